"""Prompts that a network has processed once, and the tokens that continue them.

Every completion of a prompt starts from the same keys and values: the prompt's forward pass is computed once
(`prefill`), each completion gets a copy of its cache (`Prefix.fork`), and new tokens extend it (`extend`).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from .masks import positions_of
from .network import CausalNetwork


@dataclass
class Prefix:
    """Prompts after their forward pass, from which every continuation starts.

    ``hidden`` (rows, width) predicts the first new token; ``cache`` holds keys and values; ``mask`` (rows, length) is
    None without padding; ``lengths`` (rows,) counts the tokens that are not padding.
    """

    hidden: Tensor
    cache: Any
    mask: Tensor | None
    lengths: Tensor

    def fork(self, rows: Tensor) -> Prefix:
        """Return the prefix of prompt ``rows[i]`` as row i. The cache is copied, never changed in place."""
        cache = copy.copy(self.cache)
        cache.layers = [copy.copy(layer) for layer in self.cache.layers]
        cache.batch_select_indices(rows)
        mask = None if self.mask is None else self.mask[rows]
        return Prefix(self.hidden[rows], cache, mask, self.lengths[rows])

    def detached(self) -> tuple[Prefix, list[Tensor], list[Tensor]]:
        """Return a copy with a graph of its own; its leaves, and the tensors of this prefix that they are copies of."""
        roots: list[Tensor] = []
        leaves: list[Tensor] = []

        def leaf(x: Tensor) -> Tensor:
            if not x.requires_grad:
                return x
            roots.append(x)
            leaves.append(x.detach().requires_grad_())
            return leaves[-1]

        cache = copy.copy(self.cache)
        cache.layers = [copy.copy(layer) for layer in self.cache.layers]
        for layer in cache.layers:
            layer.keys, layer.values = leaf(layer.keys), leaf(layer.values)
        return Prefix(leaf(self.hidden), cache, self.mask, self.lengths), roots, leaves

    def select(self, rows: Tensor) -> None:
        """Replace row i by row ``rows[i]``, cache included; a row that stays costs nothing."""
        self.lengths = self.lengths[rows]
        self.mask = None if self.mask is None else self.mask[rows]
        moved = (rows != torch.arange(len(rows), device=rows.device)).nonzero().squeeze(-1)
        for layer in self.cache.layers:
            for kept in (layer.keys, layer.values):
                kept[moved] = kept[rows[moved]]


def prefill(network: CausalNetwork, ids: Tensor, mask: Tensor | None) -> Prefix:
    """Run left-padded prompts ``ids`` (rows, length) through the network once.

    :raises TypeError: if the network keeps anything but the keys and values of attention layers.
    """
    rows, length = ids.shape
    lengths = torch.full((rows,), length, device=ids.device) if mask is None else mask.sum(-1)
    hidden, cache = network.hidden(ids, mask, positions_of(ids, mask))
    layers = getattr(cache, "layers", [])
    if not layers or not all(isinstance(layer, DynamicLayer) and not hasattr(layer, "conv_states") for layer in layers):
        raise TypeError(
            f"{type(network.network).__name__} keeps more than the keys and values of attention layers "
            "(recurrent and hybrid networks do): completions cannot share the prefill of their prompt"
        )
    return Prefix(hidden[:, -1], cache, mask, lengths)


def extend(network: CausalNetwork, prefix: Prefix, ids: Tensor, done: int = 0) -> Tensor:
    """Return hidden states (rows, new, width) of ``ids`` (rows, new) that follow a prefix and ``done`` earlier tokens.

    The prefix's cache grows by the new tokens.
    """
    rows, new = ids.shape
    steps = torch.arange(done, done + new, device=ids.device)
    mask = prefix.mask
    if mask is not None:
        mask = torch.cat([mask, mask.new_ones((rows, done + new))], dim=-1)
    hidden, prefix.cache = network.hidden(ids, mask, prefix.lengths[:, None] + steps, prefix.cache)
    return hidden
