"""Several processes: their random streams, their messages, and the error of one as the error of all."""

from __future__ import annotations

import os
import signal
import threading
import time
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from support.models import table_lm
from support.programs import SHORT, score_table, tilted
from support.ranks import launch

from bayeslm import Posterior
from bayeslm.inference import MCMC, SMC, BestOfN, Exact, ImportanceSampling, RejectionSampling
from bayeslm.inference.program import RankError, Ranks, alone, running

LM, TABLE = table_lm(2, seed=0, vocab=4), score_table(0, vocab=4, tokens=3)
MODEL = tilted(LM, TABLE, 0.5)
ENGINE = partial(ImportanceSampling, num_particles=64, seed=1, progress=False)


@pytest.fixture(scope="module", autouse=True)
def _imported():
    """What engines import when they first run is imported before the forks."""
    ENGINE(num_particles=8).run(MODEL, SHORT)


def test_no_draws_of_a_rank_repeat_another_s():
    """With a seed, and without one where the global random states of forks are equal."""

    def draws(rank):
        return [ENGINE(seed=seed).run(MODEL, SHORT).samples["completion"] for seed in (1, None)]

    every = launch(draws, size=3)
    for each in zip(*every, strict=True):
        assert all(np.array_equal(each[0], other) for other in each)  # all have the draws of all
        parts = [each[0][0, 64 * i // 3 : 64 * (i + 1) // 3] for i in range(3)]
        assert not any(np.array_equal(parts[i][:21], parts[j][:21]) for i, j in ((0, 1), (0, 2), (1, 2)))
    assert not np.array_equal(every[0][0], every[0][1])


def test_rank_0_draws_what_one_process_draws():
    """A seed is rank 0's own: its share of the draws is the same as without others."""
    together = launch(lambda rank: ENGINE().run(MODEL, SHORT))[0]
    np.testing.assert_array_equal(
        together.samples["completion"][0, :32], ENGINE(num_particles=32).run(MODEL, SHORT).samples["completion"][0]
    )


def heavier():
    lm = table_lm(2, seed=0, vocab=4)
    with torch.no_grad():
        next(lm.parameters())[0, 0] += 1e-3
    return lm


@pytest.mark.parametrize(
    ("other", "found"),
    [
        (lambda: ENGINE().run(MODEL, SHORT[::-1]), r"prompts of 'completion': \[\[1, 2\], .* on rank 0, \[\[.*2\], "),
        (
            lambda: ENGINE().run(MODEL, SHORT[:1]),
            r"site 'completion': latent, .*\[2, 3\] on rank 0, .*\[1, 3\] on rank",
        ),
        (lambda: ENGINE(num_particles=65).run(MODEL, SHORT), "the setting num_particles: 64 on rank 0, 65 on rank 1"),
        (lambda: ENGINE(seed=2).run(MODEL, SHORT), "the seed differs .* 1 on rank 0, 2 on rank 1"),
        (lambda: BestOfN(seed=1, progress=False).run(MODEL, SHORT), "engine: ImportanceSampling on rank 0, BestOfN on"),
        (lambda: ENGINE(guide=LM).run(MODEL, SHORT), "the setting guide: None on rank 0, LanguageModel with weights"),
        (lambda: ENGINE().run(tilted(heavier(), TABLE, 0.5), SHORT), "weights of 'completion': .* on rank 0, .* on"),
        (lambda: ENGINE().run(tilted(LM, TABLE, 0.4), SHORT), "log p of 'reward' at arbitrary latents: .* on rank 0"),
        (lambda: ENGINE().run(tilted(LM, TABLE, 0.5)), "rank 1 of 2: TypeError: .*missing 1 required"),
    ],
)
def test_unequal_runs_are_one_error_on_every_rank(other, found):
    def run(rank):
        return ENGINE().run(MODEL, SHORT) if rank == 0 else other()

    first, second = launch(run)
    assert isinstance(first, RankError)
    with pytest.raises(RankError, match=found):
        raise first
    assert str(second) == str(first) or isinstance(second, TypeError)


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        (ENGINE(num_particles=2), "ImportanceSampling: num_particles is 2 in all, to divide among 3 processes"),
        (SMC(num_chains=2, progress=False), "SMC: num_chains is 2 in all, to divide among 3"),
        (MCMC(num_chains=2, progress=False), "MCMC: num_chains is 2 in all"),
        (RejectionSampling(num_samples=2, log_bound=9.0, progress=False), "RejectionSampling: num_samples is 2 in all"),
    ],
)
def test_more_ranks_than_can_be_divided(engine, message):
    for error in launch(lambda rank: engine.run(MODEL, SHORT), size=3):
        assert isinstance(error, ValueError)
        assert message in str(error)


def failing(when):
    """A program whose reward fails on rank 1 at its call number ``when``."""
    calls = 0

    def reward(x):
        nonlocal calls
        calls += 1
        if os.environ.get("RANK") == "1" and calls > when:
            raise LookupError(f"no score at call {calls}")
        return TABLE[torch.arange(3), x].sum(-1)

    def model(prompts):
        import pyro

        with pyro.plate("prompts", len(prompts)):
            pyro.factor("reward", reward(pyro.sample("completion", LM(prompts, max_new_tokens=3))))

    return model


@pytest.mark.parametrize(
    ("engine", "when"),
    [
        (ENGINE(batch_size=8), 5),
        (SMC(seed=1, progress=False), 1),
        (MCMC(num_samples=9, warmup=9, seed=1, progress=False), 20),
    ],
)
def test_an_error_on_one_rank_is_an_error_on_every_rank(engine, when):
    """And what ranks do after it, they do together again."""

    def run(rank):
        try:
            engine.run(failing(when), SHORT)
        except (RankError, RuntimeError, LookupError) as error:
            return f"{type(error).__name__}: {error}", ENGINE().run(MODEL, SHORT).log_evidence
        return None

    (first, z), (second, also_z) = launch(run)
    assert first.startswith("RankError: rank 1 of 2: ")
    assert "LookupError: no score at call " in first
    assert "LookupError: no score at call " in second
    np.testing.assert_array_equal(z, also_z)


def test_an_error_after_the_last_draw_is_one_of_every_rank():
    def run(rank):
        with warnings.catch_warnings():
            if rank == 0:
                warnings.simplefilter("error")
            return ENGINE(num_particles=8).run(MODEL, SHORT)

    first, second = launch(run)
    assert isinstance(first, Warning)
    assert isinstance(second, RankError)
    assert "rank 0 of 2: DiagnosticsWarning: " in str(second)


def hanging(rank):
    with running(1, divided=True) as watch:
        if rank == 1:
            time.sleep(2.5)
        watch.ranks.exchange()


def leaving_in_a_run(rank):
    with running(1, divided=True) as watch:
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        watch.ranks.add_up([torch.ones(3)])


@pytest.mark.parametrize("function", [leaving_in_a_run, hanging])
def test_a_rank_that_dies_or_hangs_ends_the_run_in_the_time_limit(function):
    start = time.monotonic()
    first = launch(function, BAYESLM_TIME_LIMIT="1")[0]
    assert isinstance(first, RankError)
    assert "has died, or has not answered for 1 seconds" in str(first)
    assert time.monotonic() - start < 8.0


def test_no_process_group():
    """The other process never comes."""

    def run(rank):
        if rank == 0:
            ENGINE().run(MODEL, SHORT)

    first = launch(run, BAYESLM_TIME_LIMIT="2")[0]
    assert isinstance(first, RankError)
    assert "no process group of the 2 processes that were launched together: another process of this run" in str(first)


def test_a_time_limit_that_is_none():
    for error in launch(lambda rank: ENGINE().run(MODEL, SHORT), BAYESLM_TIME_LIMIT="soon"):
        assert isinstance(error, ValueError)
        assert "BAYESLM_TIME_LIMIT must be a number of seconds above 0, got 'soon'" in str(error)


def test_files_warnings_and_counts_are_those_of_one_run(tmp_path):
    def run(rank):
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            posterior = ENGINE(num_particles=8).run(MODEL, SHORT)
        path = posterior.save(tmp_path / "run")
        report = posterior.report(tmp_path / f"{rank}.html")
        return len(seen), posterior.stats["tokens"], posterior.stats["processes"], path, report

    (first, tokens, size, path, report), (second, *same, also_report) = launch(run)
    assert (first, second) == (1, 0)
    assert same == [tokens, size, path]
    assert size == 2
    seeds = [Ranks(rank, 2).stream(1) for rank in range(2)]
    assert tokens == sum(ENGINE(num_particles=4, seed=seed).run(MODEL, SHORT).stats["tokens"] for seed in seeds)
    assert Posterior.load(path).log_weights.shape == (1, 8, 2)
    assert report.exists()
    assert not also_report.exists()


def test_ctrl_c_on_one_rank_ends_the_block_on_all_at_the_same_exchange():
    def run(rank):
        count, before = 0, signal.getsignal(signal.SIGINT)
        with running(1, divided=True) as watch:
            try:
                with watch.ranks.deferring():
                    for _ in range(200):
                        watch.ranks.exchange()
                        count += 1
                        if rank == 1 and count == 7:
                            os.kill(os.getpid(), signal.SIGINT)
            except KeyboardInterrupt:
                return count, signal.getsignal(signal.SIGINT) is before
        return None

    assert launch(run) == [(7, True), (7, True)]


def test_runs_that_not_all_reach_are_those_of_one_process():
    """In a block of `alone`, and inside another run; engines that do not divide do the same everywhere."""

    def run(rank):
        if rank == 0:
            with alone():
                ENGINE().run(MODEL, SHORT)
        with running(1, divided=True):
            if rank == 1:
                ENGINE().run(MODEL, SHORT)
        return Exact().run(MODEL, SHORT).log_evidence

    np.testing.assert_array_equal(*launch(run))


def test_a_thread_may_run_too():
    def run(rank):
        found = []
        thread = threading.Thread(target=lambda: found.append(ENGINE().run(MODEL, SHORT).log_evidence))
        thread.start()
        thread.join()
        return found[0]

    np.testing.assert_array_equal(*launch(run))
