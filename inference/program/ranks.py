"""Several processes that run one script together, as ``torchrun`` and ``accelerate launch`` start them: the ranks.

They talk at exchanges alone. Each sends a message, JSON and tensors, and gets those of all; a rank that has failed
sends its error in the place of the next message, and the others raise it. So no rank waits for one that has left. Any
other collective follows an exchange at once, with nothing between them that could fail.

A run inside another one, in a reward or a callback, is its rank's own.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from bayeslm.models.lm import announcing, passes_together, wait_for_passes
from bayeslm.processes import set_rank
from bayeslm.progress import quiet
from bayeslm.validation import validated
from bayeslm.visible import message_of

from .messages import Message, hashed, packed, unpacked

LAUNCHED = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}  # set by torchrun and accelerate
TIME_LIMIT = "BAYESLM_TIME_LIMIT"  # the variable with the seconds that a rank waits for the others
PATIENCE = 1800.0  # seconds, by default


class RankError(RuntimeError):
    """Another process of the run has failed, has died, or has not answered within the time limit."""


class Ranks:
    """The processes of one run, of which this one is number ``rank`` of ``size``.

    :param group: of torch.distributed, on the CPU; None for a process of its own.
    """

    def __init__(self, rank: int = 0, size: int = 1, group: Any = None) -> None:
        self.rank, self.size = rank, size
        self._group = group
        self._is_over = group is None  # no rank expects another message
        self._stops = False  # Ctrl-C was pressed, and the others do not know yet
        self._defers = False

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def stream(self, seed: int) -> int:
        """Return this rank's own seed; rank 0 has the seed itself."""
        return seed if self.rank == 0 else hashed(f"{seed} of rank {self.rank}".encode())

    def rows(self, num: int) -> slice:
        """Return this rank's rows of ``num``, which differ by at most one from rank to rank."""
        return slice(self.rank * num // self.size, (self.rank + 1) * num // self.size)

    def share(self, num: int) -> int:
        """Return the number of this rank's rows of ``num``."""
        own = self.rows(num)
        return int(own.stop - own.start)

    # -- messages --------------------------------------------------------------------------------------------------

    def exchange(
        self, value: Any = None, tensors: Mapping[str, Tensor] | None = None, *, may_stop: bool = True
    ) -> list[Message]:
        """Send a message and return those of all ranks, in their order.

        :param may_stop: whether the run may end here by Ctrl-C; else it waits for the next exchange where it may.
        :raises RankError: if another rank has failed, died, or not answered in time.
        :raises KeyboardInterrupt: on every rank, if Ctrl-C was pressed on one in a block of `deferring`.
        """
        if self._group is None:
            return [Message(value, dict(tensors or {}))]
        sent = self._send({"value": value, "stop": self._stops}, tensors or {}, may_stop=may_stop)
        heads, found = zip(*sent, strict=True)
        errors = [f"rank {i} of {self.size}: {head['error']}" for i, head in enumerate(heads) if "error" in head]
        if errors:
            self._is_over = True
            raise RankError("\n".join(errors))
        if may_stop and any(head["stop"] for head in heads):
            self._stops = False
            raise KeyboardInterrupt
        return [Message(head["value"], each) for head, each in zip(heads, found, strict=True)]

    def fail(self, error: BaseException) -> None:
        """Send an error in the place of the next message, unless the run is over on all ranks."""
        if not self._is_over:
            what = message_of(error) if isinstance(error, Exception) else "interrupted"
            with contextlib.suppress(RuntimeError):
                self._send({"error": f"{type(error).__name__}: {what}"}, {})
            self._is_over = True

    def first(self, value: Any = None, tensors: Mapping[str, Tensor] | None = None) -> Message:
        """Return the message of rank 0, on every rank; the others send none. Ctrl-C does not end the run here."""
        if self._group is None:
            return Message(value, dict(tensors or {}))
        message = packed({"value": value}, tensors or {}) if self.is_first else torch.empty(0, dtype=torch.uint8)
        size = self.exchange(len(message), may_stop=False)[0].value
        message = message if self.is_first else message.new_empty(size)
        with self._guarded(may_stop=False):
            dist.broadcast(message, 0, group=self._group)
        head, found = unpacked(message.numpy().tobytes())
        return Message(head["value"], found)

    def copy_first(self, tensors: Sequence[Tensor]) -> None:
        """Give tensors, in place, their values on rank 0."""
        if self._group is None:
            return
        self.exchange()
        with self._guarded(), torch.no_grad():
            for x in tensors:
                whole = x.detach().contiguous()
                dist.broadcast(whole, 0, group=self._group if x.device.type == "cpu" else None)
                x.copy_(whole)

    def agreed(self, value: Tensor) -> Tensor:
        """Return rank 0's tensor, on every rank, on this one's device."""
        return value if self._group is None else self.first(None, {"x": value}).tensors["x"].to(value.device)

    def any(self, value: bool) -> bool:
        """Return whether a value is true on any rank."""
        return any(message.value for message in self.exchange(value))

    def joined(self, rows: Tensor) -> Tensor:
        """Return the rows of all ranks; this one's own keep their gradient, the others' have none."""
        if self._group is None:
            return rows
        parts = [message.tensors["x"].to(rows.device) for message in self.exchange(None, {"x": rows.detach()})]
        parts[self.rank] = rows
        return torch.cat(parts)

    def total(self, value: Tensor) -> Tensor:
        """Return the sum of a tensor over the ranks; the same to the bit on all of them."""
        if self._group is None:
            return value
        every = [message.tensors["x"].to(value.device) for message in self.exchange(None, {"x": value})]
        return torch.stack(every).sum(0)

    def summed(self, rows: Tensor) -> tuple[Tensor, int]:
        """Return the sum of the rows of all ranks, the same to the bit on all of them, and the number of rows."""
        if self._group is None:
            return rows.sum(0), len(rows)
        every = self.exchange(len(rows), {"x": rows.sum(0)})
        sums = torch.stack([message.tensors["x"].to(rows.device) for message in every])
        return sums.sum(0), sum(message.value for message in every)

    def joined_array(self, rows: np.ndarray) -> np.ndarray:
        """Return the rows of all ranks, of an array."""
        return rows if self._group is None else self.joined(torch.from_numpy(np.ascontiguousarray(rows))).numpy()

    def first_array(self, value: np.ndarray) -> np.ndarray:
        """Return rank 0's array, on every rank."""
        return value if self._group is None else self.agreed(torch.from_numpy(np.ascontiguousarray(value))).numpy()

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors by their sums over the ranks: one all-reduce of all of them, a device and dtype."""
        if self._group is None:
            return
        self.exchange()
        kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for x in tensors:
            kinds.setdefault((x.device, x.dtype), []).append(x)
        for (device, _), some in kinds.items():
            flat = torch.cat([x.reshape(-1) for x in some])
            with self._guarded():
                dist.all_reduce(flat, group=self._group if device.type == "cpu" else None)
            for x, total in zip(some, flat.split([x.numel() for x in some]), strict=True):
                x.copy_(total.view_as(x))

    def check_same(self, what: str, described: Mapping[str, str]) -> None:
        """Check that all ranks describe something by the same texts.

        :raises RankError: on every rank, if they do not; with what differs, and its texts.
        """
        if self._group is None:
            return
        every = [message.value for message in self.exchange(dict(described))]
        names = dict.fromkeys(name for each in every for name in each)
        different = [name for name in names if len({each.get(name) for each in every}) > 1]
        if different:
            self._is_over = True  # all of them raise this error
            shown = [
                f"{name}: " + ", ".join(f"{_short(each.get(name))} on rank {i}" for i, each in enumerate(every))
                for name in different
            ]
            raise RankError(f"{what} differs between the processes, and must be the same. {'; '.join(shown)}")

    # -- Ctrl-C ----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def deferring(self) -> Iterator[None]:
        """Let Ctrl-C on any rank end the block on all of them at the same exchange, or at its end.

        A second Ctrl-C is not deferred.
        """
        if self._group is None:
            yield
            return
        with self._noting_ctrl_c():
            self._defers = True
            try:
                yield
            finally:
                self._defers = False
            self.exchange()

    def announcing(self) -> contextlib.AbstractContextManager[None]:
        """Return a block in which passes of sharded networks are done by all ranks together."""
        return announcing(passes_together(self.agree, self.uninterrupted))

    def uninterrupted(self) -> contextlib.AbstractContextManager[None]:
        """Return a block that Ctrl-C does not end; it ends the next exchange."""
        return contextlib.nullcontext() if self._defers else self._noting_ctrl_c()

    @contextlib.contextmanager
    def _noting_ctrl_c(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def note(number: int, frame: Any) -> None:
            if self._stops:
                raise KeyboardInterrupt
            self._stops = True

        before = signal.signal(signal.SIGINT, note)
        try:
            yield
        finally:
            if before is not None:
                signal.signal(signal.SIGINT, before)

    # -- collectives -----------------------------------------------------------------------------------------------

    def agree(self, numbers: list[int]) -> list[list[int]]:
        """Return the integers of all ranks. Ctrl-C does not end the run here."""
        own = torch.tensor(numbers)
        found = [torch.empty_like(own) for _ in range(self.size)]
        with self._guarded(may_stop=False):
            dist.all_gather(found, own, group=self._group)
        return [x.tolist() for x in found]

    def _send(
        self, head: dict[str, Any], tensors: Mapping[str, Tensor], *, may_stop: bool = True
    ) -> list[tuple[dict[str, Any], Any]]:
        wait_for_passes()  # passes of sharded networks need all ranks
        own = packed(head, tensors)
        sizes = [torch.zeros(1, dtype=torch.long) for _ in range(self.size)]
        with self._guarded(may_stop=may_stop):
            dist.all_gather(sizes, torch.tensor([len(own)]), group=self._group)
            longest = max(int(size) for size in sizes)
            padded = torch.cat([own, own.new_zeros(longest - len(own))])
            found = [torch.empty_like(padded) for _ in sizes]
            dist.all_gather(found, padded, group=self._group)
        return [unpacked(x[: int(size)].numpy().tobytes()) for x, size in zip(found, sizes, strict=True)]

    @contextlib.contextmanager
    def _guarded(self, *, may_stop: bool = True) -> Iterator[None]:
        """Explain the failure of a collective; Ctrl-C waits for its end, as a rank must not leave in its middle."""
        try:
            with self.uninterrupted():
                yield
        except RuntimeError as error:
            self._is_over = True
            raise RankError(
                f"rank {self.rank} of {self.size}: another process of this run has died, or has not answered for "
                f"{time_limit():g} seconds ({TIME_LIMIT} sets this limit): {message_of(error).splitlines()[0]}"
            ) from error
        if may_stop and self._stops and not self._defers:
            self._stops = False
            raise KeyboardInterrupt


ALONE = Ranks()
_current: ContextVar[Ranks | None] = ContextVar("bayeslm_ranks", default=None)
_joined: tuple[int, int, Any] | None = None


def ranks() -> Ranks:
    """Return the processes among which the current run is divided."""
    return _current.get() or ALONE


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Let the runs of the block be those of this process only, for code that not every process reaches."""
    token = _current.set(ALONE)
    try:
        yield
    finally:
        _current.reset(token)


@contextlib.contextmanager
def together(seed: int | None, divided: bool) -> Iterator[tuple[Ranks, int | None]]:
    """Begin a run on all ranks, and end it on all of them: an error of one is an error of all.

    :param seed: of the run.
    :param divided: whether the engine divides its work; else every rank does all of it, with the same random numbers.
    :returns: the ranks among which it is divided, and this one's own seed. Without a seed it is drawn by rank 0.
    """
    joined = None if _current.get() is not None else _join()
    if joined is None:
        with alone():
            yield ALONE, seed
        return
    run = Ranks(*joined)
    drawn = int(torch.randint(2**31, ())) if seed is None else seed
    token = _current.set(run if divided else ALONE)
    try:
        with quiet(not run.is_first), warnings.catch_warnings(), run.announcing():
            if not run.is_first:
                warnings.simplefilter("ignore")
            run.check_same("the seed", {"seed": str(seed), "is divided": str(divided)})
            common = int(run.first(drawn).value)
            yield (run, run.stream(common)) if divided else (ALONE, common)
            run.exchange()
    except BaseException as error:
        with run.announcing():
            run.fail(error)
        raise
    finally:
        _current.reset(token)


def time_limit() -> float:
    """Return the seconds that a rank waits for the others."""
    text = os.environ.get(TIME_LIMIT, str(PATIENCE))
    try:
        limit = float(text)
    except ValueError:
        limit = -1.0
    if not 0 < limit < 1e9:
        raise ValueError(f"{TIME_LIMIT} must be a number of seconds above 0, got {text!r}")
    return limit


def _join() -> tuple[int, int, Any] | None:
    """Return rank, size and group of the processes that were launched together; None for one process."""
    global _joined
    if not dist.is_available():
        return None
    if dist.is_initialized():
        if _joined is not None:
            return _joined
    elif not os.environ.keys() >= LAUNCHED or int(os.environ["WORLD_SIZE"]) < 2:
        return None
    limit = timedelta(seconds=time_limit())
    try:
        if not dist.is_initialized():
            dist.init_process_group(timeout=limit)
            atexit.register(_leave)
        if dist.get_world_size() < 2:
            return None
        group = dist.new_group(backend="gloo", timeout=limit)  # messages are on the CPU, also where gradients are not
    except RuntimeError as error:
        raise RankError(
            f"no process group of the {os.environ.get('WORLD_SIZE')} processes that were launched together: another "
            f"process of this run has died, or has not answered for {limit.total_seconds():g} seconds ({TIME_LIMIT} "
            f"sets this limit), or MASTER_ADDR and MASTER_PORT lead nowhere: {message_of(error).splitlines()[0]}"
        ) from error
    _joined = dist.get_rank(), dist.get_world_size(), group
    set_rank(dist.get_rank())
    return _joined


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _short(text: str | None) -> str:
    return "nothing" if text is None else text if len(text) <= 80 else f"{text[:77]}..."


@validated
def on_first(run: Ranks, function: Callable[[], Message]) -> Message:
    """Call a function on rank 0 alone, whose runs inside are its own, and return its message on every rank."""
    if run.size == 1:
        return function()
    with alone():
        message = function() if run.is_first else Message(None, {})
    return run.first(*message)
