"""Prompts that a network has processed once, and the tokens that continue them.

Every completion of a prompt starts from the same keys and values: the prompt's forward pass is computed once
(`prefill`), each completion gets a copy of its cache (`Prefix.fork`), and new tokens extend it (`extend`). Drawing,
scoring and redrawing completions share a `PromptedNetwork`, which does so in batches of bounded memory.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .encoding import Base, Vocabulary
from .memory import Batches
from .network import CausalNetwork
from .truncation import Truncation


@dataclass
class Prefix:
    """Prompts after their forward pass, from which every continuation starts.

    ``hidden`` (rows, width) predicts the first new token; ``cache`` holds keys and values; ``mask`` (rows, length) is
    None without padding; ``lengths`` (rows,) counts the tokens that are not padding; ``taken`` (rows,) is False where
    the completion ends at once, None where none does. ``truncating`` is the same of the network whose tokens
    remain, see `PromptedNetwork`.
    """

    hidden: Tensor
    cache: Any
    mask: Tensor | None
    lengths: Tensor
    taken: Tensor | None = None
    truncating: Prefix | None = None

    def fork(self, rows: Tensor) -> Prefix:
        """Return the prefix of prompt ``rows[i]`` as row i. The cache is copied, never changed in place."""
        cache = copy.copy(self.cache)
        cache.layers = [copy.copy(layer) for layer in self.cache.layers]
        cache.batch_select_indices(rows)
        mask = None if self.mask is None else self.mask[rows]
        taken = None if self.taken is None else self.taken[rows]
        other = None if self.truncating is None else self.truncating.fork(rows)
        return Prefix(self.hidden[rows], cache, mask, self.lengths[rows], taken, other)

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
        return replace(self, hidden=leaf(self.hidden), cache=cache), roots, leaves

    def keep(self, rows: Tensor) -> None:
        """Drop all rows but these, in the cache one layer after another."""
        self.cache.batch_select_indices(rows)
        self.mask = None if self.mask is None else self.mask[rows]
        self.taken = None if self.taken is None else self.taken[rows]
        self.hidden, self.lengths = self.hidden[rows], self.lengths[rows]

    def select(self, rows: Tensor) -> None:
        """Replace row i by row ``rows[i]``, cache included; on a CPU a row that stays costs nothing."""
        self.lengths = self.lengths[rows]
        self.mask = None if self.mask is None else self.mask[rows]
        self.taken = None if self.taken is None else self.taken[rows]
        if rows.device.type != "cpu":  # which of them move is known there, and the host would wait for it
            self.cache.batch_select_indices(rows)
            return
        moved = (rows != torch.arange(len(rows), device=rows.device)).nonzero().squeeze(-1)
        for layer in self.cache.layers:
            for kept in (layer.keys, layer.values):
                kept[moved] = kept[rows[moved]]


def prefill(network: CausalNetwork, ids: Tensor, mask: Tensor | None) -> Prefix:
    """Run left-padded prompts ``ids`` (rows, length) through the network once."""
    return Prefix(*network.read(ids, mask))


def joined(parts: list[Prefix]) -> Prefix:
    """Return the prefix of the prompts of all parts."""
    first = parts[0]
    if len(parts) == 1:
        return first
    cache = copy.copy(first.cache)
    cache.layers = [copy.copy(layer) for layer in first.cache.layers]
    for i, layer in enumerate(cache.layers):
        layer.keys = torch.cat([part.cache.layers[i].keys for part in parts])
        layer.values = torch.cat([part.cache.layers[i].values for part in parts])

    def together(name: str) -> Tensor | None:
        each = [getattr(part, name) for part in parts]
        return None if each[0] is None else torch.cat(each)

    others: dict[str, Any] = {name: together(name) for name in ("hidden", "mask", "lengths", "taken")}
    truncating = [part.truncating for part in parts if part.truncating is not None]
    return Prefix(cache=cache, **others, truncating=joined(truncating) if truncating else None)


def extend(network: CausalNetwork, prefix: Prefix, ids: Tensor, done: int = 0) -> Tensor:
    """Return hidden states (rows, new, width) of ``ids`` (rows, new) that follow a prefix and ``done`` earlier tokens.

    The prefix's cache grows by the new tokens.
    """
    rows, new = ids.shape
    steps = torch.arange(done, done + new, device=ids.device)
    mask = prefix.mask
    if mask is not None:
        mask = torch.cat([mask, mask.new_ones((rows, done + new))], dim=-1)
    hidden, prefix.cache = network.hidden(ids, mask, positions_after(network, prefix.lengths, steps), prefix.cache)
    return hidden


def positions_after(network: CausalNetwork, lengths: Tensor, steps: Tensor) -> Tensor:
    """Return the positions (row, new) of new tokens, the ``steps``-th (new,) after prompts of some lengths (row,)."""
    positions = lengths[:, None] + steps
    if network.context_length is None:
        return positions
    return positions.clamp_max(network.context_length - 1)  # rows that have ended go on, and may be past it


@dataclass(frozen=True, eq=False)
class PromptedNetwork:
    """p(x_t | prompt, x_<t) for each of some prompts, and the sizes of batches that it is computed in.

    :param network: the network.
    :param vocabulary: the token ids of completions.
    :param prompt_ids: left-padded token ids, (prompt, length).
    :param prompt_mask: 1 at tokens that are not padding, same shape; None if no prompt is padded.
    :param max_new_tokens: the longest completion.
    :param temperature: divides the logits.
    :param truncation: what remains of the distribution of each token; None: all.
    :param truncating: the network, of the same prompts, by whose probabilities tokens remain, as the prior's of a
        policy; None: this one.
    :param taken: False at prompts whose completion ends at once, (prompt,); None where none does.
    :param base: what prompts begin with, its ``rows`` (prompt,); None where nothing is shared.
    :param batch_size: sequences in one forward pass at most; None: as many as bounded memory allows.
    :param micro_batch_size: of these, sequences whose activations are kept at once for a gradient.
    :param gradient_checkpointing: keep of each layer its input alone for the backward pass.
    """

    network: CausalNetwork
    vocabulary: Vocabulary
    prompt_ids: Tensor
    prompt_mask: Tensor | None
    max_new_tokens: int
    temperature: float
    truncation: Truncation | None
    truncating: PromptedNetwork | None
    taken: Tensor | None
    base: Base | None
    batch_size: int | None
    micro_batch_size: int | None
    gradient_checkpointing: bool

    @cached_property
    def batches(self) -> Batches:
        """How many prompts or rows a pass of bounded memory takes, where ``batch_size`` does not say."""
        batches = self.network.batches(self.prompt_ids.shape[-1], self.max_new_tokens)
        return batches if self.truncating is None else replace(batches, room=batches.room // 2)

    @property
    def version(self) -> Hashable:
        """A value that changes with the weights that its scores depend on."""
        return (self.network.version, None if self.truncating is None else self.truncating.version)

    @property
    def max_prompts(self) -> int:
        """How many prompts one forward pass reads."""
        return self.batch_size or self.batches.prefill

    @property
    def max_rows(self) -> int:
        """How many completions are drawn at once."""
        return self.batch_size or self.batches.decoding

    @property
    def max_rows_scored(self) -> int:
        """How many completions one forward pass scores."""
        return self.batch_size or self.batches.scoring(self.gradient_checkpointing or not self.network.findings.caches)

    @property
    def max_rows_with_gradient(self) -> int:
        """How many completions one micro-batch of a gradient takes."""
        fit = self.batches.gradient(self.gradient_checkpointing)
        return self.micro_batch_size or min(self.batch_size or fit, fit)

    @contextlib.contextmanager
    def drawing(self, rows: int) -> Iterator[PromptedNetwork]:
        """Give a copy that draws so many completions fast; see `CausalNetwork.drawing`."""
        if self.prompt_mask is not None or self.network.compiled is not None:
            _ = self.network.mask_dtype  # tried here once, and not for every copy
        with contextlib.ExitStack() as stack:
            other = None if self.truncating is None else stack.enter_context(self.truncating.drawing(rows))
            passes = -(-rows // self.max_rows) * (self.max_new_tokens - 1)
            network = stack.enter_context(self.network.drawing(passes))
            yield replace(self, network=network, truncating=other)

    def blocks(self, rows: Tensor, size: int) -> Iterator[tuple[Prefix, Tensor, Tensor]]:
        """Prefill ``size`` prompts at a time, each once, however many completions continue it.

        :param rows: the prompt that each completion continues, (row,).
        :returns: of each block the prefix, the indices into ``rows`` of its completions, and their rows in the prefix.
        """
        others = None if self.truncating is None else self.truncating.blocks(rows, size)
        for first in range(0, len(self.prompt_ids), size):
            block = slice(first, first + size)
            ids, mask = self.prompt_ids[block], None if self.prompt_mask is None else self.prompt_mask[block]
            prefix = self._continued(block, ids, mask) if self._shares_base else prefill(self.network, ids, mask)
            prefix.taken = None if self.taken is None else self.taken[block]
            if others is not None:
                with torch.no_grad():
                    prefix.truncating, _, _ = next(others)
            members = ((rows >= first) & (rows < first + size)).nonzero().squeeze(-1)
            yield prefix, members, rows[members] - first

    def prefixes(self, rows: Tensor, size: int) -> Iterator[tuple[Tensor, Prefix]]:
        """Give micro-batches of at most ``size``: indices into ``rows`` (row,), and the prefix of their prompts."""
        for prefix, members, prompts in self.blocks(rows, self.max_prompts):
            for part, prompt in zip(members.split(size), prompts.split(size), strict=True):
                if len(part):  # an empty tensor has one part
                    yield part, prefix.fork(prompt)

    def prefix(self, rows: Tensor) -> Prefix:
        """Return the prefix of prompts ``rows`` (row,), all in one batch; each prompt is prefilled once."""
        every = torch.arange(len(self.prompt_ids), device=rows.device)
        size = len(every) if self._reads_unevenly else self.max_prompts  # blocks that continue a base differ in length
        with torch.no_grad():
            return joined([prefix for prefix, _, _ in self.blocks(every, size)]).fork(rows)

    @property
    def tokens_read(self) -> int:
        """How many tokens go through the network where each prompt does once, padding counted."""
        prompts, length = self.prompt_ids.shape
        if not self._shares_base:
            return prompts * length
        assert self.base is not None
        shared = self.base.ids.shape[-1]
        return len(self.base.ids) * shared + prompts * (length - shared)

    @property
    def _shares_base(self) -> bool:
        """Whether prompts can continue the keys and values of what they begin with."""
        if self.base is None or len(self.base.ids) == len(self.prompt_ids):
            return False
        padded = torch.ones_like(self.base.ids) if self.base.mask is None else self.base.mask
        return self.network.takes_positions and self.network.pads_tokens and self.network.shares_prefill(padded)

    @property
    def _reads_unevenly(self) -> bool:
        """Whether prompts continue what they begin with, in this network or in that whose tokens remain."""
        return self._shares_base or (self.truncating is not None and self.truncating._reads_unevenly)

    def _continued(self, block: slice, ids: Tensor, mask: Tensor | None) -> Prefix:
        """Run a block of prompts through the network, what several of them begin with once."""
        assert self.base is not None
        used, row = self.base.rows[block].unique(return_inverse=True)
        begin = self.base.ids[used]
        begin_mask = torch.ones_like(begin) if self.base.mask is None else self.base.mask[used]
        prefix = prefill(self.network, begin, None if self.base.mask is None else begin_mask).fork(row)
        lengths = torch.full_like(row, ids.shape[-1]) if mask is None else mask.sum(-1)
        kept = lengths - begin_mask.sum(-1)[row]
        at = ids.shape[-1] - kept[:, None] + torch.arange(int(kept.max()), device=ids.device)
        tokens = ids.gather(-1, at.clamp_max(ids.shape[-1] - 1))
        return grown(self.network, begin[row], begin_mask[row], prefix, tokens, kept)


def grown(network: CausalNetwork, ids: Tensor, mask: Tensor, prefix: Prefix, tokens: Tensor, kept: Tensor) -> Prefix:
    """Return the prefix of prompts grown by the first ``kept[i]`` of row i's ``tokens`` (row, token).

    :param ids: of the prompts, (row, length), as ``mask``: read again where a network's cache cannot be moved.
    """
    longest = int(kept.max())
    if longest == 0:
        return prefix
    tokens, new = tokens[:, :longest], torch.arange(longest, device=tokens.device)
    ragged = bool((kept < longest).any())
    padded = ragged or prefix.mask is not None
    # what is in the cache: of prompts with a common beginning without the padding that others in their batch need
    cached = mask.new_ones((len(kept), int(prefix.lengths[0]))) if prefix.mask is None else prefix.mask
    mask = torch.cat([cached, (new < kept[:, None]).to(cached)], -1)
    # row i moves right by longest - kept[i]: the tokens that it does not keep become padding on the left
    length = mask.shape[-1]
    moved = (torch.arange(length, device=tokens.device) - (longest - kept)[:, None]) % length
    if ragged and not (network.takes_positions and network.shares_prefill(mask)):  # nothing can be moved
        text = torch.cat([ids, tokens], -1).gather(-1, moved)
        return replace(prefill(network, text, mask.gather(-1, moved)), taken=prefix.taken)
    hidden, cache = network.hidden(tokens, mask if padded else None, prefix.lengths[:, None] + new, prefix.cache)
    hidden = torch.cat([prefix.hidden[:, None], hidden], 1)
    if ragged:
        mask = mask.gather(-1, moved)
        for layer in cache.layers:
            for name in ("keys", "values"):
                x = getattr(layer, name)
                setattr(layer, name, x.gather(-2, moved[:, None, :, None].expand_as(x)))
    last = hidden[torch.arange(len(kept)), kept]
    return Prefix(last, cache, mask if padded else None, prefix.lengths + kept, prefix.taken)
