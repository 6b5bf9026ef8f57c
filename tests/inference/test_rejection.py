"""Rejection sampling and best-of-n: a bound that does not hold, interruptions and errors between batches."""

from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from bayeslm.inference import BestOfN, EvidenceError, ProgramError, RejectionSampling, RunError
from bayeslm.models.rewards.rehearsal import is_rehearsal


def scripted(*batches: float | BaseException):
    """A program of two prompts whose log-likelihood is this number, or that raises this error, in each of its runs.

    The first run is the inspection; those that check the program's shapes do not count. x = 1 has the log-likelihood
    -inf for the second prompt.
    """
    runs = iter(batches)

    def model():
        with pyro.plate("prompts", 2):
            x = pyro.sample("x", dist.Bernoulli(0.5))
            batch = 0.0 if is_rehearsal() else next(runs)
            if isinstance(batch, BaseException):
                raise batch
            impossible = (x == 1) & torch.tensor([False, True])
            pyro.factor("reward", torch.where(impossible, -math.inf, batch))

    return model


def rejection(**settings) -> RejectionSampling:
    defaults = {"num_samples": 30, "num_chains": 3, "log_bound": 0.0, "batch_size": 20, "seed": 0, "progress": False}
    return RejectionSampling(**(defaults | settings))


def test_a_bound_that_a_later_batch_exceeds_leaves_no_results():
    """The draws accepted before are wrong too, so the error carries none."""
    with pytest.raises(ProgramError, match=r"log-likelihood 0.7, above the bound 0:") as caught:
        rejection().run(scripted(0.0, -0.5, -0.5, 0.7))
    assert not hasattr(caught.value, "so_far")


@pytest.mark.parametrize("bound", [-1e30, -1e6, -1.0, 0.0, 100.0, 1e4, 1e6])
@pytest.mark.parametrize("excess", [0.3, 90.0, 1e5])
def test_the_tolerance_of_a_bound_is_in_nats_whatever_the_bound(bound, excess):
    with pytest.raises(ProgramError, match=r"above the bound"):
        rejection(log_bound=bound).run(scripted(bound, max(bound + excess, -1e20)))


@pytest.mark.parametrize("bound", [-1e6, 0.0, 1e3, 1e6])
def test_rounding_of_the_bound_is_tolerated(bound):
    rounding = float(np.spacing(np.float32(abs(bound)))) if bound else 1e-6
    engine = rejection(num_samples=2, num_chains=1, log_bound=bound)
    posterior = engine.run(scripted(*[bound + rounding] * 20))
    assert posterior.samples["x"].shape == (1, 2, 2)


@pytest.mark.parametrize("bound", [math.inf, -math.inf, math.nan])
def test_a_bound_must_be_finite(bound):
    error = ValueError if math.isnan(bound) else ProgramError
    with pytest.raises(error, match=f"(needs a finite upper bound|log_bound must be a number).*got {bound}"):
        rejection(log_bound=bound).run(scripted(0.0))


def test_ctrl_c_keeps_equally_many_draws_of_each_prompt_and_chain():
    """Prompt 0 accepts all of 40 proposals, prompt 1 half of them."""
    with pytest.warns(UserWarning, match=r"of 90 draws a prompt after 40 proposals"):
        posterior = rejection().run(scripted(0.0, 0.0, 0.0, KeyboardInterrupt()))
    assert posterior.stats["interrupted"]
    assert posterior.stats["proposals"] == 40
    accepted = round(40 * posterior.stats["acceptance"][1])
    assert 3 <= accepted < 40
    assert posterior.samples["x"].shape == posterior.log_joint.shape == (3, accepted // 3, 2)
    assert not posterior.samples["x"][..., 1].any()
    np.testing.assert_array_equal(posterior.log_weights, 0.0)
    whole = rejection(max_proposals=40)
    with pytest.warns(UserWarning, match="after 40 proposals"):
        expected = whole.run(scripted(0.0, 0.0, 0.0))
    np.testing.assert_array_equal(posterior.samples["x"], expected.samples["x"])


def test_an_error_carries_the_proposals():
    with pytest.raises(RunError, match="40 particles") as caught:
        rejection().run(scripted(0.0, 0.0, 0.0, OSError("the judge is asleep")))
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.so_far.particles.log_weights.shape == (40, 2)


def test_ctrl_c_keeps_the_complete_best_of_n():
    engine = BestOfN(n=8, num_samples=4, num_chains=2, batch_size=20, seed=0, progress=False)
    posterior = engine.run(scripted(0.0, 0.0, 0.0, KeyboardInterrupt()))  # 40 candidates: 5 of 8 draws
    assert posterior.stats["interrupted"]
    assert posterior.samples["x"].shape == (2, 2, 2)
    with pytest.raises(EvidenceError, match="interrupted before each of the 2 chains had a draw"):
        BestOfN(n=30, num_chains=2, batch_size=20, seed=0, progress=False).run(scripted(0.0, 0.0, KeyboardInterrupt()))
