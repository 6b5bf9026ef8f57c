"""The mask by which left-padded tokens attend to one another."""

from __future__ import annotations

import torch
from torch import Tensor


def causal_mask(mask: Tensor, tokens: int, dtype: torch.dtype) -> Tensor:
    """Return where each of the last ``tokens`` of left-padded texts attends to, (row, 1, tokens, length).

    :param mask: 1 at tokens that are not padding, (row, length).
    :param dtype: bool for True and False; a float type for 0 and its minimum, which are added to attention logits.
    """
    length = mask.shape[-1]
    at = torch.arange(length, device=mask.device)
    row = at[length - tokens :, None]
    # padding attends to itself: some kernels return NaN for a row that attends to nothing
    return attention_mask((mask.bool()[:, None, None, :] & (at < row)) | (at == row), dtype)


def attention_mask(attended: Tensor, dtype: torch.dtype) -> Tensor:
    """Return which tokens are attended to, of any shape, as a mask of a dtype; see `causal_mask`."""
    if dtype == torch.bool:
        return attended
    return torch.zeros_like(attended, dtype=dtype).masked_fill(~attended, torch.finfo(dtype).min)
