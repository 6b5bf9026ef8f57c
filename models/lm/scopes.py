"""What holds inside a block, whatever holds around it: a turn, a seed, gradients, and who draws completions.

The random state and Pyro's stack of handlers are one for the whole process, and threads take turns at them. A turn is
taken for each run, for each block with a seed, and for each draw of completions. Turns nest: inside a turn its own
thread takes further ones, and so does a thread that was started in its context
(``contextvars.copy_context().run``), one after another.
"""

from __future__ import annotations

import contextlib
import os
import threading
import warnings
from collections.abc import Iterator
from contextvars import ContextVar
from typing import TypeVar

import torch

T = TypeVar("T")
PATIENCE = 60.0  # seconds after which a thread says for which one it waits


@contextlib.contextmanager
def having(variable: ContextVar[T], value: T) -> Iterator[None]:
    """Give a variable a value inside the block."""
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


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


@contextlib.contextmanager
def differentiating() -> Iterator[None]:
    """Record gradients in the block, also where its caller is in ``torch.no_grad`` or ``torch.inference_mode``.

    :raises ValueError: if the block differentiates through a tensor that was made in inference mode, which PyTorch
        refuses.
    """
    with torch.inference_mode(False), torch.enable_grad():
        try:
            yield
        except RuntimeError as error:
            if "nference tensor" not in str(error) or type(error) is not RuntimeError:
                raise
            raise ValueError(
                f"a network or a tensor was made inside torch.inference_mode ({str(error).partition('.')[0]}): make or "
                "load it outside, or give a copy, x.clone(), that was made outside"
            ) from error


_allowed: ContextVar[bool] = ContextVar("bayeslm_samplers", default=True)


@contextlib.contextmanager
def drawing_by_samplers(allowed: bool) -> Iterator[None]:
    """Draw by the language models' samplers inside the block, or always by the library's own decoding."""
    with having(_allowed, allowed):
        yield


def samplers_allowed() -> bool:
    """Whether language models draw by their samplers here."""
    return _allowed.get()


def _forget_other_threads() -> None:
    """Free the process's lock in a child process, in which the thread that holds it does not exist."""
    _PROCESS.lock = threading.Lock()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_forget_other_threads)
