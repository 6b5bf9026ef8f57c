"""The progress of all long computations.

A terminal and a notebook show one line that changes, with a bar; where there is neither, a line is written now and
then, so that a log shows that the run is alive. All of them read: what, steps, time, time left, figures.
"""

from __future__ import annotations

import contextlib
import html
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any, Protocol

# Imported at the top, as the import draws from Python's random state, which a run that shows progress has just seeded.
from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from bayeslm.visible import visible

INTERVAL = 30.0  # seconds from one line to the next where there is no terminal
LONG = 20.0  # seconds: a run that takes longer says what it does, and how long it will take,
MEASURED = 1.0  # when so many seconds of it have been measured
BUSY = 1.25  # load of a core, the run's own included, above which other work slows a run down
RECENT = 10  # steps whose speed is that of the time left: other work comes and goes
REFRESH = 0.25  # seconds from one display to the next in terminals and notebooks


_writing: ContextVar[Callable[[int], None] | None] = ContextVar("bayeslm_writing", default=None)
_quiet: ContextVar[bool] = ContextVar("bayeslm_quiet", default=False)


class Report(Protocol):
    """A function to call after each step, with figures to show, the most important first, and a new label."""

    def __call__(
        self, advance: int = 1, values: Mapping[str, float] | None = None, what: str | None = None
    ) -> None: ...


class _Progress:
    """How far a computation is, and the line that says so."""

    def __init__(self, what: str, total: int | None, done: int, plan: str, tokens: int | None = None) -> None:
        self.what, self.total, self.plan, self.tokens = visible(what), total, plan, tokens
        self.done = self._first = done
        self._written = 0  # tokens since the last step
        self._values = ""
        self._start = self._last = time.monotonic()
        self._recent: deque[tuple[float, int]] = deque([(self._start, 0)], maxlen=RECENT + 1)  # when so many were done
        self.has_plan = False  # said already

    def advance(self, by: int, values: Mapping[str, float] | None, what: str | None) -> None:
        self.done += by
        self._written = 0
        self._last = time.monotonic()
        self._recent.append((self._last, self.done - self._first))
        self._values = visible("  ".join(f"{name} {value:.3g}" for name, value in (values or {}).items()))
        self.what = self.what if what is None else visible(what)

    def write(self, tokens: int) -> None:
        self._written += tokens
        self._last = time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._start

    @property
    def left(self) -> float | None:
        """Seconds until the end, at the speed of the last steps, or of a part of one; None where that is unknown."""
        part = self._written / self.tokens if self.tokens else 0.0
        since, before = self._recent[0]
        done = self.done - self._first + part - before
        if self.total is None or done <= 0:
            return None
        each = (self._last - since) / done
        return max(0.0, (self.total - self.done - part) * each - (time.monotonic() - self._last))

    def line(self, *, with_label: bool = True) -> str:
        count = f"{self.done}" if self.total is None else f"{self.done}/{self.total}"
        left = "" if self.left is None else f"ETA {_clock(self.left)}"
        parts = [count, _clock(self.seconds), left, self._values]
        return f"{self.what}: " * with_label + " · ".join(part for part in parts if part)

    def opening(self) -> str | None:
        """Return, once, what a long computation does, and how long it will take; None for a short one, or too early."""
        if self.has_plan or self.left is None or self.seconds < MEASURED:
            return None
        self.has_plan = True
        if (about := self.seconds + self.left) < LONG:
            return None
        return f"{self.what}: {self.plan or self.line(with_label=False)}; about {_words(about)} in all{_if_busy()}"


def _if_busy() -> str:
    """Return what to try where other work keeps the cores busy; nothing else, and where a number of threads is set.

    There the threads of one product wait for the last of them, and keep it from its core while they do, unless the
    environment says otherwise, as the command line makes it do.
    """
    if {"OMP_NUM_THREADS", "OMP_WAIT_POLICY"} & os.environ.keys() or not hasattr(os, "getloadavg"):  # none on Windows
        return ""
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load < BUSY * cores:
        return ""
    return f" (load {load:.1f} on {cores} cores: with OMP_WAIT_POLICY=passive in the environment it may be far faster)"


@contextlib.contextmanager
def quiet(enabled: bool = True) -> Iterator[None]:
    """Show no progress in the block, if ``enabled``: of several processes the first shows that of all."""
    token = _quiet.set(enabled or _quiet.get())
    try:
        yield
    finally:
        _quiet.reset(token)


@contextlib.contextmanager
def track(
    what: str,
    total: int | None,
    enabled: bool = True,
    *,
    done: int = 0,
    plan: str = "",
    tokens: int | None = None,
) -> Iterator[Report]:
    """Show the progress of the block: on standard error, or in the notebook.

    :param what: the label.
    :param total: the number of steps, or None if unknown.
    :param enabled: False shows nothing.
    :param done: steps that were done before, of a computation that is resumed.
    :param plan: what is done, in a few words: a long computation says so when it knows how long it will take.
    :param tokens: how many tokens each step writes, if that is most of its work: the time left is then known while
        many steps are done at once (`wrote`).
    """
    if not enabled or _quiet.get():
        yield lambda advance=1, values=None, what=None: None
        return
    progress, console = _Progress(what, total, done, plan, tokens), Console(stderr=True)
    if console.is_jupyter:
        display = _in_notebook(progress)
    elif console.is_interactive and sys.stderr.isatty():
        display = _in_terminal(progress, console)
    else:
        display = _in_log(progress)
    with display as update:

        def report(advance: int = 1, values: Mapping[str, float] | None = None, what: str | None = None) -> None:
            progress.advance(advance, values, what)
            update(progress.opening())

        def write(tokens: int) -> None:
            progress.write(tokens)
            update(progress.opening())

        token = _writing.set(None if tokens is None else write)
        try:
            yield report
        finally:
            _writing.reset(token)


def wrote(tokens: int) -> None:
    """Tell the innermost computation that shows its progress how many tokens have been written."""
    if (write := _writing.get()) is not None:
        write(tokens)


def announce(text: str, enabled: bool = True) -> None:
    """Write a line to standard error, if ``enabled``."""
    if enabled and not _quiet.get():
        with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, or None, as in some windows
            print(visible(text), file=sys.stderr, flush=True)


@contextlib.contextmanager
def _in_terminal(progress: _Progress, console: Console) -> Iterator[Callable[[str | None], None]]:
    width = 10 if console.width < 100 else 30

    def line() -> Table:
        pulse = progress.total is None
        bar = ProgressBar(progress.total, progress.done, width=width, pulse=pulse)
        grid = Table.grid(padding=(0, 1, 0, 0))
        grid.add_row(bar, Text(progress.line(), no_wrap=True, overflow="ellipsis"))
        return grid

    with Live(console=console, get_renderable=line, transient=True, refresh_per_second=1 / REFRESH):
        yield lambda opening: None if opening is None else console.print(opening, markup=False, highlight=False)


@contextlib.contextmanager
def _in_notebook(progress: _Progress) -> Iterator[Callable[[str | None], None]]:
    """Without ipywidgets, which is rarely installed, and whose output is lost when a notebook is saved."""
    from IPython.display import display

    opened, due = "", 0.0

    def data() -> dict[str, str]:
        size = "" if progress.total is None else f' value="{progress.done}" max="{progress.total}"'
        text = f"{opened}\n{progress.line()}".strip()
        return {"text/plain": text, "text/html": f"<progress{size}></progress> {html.escape(text)}"}

    def update(opening: str | None) -> None:
        nonlocal opened, due
        opened = opening or opened
        if (now := time.monotonic()) >= due:
            due = now + REFRESH
            shown.update(data(), raw=True)

    shown: Any = display(data(), raw=True, display_id=True)
    try:
        yield update
    finally:
        shown.update({"text/plain": ""}, raw=True)


@contextlib.contextmanager
def _in_log(progress: _Progress) -> Iterator[Callable[[str | None], None]]:
    """A thread writes the lines, so that they come also while one step takes long."""
    ended = threading.Event()

    def write() -> None:
        while not ended.wait(INTERVAL):
            if not progress.has_plan and progress.plan:
                progress.has_plan = True
                announce(f"{progress.what}: {progress.plan}")
            announce(progress.line())

    writer = threading.Thread(target=write, name="bayeslm progress", daemon=True)
    writer.start()
    try:
        yield lambda opening: None if opening is None else announce(opening)
    finally:
        ended.set()
        writer.join(timeout=1.0)


def _clock(seconds: float) -> str:
    """Return a time as 1:02 or 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _words(seconds: float) -> str:
    """Return a time roughly, as 40 s, 12 min or 3.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"
