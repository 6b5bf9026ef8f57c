"""What is one for the whole process: the random state and Pyro's stack of handlers, at which threads take turns.

A turn is taken for each run, for each block with a seed, and for each draw of completions. Turns nest: inside a turn
its own thread takes further ones, and so does a thread that was started in its context
(``contextvars.copy_context().run``), one after another.
"""

from __future__ import annotations

import contextlib
import os
import threading
import warnings
from collections.abc import Iterator
from contextvars import ContextVar

import torch

PATIENCE = 60.0  # seconds after which a thread says for which one it waits


class _Turn:
    """A turn; turns inside it are taken by its lock.

    ``holder`` is the name of the thread that has the one inside.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.holder = ""
        self.is_over = False


_PROCESS = _Turn()
_current: ContextVar[_Turn] = ContextVar("bayeslm_turn", default=_PROCESS)


@contextlib.contextmanager
def exclusive() -> Iterator[None]:
    """Wait for the turn of this thread, and have it for the block. Ctrl-C ends the waiting."""
    outer = _current.get()
    if outer.is_over:  # a thread that has outlived the run that started it
        outer = _PROCESS
    lock = outer.lock
    while not lock.acquire(timeout=PATIENCE):
        warnings.warn(
            f"thread {threading.current_thread().name!r} has waited for {PATIENCE:.0f} seconds for thread "
            f"{outer.holder!r}: runs and draws take turns, because Pyro's handlers and the random state are one for "
            "the process. If that thread waits for this one (a reward that infers or draws in threads of its own), "
            "neither ends: start this one with contextvars.copy_context().run(...)",
            RuntimeWarning,
            stacklevel=3,
        )
    inside = _Turn()
    _current.set(inside)
    outer.holder = threading.current_thread().name
    try:
        yield
    finally:
        inside.is_over = True
        _current.set(outer)
        lock.release()


@contextlib.contextmanager
def forked(seed: int) -> Iterator[None]:
    """Seed the CPU's random numbers for the block, and restore their state after it."""
    with exclusive(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # `torch.manual_seed` changes those of all other devices too
        yield


def _forget_other_threads() -> None:
    """Free the process's lock in a child process, in which the thread that holds it does not exist."""
    _PROCESS.lock = threading.Lock()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_forget_other_threads)
