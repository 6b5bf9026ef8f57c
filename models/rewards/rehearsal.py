"""Arbitrary scores in the place of rewards, for runs of a program that try its shapes: no reward is called for them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any
from zlib import crc32

_active: ContextVar[bool] = ContextVar("rehearsal", default=False)


@contextmanager
def rehearsal() -> Iterator[None]:
    """Within, each `Reward` gives a number between 0 and 1 that depends on prompt and completion alone."""
    token = _active.set(True)
    try:
        yield
    finally:
        _active.reset(token)


def is_rehearsal() -> bool:
    """Return whether rewards are to give arbitrary scores."""
    return _active.get()


def arbitrary_scores(prompts: Sequence[Any], completions: Sequence[str]) -> list[float]:
    """Return a number for each completion."""
    pairs = zip(prompts, completions, strict=True)
    return [crc32(repr(pair).encode("utf-8", "surrogatepass")) / 2**32 for pair in pairs]
