"""One process at a time: a lock that the system gives back when its process ends, however it ends."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout


@contextlib.contextmanager
def locked(path: Path, held: str) -> Iterator[None]:
    """Hold a lock on a file in the block. Where none can be had, as on a disk that refuses to write, there is none.

    :param held: what the error says.
    :raises BlockingIOError: at once, if the lock is held already.
    """
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise BlockingIOError(held) from None
    except (OSError, NotImplementedError):
        pass
    try:
        yield
    finally:
        lock.release()
