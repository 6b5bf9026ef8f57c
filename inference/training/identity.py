"""The identity of settings: JSON that is the same in every process and under every Python, and another for others.

Objects are identified by their type and their settings (`Identified`, or the plain values, functions, modules and
dataclasses among their attributes), modules by a digest of their weights. A function is identified by its source with
all on which that depends: closure cells, defaults, the object it is bound to, and the globals that it names,
recursively where these are code of its own package. Installed code and Python's own is identified by its name.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import sys
import textwrap
from collections.abc import Collection, Iterator, Mapping, Set
from functools import partial
from hashlib import blake2b
from pathlib import PurePath
from types import BuiltinFunctionType, CellType, FunctionType, MethodType, ModuleType
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

UNREADABLE = "source cannot be read"
SHOWN = (re.Pattern, PurePath, bytes, np.generic, torch.dtype, torch.device)  # whose text tells them apart


@runtime_checkable
class Identified(Protocol):
    """What says itself on which settings its results depend."""

    def identity(self) -> Mapping[str, Any] | None:
        """Return settings by name, which `identify` identifies in turn; those it does not know are left out."""


def identify(value: Any, *, weights: bool = True, known: Collection[torch.nn.Module] = ()) -> Any:
    """Return the identity of a setting, as JSON.

    :param weights: whether those of modules belong to it; not so in what is trained.
    :param known: modules whose weights are identified elsewhere.
    """
    return _Identifier(weights, known).of(value)


def has_unreadable(identity: Any) -> bool:
    """Return whether there is a function in an identity whose source could not be read."""
    if isinstance(identity, dict):
        return identity.get("code") == UNREADABLE or any(map(has_unreadable, identity.values()))
    return isinstance(identity, list) and any(map(has_unreadable, identity))


def digest(module: torch.nn.Module) -> str:
    """Return a digest of the names, shapes and values of all parameters and buffers."""
    found = blake2b(digest_size=16)
    for name, x in sorted(module.state_dict().items()):
        found.update(f"{name} {tuple(x.shape)} {x.dtype}".encode())
        found.update(x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


class _Identifier:
    """Identifies values that refer to one another."""

    def __init__(self, weights: bool, known: Collection[torch.nn.Module]) -> None:
        self._weights = weights
        self._known = known
        self._open: list[Any] = []  # those that are being identified, from the outermost inwards
        self._named: list[Any] = []  # global functions and classes that are identified already

    def of(self, value: Any) -> Any:
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if any(value is x for x in self._open):
            return {"in itself": _name(value)}
        self._open.append(value)
        try:
            return self._of(value)
        finally:
            self._open.pop()

    def _of(self, value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [self.of(x) for x in value]
        if isinstance(value, Set):
            return sorted((self.of(x) for x in value), key=repr)
        if isinstance(value, Mapping):
            return {str(key): self.of(x) for key, x in value.items()}
        if isinstance(value, np.ndarray | Tensor):
            return _array(value)
        if isinstance(value, SHOWN):
            return str(value)
        if isinstance(value, partial):
            return {"partial": self.of(value.func), "args": self.of(value.args), "keywords": self.of(value.keywords)}
        if isinstance(value, MethodType):
            return {"method": self.of(value.__func__), "of": self.of(value.__self__)}
        if isinstance(value, FunctionType):
            return self._function(value)
        if isinstance(value, type):
            return self._code(value, value.__module__) if _is_own(value.__module__) else _name(value)
        if isinstance(value, ModuleType) or not (hasattr(value, "__dict__") or dataclasses.is_dataclass(value)):
            return _name(value)
        if isinstance(wrapped := getattr(value, "__wrapped__", None), FunctionType):  # by functools.cache
            return {"type": _name(type(value)), "wraps": self.of(wrapped)}
        return self._object(value)

    def _object(self, value: Any) -> dict[str, Any]:
        found: dict[str, Any] = {"type": self.of(type(value))}
        if isinstance(value, torch.nn.Module):
            has_weights = self._weights and not any(value is x for x in self._known)
            return found | ({"weights": digest(value)} if has_weights else {})
        if isinstance(value, Identified):
            settings = value.identity() or {}
        elif dataclasses.is_dataclass(value):
            settings = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        else:
            settings = vars(value)
        return found | {name.lstrip("_"): self.of(x) for name, x in settings.items() if _is_setting(x)}

    # -- code ----------------------------------------------------------------------------------------------------

    def _function(self, function: FunctionType) -> dict[str, Any]:
        own = self._code(function, function.__module__) if _is_own(function.__module__) else {"name": _name(function)}
        assigned = own.pop("assigned", ())
        cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
        depends = {
            "cells": {k: self.of(x.cell_contents) for k, x in cells if x != CellType() and k not in assigned},
            "defaults": self.of(function.__defaults__ or ()),
            "keyword defaults": self.of(function.__kwdefaults__ or {}),
        }
        return own | {name: x for name, x in depends.items() if x}

    def _code(self, value: Any, module: str) -> dict[str, Any]:
        """Return a digest of the source of a function or class, and the globals that it names.

        Variables outside that the code assigns itself are what it remembers, and not settings.
        """
        try:
            source, tree = _source(value)
        except (OSError, TypeError, SyntaxError):
            return {"name": _name(value), "code": UNREADABLE}
        assigned = {x for node in ast.walk(tree) if isinstance(node, ast.Global | ast.Nonlocal) for x in node.names}
        scope = getattr(value, "__globals__", None) or vars(sys.modules.get(module, object))
        uses = {name: self._global(x, module) for name, x in _globals_of(tree, scope) if name not in assigned}
        found: dict[str, Any] = {"name": _name(value), "code": blake2b(source.encode(), digest_size=8).hexdigest()}
        if isinstance(value, FunctionType):
            found["assigned"] = assigned  # which `_function` takes out again
        return found | ({"uses": uses} if uses else {})

    def _global(self, value: Any, module: str) -> Any:
        """Return the identity of a global that code of a module names: code of other packages by name alone."""
        if isinstance(value, FunctionType | type):
            if _package(value.__module__) != _package(module) or any(value is x for x in self._named):
                return _name(value)
            self._named.append(value)
        return self.of(value)


def _array(value: np.ndarray | Tensor) -> dict[str, Any]:
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        value = (value.float() if value.dtype == torch.bfloat16 else value).numpy()
    held = repr(value.tolist()).encode() if value.dtype.hasobject else value.tobytes()  # objects' are addresses
    return {"shape": list(value.shape), "digest": blake2b(held, digest_size=16).hexdigest()}


def _is_setting(value: Any) -> bool:
    """Return whether an attribute may be a setting: neither a tool (a client, a lock) nor a memory of numbers."""
    if isinstance(value, Mapping):
        return bool(value) and not any(map(_is_plain, value.values())) and all(map(_is_setting, value.values()))
    if isinstance(value, list | tuple):
        return all(map(_is_setting, value))
    code = isinstance(value, FunctionType | BuiltinFunctionType | MethodType | partial | type | torch.nn.Module)
    return code or _is_plain(value) or isinstance(value, Identified) or dataclasses.is_dataclass(value)


def _is_plain(value: Any) -> bool:
    """Return whether a value is numbers or text, one or many."""
    if isinstance(value, list | tuple | Set):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str, np.ndarray, Tensor, *SHOWN))


def _name(value: Any) -> str:
    return str(getattr(value, "__qualname__", None) or getattr(value, "__name__", None) or type(value).__qualname__)


def _package(module: str | None) -> str:
    return (module or "").partition(".")[0]


def _is_own(module: str | None) -> bool:
    """Return whether a module is the user's own code, and not installed, Python's own, or bayeslm's."""
    package = _package(module)
    if package == "bayeslm" or package in sys.stdlib_module_names:
        return False
    file = getattr(sys.modules.get(module or ""), "__file__", None) or ""
    return not {"site-packages", "dist-packages"} & set(PurePath(file).parts)


def _source(value: Any) -> tuple[str, ast.AST]:
    """Return the source of a function or class, and its syntax tree.

    :raises OSError: if there is none.
    """
    # of a function's own code, where `functools.wraps` would lead to that of another
    code = value.__code__ if isinstance(value, FunctionType) else value
    if getattr(value, "__name__", None) != "<lambda>":
        source = textwrap.dedent(inspect.getsource(code))
        try:
            return source, ast.parse(source)
        except IndentationError:  # text at the margin, which cannot be dedented
            return source, ast.parse(f"if True:\n{source}")
    lines, _ = inspect.findsource(code)
    file = "".join(lines)
    nodes = [x for x in ast.walk(ast.parse(file)) if isinstance(x, ast.Lambda) and x.lineno == code.co_firstlineno]
    if len(nodes) > 1:  # on one line: the positions of instructions tell which one it is
        at = [(line, start) for line, _, start, end in code.co_positions() if line and end]
        nodes = [x for x in nodes if at and _start(x) <= min(at) and max(at) <= (x.end_lineno, x.end_col_offset)]
    segment = ast.get_source_segment(file, max(nodes, key=_start)) if nodes else None
    if segment is None:
        raise OSError("a lambda whose source cannot be told from others'")
    return segment, ast.parse(f"({segment})")


def _start(node: ast.Lambda) -> tuple[int, int]:
    return node.lineno, node.col_offset


def _globals_of(tree: ast.AST, scope: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Return the values that names in a syntax tree have in a module, attributes of modules as ``module.name``."""
    yielded: set[str] = set()
    for node in _without_annotations(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            owner, name = scope.get(node.value.id), f"{node.value.id}.{node.attr}"
            value = getattr(owner, node.attr, None) if isinstance(owner, ModuleType) else None
        elif isinstance(node, ast.Name):
            name, value = node.id, scope.get(node.id)
        else:
            continue
        if value is not None and not isinstance(value, ModuleType) and name not in yielded:
            yielded.add(name)
            yield name, value


def _without_annotations(node: ast.AST) -> Iterator[ast.AST]:
    """Return a syntax tree's nodes but those of annotations, whose objects differ between versions of Python."""
    yield node
    for field, child in ast.iter_fields(node):
        for each in child if isinstance(child, list) else [child]:
            if field not in ("annotation", "returns") and isinstance(each, ast.AST):
                yield from _without_annotations(each)
