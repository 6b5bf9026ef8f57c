"""A run is the same wherever it begins: where gradients are off, in another thread, inside another run."""

from __future__ import annotations

import contextvars
import os
import random
import signal
import threading
import time
from dataclasses import replace
from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import Unit
from pyro.poutine import runtime
from support.models import table_lm, tiny_llama
from support.programs import SHORT, highest, score_table, tilted

from bayeslm.inference import (
    MCMC,
    NUTS,
    SMC,
    SVI,
    AnnealedSMC,
    BestOfN,
    Exact,
    ImportanceSampling,
    Laplace,
    RejectionSampling,
)
from bayeslm.inference.markov import SuffixKernel
from bayeslm.inference.program import inspect
from bayeslm.inference.program.handlers import explained
from bayeslm.inference.sequential import TwistLearning
from bayeslm.inference.training import AutoPolicy, Critic, ReverseKL, StatefulLoss
from bayeslm.models import LanguageModel, rewards
from bayeslm.models.lm import exclusive, scopes

QUIET = {"seed": 0, "progress": False}
SCORES = score_table(2, vocab=4, tokens=3)
TABLE = tilted(table_lm(order=2, seed=2, vocab=4), SCORES, 0.5)
LLAMA = tilted(tiny_llama(seed=1), score_table(1, vocab=8, tokens=3), 1.0)


def normal_mean(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


Y = torch.tensor([1.0, 2.0])
ON_TEXTS = {
    "exact": Exact(seed=0),
    "importance": ImportanceSampling(num_particles=16, **QUIET),
    "rejection": RejectionSampling(num_samples=4, log_bound=highest(SCORES) / 0.5, **QUIET),
    "bestofn": BestOfN(n=2, num_samples=8, **QUIET),
    "smc": SMC(num_particles=16, twist="partial", **QUIET),
    "annealed": AnnealedSMC(num_particles=16, **QUIET),
    "mcmc": MCMC(num_samples=3, num_chains=4, warmup=2, initial_particles=16, **QUIET),
    "svi": SVI(num_steps=3, num_samples=16, **QUIET),
}
RUNS = {name: lambda engine=engine: engine.run(TABLE, SHORT).log_joint for name, engine in ON_TEXTS.items()}
RUNS["nuts"] = lambda: NUTS(num_samples=5, warmup=5, num_chains=1, **QUIET).run(normal_mean, Y).log_joint
RUNS["laplace"] = lambda: Laplace(num_samples=16, seed=0).run(normal_mean, Y).log_joint


def trains(guide=None, objective=None):
    engine = SVI(num_steps=3, num_samples=16, guide=guide, objective=objective, **QUIET)
    return engine.run(LLAMA, SHORT).log_joint


def fits():
    lm = LanguageModel.tabular(["<eos>", "a", "b"], seed=1)
    return np.array(lm.fit(["a b", "b a"], num_steps=5, seed=0, progress=False))


def moves_in_pyros_mcmc():
    pyro.set_rng_seed(0)
    kernel = SuffixKernel(normal_mean, continuous="nuts")
    mcmc = pyro.infer.MCMC(kernel, num_samples=5, warmup_steps=5, disable_progbar=True)
    mcmc.run(Y)
    return mcmc.get_samples()["mu"].numpy()


DIFFERENTIATE = {
    "svi": trains,
    "svi, adapters": partial(trains, guide=partial(AutoPolicy, lora_rank=2)),
    "svi, critic": partial(trains, objective=ReverseKL(8, baseline=Critic())),
    "twist": lambda: np.array(TwistLearning(num_particles=16, num_steps=3, **QUIET).run(LLAMA, SHORT).stats["loss"]),
    "nuts": RUNS["nuts"],
    "laplace": RUNS["laplace"],
    "nuts in Pyro's MCMC": moves_in_pyros_mcmc,
    "fit": fits,
}
OFF = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode, "set_grad_enabled": torch.set_grad_enabled}


ALIKE = ("svi, adapters", "svi, critic", "nuts in Pyro's MCMC")  # to the others


@pytest.mark.parametrize("name", [pytest.param(x, marks=[pytest.mark.long] * (x in ALIKE)) for x in DIFFERENTIATE])
def test_what_differentiates_does_so_where_gradients_are_off(name):
    expected = DIFFERENTIATE[name]()
    for off in OFF.values():
        with off() if off is not torch.set_grad_enabled else off(False):
            found = DIFFERENTIATE[name]()
            assert not torch.is_grad_enabled()
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_a_policy_that_was_trained_there_has_moved_and_can_be_trained_on(off):
    with off():
        policy = SVI(num_steps=3, num_samples=16, **QUIET).run(LLAMA, SHORT).policy
    prior = tiny_llama(seed=1)
    value = torch.tensor([1, 2, 0])
    assert not torch.equal(policy(SHORT, 3).log_prob(value), prior(SHORT, 3).log_prob(value))
    trains(guide=policy)


def test_pyros_own_svi_trains_there_by_our_losses():
    def losses():
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        svi = pyro.infer.SVI(
            TABLE, AutoPolicy(inspect(TABLE, SHORT)), pyro.optim.Adam({"lr": 0.1}), StatefulLoss(ReverseKL(8))
        )
        return [svi.step(SHORT) for _ in range(3)]

    expected = losses()
    with torch.no_grad():
        assert losses() == expected


def test_data_of_inference_mode_are_data():
    with torch.inference_mode():
        y = Y.clone()
    found = NUTS(num_samples=5, warmup=5, num_chains=1, **QUIET).run(normal_mean, y)
    np.testing.assert_array_equal(found.log_joint, RUNS["nuts"]())


def test_a_network_of_inference_mode_is_trained_as_another_or_refused_with_what_to_do():
    with torch.inference_mode():
        lm = tiny_llama(seed=1)
    model = tilted(lm, score_table(1, vocab=8, tokens=3), 1.0)
    engine = SVI(num_steps=3, num_samples=16, **QUIET)
    np.testing.assert_array_equal(engine.run(model, SHORT).log_joint, trains())  # a copy of all weights
    with pytest.raises(ValueError, match=r"made inside torch\.inference_mode"):
        replace(engine, guide=partial(AutoPolicy, lora_rank=2)).run(model, SHORT)  # adapters around these weights


# -- threads ------------------------------------------------------------------------------------------------------


def test_runs_in_threads_have_the_draws_of_their_seeds():
    expected = {name: run() for name, run in RUNS.items()}
    wrong: list[str] = []

    def work(number: int) -> None:
        order = random.Random(number).sample(sorted(RUNS), len(RUNS))
        for name in order:
            try:
                if not np.array_equal(RUNS[name](), expected[name]):
                    wrong.append(name)
                table_lm(order=2, seed=number)([[1]], max_new_tokens=2).sample((2,))
            except Exception as error:
                wrong.append(f"{name}: {error}")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert not runtime._PYRO_STACK
    assert not runtime._DIM_ALLOCATOR._stack


def test_the_callers_random_state_is_as_it_was_after_runs_in_threads():
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    threads = [threading.Thread(target=RUNS[name]) for name in ("importance", "smc", "svi", "nuts")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002
    assert random.getstate() == before[2]


def test_a_network_drawn_from_a_seed_leaves_the_random_state_of_a_run_alone():
    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        LanguageModel.tabular(["<eos>", "a"], seed=3)
        pyro.factor("r", -(x**2))

    def plain():
        pyro.factor("r", -(pyro.sample("x", dist.Normal(0.0, 1.0)) ** 2))

    engine = MCMC(num_samples=3, num_chains=2, warmup=2, initial_particles=8, **QUIET)
    np.testing.assert_array_equal(engine.run(model).log_joint, engine.run(plain).log_joint)


def test_ctrl_c_ends_the_waiting():
    release, handler = threading.Event(), signal.signal(signal.SIGINT, signal.default_int_handler)

    def hold():
        with exclusive():
            release.wait(20)

    holder = threading.Thread(target=hold)
    holder.start()
    try:
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
        start = time.perf_counter()
        with pytest.raises(KeyboardInterrupt):
            RUNS["importance"]()
        assert time.perf_counter() - start < 4
    finally:
        signal.signal(signal.SIGINT, handler)
        release.set()
        holder.join()
    RUNS["importance"]()


def test_who_waits_for_long_says_for_whom(monkeypatch):
    monkeypatch.setattr(scopes, "PATIENCE", 0.05)
    release, held = threading.Event(), threading.Event()

    def hold():
        with exclusive():
            held.set()
            release.wait(20)

    holder = threading.Thread(target=hold, name="the first")
    holder.start()
    held.wait(20)
    threading.Timer(0.2, release.set).start()
    with pytest.warns(RuntimeWarning, match="for thread 'the first'"), exclusive():
        pass
    holder.join()


# -- runs inside runs -----------------------------------------------------------------------------------------------

INNER = ["importance", "svi", "nuts", "laplace"]


def with_inner_runs(run):
    """`TABLE`, whose reward runs other engines."""

    def model(prompts):
        with pyro.plate("prompts", len(prompts)):
            x = pyro.sample("completion", table_lm(order=2, seed=2, vocab=4)(prompts, max_new_tokens=3))
            score = SCORES[torch.arange(3), x].sum(-1)
            run()
            rewards.factor("reward", score, 0.5)

    return model


LONG = [pytest.param(name, marks=pytest.mark.long) for name in ("smc", "mcmc", "annealed")]


@pytest.mark.parametrize("name", ["importance", "svi", *LONG])
def test_a_run_in_the_reward_of_another(name):
    expected = {inner: RUNS[inner]() for inner in INNER}
    turn = iter(range(10**6))

    def run():
        inner = INNER[next(turn) % len(INNER)]
        np.testing.assert_array_equal(RUNS[inner](), expected[inner])

    found = ON_TEXTS[name].run(with_inner_runs(run), SHORT).log_joint
    np.testing.assert_array_equal(found, RUNS[name]())


def test_runs_in_threads_of_a_reward():
    """A thread that is started in the run's context has its turn inside it; several of them one after another."""
    expected, found = RUNS["smc"](), []

    def run():
        threads = [
            threading.Thread(target=contextvars.copy_context().run, args=(lambda: found.append(RUNS["smc"]()),))
            for _ in range(2)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    outer = ON_TEXTS["importance"].run(with_inner_runs(run), SHORT).log_joint
    np.testing.assert_array_equal(outer, RUNS["importance"]())
    assert len(found) >= 4
    for x in found:
        np.testing.assert_array_equal(x, expected)


def test_pyros_check_of_factors_comes_back_in_whatever_order_runs_end():
    first, second = explained(), explained()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not Unit._validate_args
    second.__exit__(None, None, None)
    assert "_validate_args" not in vars(Unit)


def test_handlers_around_a_run_hold_in_it():
    """`poutine.mask` around a run takes the data off."""
    with poutine.mask(mask=False):
        masked = ImportanceSampling(num_particles=16, **QUIET).run(normal_mean, Y)
    np.testing.assert_array_equal(masked.log_weights, 0.0)
