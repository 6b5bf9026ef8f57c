"""One progress bar for everything that takes long."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Protocol

# Here, not where it is used: its import draws from Python's random numbers, which a seed has just set there.
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Report(Protocol):
    """Call it after each step with what to show beside the bar."""

    def __call__(self, advance: int = 1, values: Mapping[str, float] | None = None) -> None: ...


@contextlib.contextmanager
def track(what: str, total: int | None, enabled: bool = True) -> Iterator[Report]:
    """A bar of ``total`` steps on standard error (or in the notebook), gone when done; nothing where nobody looks."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[values]}"),
    )
    shown = enabled and (console.is_terminal or console.is_jupyter)
    with Progress(*columns, console=console, transient=True, disable=not shown) as bar:
        task = bar.add_task(what, total=total, values="")

        def report(advance: int = 1, values: Mapping[str, float] | None = None) -> None:
            text = "  ".join(f"{name} {value:.3g}" for name, value in (values or {}).items())
            bar.update(task, advance=advance, values=text)

        yield report
