"""A network after each of some prompts, for drawing, scoring and redrawing completions."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .network import CausalNetwork
from .prefix import Prefix, prefill
from .vocabulary import Vocabulary


@dataclass(frozen=True, eq=False)
class PromptedNetwork:
    """p(x_t | prompt, x_<t) for each of some prompts, and the sizes of batches that it is computed in.

    :param network: the network.
    :param vocabulary: the token ids of completions.
    :param prompt_ids: left-padded token ids, (prompt, length).
    :param prompt_mask: 1 at tokens that are not padding, same shape; None if no prompt is padded.
    :param max_new_tokens: the longest completion.
    :param temperature: divides the logits.
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
    batch_size: int | None
    micro_batch_size: int | None
    gradient_checkpointing: bool

    @property
    def max_rows(self) -> int:
        """How many completions one forward pass of bounded memory takes."""
        return self.batch_size or self.network.rows_per_batch(self._length)

    @property
    def max_rows_with_gradient(self) -> int:
        """How many completions one micro-batch of a gradient takes."""
        fit = self.network.rows_per_micro_batch(self._length)
        return self.micro_batch_size or min(self.batch_size or fit, fit)

    @property
    def _length(self) -> int:
        return self.prompt_ids.shape[-1] + self.max_new_tokens

    @contextlib.contextmanager
    def drawing(self, rows: int) -> Iterator[PromptedNetwork]:
        """Give a copy that draws so many completions fast; see `CausalNetwork.drawing`."""
        with self.network.drawing(-(-rows // self.max_rows) * (self.max_new_tokens - 1)) as network:
            yield replace(self, network=network)

    def blocks(self, rows: Tensor, size: int) -> Iterator[tuple[Prefix, Tensor, Tensor]]:
        """Prefill ``size`` prompts at a time, each once, however many completions continue it.

        :param rows: the prompt that each completion continues, (row,).
        :returns: of each block the prefix, the indices into ``rows`` of its completions, and their rows in the prefix.
        """
        for first in range(0, len(self.prompt_ids), size):
            block = slice(first, first + size)
            mask = None if self.prompt_mask is None else self.prompt_mask[block]
            prefix = prefill(self.network, self.prompt_ids[block], mask)
            members = ((rows >= first) & (rows < first + size)).nonzero().squeeze(-1)
            yield prefix, members, rows[members] - first

    def prefixes(self, rows: Tensor) -> Iterator[tuple[Tensor, Prefix]]:
        """Give micro-batches of bounded memory: indices into ``rows`` (row,), and the prefix of their prompts."""
        size = self.max_rows
        for prefix, members, prompts in self.blocks(rows, size):
            for part, prompt in zip(members.split(size), prompts.split(size), strict=True):
                yield part, prefix.fork(prompt)

    def prefix(self, rows: Tensor) -> Prefix:
        """Return the prefix of prompts ``rows`` (row,), all in one batch; each prompt is prefilled once."""
        with torch.no_grad():
            return prefill(self.network, self.prompt_ids, self.prompt_mask).fork(rows)
