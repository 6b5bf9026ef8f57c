"""Which of several processes that were launched together this one is. The first writes files and shows the progress."""

from __future__ import annotations

_rank = 0


def is_first() -> bool:
    """Return whether this process writes files: the only one, or rank 0 of several that run together."""
    return _rank == 0


def set_rank(rank: int) -> None:
    """Note the rank of this process among those that run together."""
    global _rank
    _rank = rank
