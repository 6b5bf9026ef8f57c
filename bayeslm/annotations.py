"""Annotations of arguments: intervals, axes of arrays, names for the usual ones, and the checks that they mean."""

from __future__ import annotations

import builtins
import collections.abc
import dataclasses
import inspect
import os
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any

import numpy as np
from numpy.typing import ArrayLike

from . import value_checks as checks
from .value_checks import ANYTHING, Check, Shape, Within


class NonEmpty:
    """A list or mapping with at least one entry, as an annotation: ``Annotated[list[int], NonEmpty]``."""


class Unchecked:
    """An annotation of an argument that the function itself checks: ``Annotated[list[Any], Unchecked]``."""


Count = Annotated[int, Within("[1, inf)")]
"""A positive whole number."""
Natural = Annotated[int, Within("[0, inf)")]
"""A whole number, 0 among them."""
Seed = Annotated[int, Within(f"[0, {2**32 - 1}]")]  # of NumPy's generator, which Pyro seeds with the others
"""A seed of random numbers."""
Finite = Annotated[float, Within("(-inf, inf)")]
Positive = Annotated[float, Within("(0, inf)")]
NonNegative = Annotated[float, Within("[0, inf)")]
Share = Annotated[float, Within("[0, 1]")]


def checks_of(target: Any, names: Iterable[str]) -> dict[str, Check]:
    """Return the checks of those parameters of a function or a constructor that are annotated, by name."""
    hints = annotations_of(target)
    return {name: check_of(hints[name]) for name in names if name in hints}


def check_of(hint: Any) -> Check:
    """Return the check of a resolved annotation."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated and Unchecked in arguments:
        return ANYTHING
    if origin is Annotated and NonEmpty in arguments:
        return checks.filled(check_of(arguments[0]))
    if origin is Annotated:
        if (shape := next((x for x in arguments[1:] if isinstance(x, Shape)), None)) is not None:
            return checks.shaped(check_of(arguments[0]), shape)
        interval = next((x for x in arguments[1:] if isinstance(x, Within)), None)
        return check_of(arguments[0]) if interval is None else checks.number(arguments[0], interval)
    if hint is None or hint is types.NoneType:
        return checks.NONE
    if hint in (int, float):
        return checks.number(hint, None)
    if origin in (typing.Union, types.UnionType):
        is_path = any(_is_path(argument) for argument in arguments)
        arrays = typing.get_args(ArrayLike)
        options = [x for x in arguments if x not in arrays] if set(arrays) <= set(arguments) else arguments
        allowed = [checks.PATH if is_path and option is str else check_of(option) for option in options]
        return checks.union([checks.NUMBERS, *allowed] if len(options) < len(arguments) else allowed)
    if hint is str:
        return Check("a string", checks.text, is_class=True)
    if origin is typing.Literal:
        words = [repr(argument) for argument in arguments]
        return Check(checks.listed(words) if len(words) < 3 else f"one of {', '.join(words)}", checks.one_of(arguments))
    if origin is collections.abc.Callable and isinstance(arguments[0], list):
        return checks.function_of(len(arguments[0]))
    if origin is collections.abc.Callable or hint is Callable:
        return Check("a function", checks.only(callable))
    cls = os.PathLike if _is_path(hint) else origin or hint
    if not isinstance(cls, type) or cls is object or hint is Any:
        return ANYTHING  # a type variable, Any
    if cls is type:
        return Check("a class", checks.instance_of(type))
    if cls is tuple and arguments and arguments[-1] is not Ellipsis:
        return checks.fixed([check_of(argument) for argument in arguments])
    if cls in (list, tuple, collections.abc.Sequence):
        return checks.sequence(cls, check_of(arguments[0]) if arguments else ANYTHING)
    if cls in (dict, collections.abc.Mapping):
        return checks.mapping(*(check_of(argument) for argument in arguments or (Any, Any)))
    if cls in (collections.abc.Iterable, collections.abc.Collection):
        return checks.ITERABLE
    if getattr(cls, "_is_protocol", False) and not getattr(cls, "_is_runtime_protocol", False):
        return ANYTHING
    names: dict[Any, str] = {bool: "True or False", os.PathLike: "a path", np.ndarray: "an array"}
    article = "an" if cls.__name__[0] in "AEIOU" else "a"
    return Check(names.get(cls, f"{article} {cls.__name__}"), checks.instance_of(cls), is_class=True)


def _is_path(hint: Any) -> bool:
    cls = typing.get_origin(hint) or hint
    return isinstance(cls, type) and issubclass(cls, os.PathLike)


def annotations_of(target: Any) -> dict[str, Any]:
    """Return the annotations of a function or a constructor, resolved; `Any` for what type checkers alone import."""
    if dataclasses.is_dataclass(target):
        bases = reversed(typing.cast(type, target).__mro__)
        owners = [(inspect.get_annotations(base), vars(sys.modules[base.__module__])) for base in bases]
    else:
        function = typing.cast(Any, target).__init__ if isinstance(target, type) else target
        function = inspect.unwrap(getattr(function, "__func__", function))
        owners = [(inspect.get_annotations(function), function.__globals__)] if inspect.isfunction(function) else []
    return {name: _resolve(hint, names) for hints, names in owners for name, hint in hints.items()}


class _Unknown:
    """What a name stands for that is imported for type checkers alone: with attributes and in unions, anything."""

    def __getattr__(self, name: str) -> _Unknown:
        return self

    def __getitem__(self, arguments: Any) -> _Unknown:
        return self

    def __or__(self, other: Any) -> Any:
        return Any

    __ror__ = __or__


class _Names(dict[str, Any]):
    def __missing__(self, name: str) -> _Unknown:
        return _Unknown()


def _resolve(hint: Any, names: Mapping[str, Any]) -> Any:
    if not isinstance(hint, str):
        return hint
    return eval(hint, {}, _Names({**vars(builtins), **names}))  # our own source text
