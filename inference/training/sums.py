"""Sums over the particles of all processes of a run, of which each process has its own: x (particle, ...).

What they return is the same to the bit on each process. A process sends the sum of its own particles, so that what is
sent does not grow with their number. Losses are written in these sums: a loss has its value over all particles, and the
gradient of this process's own, which the optimizer adds up.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from bayeslm.inference.program import Ranks, ranks
from bayeslm.validation import validated


@validated
def total(x: Tensor) -> Tensor:
    """Return the sum over the particles of all processes, without gradient."""
    return ranks().total(x.detach().sum(0))


@validated
def log_totals(x: Tensor) -> Tensor:
    """Return the logarithm of the sum of exp(x) over the particles of each process, (process, ...)."""
    own = x.detach().logsumexp(0)[None]
    return ranks().joined(own)


@validated
def log_mean_exp(x: Tensor, num: int) -> Tensor:
    """Return the logarithm of the mean of exp(x) over the particles of all processes, ``num`` of them."""
    return log_totals(x).logsumexp(0) - math.log(num)


@validated
def softmax(x: Tensor) -> Tensor:
    """Return the shares (particle, ...) of this process's particles; NaN where x is -inf for all of all processes."""
    return (x.detach() - log_totals(x).logsumexp(0)).exp()


@validated
def with_value(value: Tensor, surrogate: Tensor) -> Tensor:
    """Return ``value`` with the gradient of ``surrogate``."""
    return value.detach() + (surrogate - surrogate.detach())


class _Sum(torch.autograd.Function):
    """The sum of a tensor over the processes; in the gradient of one, those of all processes' losses."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, run: Ranks) -> Tensor:
        ctx.run = run
        return run.total(x.detach())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.run.total(gradients[0]), None


@validated
def summed(x: Tensor) -> Tensor:
    """Return the sum of a tensor over the processes, with the gradient of the sum of all their losses.

    Each process must take the gradient of a loss of it, at the same place of the program.
    """
    run = ranks()
    return x if run.size == 1 else _Sum.apply(x, run)
