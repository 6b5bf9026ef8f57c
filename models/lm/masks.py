"""Masks of left-padded texts, and the positions that they give."""

from __future__ import annotations

import torch
from torch import Tensor


def positions_of(ids: Tensor, mask: Tensor | None) -> Tensor:
    """Positions (rows, length) of left-padded ids."""
    if mask is None:
        return torch.arange(ids.shape[-1], device=ids.device).expand(ids.shape)
    return (mask.cumsum(-1) - 1).clamp_min(0)  # padding's own position is never attended to


def ready_mask(mask: Tensor, tokens: int, dtype: torch.dtype) -> Tensor:
    """What each of the last ``tokens`` attends to, (rows, 1, tokens, length), of a mask (rows, length) of left-padded
    texts: True, or 0 to be added to attention logits.
    """
    length = mask.shape[-1]
    at = torch.arange(length, device=mask.device)
    row = at[length - tokens :, None]
    # padding attends to itself: some kernels answer with NaN where there is nothing to attend to
    seen = (mask.bool()[:, None, None, :] & (at < row)) | (at == row)
    if dtype == torch.bool:
        return seen
    return torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
