"""AdaptiveImportance and Auto against enumerated posteriors: bias, errors, what ends them, and what they say."""

from __future__ import annotations

import functools
import re

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from support.models import table_lm
from support.programs import rewarded, score_table, tilted
from support.statistics import assert_evidence, assert_mean, deviations

from bayeslm.inference import AdaptiveImportance, Auto, Exact, ImportanceSampling, RunError
from bayeslm.inference.training import AutoPolicy

PROMPT = [[1, 2]]
TOKENS = 3
RUN = {"seed": 0, "progress": False}
SMALL = {"round_size": 32, "num_steps": 6, "train_below": 1.0, **RUN}


def smooth(x):
    return 2.0 * score_table(3, 4, TOKENS)[torch.arange(TOKENS), x].sum(-1)


def sparse(x):
    return 4.0 * ((x[..., 0] == 2) & (x[..., 1] == 3))


def bimodal(x):
    return 4.0 * ((x[..., :2] == 1).all(-1) | (x[..., :2] == 3).all(-1))


def constrained(x):
    return torch.where((x == 2).any(-1), -torch.inf, smooth(x))


REWARDS = {"smooth": smooth, "sparse": sparse, "bimodal": bimodal, "hard constraint": constrained}


@functools.cache
def problem(name):
    """A program of 40 texts, and its posterior."""
    model = rewarded(table_lm(order=2, seed=4, vocab=4), TOKENS, REWARDS[name])
    return model, Exact().run(model, PROMPT)


def reward(posterior):
    return np.nan_to_num(posterior.log_likelihood["reward"], neginf=0.0)


def rare_text(lm):
    """The text whose probability is nearest to 1 / 60."""
    exact = Exact().run(rewarded(lm, TOKENS, lambda x: 0.0 * x.sum(-1)), PROMPT)
    nearest = np.abs(exact.weights()[0, :, 0] - 1 / 60).argmin()
    return exact.samples["completion"][0, nearest, 0]


def replicate(name, number, **settings):
    """Errors of Z-hat and of log Z by its standard error, and the deviation of the reward, (replicate,) each."""
    model, exact = problem(name)
    log_z, found = exact.log_evidence, []
    mean = (exact.weights() * reward(exact)).sum()
    for seed in range(number):
        engine = AdaptiveImportance(**{"num_particles": 256, **SMALL, **settings, "seed": seed})
        posterior = engine.run(model, PROMPT)
        error = posterior.log_evidence - log_z
        found.append(
            [
                np.expm1(error)[0],
                (error / posterior.log_evidence_stderr)[0],
                error[0],
                deviations(posterior, reward(posterior), mean, log_z).mean(),
            ]
        )
    return np.array(found).T


def assert_unbiased_and_calibrated(name, number, most, **settings):
    error, score, log_error, deviation = replicate(name, number, **settings)
    assert_mean(error, 0.0)
    assert_mean(deviation, 0.0)
    assert abs(log_error.mean()) < most * log_error.std()
    inside = [(np.abs(score) < k).mean() for k in (1, 2, 3)]
    noise = 4 * np.sqrt(0.25 / number)
    assert abs(inside[0] - 0.68) < 0.06 + noise, inside
    assert inside[1] > 0.92 - noise, inside
    assert inside[2] > 0.98 - noise, inside


def test_unbiased_and_calibrated():
    assert_unbiased_and_calibrated("sparse", 16, 1.0, num_particles=128)


@pytest.mark.long
@pytest.mark.parametrize("weights", ["mixture", "own"])
@pytest.mark.parametrize("name", REWARDS)
def test_bias_below_a_fifth_of_the_error_in_2000_replicates(name, weights):
    assert_unbiased_and_calibrated(name, 2000, 0.2, weights=weights)


def test_a_policy_makes_the_draws_effective():
    """The prior's draws are hardly effective; those of the policies that they teach are."""
    model = rewarded(table_lm(order=2, seed=4, vocab=4), TOKENS, lambda x: 3.0 * (x == 3).sum(-1))
    exact = Exact().run(model, PROMPT)
    few = ImportanceSampling(num_particles=1024, **RUN).run(model, PROMPT)
    posterior = AdaptiveImportance(num_particles=1024, train_below=1.0, num_steps=32, **RUN).run(model, PROMPT)
    assert_evidence(posterior, exact.log_evidence)
    assert posterior.log_evidence_stderr[0] < 0.7 * few.log_evidence_stderr[0]
    assert posterior.stats["policies"] == 8
    assert posterior.policy is not None
    assert len(posterior.stats["moved"][0]) == posterior.stats["steps"] == 32
    assert posterior.log_weights.shape == (1, 1024, 1)


def test_where_the_priors_draws_are_good_it_is_importance_sampling():
    model = tilted(table_lm(order=2, seed=4, vocab=4), 0.2 * score_table(3, 4, TOKENS))
    plain = ImportanceSampling(num_particles=128, **RUN).run(model, PROMPT)
    posterior = AdaptiveImportance(num_particles=128, round_size=128, **RUN).run(model, PROMPT)
    np.testing.assert_array_equal(posterior.log_weights, plain.log_weights)
    np.testing.assert_allclose(posterior.log_evidence_stderr, plain.log_evidence_stderr, rtol=1e-2)
    assert posterior.policy is None
    assert posterior.stats["tokens"] == plain.stats["tokens"]


@pytest.mark.parametrize("engine", [AdaptiveImportance, Auto])
def test_ends_at_the_effective_draws_that_are_asked_for(engine):
    model, _ = problem("smooth")
    posterior = engine(target_ess=300.0, num_particles=5000, **RUN).run(model, PROMPT)
    assert 300 <= posterior.stats["ess"][0] < 600
    assert posterior.log_weights.size == posterior.stats["round_draws"][-1] < 5000
    assert "effective" in posterior.stats["notes"][-1]


def test_ends_at_the_error_that_is_asked_for():
    model, _ = problem("smooth")
    posterior = AdaptiveImportance(log_evidence_stderr=0.05, num_particles=5000, **RUN).run(model, PROMPT)
    assert 0.025 < posterior.log_evidence_stderr[0] <= 0.05
    assert "log Z known to" in posterior.stats["notes"][-1]


def test_ends_with_its_seconds_and_says_so():
    model, _ = problem("smooth")
    posterior = Auto(target_ess=1e9, max_seconds=0.05, **RUN).run(model, PROMPT)
    assert re.match(r"end after \d+ draws: 0.05 seconds are over", posterior.stats["notes"][-1])


def test_a_doubt_puts_off_the_end():
    """One draw in 60 has half of the weight: few draws, if they have it at all, are effective enough on paper."""
    lm = table_lm(order=2, seed=4, vocab=4)
    text = torch.tensor(rare_text(lm))
    model = rewarded(lm, TOKENS, lambda x: (x == text).all(-1) * float(np.log(60.0)))
    plain = Auto(target_ess=1.0, num_particles=2048, **RUN).run(model, PROMPT)
    notes = plain.stats["notes"]
    hits = (plain.samples["completion"][0, :, 0] == text.numpy()).all(-1).sum()
    assert "effective" in notes[0]
    assert len(plain.stats["round_draws"]) > 1, "the first round would have done by its ESS"
    assert hits >= 10


def test_a_latent_whose_coordinates_are_bounded_and_a_text():
    """Draws of the prior are scored under the guide's distribution in unconstrained coordinates."""
    lm = table_lm(order=2, seed=4, vocab=4)

    def model(prompts):
        with pyro.plate("prompts", len(prompts)):
            rate = pyro.sample("rate", dist.LogNormal(0.0, 1.0))
            x = pyro.sample("completion", lm(prompts, max_new_tokens=2))
            pyro.sample("y", dist.Poisson(rate * (1 + (x == 1).sum(-1))), obs=torch.tensor(6.0))

    plain = ImportanceSampling(num_particles=20_000, **RUN).run(model, PROMPT)
    posterior = AdaptiveImportance(num_particles=600, **SMALL).run(model, PROMPT)
    assert posterior.stats["policies"] > 0
    error = np.hypot(plain.log_evidence_stderr, posterior.log_evidence_stderr)
    assert (np.abs(posterior.log_evidence - plain.log_evidence) < 4 * error).all()
    assert (error < 0.2).all()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ZeroDivisionError("in the reward")])
def test_what_stops_a_later_round_keeps_those_before(error):
    calls = [0]

    def failing(x):
        calls[0] += 1
        if calls[0] > 12:
            raise error
        return smooth(x)

    engine = AdaptiveImportance(num_particles=10_000, round_size=16, train_below=1.0, num_steps=3, **RUN)
    model = rewarded(table_lm(order=2, seed=4, vocab=4), TOKENS, failing)
    if isinstance(error, KeyboardInterrupt):
        posterior = engine.run(model, PROMPT)
        assert posterior.stats["interrupted"]
        assert posterior.stats["notes"][-1] == "interrupted"
        assert posterior.log_weights.size == posterior.stats["round_draws"][-1] > 16
    else:
        with pytest.raises(RunError, match="in the reward") as caught:
            engine.run(model, PROMPT)
        assert len(caught.value.so_far.particles) > 16


def test_a_policy_to_begin_with_and_a_guide_of_its_own():
    model, exact = problem("smooth")
    first = AdaptiveImportance(num_particles=256, **SMALL).run(model, PROMPT)
    for guide in (first.policy, functools.partial(AutoPolicy, lora_rank=None)):
        posterior = AdaptiveImportance(num_particles=256, guide=guide, **SMALL).run(model, PROMPT)
        assert_evidence(posterior, exact.log_evidence)
