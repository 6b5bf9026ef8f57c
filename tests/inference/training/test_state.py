"""Objectives and callbacks hold settings alone: one may serve runs that are interleaved, and no run changes it."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pyro
import pytest
import torch
from support.gradients import perturbed, policy_guide
from support.models import table_lm
from support.oracles import kl_to
from support.programs import PROMPTS, TOKENS, score_table, tilted
from support.trainings import EXACT, GOLD, LM, MODEL, SMALL, assert_same, batches

from bayeslm.inference import SVI
from bayeslm.inference.program import RandomStates
from bayeslm.inference.training import (
    Critic,
    ExponentialAverage,
    FDivergence,
    ForwardKL,
    FromPosterior,
    HeldOut,
    KLTarget,
    LogVariance,
    Plateau,
    Renyi,
    Replay,
    ReverseKL,
    StatefulLoss,
    Tempering,
)

OBJECTIVES = {
    "leave-one-out": ReverseKL(4),
    "average": ReverseKL(1, ExponentialAverage()),
    "critic": ReverseKL(4, Critic()),
    "replay": LogVariance(4, Replay(12, every=3)),
    "posterior": ForwardKL(8, FromPosterior(EXACT)),
    "f-divergence": FDivergence("jensen-shannon", 4),
    "Renyi": Renyi(0.5, 4),
}
ALIKE = ("posterior", "f-divergence", "Renyi")  # to a run: they remember as little as leave-one-out
NAMES = [pytest.param(name, marks=[pytest.mark.long] * (name in ALIKE)) for name in OBJECTIVES]


def steps(objective, seed: int, num_steps: int = 7):
    """Yield the parameters after each step of a training, whose random numbers and parameters are its own."""
    policy, params = perturbed(LM, seed), {"params": {}, "constraints": {}}
    guide, loss = policy_guide(policy, TOKENS), StatefulLoss(objective)
    svi = pyro.infer.SVI(MODEL, guide, pyro.optim.Adam({"lr": 0.05}), loss)
    torch.manual_seed(seed)
    random = RandomStates.now()
    for _ in range(num_steps):
        random.restore()
        with pyro.get_param_store().scope(params):
            svi.step(PROMPTS)
        random = RandomStates.now()
        yield torch.cat([p.detach().flatten() for p in policy.network.parameters()])


@pytest.mark.parametrize("name", NAMES)
def test_two_trainings_interleaved_step_by_step(name):
    """Over one objective, each is to the bit what it is alone; one of them begins later."""
    objective = OBJECTIVES[name]
    before = copy.deepcopy({k: x for k, x in vars(objective).items() if k != "source"})
    alone = [list(steps(objective, seed)) for seed in (0, 1)]
    one, other = steps(objective, 0), steps(objective, 1)
    found = [[next(one), next(one)], []]
    for a, b in zip(one, other, strict=False):
        found[0].append(a)
        found[1].append(b)
    found[1] += list(other)
    for x, y in zip(alone, found, strict=True):
        assert len(x) >= len(y) >= 5
        assert all(torch.equal(a, b) for a, b in zip(x, y, strict=False))
    assert {k: x for k, x in vars(objective).items() if k != "source"} == before


@pytest.mark.parametrize("name", NAMES)
def test_a_run_within_a_run(name):
    """Between two steps of one run another is made, with the same objective and callbacks."""
    settings = SMALL | {"objective": OBJECTIVES[name], "num_steps": 6}
    callbacks = [KLTarget(0.5), HeldOut({"gold": GOLD}, every=4, num_particles=4), Plateau(3, -9.0)]
    alone, another = (SVI(**settings | {"seed": seed}, callbacks=callbacks).run(MODEL, PROMPTS) for seed in (0, 1))
    inner = []

    def run_another(record):
        if record.step == 3:
            inner.append(SVI(**settings | {"seed": 1}, callbacks=callbacks).run(MODEL, PROMPTS))

    outer = SVI(**settings, callbacks=[*callbacks, run_another]).run(MODEL, PROMPTS)
    assert outer.stats["tokens"] == alone.stats["tokens"] + another.stats["tokens"]  # it counts the inner one's too
    for run in (outer, alone):
        run.stats = {name: x for name, x in run.stats.items() if name not in ("tokens", "model_calls", "mismatch")}
    assert_same(outer, alone)
    assert_same(inner[0], another)


def test_an_engine_and_its_parts_are_not_changed_by_a_run():
    objective, callbacks = ReverseKL(4, Critic()), [Tempering(), HeldOut({"gold": GOLD}, every=4, num_particles=4)]
    before = [dict(vars(x)) for x in (objective, objective.baseline, *callbacks)]
    engine = SVI(**SMALL, objective=objective, callbacks=callbacks)
    first, again = (engine.run(MODEL, PROMPTS) for _ in range(2))
    assert_same(first, again)
    assert [dict(vars(x)) for x in (objective, objective.baseline, *callbacks)] == before


@pytest.mark.parametrize("name", NAMES)
def test_stock_pyro_trains_with_what_remembers_nothing(name):
    """An objective is a loss; one that remembers something says what to wrap it in."""
    objective, policy = OBJECTIVES[name], perturbed(LM)
    guide = policy_guide(policy, TOKENS)
    svi = pyro.infer.SVI(MODEL, guide, pyro.optim.Adam({"lr": 0.05}), objective)
    with pyro.get_param_store().scope():
        if name in ("average", "critic", "replay"):
            with pytest.raises(TypeError, match="use loss=StatefulLoss"):
                svi.step(PROMPTS)
            return
        torch.manual_seed(0)
        losses = [svi.step(PROMPTS) for _ in range(30)]
    assert np.isfinite(losses).all()
    after, before = (kl_to(EXACT, lm, PROMPTS).mean() for lm in (policy, perturbed(LM)))
    assert after < before - 0.05


def test_stock_pyro_takes_minibatches_without_a_memory():
    """Each is then drawn anew; with `StatefulLoss` every prompt has its turn."""
    policy = perturbed(LM)

    def guide(prompts):
        pyro.module("policy", policy)
        with pyro.plate("prompts", len(prompts), subsample_size=1) as chosen:
            pyro.sample("completion", policy([prompts[i] for i in chosen], max_new_tokens=3))

    loss, turns = StatefulLoss(ReverseKL(4)), []
    with pyro.get_param_store().scope():
        assert torch.isfinite(ReverseKL(4)(batches, guide, ["a", "b", "c"]))
        for _ in range(6):
            loss.loss_and_grads(batches, guide, ["a", "b", "c"])
            turns.append(int(loss.last.figures["prompts"]))
    assert sorted(turns[:3]) == sorted(turns[3:]) == [0, 1, 2]


def test_svi_has_at_most_twelve_settings():
    assert len(dataclasses.fields(SVI)) <= 12


def test_of_another_program_an_average_is_kept_and_a_buffer_is_not():
    policy = perturbed(table_lm())
    model, guide = tilted(table_lm(), score_table(1), 0.5), policy_guide(policy, TOKENS)
    average, replay = StatefulLoss(ReverseKL(1, ExponentialAverage())), StatefulLoss(LogVariance(4, Replay(every=9)))
    with pyro.get_param_store().scope():
        for loss in (average, replay):
            loss.loss_and_grads(model, guide, PROMPTS)
        before = average.state["baseline.average:completion"]
        for loss in (average, replay):
            loss.loss_and_grads(model, guide, PROMPTS[::-1])
    assert (average.state["baseline.average:completion"] - before).abs().max() < 0.2 * before.abs().max() + 2.0
    assert int(replay.state["source.step"]) == 1
    assert len(replay.state["source.kept.log_prior"]) == 4
