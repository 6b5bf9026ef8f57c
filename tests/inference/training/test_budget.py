"""Budgets of samples, seconds and a KL, and schedules on the share that is used."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from support.programs import PROMPTS
from support.trainings import MODEL, SMALL, TWO, batches, every_5, kl_of

from bayeslm.inference import SVI
from bayeslm.inference.training import (
    Adam,
    Budget,
    LogVariance,
    Replay,
    ReverseKL,
    Tempering,
    TrustRegion,
    loop,
    of_prior,
)

ADAM = SMALL | {"num_samples": 4, "num_prior_samples": 0, "optimizer": Adam(1e-3)}


@pytest.mark.parametrize(
    ("objective", "prompts", "samples", "steps"),
    [
        (ReverseKL(8), 2, 100, 6),  # of 16 draws each
        (ReverseKL(8), 2, 96, 6),
        (LogVariance(8, Replay(32, every=3)), 2, 50, 9),  # three lots, and two more steps on each
        (LogVariance(8, of_prior), 2, 31, 1),
        (ReverseKL(8), 1, 40, 5),  # a minibatch of one prompt
    ],
)
def test_a_budget_of_samples(objective, prompts, samples, steps):
    model = MODEL if prompts == 2 else batches
    run = SVI(**ADAM | {"num_steps": Budget(samples=samples), "objective": objective}).run(model, PROMPTS)
    assert run.stats["steps"] == steps


def test_the_first_limit_ends_the_training():
    run = SVI(**ADAM | {"num_steps": Budget(steps=3, samples=1000, seconds=3600.0)}).run(MODEL, PROMPTS)
    assert run.stats["steps"] == 3


def test_a_budget_of_seconds(monkeypatch):
    """By a clock that counts its readings, two a step: so that a step takes a second."""
    clock = itertools.count()
    monkeypatch.setattr(loop.time, "perf_counter", lambda: float(next(clock)))
    shares = []
    run = SVI(
        **ADAM | {"num_steps": Budget(seconds=10.0), "callbacks": [lambda record: shares.append(record.share)]}
    ).run(MODEL, PROMPTS)
    assert shares == pytest.approx([0.1 * i for i in range(11)])
    assert run.stats["steps"] == 10


def test_schedules_run_on_the_share_of_the_budget():
    """Six steps, of samples: the same rates and temperatures as of six steps; a trust region closes at the end."""
    settings = ADAM | {"objective": ReverseKL(8), "callbacks": [Tempering(0.1)]}
    runs = [SVI(**settings | {"num_steps": n}).run(MODEL, PROMPTS).stats for n in (6, Budget(samples=96))]
    assert (runs[0]["inverse_temperature"] == runs[1]["inverse_temperature"]).all()
    assert (runs[0]["elbo"] == runs[1]["elbo"]).all()  # and so were the learning rates
    region = SVI(**ADAM | {"num_steps": Budget(samples=640), "optimizer": TrustRegion(), "objective": ReverseKL(16)})
    moved = region.run(MODEL, PROMPTS).stats["moved"][0]
    share = np.arange(20) / 20
    assert (moved <= 1.5 * TrustRegion().kl * (1 - share) ** 2 * (1 + 1e-5)).all()


def test_a_kl_to_reach():
    run = SVI(**SMALL | {"num_steps": Budget(steps=400, kl=0.1)}).run(TWO, PROMPTS)
    assert 20 <= run.stats["steps"] < 100
    assert kl_of(run.policy) < 0.1


@pytest.mark.parametrize(
    ("budget", "error"),
    [
        (lambda: Budget(), "give steps, samples or seconds"),
        (lambda: Budget(kl=0.1), "give steps, samples or seconds"),
        (lambda: Budget(samples=0), "samples must be a positive whole number"),
        (lambda: SVI(Budget(samples=8), progress=False).run(MODEL, PROMPTS), "samples=8, and one step draws 128"),
    ],
)
def test_what_is_no_budget(budget, error):
    with pytest.raises(ValueError, match=error):
        budget()


def test_a_training_in_a_region_goes_on_with_a_larger_budget(tmp_path):
    settings = SMALL | {"checkpoint": every_5(tmp_path)}
    first = SVI(**settings | {"num_steps": 10}).run(MODEL, PROMPTS)
    more = SVI(**settings | {"num_steps": Budget(steps=30)}).run(MODEL, PROMPTS)
    assert more.stats["steps"] == 30
    assert (more.stats["elbo"][:, :10] == first.stats["elbo"]).all()
    moved = more.stats["moved"][0]
    assert moved[10:16].max() > 2 * moved[9]  # the region has grown again
