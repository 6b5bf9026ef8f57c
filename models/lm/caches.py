"""Caches of networks: of keys and values, and of the tokens themselves (`whole_texts`).

Imported where a network is used, not before: transformers takes a second or more to import.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, EncoderDecoderCache, StaticLayer

__all__ = ["Cache", "DynamicCache", "FixedLayer", "SourceCache", "TextCache", "is_shareable"]


class TextCache(DynamicCache):
    """The tokens themselves, in the place of a network's keys and values."""

    def append(self, ids: Tensor) -> Tensor:
        """Add tokens (row, new), and return all (row, length)."""
        entry = ids[:, None, :, None]
        texts: Tensor = self.update(entry, entry, 0)[0][:, 0, :, 0]
        return texts


class SourceCache(DynamicCache):
    """What an encoder has computed of prompts, and what a decoder keeps of it and of the tokens that follow.

    All of it are layers, which are selected, copied and detached as keys and values are: first that of the encoder,
    whose keys are its states and whose values are the mask; then the decoder's, of the prompts and of
    its own tokens; or these tokens themselves, where it reads all of them at each step.

    :param states: of the prompts' tokens, (row, length, width).
    :param mask: 1 at tokens that are not padding, (row, length).
    """

    def __init__(self, states: Tensor, mask: Tensor) -> None:
        super().__init__()
        self.update(states[:, None], mask[:, None, :, None], 0)
        self.num_crossed = 0  # layers of keys and values of the prompts

    @property
    def states(self) -> Tensor:
        """The encoder's states (row, length, width)."""
        encoded: Any = self.layers[0]
        states: Tensor = encoded.keys[:, 0]
        return states

    @property
    def mask(self) -> Tensor:
        """1 at tokens of the prompts that are not padding, (row, length)."""
        encoded: Any = self.layers[0]
        mask: Tensor = encoded.values[:, 0, :, 0].long()
        return mask

    def append(self, ids: Tensor) -> Tensor:
        """Add tokens (row, new) to those that are kept, and return all (row, length)."""
        kept = TextCache()
        kept.layers = self.layers[1:]
        texts = kept.append(ids)
        self.layers[1:] = kept.layers
        return texts

    def of_decoder(self) -> EncoderDecoderCache:
        """Return the decoder's keys and values as transformers has them."""
        crossed, own = DynamicCache(), DynamicCache()
        crossed.layers, own.layers = self.layers[1 : 1 + self.num_crossed], self.layers[1 + self.num_crossed :]
        return EncoderDecoderCache(own, crossed)

    def keep(self, grown: EncoderDecoderCache) -> None:
        """Take over the keys and values that a pass of the decoder has grown."""
        crossed, own = grown.cross_attention_cache.layers, grown.self_attention_cache.layers
        self.layers[1:], self.num_crossed = [*crossed, *own], len(crossed)


class FixedLayer(StaticLayer):
    """Keys and values of a fixed number of tokens; the next token is written in its place among them.

    :param keys: (row, head, token, width).
    :param values: likewise.
    :param at: the place, a number on their device, so that the host does not know it.
    """

    def __init__(self, keys: Tensor, values: Tensor, at: Tensor) -> None:
        super().__init__(keys.shape[2])
        self.keys, self.values, self.cumulative_length = keys, values, at
        self.device, self.dtype, self.is_initialized = keys.device, keys.dtype, True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the keys and values of one token, and return those of all."""
        place, keys, values = self.cumulative_length.reshape(1), self.keys, self.values
        assert keys is not None
        assert values is not None
        return keys.index_copy_(2, place, key_states), values.index_copy_(2, place, value_states)


def is_shareable(cache: Any) -> bool:
    """Return whether a cache holds all keys and values of attention layers and nothing else."""
    if type(cache) not in (DynamicCache, SourceCache) or not cache.layers:
        return False
    if isinstance(cache, SourceCache) and len(cache.layers) != 1 + 2 * cache.num_crossed:
        return False
    return all(type(layer) is DynamicLayer and layer.is_initialized for layer in cache.layers)
