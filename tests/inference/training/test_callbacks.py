"""The protocol of callbacks: what they get, what they may ask for, and what they remember."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings

import numpy as np
import pyro
import pytest
import torch
from support.programs import PROMPTS, TOKENS
from support.trainings import GOLD, LM, MODEL, SMALL, Killed, assert_same, every_5, killer

from bayeslm.inference import SVI, Exact
from bayeslm.inference.training import Callback, HeldOut, LogVariance, Reply, Tempering
from bayeslm.models import rewards


class Counter(Callback):
    """Remembers the sum of the ELBOs so far, and reports it."""

    def start(self, record, state):
        return Reply(state={"sum": torch.zeros(())}) if record.step == 0 else None

    def step(self, record, state):
        total = state["sum"] + record.figures["elbo"]
        return Reply(state={"sum": total}, evaluations={"sum_of_elbos": total.numpy()})


def test_what_a_callback_remembers_is_of_its_chain_and_is_resumed(tmp_path):
    counter = Counter()
    whole = SVI(**SMALL, num_chains=2, callbacks=[counter]).run(MODEL, PROMPTS)
    for step in (7, 11):
        with contextlib.suppress(Killed):
            callbacks = [lambda record: None, counter, killer(step)]  # functions have no place in a checkpoint
            SVI(**SMALL, num_chains=2, callbacks=callbacks, checkpoint=every_5(tmp_path)).run(MODEL, PROMPTS)
    resumed = SVI(**SMALL, num_chains=2, callbacks=[counter], checkpoint=every_5(tmp_path)).run(MODEL, PROMPTS)
    assert_same(resumed, whole)
    np.testing.assert_allclose(whole.stats["sum_of_elbos"], whole.stats["elbo"].mean(-1).cumsum(1), rtol=1e-4)
    assert vars(counter) == {}


def test_a_record_is_of_its_step_and_cannot_be_changed():
    records = []

    def keep(record):
        records.append((record, len(record.history.get("elbo", ()))))
        with pytest.raises(dataclasses.FrozenInstanceError):
            record.step = 0
        with pytest.raises(TypeError):
            record.history["elbo"] = []

    run = SVI(**SMALL, num_chains=2, callbacks=[keep]).run(MODEL, PROMPTS)
    assert [(record.chain, record.step) for record, _ in records] == [(c, s) for c in range(2) for s in range(13)]
    assert [length for _, length in records] == 2 * list(range(13))
    assert [record.is_last for record, _ in records] == 2 * (12 * [False] + [True])
    for record, _ in records:
        assert record.num_steps == 12
        assert record.policy is not None
        if record.step == 0:
            assert (record.figures, record.particles, record.texts()) == ({}, None, [])
            continue
        assert record.figures["elbo"] == pytest.approx(run.stats["elbo"][record.chain, record.step - 1].mean())
        assert record.particles.values["completion"].shape[:2] == (128, 2)
        assert len(record.texts()) == 2


def test_a_reply_stops_a_chain_and_moves_beta():
    class Halves(Callback):
        def step(self, record, state):
            return Reply(stop=record.step == 4, inverse_temperature=record.inverse_temperature / 2)

    run = SVI(**SMALL, callbacks=[Halves()]).run(MODEL, PROMPTS)
    assert run.stats["inverse_temperature"].tolist() == [[1.0, 0.5, 0.25, 0.125]]
    assert run.stats["steps"] == 4


@pytest.mark.parametrize("stops_first", [True, False])
def test_the_last_step_is_evaluated_wherever_the_chain_is_stopped(stops_first):
    """Once, also if what stops it comes later in the list."""

    def stop(record):
        return Reply(stop=record.step == 6)

    held_out, last = HeldOut({"gold": GOLD}, every=4, num_particles=4), []
    callbacks = [stop, held_out] if stops_first else [held_out, stop]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        run = SVI(**SMALL, callbacks=[*callbacks, lambda record: last.append(record.is_last)]).run(MODEL, PROMPTS)
    assert run.stats["held_out_steps"] == [0, 4, 6]
    assert run.stats["gold_elbo"].shape == (1, 3, 2)
    assert last == 6 * [False] + [True]


def test_held_out_has_the_rewards_that_a_program_records():
    """The trained one and a gold one of the same draws: each mean is that of its own values under the policy."""

    def program(gold=True):
        with pyro.plate("prompts", len(PROMPTS)):
            x = pyro.sample("completion", LM(PROMPTS, TOKENS))
            rewards.factor("proxy", (x == 2).float().sum(-1), 0.5)
            if gold:
                rewards.record("gold", x[..., 0].float())

    held_out = HeldOut({"both": program, "one": lambda: program(False)}, every=4, num_particles=3000)
    stats = SVI(**SMALL | {"num_steps": 4}, callbacks=[held_out]).run(program)
    exact, start = Exact().run(program), stats.stats
    p = np.exp(exact.log_joint - exact.log_likelihood["proxy"])[0]  # of the prior, with which the policy begins
    for name, column in (("both_reward_proxy", "proxy"), ("both_reward_gold", "gold"), ("one_reward", "proxy")):
        truth = (p * exact.rewards[column][0]).sum(0)
        assert start[name].shape == (1, 2, len(PROMPTS))
        assert (np.abs(start[name][0, 0] - truth) < 4.5 * start[f"{name}_stderr"][0, 0] + 1e-4).all()
    assert start["both_reward_gold_stderr"].min() > 0
    np.testing.assert_allclose(start["one_reward"] / 0.5, start["one_log_likelihood"], rtol=1e-4)


def test_a_callback_draws_random_numbers_of_its_own():
    def draw(record):
        torch.rand(3)
        np.random.rand(3)  # noqa: NPY002  (as callbacks may)

    assert_same(*(SVI(**SMALL, callbacks=callbacks).run(MODEL, PROMPTS) for callbacks in ([], [draw])))


def test_a_callback_that_steers_identifies_the_run_and_one_that_logs_does_not(tmp_path):
    class Log(Callback):
        def identity(self):
            return None

    SVI(**SMALL, objective=LogVariance(4), checkpoint=tmp_path).run(MODEL, PROMPTS)
    SVI(**SMALL, objective=LogVariance(4), checkpoint=tmp_path, callbacks=[Log()]).run(MODEL, PROMPTS)
    with pytest.raises(ValueError, match=r"callbacks was \[\] and is .*Tempering"):
        SVI(**SMALL, objective=LogVariance(4), checkpoint=tmp_path, callbacks=[Tempering()]).run(MODEL, PROMPTS)
