"""Which policy of a training is returned: the one with the highest ELBO of those that were evaluated."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from support.enumerated import PROMPTS, Problem, kl_to
from support.models import table_lm

from bayeslm.inference import SVI
from bayeslm.inference.training import Adam, ForwardKL, LogVariance, Replay, ReverseKL
from bayeslm.inference.training.best import Best
from bayeslm.models import TiltedLM, rewards

FAR = {"num_samples": 256, "progress": False}


def steep(seed: int) -> Problem:
    """A problem of sharp logits and rewards, whose prior is nearer to the posterior than a policy that collapses."""
    problem = Problem(seed)
    problem.lm = table_lm(2, seed=seed, vocab=4)
    return problem


@pytest.mark.parametrize(
    ("objective", "runs"),
    [
        (ReverseKL(2), 5),
        *(pytest.param(each, 10, marks=pytest.mark.long) for each in (ReverseKL(2), LogVariance(2, Replay(8)))),
    ],
    ids=["elbo", "elbo, more runs", "replay"],
)
def test_no_training_ends_below_its_prior(objective, runs):
    """Adam at a rate that leads runs away, of 2 problems, against enumeration.

    Two ELBOs of 256 draws decide, each with a standard error of about 0.1: one that is below by 0.4 is a slip of four.
    """
    below, kept = [], []
    for seed in range(2):
        problem = steep(seed)
        prior = float(kl_to(problem.lm, problem).mean())
        for run_seed in range(runs):
            engine = SVI(12, objective=objective, optimizer=Adam(3.0, clip_norm=None), seed=run_seed, **FAR)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                run = engine.run(problem.model, PROMPTS)
            below.append(float(kl_to(run.policy, problem).mean()) - prior)
            kept += run.stats["kept_steps"]
    assert max(below) < 0.4, (below, kept)
    assert kept.count(12) <= 1.5 * runs  # others of these 2 * runs were put back


def test_draws_and_policy_are_those_of_the_step_that_is_named():
    """A policy that was put back to its prior draws from it: all weights are exp(r / beta)."""
    problem = steep(0)
    engine = SVI(3, objective=ReverseKL(2), optimizer=Adam(30.0, clip_norm=None), seed=1, **FAR)
    with pytest.warns(UserWarning, match="after 3 steps the ELBO was lower than the first"):
        run = engine.run(problem.model, PROMPTS)
    assert run.stats["kept_steps"] == [0]
    assert run.log_weights == pytest.approx(run.log_likelihood["reward"], abs=1e-4)
    assert float(kl_to(run.policy, problem).mean()) == pytest.approx(float(kl_to(problem.lm, problem).mean()))


@pytest.mark.parametrize(("size", "draws"), [(None, 64), (10, 16), (2, 4)])
def test_what_decides_costs_no_more_for_many_prompts(monkeypatch, size, draws):
    """Policies are compared by 64 draws of each prompt, and of minibatches by as many as cost 64 draws of one."""
    prompts, drawn, draw = [[i % 4, j % 4] for i in range(5) for j in range(8)], [], SVI._draw

    def noted(self, program, guide, num, *labels):
        drawn.append(num)
        return draw(self, program, guide, num, *labels)

    monkeypatch.setattr(SVI, "_draw", noted)
    monkeypatch.setattr(Best, "rivals", lambda self, elbo: [0])  # in doubt
    model = TiltedLM(table_lm(2, vocab=4), rewards.Length(), beta=0.02, max_new_tokens=2, subsample_size=size)
    settings = {"num_samples": 2, "num_prior_samples": 0, "progress": False}
    engine = SVI(3, objective=ReverseKL(2), optimizer=Adam(30.0, clip_norm=None), seed=1, **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        engine.run(model, prompts)
    assert max(drawn) == draws


def history(means, noise=0.01, seed=0):
    rng = np.random.default_rng(seed)
    return [np.array([x + noise * rng.standard_normal()]) for x in means]


def candidates(means):
    best, elbo = Best(), history(means)
    for i in range(len(elbo)):
        best.note(elbo[: i + 1], (i + 1) / len(elbo), i / len(elbo), {"p": torch.tensor(float(i))})
    return best, best.rivals(elbo)


def test_which_steps_are_compared():
    rises, falls = np.linspace(-5, 0, 50), np.linspace(0, -5, 50)
    assert candidates(np.concatenate([rises, np.zeros(50)]))[1] == []  # the figures leave nothing open
    best, rivals = candidates(np.concatenate([rises, falls]))
    assert rivals in ([50], [0, 50])  # the end is where the beginning was
    assert float(best.params["p"]) == 49.0
    assert 0 in candidates(np.zeros(40))[1]
    assert candidates([-np.inf] * 20)[1] is None
    assert candidates([0.0])[1] == [0]


def test_another_aim_than_the_elbo_keeps_its_last_policy():
    problem = steep(0)
    run = SVI(3, objective=ForwardKL(4), optimizer=Adam(30.0), seed=0, **FAR).run(problem.model, PROMPTS)
    assert run.stats["kept_steps"] == [3]


def test_candidates_are_copies_and_survive_a_checkpoint():
    p = torch.zeros(2)
    best = Best()
    best.note(history([0.0]), 0.2, 0.0, {"p": p})
    p.add_(1.0)
    tensors, numbers = best.state()
    other = Best()
    other.restore(tensors, numbers)
    assert torch.equal(other.params["p"], torch.zeros(2))
    assert (other.step, other.state()[1]) == (best.step, numbers)
    fresh = Best()
    fresh.restore({}, Best().state()[1])
    assert fresh.step == 0
