"""Checks of arguments by their annotations, in one place for every engine, objective, reward and model.

    @validated
    @dataclass(frozen=True)
    class Sampler:
        num_particles: Count = 64
        ess_threshold: Annotated[float, Within("[0, 1]")] = 0.5

A wrong argument raises an error with its name, what it must be, and its value: a TypeError for another type, a
ValueError for a number out of range. A number of NumPy, and an array or tensor that is a single number, count as
Python's and are passed on as those, so that settings can be compared and written as JSON. What an annotation cannot
express, such as two settings that contradict each other, the class checks itself.

``Callable[..., X]`` means that a value can be called, ``Callable[[A], X]`` that it can be with one argument. Elements
of sequences and mappings are checked.
"""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Callable
from typing import Any, TypeVar

from .annotations import (
    Count,
    Finite,
    Natural,
    NonEmpty,
    NonNegative,
    Positive,
    Seed,
    Share,
    Unchecked,
    annotations_of,
    check_of,
    checks_of,
)
from .short_repr import short_repr, show
from .value_checks import Shape, Within, check_program, checked

__all__ = [
    "Count",
    "Finite",
    "Natural",
    "NonEmpty",
    "NonNegative",
    "Positive",
    "Seed",
    "Shape",
    "Share",
    "Unchecked",
    "Within",
    "annotations_of",
    "check_program",
    "meaning",
    "show",
    "validated",
]

F = TypeVar("F", bound=Callable[..., Any])


def validated(target: F) -> F:
    """Check the arguments of a function, or of a class's constructor, by their annotations at each call.

    :raises TypeError: at a call, if an argument is of another type than its annotation says; with its name and value.
    :raises ValueError: if a number is outside the interval of its annotation.
    """
    if isinstance(target, type):
        cls: Any = target
        cls.__init__ = checked(cls.__init__, functools.partial(checks_of, cls))
        if dataclasses.is_dataclass(target) and hasattr(vars(target).get("__repr__"), "__wrapped__"):
            cls.__repr__ = short_repr  # in the place of the dataclass's own: without defaults and whole networks
        return target
    return typing.cast(F, checked(target, functools.partial(checks_of, target)))


def meaning(annotation: Any) -> str:
    """Return what a value with a resolved annotation must be, in the words of errors."""
    return check_of(annotation).words
