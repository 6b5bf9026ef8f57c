"""The prompts of completions as tensors, one for each completion of a batch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from bayeslm.models.lm import Autoregressive


def prompts_of(fn: Autoregressive, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return ids and mask (particle, *batch, length) of the prompt of every completion.

    :param shape: (particle, *batch).
    """
    mask = torch.ones_like(fn.prompt_ids) if fn.prompt_mask is None else fn.prompt_mask
    return of_each(fn, fn.prompt_ids, shape), of_each(fn, mask, shape)


def of_each(fn: Autoregressive, x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return a tensor (*batch, n) of a distribution as (particle, *batch, n).

    :param fn: may lack the dimension of particles, where its value was replayed.
    """
    x = x.expand(*fn.batch_shape, -1)
    return x.reshape(*shape, -1) if fn.batch_shape.numel() == torch.Size(shape).numel() else x.expand(*shape, -1)


def same_prompts(ids: Tensor, mask: Tensor, other: Tensor, other_mask: Tensor) -> bool:
    """Return whether left-padded prompts are equal, without regard to their padding."""
    return torch.equal(*side_by_side([ids.masked_fill(mask == 0, -1), other.masked_fill(other_mask == 0, -1)]))


def side_by_side(ids: list[Tensor]) -> list[Tensor]:
    """Return tensors of ids (..., length) that are left-padded with -1 to the same length."""
    longest = max(x.shape[-1] for x in ids)
    return [pad(x, (longest - x.shape[-1], 0), value=-1) for x in ids]
