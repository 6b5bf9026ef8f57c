"""Bounds on the evidence and on divergences, against enumeration: right sides, coverage, and refused input.

A tolerance is 4 standard errors (6e-5 a comparison, some 60 of them: 0.4% for the file) unless a comment says
otherwise.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy.stats import binom
from support.models import table_lm
from support.programs import highest, score_table, tilted
from support.statistics import assert_estimate, assert_mean
from support.toys import enumerated

from bayeslm import DiagnosticsWarning, Posterior, diagnostics, summaries
from bayeslm.cli import tables
from bayeslm.inference import Exact, ImportanceSampling, ProgramError, RejectionSampling
from bayeslm.inference.program import inspect
from bayeslm.inference.training import AutoPolicy

LIMIT = 4.0
PROMPTS = [[1, 2], [3]]
LM = table_lm(order=3, seed=0, vocab=4)
TABLE = score_table(0, vocab=4, tokens=4)
BETA = 0.4
MODEL = tilted(LM, TABLE, BETA)
POLICY = table_lm(order=3, seed=9, vocab=4)  # untrained: far from the posterior


@functools.cache
def exact() -> Posterior:
    return Exact(num_prior_samples=1).run(MODEL, PROMPTS)


def run(model: Any = MODEL, **settings: Any) -> Posterior:
    defaults = {"num_particles": 5, "num_chains": 600, "seed": 0, "progress": False}
    return ImportanceSampling(**(defaults | settings)).run(model, PROMPTS)


def log_weight(guide: Any) -> np.ndarray:
    """log w of every completion (atom, prompt) under the prior or a policy."""
    proposal = (guide or LM)(PROMPTS, max_new_tokens=len(TABLE))
    return exact().log_joint[0] - proposal.log_prob(torch.as_tensor(exact().samples["completion"][0])).numpy()


# ---- conditional importance sampling ----


@pytest.mark.parametrize("guide", [None, POLICY], ids=["prior", "policy"])
def test_with_one_particle_both_bounds_are_known(guide: Any) -> None:
    """E_q[log w] = log Z - KL(q || posterior) from below, E_posterior[log w] from above."""
    below = run(guide=guide, num_particles=1, num_chains=3000)
    above = run(guide=guide, num_particles=1, num_chains=3000, retained=exact())
    value = log_weight(guide)
    posterior = exact().weights()[0]
    proposal = np.exp(exact().log_joint[0] - value)
    assert_mean(below.log_weights[:, 0], (proposal * value).sum(0))
    assert_mean(above.log_weights[:, 0], (posterior * value).sum(0))
    np.testing.assert_allclose(below.log_evidence_lower, below.log_weights.mean((0, 1), dtype=float))
    np.testing.assert_allclose(above.log_evidence_upper, above.log_weights.mean((0, 1), dtype=float))
    assert (above.conditional, below.conditional) == (True, False)
    assert above.log_evidence_lower is None
    assert below.log_evidence_upper is None


def mixed(prompts: list[Any]) -> None:
    """A mood shared by prompts, a topic and a completion of each: one joint posterior."""
    mood = pyro.sample("mood", dist.Bernoulli(0.4))
    with pyro.plate("prompts", len(prompts)):
        topic = pyro.sample("topic", dist.Categorical(logits=torch.zeros(2)))
        x = pyro.sample("completion", LM(prompts, max_new_tokens=2))
        pyro.factor("reward", (0.5 + mood) * 1.5 * (x == topic[..., None] + 1).sum(-1))


def continuous(prompts: list[Any]) -> None:
    """theta ~ N(0, 1) and a likelihood exp(-(theta - s)^2 / 2), s being the completion's first token."""
    with pyro.plate("prompts", len(prompts)):
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        x = pyro.sample("completion", LM(prompts, max_new_tokens=1))
        pyro.factor("reward", -0.5 * (theta - x[..., 0]) ** 2)


def continuous_log_z() -> np.ndarray:
    """sum_x p(x) exp(-s^2 / 4) / sqrt 2."""
    prior = LM(PROMPTS, max_new_tokens=1)
    tokens = torch.arange(4)[:, None, None].expand(-1, 2, 1)
    return (prior.log_prob(tokens) - tokens[..., 0] ** 2 / 4).logsumexp(0).numpy() - 0.5 * math.log(2)


@pytest.mark.parametrize("case", ["prior", "policy", "shared latent", "one by one", "continuous, by rejection"])
def test_the_inverse_of_a_conditional_estimate_is_unbiased(case: str) -> None:
    """E[Z / Z-hat] = 1, so log Z-hat is high; `log_evidence` is the estimate by the mean of 1 / Z-hat."""
    if case == "continuous, by rejection":
        kept = RejectionSampling(num_samples=600, log_bound=0.0, seed=1, progress=False).run(continuous, PROMPTS)
        posterior, log_z = run(continuous, retained=kept), continuous_log_z()
    elif case in ("shared latent", "one by one"):
        oracle = Exact(num_prior_samples=1).run(mixed, PROMPTS)
        settings = {"num_chains": 60, "num_particles": 2, "vectorize": False} if case == "one by one" else {}
        posterior, log_z = run(mixed, retained=oracle, **settings), oracle.log_evidence
    else:
        guide = POLICY if case == "policy" else None
        posterior, log_z = run(guide=guide, retained=exact()), exact().log_evidence
    by_chain = diagnostics.chain_log_evidence(posterior.log_weights)
    assert_mean(np.exp(log_z - by_chain), 1.0)
    np.testing.assert_allclose(posterior.log_evidence, -np.log(np.exp(-by_chain).mean(0)), rtol=1e-6)
    assert_estimate(posterior.log_evidence, posterior.log_evidence_stderr, log_z)
    assert (posterior.log_evidence_upper > log_z - LIMIT * by_chain.std(0) / len(by_chain) ** 0.5).all()


def test_chain_c_retains_draw_c_under_the_guide_s_weight() -> None:
    kept = exact().resample(40, seed=3)
    posterior = run(guide=POLICY, num_chains=40, retained=kept, batch_size=7)
    np.testing.assert_array_equal(posterior.samples["completion"][:, 0], kept.samples["completion"][0])
    policy = POLICY(PROMPTS, max_new_tokens=len(TABLE))
    log_q = policy.log_prob(torch.as_tensor(kept.samples["completion"][0])).numpy()
    np.testing.assert_allclose(posterior.log_weights[:, 0], kept.log_joint[0] - log_q, atol=1e-4)
    assert not np.array_equal(posterior.samples["completion"][:, 1], kept.samples["completion"][0])


def test_an_enumeration_is_drawn_from_by_the_engine_s_seed() -> None:
    first, same, other = (run(retained=exact(), num_chains=50, seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first.log_weights, same.log_weights)
    assert not np.array_equal(first.log_weights[:, 0], other.log_weights[:, 0])


@pytest.mark.parametrize("kind", ["weighted", "markov", "uncorrected"])
def test_draws_that_are_not_exact_are_refused(kind: str) -> None:
    kept = dataclasses.replace(exact().resample(10), kind=kind)
    with pytest.raises(ValueError, match=r"retained must hold exact draws .* log Z would have no upper bound"):
        run(retained=kept)


def test_too_few_draws_are_refused() -> None:
    with pytest.raises(ValueError, match="retained has 10 draws, fewer than num_chains=11"):
        run(retained=exact().resample(10), num_chains=11)


def test_draws_of_another_posterior_are_refused() -> None:
    def refused(model: Any, match: str, prompts: Any = PROMPTS, **settings: Any) -> None:
        with pytest.raises(ProgramError, match=match):
            ImportanceSampling(num_chains=9, progress=False, **settings).run(model, prompts)

    refused(tilted(LM, TABLE, 2 * BETA), "of another program: .* differs by", retained=exact())
    refused(tilted(POLICY, TABLE, BETA), "of another program", retained=exact())
    refused(MODEL, "have other prompts", prompts=[[1, 2], [2]], retained=exact())
    refused(tilted(LM, TABLE[:3], BETA), "no 'completion' of shape", retained=exact())
    refused(mixed, "no 'mood'", retained=exact())


def test_guides_that_cannot_have_proposed_the_draws_are_refused() -> None:
    kept = RejectionSampling(num_samples=20, log_bound=0.0, seed=1, progress=False).run(continuous, PROMPTS)
    guide = AutoPolicy(inspect(continuous, PROMPTS))
    with pytest.raises(ProgramError, match="draws 'theta_unconstrained', which is no latent of the program"):
        run(continuous, retained=kept, guide=guide, num_chains=20)

    oracle = Exact(num_prior_samples=1).run(mixed, PROMPTS)

    def blind(prompts: list[Any]) -> None:
        with pyro.plate("prompts", len(prompts)):
            pyro.sample("topic", dist.Categorical(logits=torch.tensor([-torch.inf, 0.0])))

    with pytest.raises(ProgramError, match="probability 0: it does not cover the posterior"):
        run(mixed, retained=oracle, guide=blind, num_chains=20)


# ---- certify ----


def weights_only(log_weights: np.ndarray, **fields: Any) -> Posterior:
    """A posterior that has weights (chain, draw, prompt) and little else."""
    prompts = log_weights.shape[2]
    with np.errstate(invalid="ignore"):
        known = diagnostics.log_evidence(log_weights)
    defaults: dict[str, Any] = {
        "samples": {"x": np.zeros(log_weights.shape)},
        "log_weights": log_weights,
        "log_joint": log_weights,
        "log_likelihood": {},
        "log_evidence": known[0],
        "log_evidence_stderr": known[1],
        "kind": "weighted",
        "engine": "Toy",
        "dims": {"x": ("prompt",)},
        "prompts": [f"prompt {i}" for i in range(prompts)],
    }
    return Posterior(**(defaults | fields))


def some_chains(posterior: Posterior, chains: slice) -> Posterior:
    names = ("samples", "log_likelihood", "rewards", "texts", "lengths", "truncated", "token_log_ratio", "token_ends")
    groups = {name: getattr(posterior, name) for name in names}
    cut = {group: {name: x[chains] for name, x in values.items()} for group, values in groups.items()}
    return dataclasses.replace(
        posterior, **cut, log_weights=posterior.log_weights[chains], log_joint=posterior.log_joint[chains]
    )


@pytest.mark.parametrize("guide", [None, POLICY], ids=["prior", "policy"])
@pytest.mark.parametrize("kept", ["enumerated", "by rejection"])
def test_intervals_cover_the_enumerated_truth(guide: Any, kept: str) -> None:
    """60 repetitions of 10 chains, two prompts each: no more misses than the level allows.

    The binomial bound is exceeded by chance once in 100,000.
    """
    if kept == "enumerated":
        retained = exact()
    else:
        bound = highest(TABLE) / BETA
        retained = RejectionSampling(num_samples=600, log_bound=bound, seed=2, progress=False).run(MODEL, PROMPTS)
    runs, conditional = run(guide=guide, seed=1), run(guide=guide, seed=2, retained=retained)
    value, posterior = log_weight(guide), exact().weights()[0]
    proposal = np.exp(exact().log_joint[0] - value)
    log_z = exact().log_evidence
    truths = {
        "log_evidence": log_z,
        "kl_to_posterior": log_z - (proposal * value).sum(0),
        "kl_from_posterior": (posterior * value).sum(0) - log_z,
    }
    assert min(truths["kl_to_posterior"]) > 0.1
    misses = dict.fromkeys(truths, 0)
    for i in range(60):
        chains = slice(10 * i, 10 * i + 10)
        table = diagnostics.certify(some_chains(runs, chains), some_chains(conditional, chains), level=0.9)
        for name, truth in truths.items():
            misses[name] += int(((table[f"{name}_low"] > truth) | (table[f"{name}_high"] < truth)).sum())
    allowed = binom.isf(1e-5, 120, 0.1)
    assert max(misses.values()) <= allowed, misses

    whole = diagnostics.certify(runs, conditional)
    apart = whole["log_evidence_upper"] - whole["log_evidence_lower"]
    for name in truths:  # and not too wide: with 600 chains the error of each end is below 0.2
        assert (whole[f"{name}_high"] - whole[f"{name}_low"] < apart + 0.5).all(), name
    assert (whole["kl_sampler_high"] > apart).all()


def test_retained_draws_that_are_not_exact_show_in_the_bounds() -> None:
    """If draws of the prior are retained, the upper bound is wrong: log Z is far above it."""
    prior = run(num_particles=600, num_chains=1)
    forged = dataclasses.replace(prior, kind="exact", log_weights=np.zeros((1, 600, 2)))
    table = diagnostics.certify(run(seed=1), run(seed=2, retained=forged))
    assert (table["log_evidence_high"] < exact().log_evidence).all()


def test_limits_are_student_s() -> None:
    """Normal log Z-hat, 4 and 6 chains, 4000 replicates as prompts: each end misses as often as its level says."""
    rng = np.random.default_rng(0)
    runs = weights_only(rng.normal(0.0, 1.0, (4, 1, 4000)))
    conditional = weights_only(rng.normal(1.0, 2.0, (6, 1, 4000)), conditional=True)
    table = diagnostics.certify(runs, conditional, level=0.9)
    error = LIMIT * math.sqrt(0.05 * 0.95 / 4000)
    assert np.mean(table["log_evidence_low"] > 0) == pytest.approx(0.05, abs=error)
    assert np.mean(table["log_evidence_high"] < 1) == pytest.approx(0.05, abs=error)
    for name, miss in (("kl_to_posterior_high", 0.05), ("kl_from_posterior_high", 0.05), ("kl_sampler_high", 0.1)):
        error = LIMIT * math.sqrt(miss * (1 - miss) / 4000) + 0.01  # Welch's degrees of freedom are approximate
        assert np.mean(table[name] < 1) == pytest.approx(miss, abs=error)
    np.testing.assert_allclose(table["log_evidence_lower_se"], runs.log_weights[:, 0].std(0, ddof=1) / 2)


@pytest.mark.parametrize("share", [0.02, 0.05, 0.1])
@pytest.mark.parametrize("chains", [4, 10, 30])
def test_a_mode_that_no_exact_draw_hits_is_within_the_limit(chains: int, share: float) -> None:
    """A mode of prior probability 1e-4 and this posterior share, 400 replicates as prompts, 32 draws a chain.

    The nominal 95% are reached by the limit. The Student interval alone covers as little as 0.4, and a warning says so.
    """
    rng = np.random.default_rng(0)
    height = math.log(share / (1 - share) * (1 - 1e-4) / 1e-4)
    truth = math.log1p(1e-4 * math.expm1(height))
    prior = height * (rng.random((2, chains, 32, 400)) < 1e-4) + 0.1 * rng.normal(size=(2, chains, 32, 400)) - 0.005
    prior[1, :, 0] = height * (rng.random((chains, 400)) < share) + 0.1 * rng.normal(size=(chains, 400)) + 0.005
    with pytest.warns(DiagnosticsWarning, match=f"{chains} retained draws may all miss a part of the posterior"):
        table = diagnostics.certify(weights_only(prior[0]), weights_only(prior[1], conditional=True))
    covered = (table["log_evidence_low"] <= truth) & (truth <= table["log_evidence_limit"])
    assert covered.mean() >= 0.95
    hit = (prior[1, :, 0] > height / 2).any(0)
    assert (table["log_evidence_high"][~hit] < truth).mean() > (0.5 if share > 0.05 else 0.0)
    assert (table["log_evidence_limit"] - table["log_evidence_high"]).iloc[0] < 4.0 / chains


def test_particles_are_bounded_as_a_whole() -> None:
    rng = np.random.default_rng(0)
    roots = np.zeros((4, 8, 2), dtype=int)
    runs = weights_only(rng.normal(size=(4, 8, 2)), kind="particles", roots=roots)
    conditional = weights_only(rng.normal(size=(4, 8, 2)) + 1, kind="particles", roots=roots, conditional=True)
    table = diagnostics.certify(runs, conditional)
    assert "kl_sampler_high" in table
    assert not [name for name in table if "posterior" in name]
    assert list(diagnostics.certify(runs, weights_only(rng.normal(size=(4, 8, 2)), conditional=True)).columns) == [
        *(f"log_evidence_{end}{se}" for end in ("lower", "upper") for se in ("", "_se")),
        *(
            "log_evidence_low",
            "log_evidence_high",
            "log_evidence_limit",
            "kl_from_posterior_low",
            "kl_from_posterior_high",
        ),
        "kl_sampler_high",
    ]


def test_dead_draws_make_infinite_bounds_and_never_nan() -> None:
    log_weights = np.zeros((3, 4, 2))
    log_weights[0, :, 0] = log_weights[0, 0, 1] = -np.inf  # a dead chain; a dead draw
    table = diagnostics.certify(weights_only(log_weights), weights_only(np.ones((3, 4, 2)), conditional=True))
    assert not table.isna().any(axis=None)
    assert table["log_evidence_lower"].iloc[0] == table["log_evidence_low"].iloc[0] == -np.inf
    assert np.isfinite(table["log_evidence_low"].iloc[1])
    assert np.isposinf(table[["kl_to_posterior_low", "kl_to_posterior_high"]]).all(axis=None)
    assert np.isposinf(table[["kl_from_posterior_high", "kl_sampler_high"]].iloc[0]).all()
    np.testing.assert_allclose(table["log_evidence_high"], 1.0)  # all chains are equal


@pytest.mark.parametrize(
    ("runs", "conditional", "message"),
    [
        ({}, {}, "conditional has no retained draw"),
        ({"conditional": True}, {"conditional": True}, "runs has a retained draw"),
        ({"log_weights": np.zeros((1, 5, 2))}, {"conditional": True}, "runs has 1 chain: intervals need at least 2"),
        ({}, {"conditional": True, "prompts": ["a", "b"]}, "of the same prompts"),
        ({"kind": "exact"}, {"conditional": True}, "runs must hold weighted draws or particles, not exact ones"),
    ],
)
def test_runs_that_give_no_bounds_are_refused(runs: dict[str, Any], conditional: dict[str, Any], message: str) -> None:
    default = {"log_weights": np.zeros((2, 5, 2))}
    with pytest.raises(ValueError, match=message):
        diagnostics.certify(weights_only(**(default | runs)), weights_only(**(default | conditional)))


def test_level_is_a_probability() -> None:
    with pytest.raises(ValueError, match="level must be between 0 and 1"):
        diagnostics.certify(enumerated(), enumerated(), level=95)


# ---- in reports ----


def test_reports_warn_of_few_roots_and_of_retained_draws() -> None:
    log_weights, roots = np.zeros((2, 50, 1)), np.zeros((2, 50, 1), dtype=int)
    few = weights_only(log_weights, kind="particles", roots=roots)
    many = weights_only(log_weights, kind="particles", roots=roots + np.arange(50)[:, None])
    retained = weights_only(log_weights, conditional=True)
    lines = summaries.remarks({"few": few, "many": many, "retained": retained})
    assert [re.split("[,: ]", line)[0] for line in lines] == ["few", "retained"]
    assert "descend from 2 first particles" in lines[0]
    guided = dataclasses.replace(many, policy=POLICY)  # its raw particles are not the policy's own draws
    for posterior in (few, retained, guided):
        assert next(tables.comparisons({"run": posterior})).row_count == 1
