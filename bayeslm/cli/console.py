"""Consoles and exit codes of all commands, and errors in one line."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import typer
from rich.console import Console

out_console = Console()
err_console = Console(stderr=True)

# Exit codes other than 0 and typer's own 2 for wrong usage.
FAILED, NO_POSTERIOR, INTERRUPTED = 1, 3, 130


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Print one line instead of a traceback for an error that a user can correct, and exit.

    :raises typer.Exit: after such an error, or Ctrl-C.
    """
    from bayeslm.inference import EvidenceError

    code = FAILED
    try:
        yield
        return
    except EvidenceError as error:
        message, code = str(error), NO_POSTERIOR
    except KeyboardInterrupt as error:
        notes = getattr(error, "__notes__", []) or ["before there was a result"]
        message, code = "interrupted: " + "\n".join(notes), INTERRUPTED
    except (ValueError, TypeError, OSError, ImportError, FloatingPointError) as error:
        message = str(error).partition("\nTrace Shapes:")[0].strip()  # Pyro appends a trace to errors
        message += "".join(f"\n{note}" for note in getattr(error, "__notes__", []))
    err_console.print(f"bayeslm: {message}", style="red", markup=False, highlight=False)
    raise typer.Exit(code)
