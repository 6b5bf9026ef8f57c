"""Moments: coefficients and moments against enumeration, by every kind of draws, and what cannot be had."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
from support.engines import ENGINES
from support.models import table_lm
from support.oracles import expectation
from support.statistics import assert_agrees, assert_estimate
from support.toys import assert_calibrated

from bayeslm.inference import (
    MCMC,
    SMC,
    BestOfN,
    Exact,
    ImportanceSampling,
    match_moments,
)
from bayeslm.models import Moment, TiltedLM, rewards
from bayeslm.moments import MomentError, fit_tilt

PROMPTS = [[1, 2], [3]]
LM = table_lm(order=3, seed=1, vocab=5)
COUNT = rewards.Reward(lambda completions: [float(text.split().count("a")) for text in completions])
WANTED = (Moment(rewards.Contains("a"), 0.5), Moment(rewards.Length(), 2.5))
BASES = {
    "the prior": TiltedLM(LM, None, max_new_tokens=4),
    "a posterior": TiltedLM(LM, rewards.Contains("b"), 0.7, max_new_tokens=4),
    "a power": TiltedLM(LM, None, max_new_tokens=4, power=1.5),
    "a truncated prior": TiltedLM(LM, None, max_new_tokens=4, top_k=4, stop="b"),
}


@functools.cache
def enumerated(base):
    """Features (atom, prompt, moment), log density of the base, and lambda by a solver of its own."""
    exact = Exact().run(BASES[base], PROMPTS)
    texts = exact.texts["completion"][0]
    phi = np.array([[[float("a" in text.split()), float(len(text.split()))] for text in row] for row in texts])
    log_b = exact.log_joint[0] - exact.log_evidence
    coefficients = np.zeros(2)
    for _ in range(50):
        p = weights(log_b, phi, coefficients)
        mean = (p[..., None] * phi).sum(0)
        slope = np.einsum("ac,aci,acj->ij", p, phi - mean, phi - mean) / len(PROMPTS)
        coefficients = coefficients - np.linalg.solve(slope, mean.mean(0) - [0.5, 2.5])
    return phi, log_b, coefficients


def weights(log_b, phi, coefficients):
    p = np.exp(log_b + phi @ coefficients)
    return p / p.sum(0)


@pytest.mark.parametrize("base", BASES)
def test_an_enumeration_has_the_nearest_distribution(base):
    phi, log_b, coefficients = enumerated(base)
    fit = match_moments(BASES[base], PROMPTS, WANTED, engine=Exact())
    np.testing.assert_allclose(fit.coefficients, coefficients, atol=1e-5)
    np.testing.assert_allclose(fit.moments, [0.5, 2.5], atol=1e-6)
    np.testing.assert_allclose(fit.base_moments, (np.exp(log_b)[..., None] * phi).sum(0).mean(0), atol=1e-6)
    np.testing.assert_allclose(fit.posterior.weights()[0], weights(log_b, phi, coefficients), atol=1e-6)
    assert fit.rounds == 2


DRAWS = {
    "importance": lambda seed: ImportanceSampling(num_particles=800, seed=seed, progress=False),
    "particles": lambda seed: SMC(100, 8, twist="partial", seed=seed, progress=False),
}


@pytest.mark.parametrize("kind", ["importance", "particles"])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("seed", [0, pytest.param(10, marks=pytest.mark.long)])
def test_draws_have_them_within_their_errors(kind, base, seed):
    phi, log_b, coefficients = enumerated(base)
    fit = match_moments(BASES[base], PROMPTS, WANTED, engine=DRAWS[kind](seed))
    assert_estimate(fit.coefficients, fit.coefficients_stderr, coefficients)
    truth = (weights(log_b, phi, fit.coefficients)[..., None] * phi).sum(0).mean(0)  # of these coefficients
    assert_estimate(fit.moments, fit.moments_stderr, truth)
    assert np.abs(fit.moments - [0.5, 2.5]).min() > 1e-6  # lambda was fitted to other draws
    assert (fit.coefficients_stderr < [0.15, 0.05]).all()
    assert (fit.moments_stderr < [0.03, 0.07]).all()


def test_the_error_of_a_share_is_that_of_its_logit():
    """lambda = logit(target) - logit(share of N draws), so its error is 1 / sqrt(N share (1 - share))."""
    wanted, engine = [Moment(rewards.Contains("a"), 0.6)], ImportanceSampling(1000, seed=1, progress=False)
    fit = match_moments(BASES["the prior"], PROMPTS[:1], wanted, engine=engine)
    share = fit.base_moments
    np.testing.assert_allclose(fit.coefficients, np.log(0.6 / 0.4) - np.log(share / (1 - share)), rtol=1e-6)
    np.testing.assert_allclose(fit.coefficients_stderr, 1 / np.sqrt(1000 * share * (1 - share)), rtol=2e-3)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["weighted", "exact"])
def test_errors_of_the_coefficients_are_calibrated(kind):
    """In 200 replicates, of 400 draws of the prior, or of the posterior by weights."""
    phi, log_b, coefficients = enumerated("a posterior")
    log_p = Exact().run(BASES["a posterior"], PROMPTS)
    log_q = log_p.log_joint[0] - log_p.log_likelihood["reward"][0] if kind == "weighted" else log_b
    rng, fits = np.random.default_rng(5), []
    start = ImportanceSampling(num_particles=400, seed=0, progress=False).run(BASES["a posterior"], PROMPTS)
    for _ in range(200):
        index = np.stack([rng.choice(len(log_q), 400, p=np.exp(q) / np.exp(q).sum()) for q in log_q.T], 1)
        take = functools.partial(np.take_along_axis, indices=index, axis=0)
        posterior = start
        posterior.kind = kind
        posterior.log_weights = (take(log_b) - take(log_q) if kind == "weighted" else np.zeros((400, 2)))[None]
        fits.append(fit_tilt(posterior, np.stack([take(phi[..., j]) for j in (0, 1)], -1)[None], [0.5, 2.5], "ab"))
    for j, coefficient in enumerate(coefficients):
        found = np.array([(fit.coefficients[j], fit.stderr[j]) for fit in fits])
        assert_calibrated(*found.T, coefficient)


def contains(letter):
    return lambda posterior: np.vectorize(lambda text: float(letter in text))(posterior.texts["completion"])


@functools.cache
def shares():
    """A target with two shares, and its enumeration."""
    wanted = [Moment(rewards.Contains("a"), 0.6), Moment(rewards.Contains("c"), 0.2)]
    target = match_moments(BASES["a posterior"], PROMPTS, wanted, engine=Exact()).target
    return target, Exact().run(target, PROMPTS)


@pytest.mark.parametrize(
    "name",
    ["importance", "rejection", "smc", *(pytest.param(x, marks=pytest.mark.long) for x in ("annealed", "mcmc", "svi"))],
)
def test_the_target_is_one_for_every_engine(name):
    target, exact = shares()
    for letter, share in {"a": 0.6, "c": 0.2}.items():
        assert expectation(exact, contains(letter)(exact)).mean() == pytest.approx(share)
    posterior = ENGINES[name].make(3, target.log_bound, 4).run(target, PROMPTS)
    assert_agrees(posterior, exact, map(contains, "ac"), unbiased=ENGINES[name].unbiased)


@pytest.mark.parametrize("seed", [0, pytest.param(50, marks=pytest.mark.long)])
def test_rounds_reach_what_the_priors_draws_hardly_have(seed):
    """Three a's of four words: by importance sampling alone they are too few."""
    wanted = [Moment(COUNT, 3.0)]
    base = BASES["the prior"]
    exact = match_moments(base, PROMPTS, wanted, engine=Exact())
    with pytest.raises(MomentError, match=r"fewer than 50 effective draws|outside of what was drawn"):
        match_moments(base, PROMPTS, wanted, engine=ImportanceSampling(200, seed=seed, progress=False))
    engine = SMC(100, 4, twist="partial", proposal="twist", seed=seed, progress=False)
    fit = match_moments(base, PROMPTS, wanted, engine=engine)
    assert fit.rounds > 2
    assert_estimate(fit.coefficients, fit.coefficients_stderr, exact.coefficients)
    assert_estimate(fit.moments, np.hypot(fit.moments_stderr, 0.05), 3.0)


def nothing(completions):
    return [-math.inf if "a" in text else 0.0 for text in completions]


def always(completions):
    return [1.0] * len(completions)


SMALL = ImportanceSampling(num_particles=300, seed=0, progress=False)
A, B, LENGTH = rewards.Contains("a"), rewards.Contains("b"), rewards.Length()
IMPOSSIBLE = {
    "outside the range": ([Moment(LENGTH, 9.0)], SMALL, "outside of what was drawn: 'length' is .* can have 0 to 4"),
    "outside, enumerated": ([Moment(LENGTH, 4.5)], Exact(), "outside of what was drawn: 'length' is 2.2"),
    "a contradiction": ([Moment(A, 0.9), Moment(COUNT, 0.5)], SMALL, "contradict each other"),
    "a contradiction, enumerated": ([Moment(A, 0.9), Moment(COUNT, 0.5)], Exact(), "contradict each other"),
    "a constant": ([Moment(always, 0.5)], SMALL, "moment 'always' is the same in all draws"),
    "not a draw has it": ([Moment(rewards.Contains("z"), 0.5)], SMALL, "moment 'contains' is the same in all draws"),
    "twice the same": ([Moment(A, 0.5), Moment(2.0 * A, 1.0)], SMALL, "determine each other"),
    "infinite": ([Moment(nothing, -1.0)], SMALL, "a feature must be finite, and 'nothing' is -inf for"),
    "no moments": ([], SMALL, "there are no moments"),
    "Markov chains": (
        [Moment(A, 0.5)],
        MCMC(4, 2, warmup=2, seed=0, progress=False),
        "MCMC gives markov draws, which cannot",
    ),
    "best of n": ([Moment(A, 0.5)], BestOfN(seed=0, progress=False), "BestOfN gives uncorrected draws, which cannot"),
    "few draws": (
        [Moment(A, 0.5)],
        ImportanceSampling(20, seed=0, progress=False),
        "fewer than 50 effective draws",
    ),
    "too few rounds": ([Moment(A, 0.5)], SMALL, "1 rounds have reached 'contains' 0.37.* of 0.5"),
}


@pytest.mark.parametrize("what", IMPOSSIBLE)
def test_moments_that_cannot_be_had_are_refused(what):
    wanted, engine, message = IMPOSSIBLE[what]
    with pytest.raises(ValueError, match=message):
        match_moments(BASES["the prior"], PROMPTS, wanted, engine=engine, num_rounds=1 if "rounds" in what else 10)


@pytest.mark.parametrize("target", [0.0, 1.0, 1.5, -0.1])
def test_a_property_of_every_text_is_no_moment(target):
    with pytest.raises(ValueError, match=r"must be between its bounds 0 and 1, got .*rewards.Constraint"):
        Moment(A, target)


def test_columns_reach_the_features():
    def names_it(completions, answer, completion_ids, truncated):
        assert len(completion_ids) == len(truncated) == len(completions)
        return [float(word in text) for text, word in zip(completions, answer, strict=True)]

    table = {"prompt": PROMPTS, "answer": ["a", "b"]}
    fit = match_moments(BASES["the prior"], table, [Moment(names_it, 0.6)], engine=Exact())
    posterior = Exact().run(fit.target, table)
    shares = [expectation(posterior, contains(letter)(posterior))[i] for i, letter in enumerate("ab")]
    assert np.mean(shares) == pytest.approx(0.6)


def test_the_summary_has_a_row_for_each_moment():
    table = match_moments(BASES["the prior"], PROMPTS, WANTED, engine=Exact()).summary()
    assert table.index.tolist() == ["contains", "length"]
    np.testing.assert_allclose(table["reached"], table["target"], atol=1e-6)
