"""Counts of forward passes and tokens, and differences between two scores of the same tokens."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .scopes import having


@dataclass
class DrawnElsewhere:
    """Completions that a sampler drew, and how far its log s is from this library's log p.

    :param draws: their number.
    :param stale: those that older weights drew.
    :param tokens: of all draws.
    :param largest: |log p - log s| of a token.
    :param total: the sum of |log p - log s| over tokens.
    :param log_weights: log of the sum over draws of p / s.
    :param log_squares: log of the sum of (p / s)^2.
    :param warned: whether a warning has said that they differ much.
    """

    draws: int = 0
    stale: int = 0
    tokens: int = 0
    largest: float = 0.0
    total: float = 0.0
    log_weights: float = -math.inf
    log_squares: float = -math.inf
    warned: bool = False

    def add(self, other: DrawnElsewhere) -> None:
        self.draws, self.stale = self.draws + other.draws, self.stale + other.stale
        self.tokens += other.tokens
        self.largest, self.total = max(self.largest, other.largest), self.total + other.total
        self.log_weights = float(np.logaddexp(self.log_weights, other.log_weights))
        self.log_squares = float(np.logaddexp(self.log_squares, other.log_squares))
        self.warned |= other.warned

    def stats(self) -> dict[str, Any]:
        """Return the figures of a run; none without draws."""
        if not self.draws:
            return {}
        ess = math.exp(2 * self.log_weights - self.log_squares) / self.draws
        difference = [self.largest, self.total / max(self.tokens, 1)]
        return {"sampler_draws": self.draws, "sampler_difference": difference, "sampler_ess": ess} | (
            {"sampler_stale": self.stale} if self.stale else {}
        )


@dataclass
class Usage:
    """Forward passes, and token positions pushed through them."""

    model_calls: int = 0
    tokens: int = 0
    drawn: DrawnElsewhere = field(default_factory=DrawnElsewhere)
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
        drawn = asdict(self.drawn) if self.drawn.draws else None
        return {"model_calls": self.model_calls, "tokens": self.tokens, "mismatch": mismatch, "drawn": drawn}

    @staticmethod
    def total(states: Sequence[Mapping[str, Any]]) -> Usage:
        """Return the counts of several processes together, from what their `state_dict` returned."""
        usage = Usage(*(sum(state[name] for state in states) for name in ("model_calls", "tokens")))
        if noted := [state["mismatch"] for state in states if state["mismatch"] is not None]:
            largest, total, count = zip(*noted, strict=True)
            usage._mismatch = torch.tensor(max(largest)), torch.tensor(sum(total)), torch.tensor(int(sum(count)))
        for drawn in [state["drawn"] for state in states if state["drawn"] is not None]:
            usage.drawn.add(DrawnElsewhere(**drawn))
        return usage

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from the counts that `state_dict` returned."""
        vars(self).update(vars(Usage.total([state])))


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
    with having(_active, usages):
        yield


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


def note_drawn(difference: Tensor, tokens: int, stale: int, differs: bool) -> bool:
    """Record draws of a sampler, and return whether a warning of their difference is still to be given.

    :param difference: log p - log s of their tokens, (row, token), 0 where there is no token; on the CPU.
    :param tokens: how many there are.
    :param stale: how many of the draws older weights made.
    :param differs: whether this is more than what a warning says.
    """
    weights = difference.sum(-1).nan_to_num(nan=0.0, neginf=-1e4)  # -inf, where log p is
    size = difference.abs().where(difference.isfinite(), 0.0)
    new = DrawnElsewhere(
        draws=len(difference),
        stale=stale,
        tokens=tokens,
        largest=float(size.max()),
        total=float(size.sum()),
        log_weights=float(weights.logsumexp(0)),
        log_squares=float((2 * weights).logsumexp(0)),
        warned=differs,
    )
    said = any(usage.drawn.warned for usage in _active.get())
    for usage in _active.get():
        usage.drawn.add(new)
    return not said
