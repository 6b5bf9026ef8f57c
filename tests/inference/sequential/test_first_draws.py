"""The first particles of SMC, from which it learns a twist: they all count, whatever was learned."""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from support.models import table_lm, tiny_llama
from support.programs import PROMPTS, SHORT, case, conversation, rewarded, score_table, shared, tilted
from support.statistics import assert_agrees, assert_mean, assert_roots_follow

from bayeslm.inference import SMC, EvidenceError, Exact
from bayeslm.inference.program import inspect
from bayeslm.inference.sequential import TwistLearning, number_of_first

QUIET = {"seed": 0, "progress": False}
MODEL = tilted(table_lm(order=2, seed=3, vocab=4), score_table(3, vocab=4, tokens=3), 0.5)


def hidden_words():
    """A reward that is known late: the sum over tokens of a network's texts, at a small beta."""
    return tilted(tiny_llama(seed=1), score_table(1, vocab=8, tokens=3), 0.25)


def untrained(monkeypatch, gain):
    """Twists are not trained, and said to gain so much."""

    def fit(self, twist, data):
        torch.nn.init.normal_(twist.out.weight, std=0.3)
        return {"gain": gain}

    monkeypatch.setattr(TwistLearning, "fit", fit)


def test_z_is_unbiased_whatever_twist_is_learned():
    """The mean of Z-hat / Z over chains is 1, each run with a twist of its own; the posterior is the exact one."""
    model = hidden_words()
    exact = Exact().run(model, PROMPTS)
    runs = [SMC(12, 50, ess_threshold=0.9, seed=seed, progress=False).run(model, PROMPTS) for seed in range(2)]
    assert all(run.stats["twist_gain"]["completion"] > 0.05 for run in runs)
    assert any(run.stats["resampled"].any() for run in runs)
    assert_mean(np.concatenate([np.exp(run.log_weights - exact.log_evidence).mean(1) for run in runs]), 1.0)
    assert_agrees(runs[0], exact, [lambda p: p.rewards["reward"]])
    assert_roots_follow(runs[0])


@pytest.mark.parametrize("gain", [1.0, 0.0])
def test_the_first_particles_count_whether_the_twist_is_used_or_not(monkeypatch, gain):
    """Whether they count must not depend on them. They weigh their likelihood, and are never resampled."""
    untrained(monkeypatch, gain)
    posterior = SMC(16, 40, ess_threshold=1.0, **QUIET).run(MODEL, SHORT)
    assert posterior.log_weights.shape == (40, 16, 2)
    first, others = (posterior.log_weights - posterior.log_likelihood["reward"])[:, :4], posterior.roots[:, 4:]
    np.testing.assert_allclose(first, 0.0, atol=1e-6)
    np.testing.assert_array_equal(posterior.roots[:, :4], np.broadcast_to(np.arange(4)[:, None], (40, 4, 2)))
    assert (others >= 4).all()
    assert posterior.stats["resampled"].any() == (gain > 0.05)
    assert (posterior.stats["ess_by_step"] >= 4).all()
    assert_mean(np.exp(posterior.log_weights - Exact().run(MODEL, SHORT).log_evidence).mean(1), 1.0)


def test_a_refused_twist_leaves_draws_of_the_prior():
    flat = tilted(tiny_llama(seed=1), torch.zeros(3, 8))  # a constant has nothing to learn
    posterior = SMC(128, **QUIET).run(flat, PROMPTS)
    assert posterior.stats["twist_gain"]["completion"] < 0.05
    assert posterior.stats["twist_seconds"] > 0
    np.testing.assert_allclose(posterior.log_evidence, 0.0, atol=1e-5)
    assert not posterior.stats["resampled"].any()


def observed_before(prompts):
    with pyro.plate("prompts", len(prompts)):
        mood = pyro.sample("mood", dist.Categorical(torch.ones(2)))
        pyro.sample("y", dist.Normal(mood.float(), 1.0), obs=torch.ones(len(prompts)))
        pyro.sample("completion", table_lm(order=2, vocab=4)(prompts, max_new_tokens=2))


def candidates(prompts):
    with pyro.plate("prompts", len(prompts)), pyro.plate("candidates", 2):
        x = pyro.sample("completion", table_lm(order=2, vocab=4)(prompts, max_new_tokens=2))
        pyro.factor("reward", 1.0 * (x == 1).sum(-1))


def long(prompts):
    return rewarded(table_lm(order=2, vocab=4), 200, lambda x: x.sum(-1) * 1.0)(prompts)


def test_which_programs_have_a_twist_learned():
    def number(model, particles=128, chains=4, prompts=SHORT):
        return number_of_first(inspect(model, prompts), particles, chains)

    assert number(MODEL) == 32
    assert number(MODEL, 10_000) == 256  # 1024 draws in all
    assert number(MODEL, 124) == 0  # 124 draws
    for model in (observed_before, candidates, conversation(), shared(), long):
        assert number(model) == 0, model
    assert number(long, prompts=SHORT[:1]) == 32
    assert "twist_gain" not in SMC(128, proposal=table_lm(seed=1), **QUIET).run(case("table", 1.0)[1], PROMPTS).stats


def test_retained_draws_are_among_particles_of_one_kind(monkeypatch):
    """A conditional run learns from draws that are not its own particles; 1 / Z-hat is unbiased for 1 / Z."""
    untrained(monkeypatch, 1.0)
    exact = Exact().run(MODEL, SHORT)
    draws = exact.resample(200, seed=1)
    posterior = SMC(16, 200, retained=draws, ess_threshold=1.0, **QUIET).run(MODEL, SHORT)
    np.testing.assert_array_equal(posterior.samples["completion"][:, 0], draws.samples["completion"][0])
    assert posterior.stats["resampled"].any()
    assert_mean(1 / np.exp(posterior.log_weights - exact.log_evidence).mean(1), 1.0)


def test_all_lost_is_an_error_with_all_particles():
    never = rewarded(table_lm(order=2, seed=0, vocab=4), 2, lambda x: torch.full(x.shape[:-1], -torch.inf))
    with pytest.raises(EvidenceError, match="all 512 particles"):
        SMC(128, **QUIET).run(never, [[1]])
