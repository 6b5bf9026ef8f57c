"""Checks of reward functions and of the scores that they return."""

from __future__ import annotations

import inspect
import math
import numbers
import reprlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NoReturn

import numpy as np
import torch

short = reprlib.Repr()
short.maxstring = short.maxother = 160
EACH = ": return one number for each completion"
ABSTAINED = "abstained (gave None)"
_ROUNDING = 1e-6  # how far past a declared bound a score may be, relative to the bound: float32 models round


def check_function(function: Any) -> None:
    """Refuse a function that cannot be called, and a class, whose objects are no scores.

    :raises TypeError: if it is not callable, or a class.
    """
    if not callable(function):
        raise TypeError(f"a reward function must be callable, got {type(function).__name__}")
    if isinstance(function, type):
        name = function.__name__
        raise TypeError(f"a reward must be a function or a Reward, got the class {name}: write {name}(...)")


def check_scores(result: Any, count: int, low: float, high: float, fail: Callable[[str, int], NoReturn]) -> np.ndarray:
    """Return a function's result as ``count`` float64 scores within bounds, NaN where it is None.

    :param result: the scores, in a sequence, an array or a tensor.
    :param count: how many they must be.
    :param low: the lower bound.
    :param high: the upper bound.
    :param fail: ``fail(what, i)`` raises an error about completion i.
    """
    if hasattr(result, "tolist"):  # arrays, tensors, series
        result = result.tolist()
    if not isinstance(result, Sequence) or isinstance(result, str):
        fail(f"gave {type(result).__name__} instead of a list of {count} scores{EACH}", 0)
    if len(result) != count:
        fail(f"gave {len(result)} scores for {count} completions{EACH}", 0)
    scores = np.empty(count)
    highest = torch.finfo(torch.get_default_dtype()).max
    for i, value in enumerate(result):
        if value is None:
            scores[i] = np.nan
            continue
        number = _number(value)
        if number is None or math.isnan(number):
            fail(f"gave {short.repr(value):.60} instead of a number{EACH}", i)
        if number > highest:
            fail(f"gave {number}: a score must be below +inf", i)
        scores[i] = number
    for outside in (scores < low - _slack(low), scores > high + _slack(high)):
        if outside.any():
            i = int(outside.argmax())
            fail(f"gave {scores[i]}, outside its bounds [{low}, {high}]", i)
    return np.clip(scores, low, high)


def with_none(scores: np.ndarray) -> list[float | None]:
    """Return scores with None in the place of NaN, as a reward returns them."""
    return [None if np.isnan(x) else x for x in scores.tolist()]


def is_real(value: Any) -> bool:
    """Return whether a value is a real number."""
    return isinstance(value, numbers.Real)  # numpy's numbers too


def place_of(function: Any) -> str:
    """Return the file and the line of a function in parentheses, or an empty string where there is none."""
    code = getattr(inspect.unwrap(function), "__code__", None) if callable(function) else None
    return "" if code is None else f" ({code.co_filename}:{code.co_firstlineno})"


def name_of(function: Any) -> str:
    """Return the name of a function, or of the class of a callable without one."""
    while isinstance(function, partial):
        function = function.func
    return str(getattr(function, "__name__", type(function).__name__))


def parameters(function: Callable[..., Any]) -> tuple[frozenset[str] | None, frozenset[str]]:
    """Return the names that a function accepts (None: any), and those that it requires."""
    try:
        found = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some callables of extension modules have none
        return None, frozenset()
    named = [p for p in found if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    required = frozenset(p.name for p in named if p.default is p.empty)
    anything = any(p.kind is p.VAR_KEYWORD for p in found)
    return (None if anything else frozenset(p.name for p in named)), required


def _number(value: Any) -> float | None:
    """Return a Python, numpy or torch scalar as a float, None if it is not one."""
    if getattr(value, "ndim", None) == 0:
        value = value.item()
    try:
        return float(value) if is_real(value) else None
    except OverflowError:  # a whole number of more than 308 digits
        return None


def _slack(bound: float) -> float:
    return _ROUNDING * max(1.0, abs(bound)) if math.isfinite(bound) else 0.0
