"""Caches of networks: of keys and values, and of the tokens themselves (`whole_texts`).

Imported where a network is used, not before: transformers takes a second or more to import.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

__all__ = ["DynamicCache", "TextCache", "is_shareable"]


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
