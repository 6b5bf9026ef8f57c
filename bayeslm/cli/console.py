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
    from bayeslm.inference import EvidenceError, RunError

    try:
        yield
        return
    except (Exception, KeyboardInterrupt) as error:
        so_far = error.so_far if isinstance(error, RunError) else None
        cause = error if so_far is None else error.__cause__
        notes = [note for x in dict.fromkeys((cause, error)) for note in getattr(x, "__notes__", [])]
        if isinstance(cause, KeyboardInterrupt):
            results = notes or ["before there was a result" if so_far is None else f"the run had {so_far}"]
            message, code = "interrupted: " + "\n".join(results), INTERRUPTED
        elif isinstance(cause, ValueError | TypeError | OSError | ImportError | FloatingPointError):
            code = NO_POSTERIOR if isinstance(cause, EvidenceError) else FAILED
            message = "\n".join([str(cause).partition("\nTrace Shapes:")[0].strip(), *notes])  # Pyro appends a trace
        else:
            raise
    err_console.print(f"bayeslm: {message}", style="red", markup=False, highlight=False)
    raise typer.Exit(code)
