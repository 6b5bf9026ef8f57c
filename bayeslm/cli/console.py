"""Consoles and exit codes of all commands, and errors in one line."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import typer
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.status import Status
from rich.text import Text

from bayeslm.visible import visible


class PlainConsole(Console):
    """A console that shows every string unchanged, without markup, and what a terminal would obey as escapes."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **settings)

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

# Exit codes other than 0 and typer's own 2 for wrong usage.
FAILED, NO_POSTERIOR, INTERRUPTED = 1, 3, 130
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

    :raises typer.Exit: after an error, or Ctrl-C.
    """
    from bayeslm.inference import EvidenceError, RunError

    try:
        yield
        return
    except (typer.Exit, typer.Abort):
        raise
    except (Exception, KeyboardInterrupt) as error:
        if os.environ.get(TRACEBACK):
            raise
        so_far = error.so_far if isinstance(error, RunError) else None
        cause = error if so_far is None else error.__cause__
        notes = [note for x in dict.fromkeys((cause, error)) for note in getattr(x, "__notes__", [])]
        if isinstance(cause, KeyboardInterrupt):
            results = notes or ["before there was a result" if so_far is None else f"the run had {so_far}"]
            message, code = "interrupted: " + "\n".join(results), INTERRUPTED
        else:
            code = NO_POSTERIOR if isinstance(cause, EvidenceError) else FAILED
            message = "\n".join([_describe(cause), *notes])
    err_console.print(f"bayeslm: {message}", style="red")
    raise typer.Exit(code)


def _describe(error: BaseException | None) -> str:
    """Return an error in one line, or the lines of a message of our own."""
    from bayeslm.inference.program import message_of

    text = "" if error is None else message_of(error)
    if isinstance(error, MemoryError) or any(sign in text for sign in OUT_OF_MEMORY):
        first = text.splitlines()[0] if text else "an array did not fit"
        return f"not enough memory ({first}): take a smaller --batch-size, or fewer --particles, --samples or prompts"
    if isinstance(error, ValueError | TypeError | OSError | ImportError | FloatingPointError) and text:
        return text
    first = text.splitlines()[0] if text else "no message"
    return f"unexpected {type(error).__name__}: {first} (with {TRACEBACK}=1 in the environment: where)"
