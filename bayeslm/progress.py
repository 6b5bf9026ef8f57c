"""The progress bar of all long computations."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Protocol

# Imported at the top, as the import draws from Python's random state, which a run that shows progress has just seeded.
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from bayeslm.visible import visible


class Report(Protocol):
    """A function to call after each step, with figures to show next to the bar, and a new label for it."""

    def __call__(
        self, advance: int = 1, values: Mapping[str, float] | None = None, what: str | None = None
    ) -> None: ...


@contextlib.contextmanager
def track(what: str, total: int | None, enabled: bool = True) -> Iterator[Report]:
    """Show a progress bar on standard error, or in the notebook, until the end of the block.

    :param what: the bar's label.
    :param total: the number of steps, or None if unknown.
    :param enabled: False shows nothing, as if standard error were not a terminal.
    """
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[values]}", markup=False),
    )
    shown = enabled and (console.is_terminal or console.is_jupyter)
    with Progress(*columns, console=console, transient=True, disable=not shown) as bar:
        task = bar.add_task(visible(what), total=total, values="")

        def report(advance: int = 1, values: Mapping[str, float] | None = None, what: str | None = None) -> None:
            text = "  ".join(f"{name} {value:.3g}" for name, value in (values or {}).items())
            description = None if what is None else visible(what)
            bar.update(task, advance=advance, values=visible(text), description=description)

        yield report
