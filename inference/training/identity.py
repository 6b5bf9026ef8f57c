"""The identity of settings: JSON that is the same in every process and under every Python, and another for others.

A value is identified by its type and by what pickling it would save, a module by a digest of its weights and by its
settings. A function is identified by its source with all on which that depends: closure cells, defaults, attributes,
the object it is bound to, and the globals that it names, recursively where these are the user's own code. A class is by
its source, its attributes and its bases. Installed code and Python's own is identified by its name. What cannot be
pickled, such as a lock or a connection, and an iterator is a tool: its type alone counts.

An object that changes as it is used, such as one with a cache, says by a method `Identified.identity` what it is.
"""

from __future__ import annotations

import dataclasses
import json
import math
import random
import re
import sys
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from enum import Enum
from functools import cached_property, partial
from hashlib import blake2b
from pathlib import PurePath
from types import (
    BuiltinMethodType,
    CellType,
    FunctionType,
    MappingProxyType,
    MethodType,
    MethodWrapperType,
    ModuleType,
)
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from bayeslm.models.lm import digest_of_values, whole_state
from bayeslm.validation import validated

from .source import assigned_outside, is_own, source_of, values_named

UNREADABLE = "source cannot be read"
GENERATORS = (random._inst, np.random.mtrand._rand)  # whose states checkpoints hold
SHOWN = (re.Pattern, PurePath, bytes, np.generic, torch.dtype, torch.device)  # whose text tells them apart
PLACES = ("_name_or_path", "base_model_name_or_path", "transformers_version")  # not what a network computes


@runtime_checkable
class Identified(Protocol):
    """What says itself on which settings its results depend."""

    def identity(self) -> Mapping[str, Any] | None:
        """Return settings by name, which `identify` identifies in turn."""


@validated
def identify(value: Any, *, weights: bool = True, known: Collection[torch.nn.Module] = ()) -> Any:
    """Return the identity of a setting, as JSON.

    :param weights: whether those of modules belong to it; not so in what is trained.
    :param known: modules that are identified elsewhere.
    """
    return _Identifier(weights, known).of(value)


def has_unreadable(identity: Any) -> bool:
    """Return whether there is a function in an identity whose source could not be read."""
    if isinstance(identity, dict):
        return identity.get("code") == UNREADABLE or any(map(has_unreadable, identity.values()))
    return isinstance(identity, list) and any(map(has_unreadable, identity))


def digest(module: torch.nn.Module) -> str:
    """Return a digest of the names, shapes and values of all parameters and buffers."""
    return digest_of_values(sorted(whole_state(module), key=lambda each: each[0]))


class _Tool(Exception):
    pass


class _Identifier:
    """Identifies values that refer to one another."""

    def __init__(self, weights: bool, known: Collection[torch.nn.Module]) -> None:
        self._weights = weights
        self._known = known
        self._containers: list[Any] = []  # that are being identified, from the outermost inwards
        self._met: dict[int, Any] = {}  # functions, classes and objects by address: identified where met first
        self._numbers: dict[int, int] = {}  # of these, how many of the same type and name were met before
        self._counts: Counter[tuple[type, str]] = Counter()
        self._strict = False  # in an object of an installed package

    def of(self, value: Any) -> Any:
        if isinstance(value, float) and not math.isfinite(value):
            return repr(value)  # NaN is not itself
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, np.ndarray | Tensor):
            return _array(value)
        if isinstance(value, SHOWN):
            return str(value)
        if isinstance(value, ModuleType):
            return _name(value)
        if type(value) in (list, tuple, set, frozenset, dict, MappingProxyType):
            return self._container(value)
        if id(value) in self._met:
            return {"met": _name(value)} | ({"number": n} if (n := self._numbers[id(value)]) else {})
        self._meet(value)
        if isinstance(value, partial):
            return {"partial": self.of(value.func), "args": self.of(value.args), "keywords": self.of(value.keywords)}
        if isinstance(value, MethodType):
            return {"method": self.of(value.__func__), "of": self.of(value.__self__)}
        if isinstance(value, FunctionType):
            return self._function(value)
        if isinstance(value, type):
            return self._class(value) if is_own(value.__module__) else _name(value)
        if isinstance(wrapped := getattr(value, "__wrapped__", None), FunctionType):  # by functools.cache
            return {"type": _name(type(value)), "wraps": self.of(wrapped)}
        if isinstance(value, Iterator) or any(value is x for x in GENERATORS):
            return {"type": _name(type(value))}
        if isinstance(value, BuiltinMethodType | MethodWrapperType):
            return {"method": _name(value), "of": self.of(value.__self__)}
        return self._object(value)

    def _meet(self, value: Any) -> None:
        kind = (type(value), _name(value))
        self._met[id(value)], self._numbers[id(value)] = value, self._counts[kind]
        self._counts[kind] += 1

    def _forget(self, size: int) -> None:
        """Forget all that was met after the first ``size``."""
        while len(self._met) > size:
            key, value = self._met.popitem()
            self._counts[type(value), _name(value)] -= 1
            del self._numbers[key]

    def _container(self, value: Any) -> Any:
        if any(value is x for x in self._containers):
            return {"in itself": _name(value)}
        self._containers.append(value)
        try:
            if isinstance(value, dict | MappingProxyType):
                return {str(key): self.of(x) for key, x in value.items()}
            found = [self.of(x) for x in value]
            return found if isinstance(value, list | tuple) else sorted(found, key=repr)
        finally:
            self._containers.pop()

    # -- objects -------------------------------------------------------------------------------------------------

    def _object(self, value: Any) -> dict[str, Any]:
        found: dict[str, Any] = {"type": self.of(type(value))}
        if any(value is x for x in self._known):
            return found
        if isinstance(value, Identified):
            return found | self._named(value.identity() or {})
        if isinstance(value, torch.nn.Module):
            weights = {"weights": digest(value)} if self._weights else {}
            return found | weights | {"settings": _digest(self.of(_settings_of(value)))}
        if (backend := getattr(value, "backend_tokenizer", None)) is not None:
            return found | {"tokens": _digest(self.of(_tokenizer(value, backend)))}
        if dataclasses.is_dataclass(value):
            return found | self._named({x.name: getattr(value, x.name) for x in dataclasses.fields(value)})
        if self._strict or is_own(type(value).__module__) or type(value).__module__.startswith("bayeslm"):
            return found | self._state(value)
        self._strict, met = True, len(self._met)
        try:
            return found | {"state": _digest(self._state(value))}
        except (_Tool, RecursionError):
            self._forget(met)
        finally:
            self._strict = False
        plain = {k: x for k, x in getattr(value, "__dict__", {}).items() if _is_plain(x)}
        return found | ({"settings": _digest(self.of(plain))} if plain else {})

    def _state(self, value: Any) -> dict[str, Any]:
        """Return the identity of what pickling an object would save."""
        try:
            reduced = value.__reduce_ex__(4)
        except Exception:  # each type says in its own way that it cannot
            if self._strict:
                raise _Tool from None
            return self._named(getattr(value, "__dict__", {}))
        if isinstance(reduced, str):
            return {"name": reduced}
        made, arguments, state, *items = (*reduced, None, None, None)[:5]
        found = {} if _name(made) in ("__newobj__", "__newobj_ex__") else {"made": self.of(made)}
        if rest := [x for x in arguments if x is not type(value)]:
            found["args"] = self.of(rest)
        found |= {"items": self.of([list(x) for x in items if x is not None])} if any(items) else {}
        parts = state if isinstance(state, tuple) and len(state) == 2 and isinstance(state[1], dict) else (state,)
        for part in parts:  # attributes, and those in slots
            if isinstance(part, dict):
                found |= self._named({k: x for k, x in part.items() if not _is_computed(value, k)})
            elif part is not None:
                found["state"] = self.of(part)
        return found

    def _named(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        return {str(name).lstrip("_"): self.of(x) for name, x in settings.items()}

    # -- code ----------------------------------------------------------------------------------------------------

    def _function(self, function: FunctionType) -> dict[str, Any]:
        cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
        closure = {k: x.cell_contents for k, x in cells if x != CellType()}
        found: dict[str, Any] = {"name": _name(function)}
        if is_own(function.__module__):
            code, assigned = self._code(function, {**function.__globals__, **closure}, set(closure))
            found |= code
            closure = {k: x for k, x in closure.items() if k not in assigned}
        attributes = {k: x for k, x in vars(function).items() if k != "__wrapped__"}
        depends = {
            "cells": closure,
            "defaults": function.__defaults__ or (),
            "keyword defaults": function.__kwdefaults__ or {},
            "attributes": attributes,
        }
        return found | {name: self.of(x) for name, x in depends.items() if x}

    def _class(self, value: type) -> dict[str, Any]:
        code, _ = self._code(value, vars(sys.modules.get(value.__module__, object)), set())
        found = {"name": _name(value)} | code
        if bases := [self.of(x) for x in value.__bases__ if is_own(x.__module__)]:
            found["bases"] = bases
        members: dict[str, Any] = {}
        if issubclass(value, Enum):  # which keeps more in itself with each use
            return found | {"members": {name: self.of(x.value) for name, x in value.__members__.items()}}
        for name, x in vars(value).items():
            for inner in ("__func__", "fget", "func"):  # of static and class methods, properties, cached ones
                x = getattr(x, inner, x) if hasattr(type(x), "__get__") and not isinstance(x, FunctionType) else x
            if isinstance(x, FunctionType):
                written = not x.__code__.co_filename.startswith("<")  # else by `dataclass`, which the source shows
                members |= {name: self.of(x)} if written else {}
            elif not (name.startswith(("__", "_abc_")) or hasattr(type(x), "__get__")):
                members[name] = self.of(x)
        return found | ({"members": members} if members else {})

    def _code(self, value: Any, scope: Mapping[str, Any], cells: set[str]) -> tuple[dict[str, Any], set[str]]:
        """Return a digest of the source of a function or class with the globals that it names, and what it assigns."""
        try:
            source, tree = source_of(value)
        except (OSError, TypeError, SyntaxError):
            return {"code": UNREADABLE}, set()
        assigned = assigned_outside(tree)
        package = getattr(sys.modules.get(value.__module__), "__package__", None) or ""
        named = values_named(tree, scope, package).items()
        uses = {k: self._global(x) for k, x in named if k not in assigned | cells and x is not None}
        code = blake2b(source.encode(), digest_size=8).hexdigest()
        return {"code": code} | ({"uses": uses} if uses else {}), assigned

    def _global(self, value: Any) -> Any:
        is_code = isinstance(value, FunctionType | type)
        return _name(value) if is_code and not is_own(value.__module__) else self.of(value)


def _digest(identity: Any) -> str:
    return blake2b(json.dumps(identity, sort_keys=True).encode(), digest_size=16).hexdigest()


def _array(value: np.ndarray | Tensor) -> dict[str, Any]:
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        value = (value.float() if value.dtype == torch.bfloat16 else value).numpy()
    held = repr(value.tolist()).encode() if value.dtype.hasobject else value.tobytes()  # objects' are addresses
    return {"shape": list(value.shape), "digest": blake2b(held, digest_size=16).hexdigest()}


def _settings_of(module: torch.nn.Module) -> dict[str, Any]:
    """Return what else than weights tells modules apart: transformers' and PEFT's configs, or numbers of all parts."""
    config: Any = getattr(module, "config", None)
    adapters = getattr(module, "peft_config", None) or {}
    if not hasattr(config, "to_dict"):
        parts = [(name, k, x) for name, part in module.named_modules() for k, x in vars(part).items()]
        return {f"{name}.{k}": x for name, k, x in parts if not k.startswith("_") and _is_plain(x)}
    configs = {"": config} | dict(adapters)
    return {name: {k: x for k, x in each.to_dict().items() if k not in PLACES} for name, each in configs.items()}


def _tokenizer(tokenizer: Any, backend: Any) -> dict[str, Any]:
    """Return what a fast tokenizer encodes and decodes by; padding and truncation are set anew in every call."""
    kept = {k: x for k, x in json.loads(backend.to_str()).items() if k not in ("padding", "truncation")}
    special = {str(k): str(x) for k, x in tokenizer.special_tokens_map.items()}
    return {"backend": kept, "special": special, "template": getattr(tokenizer, "chat_template", None)}


def _is_plain(value: Any) -> bool:
    """Return whether a value is numbers or text, one or many."""
    if isinstance(value, list | tuple | set | frozenset):
        return all(map(_is_plain, value))
    if isinstance(value, Mapping):
        return all(map(_is_plain, value.values()))
    return value is None or isinstance(value, (bool, int, float, str, np.ndarray, Tensor, *SHOWN))


def _is_computed(value: Any, name: Any) -> bool:
    """Return whether an attribute is the value of a `functools.cached_property`."""
    return isinstance(name, str) and isinstance(getattr(type(value), name, None), cached_property)


def _name(value: Any) -> str:
    return str(getattr(value, "__qualname__", None) or getattr(value, "__name__", None) or type(value).__qualname__)
