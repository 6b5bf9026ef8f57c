"""Gradient estimates against gradients by enumeration."""

from __future__ import annotations

import pyro
import torch
from scipy.stats import t
from torch import Tensor

from bayeslm.inference.training import Objective, StatefulLoss

REPEATS = 40
COPIES = 200  # of each prompt in a batch: more independent terms a gradient, which cost less than more gradients
LIMIT = 4.5  # standard errors
FALSE_ALARM = 2e-5  # a check; 2e-4 a gradient


def perturbed(lm, seed: int = 0, scale: float = 0.5):
    """A policy that is neither the prior nor the posterior."""
    policy = lm.policy()
    generator = torch.Generator().manual_seed(seed)
    for p in policy.network.parameters():
        p.data += scale * p.data.std() * torch.randn(p.shape, generator=generator)
    return policy


def policy_guide(policy, tokens: int):
    def guide(prompts):
        pyro.module("policy", policy)
        with pyro.plate("prompts", len(prompts)):
            pyro.sample("completion", policy(prompts, max_new_tokens=tokens))

    return guide


def gradient_of(loss: Tensor, parameters) -> Tensor:
    """Return the gradient of a loss that is enumerated, (coordinate,)."""
    found = torch.autograd.grad(loss, [p for p in parameters if p.requires_grad], retain_graph=True)
    return torch.cat([g.reshape(-1) for g in found])


def gradients(objective, model, guide, parameters, args, repeats: int = REPEATS) -> Tensor:
    """Return many gradient estimates, (repeat, coordinate).

    :param objective: one of ours, which begins anew; or a Pyro ELBO, such as the `StatefulLoss` of one of ours.
    """
    loss = StatefulLoss(objective) if isinstance(objective, Objective) else objective
    rows = []
    for _ in range(repeats):
        for p in parameters:
            p.grad = None
        with pyro.get_param_store().scope():
            loss.loss_and_grads(model, guide, *args)
        rows.append(torch.cat([p.grad.reshape(-1) for p in parameters]))
    return torch.stack(rows)


def assert_unbiased(estimates: Tensor, expected: Tensor) -> None:
    """Projections on the true gradient and on 9 random directions (sums, so nearly normal): each by Student's t."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.stack([expected, *torch.randn(9, len(expected), generator=generator)])
    projected = estimates @ directions.T
    stderr = projected.std(0) / len(estimates) ** 0.5
    error = projected.mean(0) - directions @ expected
    limit = float(t.isf(FALSE_ALARM / 2, len(estimates) - 1))
    assert (error.abs() <= limit * stderr).all(), error / stderr
    # A gradient of the wrong size would show: one shrunk by a quarter misses by more than the limit.
    assert 0.25 * expected @ expected > limit * stderr[0], (expected @ expected / stderr[0]).item()
