"""Calls of functions that users write: on copies of their arguments, awaited if asynchronous, within a time limit.

What a function sets for the whole process ends with its call: whether gradients are on, the default type, and the seed
of torch's random numbers, from which a run would draw the same ones after each call. Numbers that it draws from torch's
generator count, as ever.

A limit stops a call in one of three ways:

- In the main thread, on POSIX, a timer interrupts the call: it stops Python code, and waiting for a file, a socket, a
  lock or `time.sleep`. It does not stop an extension that computes without returning to Python.
- In other threads, and on Windows, the call runs in a thread of its own. At the limit it is abandoned: Python cannot
  end a thread, so it works on in the background, and its result is dropped. An extension that holds the interpreter's
  lock holds up the limit too.
- A coroutine is cancelled, at its next ``await``.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
import copy
import inspect
import os
import signal
import threading
import time
from collections.abc import Awaitable, Callable, MutableMapping, MutableSequence, MutableSet
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .rehearsal import watching_seed

_ATOMS = frozenset({str, int, float, bool, type(None)})
LONGEST = 1e9  # seconds, which every system's timers take
_AGAIN = 0.2  # seconds after which a call that went on in spite of the timer is interrupted again


class TimeLimitError(Exception):
    """A call took longer than its time limit."""


class _Interrupt(BaseException):  # which the function's own `except Exception` lets through
    """Ends a call at its time limit."""


def copied(value: Any) -> Any:
    """Return a copy of a container with all containers, arrays and tensors in it; other objects are shared."""
    if type(value) in _ATOMS:
        return value
    new: Any
    if isinstance(value, list | MutableSequence):  # list first: abstract classes are slow to ask
        new = copy.copy(value)
        if not _ATOMS.issuperset(map(type, new)):
            new[:] = map(copied, value)
        return new
    if isinstance(value, MutableMapping):
        new = copy.copy(value)
        for key, x in value.items():
            new[key] = copied(x)
        return new
    if isinstance(value, tuple):
        return value._make(map(copied, value)) if hasattr(value, "_make") else tuple(map(copied, value))
    if isinstance(value, np.ndarray) and value.dtype.hasobject:
        new = value.copy()
        for index, x in np.ndenumerate(value):
            new[index] = copied(x)
        return new
    if isinstance(value, MutableSet | np.ndarray):
        return copy.copy(value)
    return value.clone() if isinstance(value, Tensor) else value


def check_timeout(timeout: float | None) -> None:
    """Refuse a time limit that is no positive number of seconds.

    :raises ValueError: if it is not positive and finite, or None.
    """
    if timeout is not None and not 0 < timeout < LONGEST:
        raise ValueError(
            f"timeout must be a positive number of seconds below {LONGEST:g}, or None for no limit, got {timeout}"
        )


def call(function: Callable[[], Any], timeout: float | None) -> Any:
    """Return a function's result, awaited if it is a coroutine.

    :param timeout: the time limit in seconds; None for no limit.
    :raises TimeLimitError: at the limit.
    """
    dtype = torch.get_default_dtype()
    with torch.set_grad_enabled(torch.is_grad_enabled()), watching_seed():
        try:
            if timeout is None:
                result = function()
                return _awaited(result, None) if inspect.isawaitable(result) else result
            start = time.monotonic()
            in_main = threading.current_thread() is threading.main_thread() and hasattr(signal, "setitimer")
            result = (_interrupted if in_main else _abandoned)(function, timeout)
            return _awaited(result, timeout - (time.monotonic() - start)) if inspect.isawaitable(result) else result
        finally:
            torch.set_default_dtype(dtype)


def _interrupted(function: Callable[[], Any], timeout: float) -> Any:
    """Call a function in the main thread, and interrupt it at the limit."""
    start, mine, outer = time.monotonic(), _Interrupt(), signal.getsignal(signal.SIGALRM)
    delay, interval = signal.getitimer(signal.ITIMER_REAL)  # of a limit around this one, or of the program
    rang = False

    def ring(number: int, frame: Any) -> None:
        nonlocal delay, rang
        remaining = start + timeout - time.monotonic()
        if remaining <= 0:
            rang = True
            signal.setitimer(signal.ITIMER_REAL, _AGAIN)
            raise mine
        signal.setitimer(signal.ITIMER_REAL, remaining)
        delay = interval
        if callable(outer):
            outer(number, frame)

    try:
        signal.signal(signal.SIGALRM, ring)
        signal.setitimer(signal.ITIMER_REAL, min(timeout, delay or timeout))
        try:
            result = function()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except BaseException as error:
        if not rang or (error is not mine and isinstance(error, KeyboardInterrupt | _Interrupt)):
            raise
        raise TimeLimitError from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL if outer is None else outer)
        if delay:
            signal.setitimer(signal.ITIMER_REAL, max(delay - (time.monotonic() - start), 1e-3), interval)
    if rang:  # a result in the place of the interruption, such as the default of a bare `except`
        raise TimeLimitError
    return result


def _abandoned(function: Callable[[], Any], timeout: float) -> Any:
    """Call a function in a thread of its own, which is abandoned at the limit."""
    context, device, gradient = contextvars.copy_context(), torch.get_default_device(), torch.is_grad_enabled()
    future: concurrent.futures.Future[Any] = concurrent.futures.Future()

    def work() -> None:
        try:
            with torch.device(device), torch.set_grad_enabled(gradient):
                future.set_result(context.run(function))
        except BaseException as error:  # KeyboardInterrupt comes in the main thread only
            future.set_exception(error)

    threading.Thread(target=work, name="bayeslm-reward", daemon=True).start()
    return _result(future, timeout)


def _awaited(awaitable: Awaitable[Any], timeout: float | None) -> Any:
    """Wait for a coroutine in the event loop of `_event_loop`, and cancel it at the limit or at Ctrl-C."""

    async def wait() -> Any:
        return await awaitable

    loop = _event_loop()
    future = asyncio.run_coroutine_threadsafe(wait(), loop)
    try:
        return _result(future, timeout)
    except BaseException:
        if not future.done():
            future.cancel()
            _abandon_if_blocked(loop)
        raise


def _result(future: concurrent.futures.Future[Any], timeout: float | None) -> Any:
    """Return a future's result; its own `TimeoutError` is none of the limit."""
    done, _ = concurrent.futures.wait([future], timeout)
    if not done:
        raise TimeLimitError
    return future.result()


_lock = threading.Lock()
_loops: list[asyncio.AbstractEventLoop] = []  # at most one; coroutines may keep connections that belong to it


def _event_loop() -> asyncio.AbstractEventLoop:
    """Return the running event loop of a thread of its own; another one for a coroutine that runs in it."""
    with _lock:
        if _loops:
            try:
                inside = asyncio.get_running_loop() is _loops[0]
            except RuntimeError:
                inside = False
            if not inside:
                return _loops[0]
        loop = asyncio.new_event_loop()
        threading.Thread(target=loop.run_forever, name="bayeslm-coroutines", daemon=True).start()
        if not _loops:
            _loops.append(loop)
        return loop


def _abandon_if_blocked(loop: asyncio.AbstractEventLoop) -> None:
    """Use another event loop from now on, if a coroutine does not let this one go on."""
    alive = threading.Event()
    loop.call_soon_threadsafe(alive.set)
    if not alive.wait(_AGAIN):
        with _lock:
            _loops[:] = [x for x in _loops if x is not loop]


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_loops.clear)  # a thread does not survive a fork
