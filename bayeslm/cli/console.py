"""Consoles and exit codes of all commands, and errors in one line."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import typer
from rich.console import Console, ConsoleDimensions, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.status import Status
from rich.text import Text

from bayeslm.visible import message_of, visible

UNBROKEN = 10**6  # columns where no terminal wraps lines


class UsageError(ValueError):
    """The command line or a settings file is wrong; nothing was run."""


class PlainConsole(Console):
    """A console that shows every string unchanged, without markup, and what a terminal would obey as escapes.

    Where there is no terminal, lines are not wrapped.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **settings)

    @property
    def size(self) -> ConsoleDimensions:
        return super().size if self.is_terminal else ConsoleDimensions(UNBROKEN, 25)

    @size.setter
    def size(self, new_size: tuple[int, int]) -> None:
        self._width, self._height = new_size

    def render_str(self, text: str, **settings: Any) -> Text:
        return super().render_str(visible(text), **settings)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        for segment in super().render(renderable, options):  # of texts that were made elsewhere
            yield segment if segment.control else Segment(visible(segment.text), segment.style)

    def status(self, status: RenderableType, **settings: Any) -> Status:
        return super().status(content(status) if isinstance(status, str) else status, **settings)


def content(text: str, style: str = "") -> Text:
    """Return a text of a model or a file to print."""
    return Text(visible(text), style)


out_console = PlainConsole()
err_console = PlainConsole(stderr=True)

TRACEBACK = "BAYESLM_TRACEBACK"  # set in the environment, it shows where an error was raised

FAILED, USAGE, NO_POSTERIOR, INTERRUPTED = 1, 2, 3, 130  # exit codes; docs/command-line.md says when
OUT_OF_MEMORY = (
    "not enough memory",
    "out of memory",
    "can't allocate memory",
    "Unable to allocate",
)  # torch's, NumPy's


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Print one line instead of a traceback for an error, and exit.

    An error of a kind that inputs do not cause is shown with its type, and how to see where it was raised.

    :raises typer.Exit: after an error, Ctrl-C, or a signal that asks the process to end.
    """
    with _signals_as_ctrl_c() as received:
        try:
            with warnings.catch_warnings(), _one_line():
                warnings.showwarning = _show_warning
                yield
        except typer.Exit as end:
            raise typer.Exit(
                128 + received[0] if received and end.exit_code == INTERRUPTED else end.exit_code
            ) from None


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: Any = None,
    line: str | None = None,
) -> None:
    """Print a warning in one line, with the place that gave it if it is not written for users."""
    if issubclass(category, FutureWarning):  # of libraries, for those who write programs with them
        return
    for_users = category is UserWarning or category.__module__.startswith("bayeslm")
    place = "" if for_users else f" ({category.__name__}, {filename}:{lineno})"
    err_console.print(f"! {' '.join(str(message).split())}{place}", style="yellow")


@contextlib.contextmanager
def _signals_as_ctrl_c() -> Iterator[list[int]]:
    """Let SIGTERM and SIGHUP do what Ctrl-C does, so that what there is until then is kept.

    A signal that the caller ignores, as nohup does SIGHUP, stays ignored. A terminal that has gone is not written to.

    :returns: the signals that have come.
    """
    received: list[int] = []

    def end(number: int, _: object) -> None:
        received.append(number)
        if number != signal.SIGTERM:
            for stream in (1, 2):
                if os.isatty(stream):
                    os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        raise KeyboardInterrupt

    named = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    if threading.current_thread() is not threading.main_thread():
        named = []  # handlers are the main thread's
    replaced = [number for number in named if signal.getsignal(number) == signal.SIG_DFL]
    for number in replaced:
        signal.signal(number, end)
    try:
        yield received
    finally:
        for number in replaced:
            signal.signal(number, signal.SIG_DFL)


@contextlib.contextmanager
def _one_line() -> Iterator[None]:
    try:
        yield
        sys.stdout.flush()  # here, where a reader that has closed the pipe is no error to describe
        return
    except (typer.Exit, typer.Abort):
        raise
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains at its end
        raise typer.Exit(FAILED) from None
    except (Exception, KeyboardInterrupt) as error:
        if os.environ.get(TRACEBACK):
            raise
        message, code = _explained(error)
    err_console.print(f"bayeslm: {message}", style="red")
    raise typer.Exit(code)


def _explained(error: BaseException) -> tuple[str, int]:
    """Return what to print for an error, and the exit code."""
    inference = sys.modules.get("bayeslm.inference")  # what is refused before a run has not imported PyTorch
    so_far = error.so_far if inference is not None and isinstance(error, inference.RunError) else None
    cause = error if so_far is None else error.__cause__
    notes = [note for x in dict.fromkeys((cause, error)) for note in getattr(x, "__notes__", [])]
    if isinstance(cause, KeyboardInterrupt):
        results = notes or ["before there was a result" if so_far is None else f"the run had {so_far}"]
        return "interrupted: " + "\n".join(results), INTERRUPTED
    has_none = inference is not None and isinstance(cause, inference.EvidenceError)
    code = NO_POSTERIOR if has_none else USAGE if isinstance(cause, UsageError) else FAILED
    return "\n".join([_describe(cause), *notes]), code


def _describe(error: BaseException | None) -> str:
    """Return an error in one line, or the lines of a message of our own."""
    text = "" if error is None else message_of(error)
    if isinstance(error, MemoryError) or any(sign in text for sign in OUT_OF_MEMORY):
        first = text.splitlines()[0] if text else "an array did not fit"
        return f"not enough memory ({first}): take a smaller --batch-size, or fewer draws or prompts"
    if isinstance(error, OSError) and error.filename is not None and error.strerror and text.startswith("[Errno"):
        return f"{os.fsdecode(error.filename)}: {error.strerror.lower()}"  # a file's name, not its repr
    if isinstance(error, ValueError | TypeError | OSError | ImportError | FloatingPointError) and text:
        return text
    first = text.splitlines()[0] if text else "no message"
    return f"unexpected {type(error).__name__}: {first} (with {TRACEBACK}=1 in the environment: where)"
