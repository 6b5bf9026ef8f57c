"""Strings that end a text, as an automaton over token ids.

The state after some tokens is the longest end of their text that is a beginning of a stop string. It depends on the
state before and on the characters of the new token alone, so that whether a text has ended is a function of its ids,
and a distribution that stops there is normalised. A token is read as what it adds to a word; a token that is a part of
a character is read as no stop string.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Stops:
    """Stop strings of a tokenizer.

    :param strings: the strings.
    :param table: the state (state, token) after each token; the last state is that of a text that holds a stop string.
    """

    strings: tuple[str, ...]
    table: Tensor = field(repr=False, compare=False)

    @property
    def ended(self) -> int:
        """The state of texts that hold a stop string."""
        return len(self.table) - 1

    def start(self, rows: int) -> Tensor:
        """Return the states (row,) of texts of no tokens."""
        return torch.zeros(rows, dtype=torch.long, device=self.table.device)

    def after(self, states: Tensor, tokens: Tensor) -> Tensor:
        """Return the states after one more token; both of the same shape, or broadcast."""
        return self.table[states, tokens.clamp(0, self.table.shape[1] - 1)]

    def states(self, values: Tensor) -> Tensor:
        """Return the states (..., T) after each token of completions (..., T)."""
        state, found = self.start(1).expand(values.shape[:-1]), []
        for token in values.unbind(-1):
            state = self.after(state, token)
            found.append(state)
        return torch.stack(found, -1)

    def to(self, device: torch.device) -> Stops:
        """Return the same on another device."""
        return self if self.table.device == device else Stops(self.strings, self.table.to(device))
