"""What is said of errors that cannot be believed: levels, reasons, limits, and the class of the warnings."""

from __future__ import annotations

import re
import warnings
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import binom
from support.models import table_lm
from support.toys import Gaussian

from bayeslm import DiagnosticsWarning, Posterior, diagnostics, inference
from bayeslm.advice import ADVICE
from bayeslm.bounds import unseen_limit
from bayeslm.cli import tables
from bayeslm.inference import MCMC, SMC, AnnealedSMC, BestOfN, ImportanceSampling, RejectionSampling
from bayeslm.inference.control import ControlledSMC
from bayeslm.models import TiltedLM
from bayeslm.models.rewards import Reward
from bayeslm.reliability import levels, problems, warn
from bayeslm.weights import log_evidence

LM = table_lm(order=3, seed=0)
QUIET: dict[str, Any] = {"seed": 0, "progress": False}


def weighted(rewards: np.ndarray, noise: np.ndarray | float = 0.0, beta: float = 1.0, **fields: Any) -> Posterior:
    """Weighted draws (chain, draw, prompt) with log w = r / beta + noise."""
    likelihood = rewards / beta
    weights = likelihood + noise
    known = log_evidence(weights)
    defaults = {
        "samples": {},
        "rewards": {"reward": rewards},
        "dims": {},
        "log_weights": weights,
        "log_joint": likelihood - 5.0,
        "log_likelihood": {"reward": likelihood},
        "log_evidence": known[0],
        "log_evidence_stderr": known[1],
        "prior": {},
    }
    return replace(Gaussian().posterior(0, prompts=rewards.shape[2]), **(defaults | fields))


# ---- k-hat ----

RNG = np.random.default_rng(0)
SHAPE = (1, 400, 20)
LUMPY = {
    "0 or 1": 5.0 * (RNG.random(SHAPE) < 0.05),
    "0 or 1, rare": 12.0 * (RNG.random(SHAPE) < 0.01),
    "0 or 1, often": 5.0 * (RNG.random(SHAPE) < 0.5),
    "counts": np.floor(RNG.exponential(2.0, SHAPE)),
    "many counts": 0.7 * RNG.poisson(6.0, SHAPE),
    "four levels": 4.0 * RNG.binomial(3, 0.1, SHAPE),
}
SMOOTH = {
    "heavy": -0.9 * np.log(RNG.random(SHAPE)),
    "light": -0.2 * np.log(RNG.random(SHAPE)),
    "normal": 2.0 * RNG.normal(size=SHAPE),
    "bounded": 5.0 * RNG.random(SHAPE),
    "two smooth modes": 5.0 * (RNG.random(SHAPE) < 0.05) + RNG.normal(size=SHAPE),
}


@pytest.mark.parametrize("noise", [0.0, 1e-6, 1e-4, 1e-3, 1e-2])
@pytest.mark.parametrize("name", LUMPY)
def test_khat_is_no_number_where_the_largest_weights_are_ties_or_nearly(name: str, noise: float) -> None:
    """A reward of few levels, and a policy whose log-probabilities differ a little from the prior's."""
    log_weights = LUMPY[name] + noise * np.random.default_rng(1).normal(size=SHAPE)
    smoothed, khat = diagnostics.psis(log_weights)
    reasons = diagnostics.khat_reasons(log_weights)
    assert np.isnan(khat).all()
    assert all("largest weights are" in reason for reason in reasons)
    np.testing.assert_allclose(smoothed, log_weights - np.log(np.exp(log_weights).sum((0, 1))))
    table = diagnostics.summary(weighted(LUMPY[name], log_weights - LUMPY[name]))
    assert table["khat_reason"].tolist() == reasons


@pytest.mark.parametrize("name", SMOOTH)
def test_khat_is_a_number_where_weights_are_continuous(name: str) -> None:
    assert np.isfinite(diagnostics.psis(SMOOTH[name])[1]).all()
    assert diagnostics.khat_reasons(SMOOTH[name]) == [""] * 20
    assert "khat_reason" not in diagnostics.summary(weighted(SMOOTH[name]))


def test_other_reasons_of_an_unknown_khat() -> None:
    few, equal = np.random.default_rng(0).normal(size=(1, 30, 1)), np.full((4, 50, 1), -900.0)
    dead = np.where(np.arange(400) < 20, few[0, 0], -np.inf).reshape(1, 400, 1)
    assert diagnostics.khat_reasons(few) == ["only 30 draws have positive weight, 50 are needed: look at the ESS"]
    assert diagnostics.khat_reasons(equal) == ["all weights are equal: look at the number of draws"]
    assert diagnostics.khat_reasons(dead)[0] == "all weights are equal: look at the number of draws"


# ---- levels ----


@pytest.mark.parametrize("guide", [0.0, 0.3], ids=["prior", "policy"])
def test_levels_have_their_hits_and_shares(guide: float) -> None:
    rewards = np.repeat([0.0, 1.0, 2.5], [300, 95, 5]).reshape(4, 100, 1)
    noise = guide * np.random.default_rng(0).normal(size=rewards.shape)
    found = levels(weighted(rewards, noise, beta=0.5))[0]
    weights = np.exp(2 * rewards + noise)
    assert [level.value for level in found] == [0.0, 1.0, 2.5]
    assert [level.hits for level in found] == [300, 95, 5]
    shares = [weights[rewards == level.value].sum() / weights.sum() for level in found]
    np.testing.assert_allclose([level.share for level in found], shares)
    (sentences,) = problems(weighted(rewards, noise, beta=0.5))
    (share,) = [x.share for x in found if x.value == 2.5]
    assert sentences[0].lower().endswith(f"few draws have the reward 2.5 ({share:.0%} of the weight, 5 draws).")
    assert len(sentences) == 1  # the low ESS, its cause and what lies above are one fact


def test_levels_of_particles_count_roots_and_continuous_rewards_have_none() -> None:
    rewards = np.repeat([0.0, 1.0], [60, 40]).reshape(2, 50, 1)
    roots = np.tile(np.arange(50) // 10, (2, 1))[..., None]
    particles = weighted(rewards, kind="particles", roots=roots)
    assert [level.hits for level in levels(particles)[0]] == [6, 4]
    assert levels(weighted(np.random.default_rng(0).normal(size=(1, 100, 2)))) == [[], []]
    impossible = np.where(rewards > 0, rewards, -np.inf)
    assert [level.value for level in levels(weighted(impossible))[0]] == [-np.inf, 1.0]


# ---- what was not seen ----


@pytest.mark.parametrize("probability", [1e-4, 1e-3, 0.004, 0.012, 0.04, 0.3])
@pytest.mark.parametrize("height", [3.0, 8.0, 20.0])
def test_the_limit_covers_what_no_draw_has_seen(probability: float, height: float) -> None:
    """500 replicates of 256 draws, reward 0 or 1, e^M = e^height: the limit covers at least 95%.

    It covers 99% or more in the benchmark; a share of 0.95 would be at 0.92 or below once in 1000 cells.
    """
    hits = np.random.default_rng(0).binomial(256, probability, 500)
    log_weights = np.where(np.arange(256)[:, None] < hits, height, 0.0)[None]
    estimate, stderr = diagnostics.log_evidence(log_weights)
    truth = np.log1p(probability * np.expm1(height))
    high = unseen_limit(estimate, stderr, height, 256)
    assert np.mean(high >= truth) >= 1 - binom.isf(1e-3, 500, 0.05) / 500
    assert (high > estimate).all()
    if probability * 256 < 1:  # where the plain interval fails
        assert np.mean(estimate + 2 * stderr >= truth) < 0.5 or truth < 0.1


def success(upper_bound: float = np.inf) -> Reward:
    def rare(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        return [float(text.strip().startswith("g g g")) for text in completions]

    return Reward(rare, upper_bound=upper_bound, lower_bound=0.0)


RARE = {
    "importance": ImportanceSampling(64, **QUIET),
    "best of n": BestOfN(4, 16, **QUIET),
    "annealed": AnnealedSMC(64, 1, ladder=(1.0,), **QUIET),
}


@pytest.mark.parametrize("name", RARE)
def test_no_success_is_no_certainty(name: str, tmp_path: Any) -> None:
    """None of 64 draws has the success that makes log Z 3: the limit says so, in Python, in tables and on disk."""
    model = TiltedLM(LM, success(1.0), 0.1, max_new_tokens=4)
    with pytest.warns(DiagnosticsWarning, match=r"No draw has the highest possible reward.*\(95%\)"):
        posterior = RARE[name].run(model, ["a"])
    high = np.log(1 + 3 / 64 * np.exp(10.0))
    np.testing.assert_allclose(posterior.log_evidence_high, high, rtol=1e-6)
    np.testing.assert_allclose(diagnostics.summary(posterior)["log_evidence_high"], high, rtol=1e-6)
    assert posterior.stats["log_bound"] == 10.0
    loaded = Posterior.load(posterior.save(tmp_path / "run"))
    np.testing.assert_allclose(loaded.log_evidence_high, high, rtol=1e-6)
    assert problems(loaded) == problems(posterior)


@pytest.mark.parametrize(
    "engine", [*RARE.values(), SMC(64, 1, **QUIET), MCMC(10, 4, warmup=2, num_candidates=1, **QUIET)]
)
def test_without_a_bound_it_is_said_that_nothing_rare_was_seen(engine: Any) -> None:
    model = TiltedLM(LM, success(), 0.1, max_new_tokens=4)
    with pytest.warns(DiagnosticsWarning, match="have the reward 0: nothing rare was seen"):
        posterior = engine.run(model, ["a"])
    assert posterior.log_evidence_high is None


def test_what_draws_reach_is_not_called_unseen() -> None:
    """Rejection sampling, and a reward whose bound many draws have: nothing to say."""
    often = Reward(lambda prompts, completions, **columns: [float(len(x) > 2) for x in completions], upper_bound=1.0)
    model = TiltedLM(LM, often, 0.5, max_new_tokens=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error", DiagnosticsWarning)
        posterior = ImportanceSampling(256, **QUIET).run(model, ["a"])
        RejectionSampling(40, **QUIET).run(model, ["a"])
    assert problems(posterior) == [[]]
    assert posterior.log_evidence_high > posterior.log_evidence + 2 * posterior.log_evidence_stderr


def test_a_ladder_of_levels_whose_next_step_was_not_seen() -> None:
    """Counts 0, 1, 2 with weights e^0, e^3, e^6: as much weight at 2 as 16 draws have, and 3 was not seen."""
    steep = np.repeat([0.0, 3.0, 6.0], [800, 184, 16]).reshape(1, 1000, 1)
    flat = np.repeat([0.0, 0.3, 0.6], [800, 150, 50]).reshape(1, 1000, 1)
    assert problems(weighted(steep))[0][0].startswith("The highest reward seen, 6, has")
    assert problems(weighted(flat)) == [[]]
    assert problems(weighted(steep, stats={"log_bound": 6.0})) == [[]]


def test_tables_show_the_limit_and_the_roots() -> None:
    """The limit stands below log Z where the plain error is 0 or says nothing; particles show (roots)."""
    rewards = np.zeros((4, 25, 1))
    fields = {"log_evidence_high": np.array([5.5]), "stats": {"log_bound": 9.0}}
    roots = np.broadcast_to(np.arange(25)[:, None] // 5, rewards.shape)
    runs = {"plain": weighted(rewards, **fields), "smc": weighted(rewards, kind="particles", roots=roots, **fields)}
    cells = [str(cell) for column in next(tables.comparisons(runs)).columns for cell in column.cells]
    assert cells.count("0.00\n<5.50") == 2
    assert "100 (20)" in cells


# ---- warnings in Python ----


def test_warnings_name_the_caller_and_can_be_filtered() -> None:
    model = TiltedLM(LM, success(1.0), 0.1, max_new_tokens=4)
    with pytest.warns(DiagnosticsWarning) as caught:
        ImportanceSampling(16, **QUIET).run(model, ["a", "b", "c", "d", "e"])
    assert [record.filename for record in caught] == [__file__]
    assert "And 2 more prompts" in str(caught[0].message)
    assert str(caught[0].message).splitlines()[-1].startswith("Next: raise num_particles")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", DiagnosticsWarning)
        ImportanceSampling(16, **QUIET).run(model, ["a"])


ALL_ENGINES = {engine.__name__: engine for engine in (*inference.ENGINES.values(), inference.Laplace, ControlledSMC)}
NO_PROBLEMS = {"Exact"}  # an enumeration


@pytest.mark.parametrize("name", sorted(ALL_ENGINES.keys() - NO_PROBLEMS))
def test_advice_names_settings_that_the_engine_has(name: str) -> None:
    advice = ADVICE[name]
    assert advice.settings
    assert set(advice.settings) <= {field.name for field in fields(ALL_ENGINES[name])}
    for other, setting in re.findall(r"(\w+)\((\w*)", advice.instead):
        if other != "run":
            assert not setting or setting in {field.name for field in fields(ALL_ENGINES[other])}
            assert setting or other != name, "the engine that was used, as it was used, is no advice"


def test_all_other_advice_is_by_kind() -> None:
    assert ADVICE.keys() - ALL_ENGINES.keys() == {
        "weighted",
        "particles",
        "markov",
        "exact",
        "uncorrected",
        "enumerated",
    }
    assert not any(ADVICE[kind].settings for kind in ADVICE.keys() - ALL_ENGINES.keys())


@pytest.mark.parametrize(
    ("engine", "kind", "says", "not_says"),
    [
        ("NUTS", "markov", "raise num_samples, warmup or target_accept.", "tempering|temperatures|polic"),
        ("MCMC", "markov", r"raise num_samples or warmup, or MCMC\(num_temperatures=4\)", "target_accept"),
        ("Own", "markov", "Next: run longer chains.$", "MCMC|num_"),
        ("AnnealedSMC", "particles", "raise num_particles, num_chains, cess or num_sweeps.", "twist|guide"),
        ("SMC", "particles", r"AdaptiveImportance\(\)", "ladder"),
        ("SVI", "weighted", "raise num_samples or num_steps, or AdaptiveImportance", r"num_particles|SVI\("),
        ("Own", "weighted", "Next: use more draws or a better proposal.$", "num_|SVI"),
    ],
)
def test_each_engine_has_advice_of_its_own(engine: str, kind: str, says: str, not_says: str) -> None:
    rewards = np.r_[np.zeros(60), 9.0, np.random.default_rng(0).normal(size=39)].reshape(2, 50, 1)
    roots = np.zeros(rewards.shape, dtype=int) if kind == "particles" else None
    weights = {"log_weights": np.zeros(rewards.shape)} if kind == "markov" else {}
    with pytest.warns(DiagnosticsWarning) as caught:
        warn(weighted(rewards, engine=engine, kind=kind, roots=roots, **weights))
    assert re.search(says, str(caught[0].message))
    assert not re.search(not_says, str(caught[0].message))


def test_one_draw_that_dominates_is_named() -> None:
    rng = np.random.default_rng(0)
    heavy = weighted(np.r_[rng.normal(size=255), 4.2].reshape(1, 256, 1))
    even = weighted(rng.random((1, 256, 1)))
    assert diagnostics.ess(heavy.log_weights) > 30
    assert [sentence.split(" of the variance")[0][:15] for sentence in problems(heavy)[0]] == ["One draw makes "]
    assert problems(even) == [[]]


def test_chains_that_disagree_are_named() -> None:
    rng = np.random.default_rng(0)
    shape, roots = (4, 100, 1), np.broadcast_to(np.arange(100)[:, None], (4, 100, 1))
    fields = {"kind": "particles", "roots": roots}
    agree = weighted(rng.random(shape), **fields)
    apart = weighted(rng.random(shape), np.array([0.0, 0.0, 0.0, 1.5]).reshape(4, 1, 1), **fields)
    lost = weighted(rng.random(shape), np.array([0.0, 0.0, 0.0, 9.0]).reshape(4, 1, 1), **fields)
    assert problems(agree) == [[]]
    assert "The chains disagree on" in problems(apart)[0][0]
    assert "count by their log Z" in problems(lost)[0][0]


def test_particles_show_their_smallest_ess() -> None:
    """Resampling at every token: the ESS at the end is that of the last step alone."""
    rng = np.random.default_rng(0)
    particles = weighted(
        rng.random((2, 100, 1)),
        kind="particles",
        roots=np.broadcast_to(np.arange(100)[:, None], (2, 100, 1)),
        stats={"ess_by_step": np.array([[90.0, 6.0, 80.0], [70.0, 5.0, 99.0]])[..., None]},
    )
    assert diagnostics.ess(particles.log_weights) > 150
    assert diagnostics.summary(particles)["ess_min"].tolist() == [11.0]
    assert "ESS 11 at its smallest" in problems(particles)[0][0]


def test_markov_chains_that_have_not_mixed_are_named() -> None:
    rng = np.random.default_rng(0)
    rewards = rng.normal(size=(4, 200, 2)) + np.array([[0, 0], [0, 0], [0, 0], [0, 2.0]])[:, None]
    chains = replace(weighted(rewards), kind="markov", log_weights=np.zeros(rewards.shape))
    good, bad = problems(chains)
    assert good == []
    assert bad[0].startswith("R̂ 1.")


@pytest.mark.parametrize("name", LUMPY)
def test_khat_is_never_a_bare_nan(name: str) -> None:
    """In the engine's stats, the summary, the repr and the warning: the reason, and what to look at instead."""
    found = weighted(LUMPY[name][..., :2], stats=diagnostics.quality(LUMPY[name][..., :2]))
    for reason in (*found.stats["khat_reason"], *diagnostics.summary(found)["khat_reason"]):
        assert "largest weights are" in reason
        assert "look at the ESS" in reason
    assert "k̂ unknown" in repr(found)
    assert f"k̂: {diagnostics.khat_reasons(LUMPY[name])[0]}" in repr(found)
    assert "nan" not in repr(found)
    few = weighted(12.0 * (np.arange(60) < 1).reshape(1, 60, 1))
    assert problems(few)[0][0].startswith("k̂ unknown (the")


@pytest.mark.parametrize(("offset", "beta"), [(1.7e9, 2.0), (-1e30, 2.0), (1e3, 1e-6)])
@pytest.mark.parametrize("double", [False, True])
def test_a_log_likelihood_that_has_lost_its_digits_is_named(offset, beta, double) -> None:
    """A time stamp as a reward differs by less than float32 can tell; a hard penalty of some draws is no fault."""
    model = TiltedLM(LM, lambda completions, **columns: [offset + len(x) for x in completions], beta, max_new_tokens=2)
    torch.set_default_dtype(torch.float64 if double else torch.float32)
    try:
        found = inference.Exact(progress=False).run(model, ["a", "b"])
    finally:
        torch.set_default_dtype(torch.float32)
    assert np.allclose(found.weights().sum((0, 1)), 1.0, atol=1e-6)
    if double and abs(offset) < 1e10:
        assert not any(problems(found))
        return
    assert all(problems(found))
    with pytest.warns(DiagnosticsWarning, match=r"subtract a constant from the reward"):
        warn(found)


def test_penalties_of_some_draws_lose_no_digits_that_count() -> None:
    model = TiltedLM(LM, lambda completions, **columns: [-1e9 * ("a" in x) for x in completions], max_new_tokens=2)
    assert problems(inference.Exact(progress=False).run(model, ["a"])) == [[]]
