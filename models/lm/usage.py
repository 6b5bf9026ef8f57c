"""Counts of forward passes and tokens, and the difference of two passes over the same tokens."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class Usage:
    """Forward passes, and token positions pushed through them."""

    model_calls: int = 0
    tokens: int = 0
    _mismatch: tuple[Tensor, Tensor, Tensor] | None = None  # largest, sum and count, on the device

    @property
    def mismatch(self) -> tuple[float, float] | None:
        """The largest and the mean |log q computed in sampling - log q computed for a gradient| of a token.

        These are two passes through the same network, whose rounding differs: about 1e-6 in float32, more in bfloat16.
        None if no completions had both.
        """
        if self._mismatch is None:
            return None
        largest, total, count = (float(x) for x in self._mismatch)
        return largest, total / max(count, 1.0)

    def state_dict(self) -> dict[str, Any]:
        """Return all counts as plain numbers."""
        mismatch = None if self._mismatch is None else [float(x) for x in self._mismatch]
        return {"model_calls": self.model_calls, "tokens": self.tokens, "mismatch": mismatch}

    @staticmethod
    def total(states: Sequence[Mapping[str, Any]]) -> Usage:
        """Return the counts of several processes together, from what their `state_dict` returned."""
        usage = Usage(*(sum(state[name] for state in states) for name in ("model_calls", "tokens")))
        if noted := [state["mismatch"] for state in states if state["mismatch"] is not None]:
            largest, total, count = zip(*noted, strict=True)
            usage._mismatch = torch.tensor(max(largest)), torch.tensor(sum(total)), torch.tensor(int(sum(count)))
        return usage

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from the counts that `state_dict` returned."""
        self.model_calls, self.tokens = state["model_calls"], state["tokens"]
        if state["mismatch"] is not None:
            largest, total, count = state["mismatch"]
            self._mismatch = torch.tensor(largest), torch.tensor(total), torch.tensor(int(count))


_active: ContextVar[tuple[Usage, ...]] = ContextVar("bayeslm_usage", default=())


@contextlib.contextmanager
def count_usage() -> Iterator[Usage]:
    """Count the forward passes and tokens of every network used inside the block.

    The passes of a gradient count where its scores were computed, whenever its backward pass runs.
    """
    usage = Usage()
    with counting((*_active.get(), usage)):
        yield usage


def active_usages() -> tuple[Usage, ...]:
    """Return the counters of the enclosing `count_usage` blocks."""
    return _active.get()


@contextlib.contextmanager
def counting(usages: tuple[Usage, ...]) -> Iterator[None]:
    """Count in ``usages`` alone inside the block: a backward pass may run in a thread that has no counters."""
    token = _active.set(usages)
    try:
        yield
    finally:
        _active.reset(token)


def count_pass(tokens: int) -> None:
    """Count one forward pass over so many token positions."""
    for usage in _active.get():
        usage.model_calls += 1
        usage.tokens += tokens


def note_mismatch(difference: Tensor, where: Tensor) -> None:
    """Record differences between two scores of the same tokens, at those of ``where`` (bool, same shape)."""
    size = difference.abs().where(where & difference.isfinite(), 0.0)
    for usage in _active.get():
        new = (size.amax(), size.sum(), where.sum())
        if usage._mismatch is not None:
            old = [x.to(size.device) for x in usage._mismatch]
            new = (torch.maximum(old[0], new[0]), old[1] + new[1], old[2] + new[2])
        usage._mismatch = new
