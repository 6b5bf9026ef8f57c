"""The order in which minibatches take the prompts."""

from __future__ import annotations

import torch
from torch import Tensor

from bayeslm.inference.program import ranks


def next_minibatch(waiting: Tensor | None, size: int, full_size: int) -> tuple[Tensor, Tensor]:
    """Return the next minibatch of an epoch, in which every prompt has its turn before one has its next.

    Each minibatch is a uniform subset, as Pyro's own are, so that sums over it stay unbiased; its variance over an
    epoch is smaller (random reshuffling). Each epoch has an order of its own, the same on all processes of a run.

    :param waiting: indices of the prompts whose turn is still to come, in their order; None begins an epoch.
    :param size: of the minibatch.
    :param full_size: the number of prompts.
    :returns: indices (size,), and those that wait then.
    """
    waiting = torch.empty(0, dtype=torch.long) if waiting is None else waiting.cpu()
    batch, waiting = waiting[:size], waiting[size:]
    if len(batch) < size:  # the last ones of an epoch, and the first of the next
        order = ranks().agreed(torch.randperm(full_size))
        others = (~torch.isin(order, batch)).nonzero().squeeze(-1)[: size - len(batch)]
        batch = torch.cat([batch, order[others]])
        rest = torch.ones(full_size, dtype=torch.bool)
        rest[others] = False
        waiting = order[rest]
    return batch, waiting
