"""What a run remembers: the token ids of its prompts, and the texts of its completions so far.

A program calls its language model and decodes its completions each time it is run, and engines run it at every step or
token. Inside `remembering` a prompt that has been encoded is not encoded again, and a text that has grown by a token is
not decoded anew (`texts`). Outside of it nothing is kept.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any, TypeVar

from torch import Tensor

from .scopes import having

T = TypeVar("T")
FEWEST = 2**12  # entries that are kept at least


class Recent:
    """A mapping that forgets: it keeps what was asked for or put in last, twice ``size`` entries at most."""

    def __init__(self, size: int = FEWEST) -> None:
        self.size = size
        self._new: dict[Hashable, Any] = {}
        self._old: dict[Hashable, Any] = {}

    def get(self, key: Hashable) -> Any:
        """Return the value of a key, None if it is not known."""
        if key in self._new:
            return self._new[key]
        value = self._old.get(key)
        if value is not None:
            self.put(key, value)
        return value

    def put(self, key: Hashable, value: Any) -> None:
        if len(self._new) >= self.size:
            self._old, self._new = self._new, {}
        self._new[key] = value


class Remembered:
    """What one run remembers. ``owners`` keeps the objects by whose ids there are keys."""

    def __init__(self) -> None:
        self.owners: dict[int, Any] = {}
        self.rows = Recent()  # token ids by prompt
        self.batches = Recent(16)  # encoded prompts by all of them
        self.contexts = Recent(16)  # what completions of encoded prompts are decoded with
        self.texts = Recent()  # by context and token ids
        self.rooms = Recent(16)  # bytes by device (`memory`)
        self.copies = Recent(4)  # on the CPU, of tensors of another device
        self.lots: dict[int, Any] = {}  # of draws that an engine was asked for (`ahead`)
        self.idle: list[Tensor] = []  # keys and values that a compiled batch has left (`compiled`)

    def of(self, owner: Any) -> int:
        """Return a key for an object, which nothing else has while this exists."""
        self.owners[id(owner)] = owner
        return id(owner)


_current: ContextVar[Remembered | None] = ContextVar("bayeslm_remembered", default=None)


@contextlib.contextmanager
def remembering() -> Iterator[None]:
    """Remember prompts and texts in the block; a block inside another one has the same memory."""
    if _current.get() is not None:
        yield
        return
    with having(_current, Remembered()):
        yield


def remembered() -> Remembered:
    """Return the memory of the enclosing block; outside of one an empty one, that nobody else has."""
    return _current.get() or Remembered()


def recalled(recent: Recent, key: Hashable | None, make: Callable[[], T]) -> T:
    """Return the value of a key, which is made if it is not known; a key of None is never known."""
    if key is None:
        return make()
    value: T | None = recent.get(key)
    if value is None:
        value = make()
        recent.put(key, value)
    return value


def on_host(x: Tensor) -> Tensor:
    """Return a tensor on the CPU; in a run it is copied once, as the host waits for each copy from a device."""
    if x.device.type == "cpu" or x.is_inference():  # which does not count its changes
        return x.cpu()
    found: Any = remembered().copies.get(id(x))
    if found is None or found[1] != x._version:
        put_on_host(x, copy := x.cpu())
        return copy
    copied: Tensor = found[2]
    return copied


def put_on_host(x: Tensor, copy: Tensor) -> None:
    """Remember the copy of a tensor on the CPU."""
    if not x.is_inference():
        remembered().copies.put(id(x), (x, x._version, copy))  # with x, whose id is then its own


def key_of(prompt: Any) -> Hashable | None:
    """Return a key that equal prompts have and no others; None for a prompt of another type than those in lists."""
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, list | tuple):
        if all(type(token) is int for token in prompt):
            return tuple(prompt)
        if all(isinstance(message, Mapping) for message in prompt):
            return ("chat", repr(prompt))
    return None
