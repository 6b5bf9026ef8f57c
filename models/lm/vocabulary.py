"""The token ids of completions: which end a completion, and which pads it after its end."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True)
class Vocabulary:
    """The token ids 0, ..., size - 1 of a network, and how a completion of T of them ends.

    :param size: number of tokens.
    :param eos_token_ids: the first of these in a completion ends it, and counts.
    :param pad_token_id: fills a completion after its end; it need not be a token of the network.
    """

    size: int
    eos_token_ids: tuple[int, ...]
    pad_token_id: int

    def is_eos(self, ids: Tensor) -> Tensor:
        """Return which tokens end a completion, bool of the same shape."""
        found = torch.zeros_like(ids, dtype=torch.bool)
        for token in self.eos_token_ids:  # compared with Python numbers, which need no transfer to the device
            found |= ids == token
        return found

    def is_live(self, values: Tensor) -> Tensor:
        """Return True up to and including the first EOS of completions (..., T), False on their padding."""
        ends = self.is_eos(values).long()
        return (ends.cumsum(-1) - ends) == 0

    def is_well_formed(self, values: Tensor) -> Tensor:
        """Return, for each token of completions (..., T), whether it is in range, or the pad id after the end."""
        in_range = (values >= 0) & (values < self.size)
        return torch.where(self.is_live(values), in_range, values == self.pad_token_id)

    def num_completions(self, length: int) -> int:
        """Return how many completions of at most ``length`` tokens exist.

        With E of V tokens ending one: the sum over t of (V-E)^(t-1) E that end at t, plus (V-E)^T that never end.
        """
        ends = len(self.eos_token_ids)
        alive = self.size - ends
        return sum(alive ** (t - 1) * ends for t in range(1, length + 1)) + alive**length

    def completions(self, length: int, device: torch.device) -> Tensor:
        """Enumerate all completions of at most ``length`` tokens, (completion, length)."""
        tokens = torch.arange(self.size, device=device)
        is_end = self.is_eos(tokens)
        alive = torch.empty((1, 0), dtype=torch.long, device=device)
        done = []
        for t in range(length):
            longer = torch.cat([alive.repeat_interleave(len(tokens), 0), tokens.repeat(len(alive))[:, None]], dim=-1)
            ended = is_end.repeat(len(alive))
            done.append(pad(longer[ended], (0, length - t - 1), value=self.pad_token_id))
            alive = longer[~ended]
        return torch.cat([*done, alive])
