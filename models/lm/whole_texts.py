"""Networks that read the whole text again for each of its tokens.

The state of recurrent networks has no keys and values to select and to move; others have no cache at all; and some
count positions from the first token of a batch, padding included. Their own forward pass is right: of whole texts,
without padding, those of one length at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import DynamicCache, DynamicLayer


class TextCache(DynamicCache):
    """The tokens themselves, in the place of a network's keys and values."""

    def append(self, ids: Tensor) -> Tensor:
        """Add tokens (row, new), and return all (row, length)."""
        entry = ids[:, None, :, None]
        texts: Tensor = self.update(entry, entry, 0)[0][:, 0, :, 0]
        return texts


def is_shareable(cache: Any) -> bool:
    """Return whether a cache holds all keys and values of attention layers and nothing else."""
    if type(cache) is not DynamicCache or not cache.layers:
        return False
    return all(type(layer) is DynamicLayer and layer.is_initialized for layer in cache.layers)


def one_length_at_a_time(states: Callable[[Tensor], Tensor], ids: Tensor, mask: Tensor | None) -> Tensor:
    """Return hidden states (row, length, width) of left-padded texts (row, length), 0 on padding.

    :param states: computes the hidden states of texts without padding.
    :param mask: 1 at tokens that are not padding, (row, length); None where none is.
    """
    if mask is None:
        return states(ids)
    length = ids.shape[-1]
    lengths = mask.sum(-1)
    rows, parts = [], []
    for real in lengths.unique().tolist():
        rows.append((lengths == real).nonzero().squeeze(-1))
        parts.append(pad(states(ids[rows[-1], length - real :]), (0, 0, length - real, 0)))
    return torch.cat(parts)[torch.cat(rows).argsort()]
