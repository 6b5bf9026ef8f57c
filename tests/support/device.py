"""A device without hardware, on which it is counted how often the host waits for the device.

It is PyTorch's PrivateUse1 backend, registered in Python: its tensors hold theirs of the CPU, and every operation of
theirs comes here, below autograd. On a GPU operations are queued, and the host runs ahead; it waits where it needs a
number or a size that depends on numbers (`WAITS`), and where data is copied from one to the other. Those are counted.
What is on a GPU an error is one here: an operation on tensors of both devices.
"""

from __future__ import annotations

import functools
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

NAME = "counted"
# Operations whose results' sizes, or Python values, depend on numbers: on CUDA each of them synchronises.
WAITS = {
    "aten::_local_scalar_dense",  # item(), float(), bool(), an `if`
    "aten::nonzero",  # and a mask as an index
    "aten::masked_select",
    "aten::equal",
    "aten::_unique2",
    "aten::unique_dim",
    "aten::unique_consecutive",
    "aten::repeat_interleave.Tensor",
    "aten::bincount",
}
INDEXED = {"aten::index.Tensor", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
MASKS = {torch.bool, torch.uint8}  # as indices, of which CUDA counts the non-zero ones
COPIES = {"aten::_to_copy", "aten::copy_", "aten::_copy_from"}
# Made by torch from operations that change a tensor's size in place, which no tensor of Python can.
RESIZED = [("arange", "default"), ("arange", "start"), ("arange", "start_step"), ("linspace", "default")]
RESIZED += [("eye", "default"), ("eye", "m"), ("randperm", "default")]
RESIZED += [("copy_", "default")]


class Counted(Tensor):
    """A tensor of the device; ``raw`` is that of the CPU, with the same strides."""

    raw: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def of(x: Tensor) -> Counted:
        out: Counted = Tensor._make_wrapper_subclass(
            Counted, x.shape, x.stride(), x.storage_offset(), dtype=x.dtype, device=torch.device(NAME, 0)
        )
        out.raw = x
        return out

    def tolist(self) -> Any:  # refused by torch for a subclass
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(op, *args, **(kwargs or {}))


class Waits(Counter[str]):
    """How often the host has waited, by the place in the project that made it wait."""


_counts: list[Waits] = []


@contextmanager
def waits() -> Iterator[Waits]:
    """Count in the block."""
    found = Waits()
    _counts.append(found)
    try:
        yield found
    finally:
        _counts.remove(found)


@functools.cache
def counted_device() -> torch.device:
    """Register the device, once a process, and return it; skip the test where this torch cannot."""
    try:
        from torch.utils.backend_registration import _setup_privateuseone_for_python_backend as register
    except ImportError:
        pytest.skip("this torch has no backends in Python")

    class Hooks(torch._C._acc.PrivateUse1Hooks):  # "not available": others do not take it for this machine's device
        def is_available(self) -> bool:
            return False

        def has_primary_context(self, index: int) -> bool:
            return True

        def is_built(self) -> bool:
            return True

    register(NAME, hook=Hooks())
    made = torch.library.Library("_", "IMPL")  # operations without a tensor of the device: those that make one
    made.fallback(run, "PrivateUse1")
    aten = torch.library.Library("aten", "IMPL")
    for packet, overload in RESIZED:
        op = getattr(getattr(torch.ops.aten, packet), overload)
        aten.impl(op.name().removeprefix("aten::"), functools.partial(run, op), "PrivateUse1")
    _kept.extend([made, aten])
    return torch.device(NAME, 0)


_kept: list[Any] = []  # a library ends with its object


def run(op: Any, *args: Any, **kwargs: Any) -> Any:
    """Run an operation on tensors of the CPU."""
    name = op.name()
    tensors = list(_tensors((*args, *kwargs.values())))
    if name in COPIES:
        goes_to = torch.device(kwargs["device"] if kwargs.get("device") else tensors[0].device)
        if len(tensors) == 2 or (goes_to.type == NAME) != isinstance(tensors[0], Counted):
            return copy(op, tensors, goes_to, args, kwargs)
    here = [x for x in tensors if not isinstance(x, Counted) and x.dim() > 0]
    if here and name in INDEXED:
        note(f"{name} with indices of the CPU")
    elif here:
        raise RuntimeError(f"{name}: expected all tensors on one device, found {NAME} and the CPU")
    if name in WAITS or (name in INDEXED and any(x.dtype in MASKS for x in tensors[1:])):
        note(name)
    return on_device(op, tensors, args, kwargs)


def _tensors(arguments: Any) -> Iterator[Tensor]:
    for x in arguments:
        if isinstance(x, Tensor):
            yield x
        elif isinstance(x, list | tuple):
            yield from _tensors(x)


def on_device(op: Any, tensors: list[Tensor], args: Any, kwargs: Any) -> Any:
    """Return what an operation gives, as tensors of the device; those that it changes are themselves."""
    args, kwargs = [_each(x) for x in args], {name: _each(x) for name, x in kwargs.items()}
    if "device" in kwargs:
        kwargs["device"] = torch.device("cpu")
    changed = {id(x.raw): x for x in tensors if isinstance(x, Counted)}
    out = op(*args, **kwargs)

    def placed(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return changed[id(x)] if id(x) in changed else Counted.of(x)

    return type(out)(map(placed, out)) if isinstance(out, list | tuple) else placed(out)


def _each(x: Any) -> Any:
    if isinstance(x, list | tuple):
        return [_each(y) for y in x]
    return x.raw if isinstance(x, Counted) else x


def copy(op: Any, tensors: list[Tensor], goes_to: torch.device, args: Any, kwargs: Any) -> Any:
    """Copy to the device, from it, or on it."""
    if len(tensors) == 2:  # copy_ and _copy_from
        source, target = tensors if op.name() == "aten::_copy_from" else reversed(tensors)
        raw = [x.raw if isinstance(x, Counted) else x for x in (source, target)]
        if isinstance(source, Counted) != isinstance(target, Counted) and source.numel() > 0:
            note("a copy from the device" if isinstance(source, Counted) else "a copy to the device")
        raw[1].copy_(raw[0])
        return target
    note("a copy to the device" if goes_to.type == NAME else "a copy from the device")
    raw = tensors[0].raw if isinstance(tensors[0], Counted) else tensors[0]
    out = raw.to(kwargs.get("dtype") or raw.dtype, copy=True)
    return Counted.of(out) if goes_to.type == NAME else out


def note(what: str) -> None:
    """Count a wait."""
    if not _counts:
        return
    frame: Any = sys._getframe(1)
    while frame is not None and ("site-packages" in (file := frame.f_code.co_filename) or file == __file__):
        frame = frame.f_back
    place = "a thread of torch" if frame is None else f"{file.rpartition('/')[2]}:{frame.f_lineno}"
    for found in _counts:
        found[f"{what.removeprefix('aten::')} at {place}"] += 1
