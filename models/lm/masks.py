"""Positions of left-padded tokens, and the masks by which they attend to one another."""

from __future__ import annotations

import torch
from torch import Tensor


def positions_of(ids: Tensor, mask: Tensor | None) -> Tensor:
    """Return the positions (row, length) of left-padded ids (row, length)."""
    if mask is None:
        return torch.arange(ids.shape[-1], device=ids.device).expand(ids.shape)
    return (mask.cumsum(-1) - 1).clamp_min(0)  # no token attends to padding, whose own position does not matter


def causal_mask(mask: Tensor, tokens: int, dtype: torch.dtype) -> Tensor:
    """Return where each of the last ``tokens`` of left-padded texts attends to, (row, 1, tokens, length).

    :param mask: 1 at tokens that are not padding, (row, length).
    :param dtype: bool for True and False; a float type for 0 and its minimum, which are added to attention logits.
    """
    length = mask.shape[-1]
    at = torch.arange(length, device=mask.device)
    row = at[length - tokens :, None]
    # padding attends to itself: some kernels return NaN for a row that attends to nothing
    attended = (mask.bool()[:, None, None, :] & (at < row)) | (at == row)
    if dtype == torch.bool:
        return attended
    return torch.zeros_like(attended, dtype=dtype).masked_fill(~attended, torch.finfo(dtype).min)
