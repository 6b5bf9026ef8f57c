"""Bytes that this process hands to collectives of torch.distributed: all, or those in gradient steps."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from unittest import mock

import pyro.infer
import torch.distributed as dist

SENT = {"all_gather": 1, "all_reduce": 0, "broadcast": 0}  # which argument is this process's own


@contextlib.contextmanager
def counted_bytes() -> Iterator[Counter[str]]:
    """Count the bytes of the tensors that collectives are called with, by their names."""
    sent: Counter[str] = Counter()

    def counting(name: str, place: int):
        real = getattr(dist, name)

        def collective(*args, **kwargs):
            sent[name] += args[place].nbytes
            return real(*args, **kwargs)

        return collective

    with contextlib.ExitStack() as held:
        for name, place in SENT.items():
            held.enter_context(mock.patch.object(dist, name, counting(name, place)))
        yield sent


@contextlib.contextmanager
def counted_bytes_of_steps() -> Iterator[Counter[str]]:
    """Count the same in the gradient steps of `SVI` alone."""
    total: Counter[str] = Counter()
    real = pyro.infer.SVI.step
    with counted_bytes() as sent:

        def step(self, *args, **kwargs):
            before = Counter(sent)
            found = real(self, *args, **kwargs)
            total.update(sent - before)
            return found

        with mock.patch.object(pyro.infer.SVI, "step", step):
            yield total
