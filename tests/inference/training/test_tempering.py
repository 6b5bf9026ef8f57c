"""A tempered likelihood in every objective."""

from __future__ import annotations

import pytest
import torch
from support.gradients import gradients, perturbed, policy_guide
from support.models import table_lm
from support.programs import SHORT, score_table, tilted

from bayeslm.inference.training import (
    Critic,
    ExponentialAverage,
    FDivergence,
    ForwardKL,
    LogVariance,
    Renyi,
    ReverseKL,
    StatefulLoss,
)

T = 3


@pytest.mark.parametrize(
    "make",
    [
        lambda: ReverseKL(8),
        lambda: ReverseKL(8, ExponentialAverage()),
        lambda: ReverseKL(8, Critic()),
        lambda: LogVariance(8),
        lambda: ForwardKL(8),
        lambda: FDivergence("jensen-shannon", 8),
        lambda: Renyi(0.5, 8),
    ],
    ids=["leave-one-out", "average", "critic", "log-variance", "forward KL", "Jensen-Shannon", "Renyi"],
)
def test_an_inverse_temperature_of_a_half_is_twice_the_beta(make):
    """The same draws, and the same gradients step by step; their figures stay those of the target itself."""
    lm, table = table_lm(order=2, seed=0, vocab=4), score_table(0, vocab=4, tokens=T, scale=1.0)
    policy = perturbed(lm)
    found, told = [], []
    for beta, gamma in ((0.5, 0.5), (1.0, 1.0), (0.5, 1.0)):
        loss = StatefulLoss(make())
        loss.inverse_temperature = gamma
        torch.manual_seed(0)
        parameters = list(policy.network.parameters())
        found.append(gradients(loss, tilted(lm, table, beta), policy_guide(policy, T), parameters, (SHORT,), 3))
        told.append(loss.last.figures)
    torch.testing.assert_close(found[0], found[1])
    assert (found[0] - found[2]).norm() > 0.05 * found[2].norm()
    for name in ("elbo", "log_likelihood", "kl"):
        torch.testing.assert_close(told[0][name], told[2][name])
