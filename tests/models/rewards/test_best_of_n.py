"""Best-of-n as a likelihood: the density of the best of n draws, by enumeration and by drawing it."""

from __future__ import annotations

import functools
import math
from fractions import Fraction

import numpy as np
import pytest
from support.models import table_lm
from support.oracles import kl_to
from support.statistics import assert_agrees, assert_estimate, assert_mean

from bayeslm import diagnostics
from bayeslm.inference import SVI, BestOfN, Exact, ImportanceSampling, RejectionSampling
from bayeslm.models import TiltedLM, rewards
from bayeslm.models.rewards import BestOfNLikelihood, RewardError
from bayeslm.models.rewards.best_of_n import log_best_of_n

PROMPTS = [[1, 2], [3]]
LM = table_lm(order=3, seed=1, vocab=4)
RANK = {"a": 0.3, "b": -1.1, "c": 0.7}


def distinct(completions):
    """A reward without ties."""
    return [sum(RANK[word] * 3.0**-i for i, word in enumerate(text.split(), 1)) - 9.0**-9 for text in completions]


REWARDS = {
    "no ties": rewards.Reward(distinct),
    "ties": rewards.Length(),
    "two levels": rewards.Contains("a"),
    "a constraint": rewards.Length() + rewards.Constraint(lambda text: "b" not in text),
}


@functools.cache
def prior_of(name, scale=1.0):
    """Rewards and probabilities of all texts, (atom, prompt)."""
    recorded = Exact().run(TiltedLM(LM, scale * REWARDS[name], 1.0, max_new_tokens=3), PROMPTS)
    plain = Exact().run(TiltedLM(LM, None, max_new_tokens=3), PROMPTS)
    return recorded.rewards["reward"][0], np.exp(plain.log_joint[0].astype(float))


def target(name, n, scale=1.0):
    likelihood = BestOfNLikelihood(scale * REWARDS[name], n, PROMPTS, *prior_of(name, scale))
    return TiltedLM(LM, likelihood, 1.0, max_new_tokens=3)


@pytest.mark.parametrize("n", [1, 2, 5, 64])
@pytest.mark.parametrize("name", REWARDS)
def test_with_an_exact_rank_it_is_what_best_of_n_draws(name, n):
    """By the definition: P(best = x) = p(x | its level) (P(all n <= level) - P(all n < level))."""
    exact = Exact().run(target(name, n), PROMPTS)
    r, p = prior_of(name)
    for c in range(2):
        below = np.array([p[r[:, c] < value, c].sum() for value in r[:, c]])
        level = np.array([p[r[:, c] == value, c].sum() for value in r[:, c]])
        density = p[:, c] / level * ((below + level) ** n - below**n)
        np.testing.assert_allclose(exact.weights()[0, :, c], density, rtol=1e-3, atol=1e-6)
        assert np.exp(exact.log_evidence[c]) == pytest.approx(1.0, abs=1e-5)
        kl = (density[density > 0] * np.log(density[density > 0] / p[density > 0, c])).sum()
        assert diagnostics.kl_to_prior(exact)[0][c] == pytest.approx(kl, abs=1e-4)
        assert kl <= diagnostics.best_of_n_kl_bound(n) + 1e-6


@pytest.mark.long
def test_it_agrees_with_the_draws_of_best_of_n():
    exact = Exact().run(target("ties", 6), PROMPTS)
    model = TiltedLM(LM, REWARDS["ties"], 1.0, max_new_tokens=3)
    drawn = BestOfN(n=6, num_samples=20, num_chains=40, seed=0, progress=False).run(model, PROMPTS)
    functions = [lambda p, t=t: (p.samples["completion"][..., 0] == t) * 1.0 for t in range(1, 4)]
    for function in functions:
        expected = (exact.weights() * function(exact)).sum((0, 1))
        assert_mean(function(drawn).mean(1), expected, rounding=1e-5)
    bounded = RejectionSampling(num_samples=10, num_chains=40, seed=0, progress=False).run(target("ties", 6), PROMPTS)
    assert_agrees(bounded, exact, functions, unbiased=False)
    assert_estimate(bounded.stats["acceptance"], np.sqrt(1 / 6 / bounded.stats["proposals"]), 1 / 6)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", REWARDS)
def test_with_draws_of_the_prior_the_evidence_is_one_on_average(name, seed):
    """Whatever the number of draws, as the text is one of m + 1 exchangeable draws: 100 replicates of m = 5, n = 4."""
    (r, p), rng = prior_of(name), np.random.default_rng(seed)
    values = []
    for _ in range(100):
        rows = np.stack([rng.choice(len(p), 5, p=p[:, c] / p[:, c].sum()) for c in range(2)], 1)
        some = BestOfNLikelihood(REWARDS[name], 4, PROMPTS, np.take_along_axis(r, rows, 0))
        levels = [np.unique(r[:, c]) for c in range(2)]
        mean = []
        for c, prompt in enumerate(PROMPTS):
            mass = np.array([p[r[:, c] == value, c].sum() for value in levels[c]])
            mean.append((mass * np.exp([some._of(0, [prompt], [""], value) for value in levels[c]])).sum())
        values.append(mean)
    assert_mean(values, 1.0)


def test_it_does_not_depend_on_the_scale():
    one, other = (Exact().run(target("no ties", 8, scale), PROMPTS) for scale in (1.0, 1000.0))
    np.testing.assert_allclose(one.log_joint, other.log_joint, atol=1e-6)


@pytest.mark.long
def test_a_policy_is_trained_for_it_and_its_kl_is_known():
    """F of 2,000 draws of the prior; the trained policy is nearer to the exact target than the prior is."""
    base = TiltedLM(LM, REWARDS["no ties"], 1.0, max_new_tokens=3)
    draws = ImportanceSampling(2000, seed=3, progress=False).run(base, PROMPTS)
    likelihood = BestOfNLikelihood(REWARDS["no ties"], 4, PROMPTS, draws.prior_rewards["reward"][0])
    model, exact = TiltedLM(LM, likelihood, 1.0, max_new_tokens=3), Exact().run(target("no ties", 4), PROMPTS)
    assert_estimate(ImportanceSampling(500, seed=0, progress=False).run(model, PROMPTS).log_evidence, 0.05, 0.0)
    trained = SVI(num_steps=40, num_particles=16, num_samples=500, seed=0, progress=False).run(model, PROMPTS)
    assert kl_to(exact, trained.policy, PROMPTS).max() < 0.1 * kl_to(exact, LM, PROMPTS).min()
    kl, stderr = diagnostics.kl_to_prior(trained, weighted=False)
    assert (kl < diagnostics.best_of_n_kl_bound(4) + 4 * stderr + 0.05).all()


@pytest.mark.parametrize("below", [0.0, 1e-12, 0.3, 1.0 - 1e-12])
@pytest.mark.parametrize("n", [1, 2, 1000])
def test_the_density_is_accurate_for_levels_of_any_size(below, n):
    for width in (1e-12, 1e-3, 1.0 - below):
        low, high = Fraction(below), Fraction(min(below + width, 1.0))
        if high > low:
            exact = (high**n - low**n) / (high - low)
            exact = math.log(exact.numerator) - math.log(exact.denominator)
            assert log_best_of_n(float(low), float(high), n) == pytest.approx(exact, rel=1e-6, abs=1e-6)


OK = {"reward": REWARDS["ties"], "n": 4, "prompts": PROMPTS, "prior_rewards": [[1.0, 2.0], [0.0, 1.0]]}
WRONG = {
    "another number of prompts": ({"prior_rewards": [[1.0], [2.0]]}, r"must be \(draw, 2\)"),
    "no numbers": ({"prior_rewards": [["high", 1.0]]}, "prior_rewards must be an array of numbers"),
    "rows of other lengths": ({"prior_rewards": [[1.0, 2.0], [1.0]]}, "prior_rewards must be an array of numbers"),
    "no draws": ({"prior_rewards": np.zeros((0, 2))}, r"must be \(draw, 2\)"),
    "NaN": ({"prior_rewards": [[np.nan, 1.0]]}, "finite or -inf"),
    "a prompt twice": ({"prompts": [[1], [1]]}, r"prompt \[1\] occurs twice"),
    "weights of another shape": ({"prior_weights": [[1.0, 1.0]]}, "prior_weights must be probabilities"),
    "negative weights": ({"prior_weights": [[1.0, 1.0], [-1.0, 1.0]]}, "prior_weights must be probabilities"),
    "no n": ({"n": 0}, "n must be a positive whole number"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_arguments_are_refused(what):
    arguments, message = WRONG[what]
    with pytest.raises((TypeError, ValueError), match=message):
        BestOfNLikelihood(**(OK | arguments))


@pytest.mark.parametrize("prompt", ["the", [1, 2], [{"role": "user", "content": "hi"}], np.array([1, 2])])
def test_prompts_of_all_kinds_are_found_again(prompt):
    likelihood = BestOfNLikelihood(rewards.Length(), 2, [prompt], [[0.0], [1.0]])
    assert likelihood([prompt], ["a b"]).item() == pytest.approx(math.log((1 - (2 / 3) ** 2) / (1 / 3)))
    with pytest.raises(RewardError, match="has no draws of the prior for a prompt"):
        likelihood(["another"], ["a b"])
