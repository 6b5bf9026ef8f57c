"""The passes of sharded networks, which all processes of a run do together.

A pass of a sharded network gathers weights from every process, so no process can do one alone. But processes draw other
rows, which end at other lengths: their passes differ in number. So in a run each pass is announced. All processes do
the one that is the first in a fixed order of those announced; whoever wants another one, or none, takes part with two
tokens whose result is dropped. A process that needs no more passes, until it has something to say to the others
(`inference.program.ranks`), waits here and takes part in theirs.

Outside a run every process must make the same calls, as FSDP asks of any program.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")


WHOLE, BODY, HEAD, GRADIENT, TENSOR = range(1, 6)  # kinds of passes, in the order in which they have their turn


class Wanted(NamedTuple):
    """A pass: its kind, the network's number, and of which of its tensors."""

    kind: int
    network: int
    which: int = 0


NONE = Wanted(0, 0)


class Lockstep:
    """The passes of the processes of one run.

    :param agree: returns the integers of all processes, in their order, for this one's.
    :param uninterrupted: a block that Ctrl-C does not end.
    :param known: returns how many sharded networks this process knows.
    :param take_part: does a pass whose result is dropped.
    """

    def __init__(
        self,
        agree: Callable[[list[int]], list[list[int]]],
        uninterrupted: Callable[[], contextlib.AbstractContextManager[None]],
        known: Callable[[], int],
        take_part: Callable[[Wanted], None],
    ) -> None:
        self._agree, self._uninterrupted = agree, uninterrupted
        self._known, self._take_part = known, take_part

    def together(self, wanted: Wanted, work: Callable[[], T]) -> T:
        """Do a pass when it is its turn."""
        with self._uninterrupted():
            while (chosen := self._chosen(wanted)) != wanted:
                self._take_part(chosen)
            return work()

    def wait(self) -> None:
        """Take part in the passes of others until no process wants any."""
        if not self._known():
            return
        with self._uninterrupted():
            while (chosen := self._chosen(NONE)) != NONE:
                self._take_part(chosen)

    def _chosen(self, wanted: Wanted) -> Wanted:
        every = self._agree([*wanted, self._known()])
        counts = [numbers[-1] for numbers in every]
        if len(set(counts)) > 1:
            raise RuntimeError(
                f"the processes of this run know {counts} sharded networks: one that a single process has made cannot "
                "be computed. Make it on all of them"
            )
        return min((each for numbers in every if (each := Wanted(*numbers[:-1])) != NONE), default=NONE)


_current: Lockstep | None = None  # of all threads: a backward pass may run in another one


def current() -> Lockstep | None:
    """Return the passes of the current run; None outside."""
    return _current


@contextlib.contextmanager
def announcing(steps: Lockstep) -> Iterator[None]:
    """Announce the passes of sharded networks in the block."""
    global _current
    before, _current = _current, steps
    try:
        yield
    finally:
        _current = before


def wait_for_passes() -> None:
    """Take part in the passes of other processes until none wants any."""
    if _current is not None:
        _current.wait()


def announced(wanted: Wanted, work: Callable[[], Any]) -> Any:
    """Do a pass together with all processes of a run, or, outside one, at once."""
    return work() if _current is None else _current.together(wanted, work)
