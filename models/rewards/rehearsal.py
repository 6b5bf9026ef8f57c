"""Arbitrary scores in the place of rewards, for runs of a program that try it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any
from zlib import crc32

_active: ContextVar[str | None] = ContextVar("rehearsal", default=None)


@contextmanager
def rehearsal(*, calls: bool = False) -> Iterator[None]:
    """Within, each `Reward` gives a number between 0 and 1 that depends on prompt and completion alone.

    :param calls: call the reward's function too, and check what it returns, so that its errors appear early.
    """
    token = _active.set("calls" if calls else "silent")
    try:
        yield
    finally:
        _active.reset(token)


def is_rehearsal() -> bool:
    """Return whether rewards are to give arbitrary scores, and call no function."""
    return _active.get() == "silent"


def is_trial() -> bool:
    """Return whether rewards are to give arbitrary scores after they have called their functions."""
    return _active.get() == "calls"


def arbitrary_scores(prompts: Sequence[Any], completions: Sequence[str]) -> list[float]:
    """Return a number for each completion."""
    pairs = zip(prompts, completions, strict=True)
    return [crc32(repr(pair).encode("utf-8", "surrogatepass")) / 2**32 for pair in pairs]
