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

import builtins
import collections.abc
import dataclasses
import functools
import inspect
import math
import numbers
import os
import reprlib
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike

from bayeslm.characters import lone_surrogate
from bayeslm.short_repr import short_repr

F = TypeVar("F", bound=Callable[..., Any])


class Within:
    """An interval of numbers, as the annotation of an argument: ``Annotated[float, Within("(0, 1]")]``.

    :param interval: in the notation of mathematics, ``inf`` for an end that is unbounded.
    """

    def __init__(self, interval: str) -> None:
        self.interval = interval
        self.low, self.high = (float(end) for end in interval[1:-1].split(","))

    def __contains__(self, value: float) -> bool:
        above = value >= self.low if self.interval[0] == "[" else value > self.low
        return above and (value <= self.high if self.interval[-1] == "]" else value < self.high)


class Shape:
    """Named axes of an array or a tensor, as an annotation: ``Annotated[ArrayLike, Shape("chain, draw, ...")]``.

    :param axes: with "..." at the beginning or the end, where it may have more.
    :param whole: whether its entries must be whole numbers.
    """

    def __init__(self, axes: str, *, whole: bool = False) -> None:
        self.axes, self.whole = axes, whole
        names = axes.split(", ")
        self.least = len(names) - ("..." in names)
        self.most = math.inf if "..." in names else self.least

    def __contains__(self, value: Any) -> bool:
        if self.whole and not str(getattr(value, "dtype", "int")).rpartition(".")[2].startswith(("int", "uint")):
            return False
        return self.least <= len(np.shape(value)) <= self.most


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

PLAIN: tuple[type, ...] = (int, float)  # numbers that are kept as they come
LARGEST = 2**63 - 1  # whole numbers become tensors of int64
WORDS = {
    (int, "[1, inf)"): "a positive whole number",
    (int, "[0, inf)"): "0 or a positive whole number",
    (float, "(-inf, inf)"): "a finite number",
    (float, "(0, inf)"): "positive and finite",
    (float, "[0, inf)"): "non-negative and finite",
}
_shown = reprlib.Repr()
_shown.maxstring = _shown.maxother = 60
_shown.maxlevel = 2


class _Refused(Exception):
    """A value is none of what an annotation means.

    :param out_of_range: whether it is a number of the right type.
    :param place: of an element, such as "[3]", and what it must be, and its value.
    """

    def __init__(self, out_of_range: bool = False, place: str = "", words: str = "", value: Any = None) -> None:
        super().__init__()
        self.out_of_range, self.place, self.words, self.value = out_of_range, place, words, value


@dataclasses.dataclass(frozen=True)
class _Check:
    """What an annotation means: words for it, and a function that returns a value, converted, or raises `_Refused`."""

    words: str
    convert: Callable[[Any], Any]
    is_class: bool = False


ANYTHING = _Check("anything", lambda value: value)


def validated(target: F) -> F:
    """Check the arguments of a function, or of a class's constructor, by their annotations at each call.

    :raises TypeError: at a call, if an argument is of another type than its annotation says; with its name and value.
    :raises ValueError: if a number is outside the interval of its annotation.
    """
    if isinstance(target, type):
        cls: Any = target
        cls.__init__ = _checked(cls.__init__, functools.partial(annotations_of, cls))
        if dataclasses.is_dataclass(target) and hasattr(vars(target).get("__repr__"), "__wrapped__"):
            cls.__repr__ = short_repr  # in the place of the dataclass's own: without defaults and whole networks
        return target
    return typing.cast(F, _checked(target, functools.partial(annotations_of, target)))


def check_program(model: Any) -> None:
    """Check that the first argument of an engine's ``run`` is a program.

    :raises TypeError: if it cannot be called, as where it was exchanged with the prompts; with its value.
    """
    if not callable(model):
        raise TypeError(f"model must be a Pyro program, a function, got {show(model)}: write run(model, prompts)")


def meaning(annotation: Any) -> str:
    """Return what a value with a resolved annotation must be, in the words of errors."""
    return _compile(annotation).words


def show(value: Any) -> str:
    """Return a value on one short line, for errors; with its type, unless that is plain from its look."""
    try:
        text = " ".join(_shown.repr(value).split())
    except Exception:  # an object's own __repr__ may fail
        return f"a {type(value).__name__}"
    plain = value is None or isinstance(value, str | int | float | list | tuple | dict | set | bytes | type)
    return text if plain else f"a {type(value).__name__}: {text:.60}"


def _checked(function: Callable[..., Any], annotations: Callable[[], dict[str, Any]]) -> Any:
    @functools.cache  # at the first call: annotations may name what is defined later
    def compiled() -> tuple[inspect.Signature, dict[str, _Check]]:
        signature = inspect.signature(function)
        hints = annotations()
        variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        named = [name for name, parameter in signature.parameters.items() if parameter.kind not in variadic]
        return signature, {name: _compile(hints[name]) for name in named if name in hints}

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        signature, checks = compiled()
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError:
            return function(*args, **kwargs)  # Python's own error names the argument
        for name, value in bound.arguments.items():
            if (check := checks.get(name, ANYTHING)) is ANYTHING or value is signature.parameters[name].default:
                continue
            try:
                bound.arguments[name] = check.convert(value)
            except _Refused as refused:
                owner = function.__qualname__
                if "self" in signature.parameters:  # a method is named after the class of the object, not its base
                    name_of = "" if function.__name__ in ("__init__", "forward") else f".{function.__name__}"
                    owner = type(args[0]).__name__ + name_of
                error = ValueError if refused.out_of_range else TypeError
                words, value = refused.words or check.words, refused.value if refused.place else value
                hint = f": write [{show(value)}]" if isinstance(value, str) and "a list" in words else ""
                raise error(f"{owner}: {name}{refused.place} must be {words}, got {show(value)}{hint}") from None
        return function(*bound.args, **bound.kwargs)

    return call


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


def _compile(hint: Any) -> _Check:
    """Return the check of a resolved annotation."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated and Unchecked in arguments:
        return ANYTHING
    if origin is Annotated:
        if (shape := next((x for x in arguments[1:] if isinstance(x, Shape)), None)) is not None:
            return _shaped(_compile(arguments[0]), shape)
        interval = next((x for x in arguments[1:] if isinstance(x, Within)), None)
        return _compile(arguments[0]) if interval is None else _number(arguments[0], interval)
    if hint is None or hint is types.NoneType:
        return _Check("None", _only(lambda value: value is None), is_class=True)
    if hint in (int, float):
        return _number(hint, None)
    if origin in (typing.Union, types.UnionType):
        is_path = any(_is_path(argument) for argument in arguments)
        arrays = typing.get_args(ArrayLike)
        options = [x for x in arguments if x not in arrays] if set(arrays) <= set(arguments) else arguments
        checks = [PATH if is_path and option is str else _compile(option) for option in options]
        return _union([NUMBERS, *checks] if len(options) < len(arguments) else checks)
    if hint is str:
        return _Check("a string", _text, is_class=True)
    if origin is typing.Literal:
        words = [repr(argument) for argument in arguments]
        return _Check(_listed(words) if len(words) < 3 else f"one of {', '.join(words)}", _one_of(arguments))
    if origin is collections.abc.Callable and isinstance(arguments[0], list):
        return _function(len(arguments[0]))
    if origin is collections.abc.Callable or hint is Callable:
        return _Check("a function", _only(callable))
    cls = os.PathLike if _is_path(hint) else origin or hint
    if not isinstance(cls, type) or cls is object or hint is Any:
        return ANYTHING  # a type variable, Any
    if cls is type:
        return _Check("a class", _only(lambda value: isinstance(value, type)))
    if cls is tuple and arguments and arguments[-1] is not Ellipsis:
        return _fixed([_compile(argument) for argument in arguments])
    if cls in (list, tuple, collections.abc.Sequence):
        return _sequence(cls, _compile(arguments[0]) if arguments else ANYTHING)
    if cls in (dict, collections.abc.Mapping):
        return _mapping(*(_compile(argument) for argument in arguments or (Any, Any)))
    if getattr(cls, "_is_protocol", False) and not getattr(cls, "_is_runtime_protocol", False):
        return ANYTHING
    names: dict[Any, str] = {bool: "True or False", os.PathLike: "a path"}
    article = "an" if cls.__name__[0] in "AEIOU" else "a"
    return _Check(
        names.get(cls, f"{article} {cls.__name__}"), _only(lambda value: isinstance(value, cls)), is_class=True
    )


def _only(holds: Callable[[Any], bool]) -> Callable[[Any], Any]:
    def convert(value: Any) -> Any:
        if not holds(value):
            raise _Refused
        return value

    return convert


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise _Refused
    if (found := lone_surrogate(value)) is not None:
        raise _Refused(out_of_range=True, words=f"a string without {found}, which is half of a character")
    return value


def _is_path(hint: Any) -> bool:
    cls = typing.get_origin(hint) or hint
    return isinstance(cls, type) and issubclass(cls, os.PathLike)


def _numbers(value: Any) -> Any:
    try:
        kind = np.asarray(value).dtype.kind
    except Exception:  # a ragged list, a tensor with a gradient, an object of any kind
        raise _Refused from None
    if kind not in "biuf":
        raise _Refused
    return value


def _shaped(array: _Check, shape: Shape) -> _Check:
    """Return the check of an array with named axes."""
    words = f"{array.words} of {'whole numbers of ' * shape.whole}shape ({shape.axes})"

    def convert(value: Any) -> Any:
        value = array.convert(value)
        if value not in shape:
            raise _Refused(out_of_range=True, words=f"{words}, not {tuple(np.shape(value))}")
        return value

    return _Check(words, convert)


NUMBERS = _Check("an array of numbers", _numbers)
PATH = _Check("a string", _only(lambda value: isinstance(value, str)), is_class=True)  # of a file, of any bytes


def _function(count: int) -> _Check:
    """Return the check of a function that can be called with so many arguments, as far as its signature says."""

    def convert(value: Any) -> Any:
        if not callable(value):
            raise _Refused
        try:
            inspect.signature(value).bind(*[None] * count)
        except TypeError:
            raise _Refused(words=f"a function of {count} argument{'' if count == 1 else 's'}") from None
        except ValueError:  # a built-in function without a signature
            pass
        return value

    return _Check("a function", convert)


def _one_of(options: tuple[Any, ...]) -> Callable[[Any], Any]:
    def convert(value: Any) -> Any:
        if not any(type(value) is type(option) and value == option for option in options):
            raise _Refused(out_of_range=any(isinstance(value, type(option)) for option in options))
        return value

    return convert


def _number(kind: type, interval: Within | None) -> _Check:
    what = "a whole number" if kind is int else "a number"
    if interval is not None and interval.high == math.inf and kind is int:
        what = f"{what} of at least {interval.low:.0f}"
    elif interval is not None:
        what = f"{what} in {interval.interval}"
    words = what if interval is None else WORDS.get((kind, interval.interval), what)

    def convert(value: Any) -> Any:
        value = _without_array(value)
        if isinstance(value, bool) or not isinstance(value, numbers.Integral if kind is int else numbers.Real):
            raise _Refused
        try:
            number = value if type(value) in PLAIN else kind(value)
            inside = not math.isnan(number) if interval is None else float(number) in interval
        except OverflowError:
            raise _Refused(out_of_range=True) from None
        if not inside:
            raise _Refused(out_of_range=True)
        if kind is int and abs(number) > LARGEST:
            raise _Refused(out_of_range=True, words=f"{words} below 2 ** 63")
        return float(number) if kind is float and isinstance(number, int) and abs(number) > LARGEST else number

    return _Check(words, convert)


def _without_array(value: Any) -> Any:
    """Return the number in an array or a tensor without dimensions; one with a gradient to lose is none."""
    if getattr(value, "ndim", None) != 0 or not hasattr(value, "item") or getattr(value, "requires_grad", False):
        return value
    try:
        return value.item()
    except (RuntimeError, ValueError):  # on the device "meta"
        return value


def _union(options: list[_Check]) -> _Check:
    if ANYTHING in options:
        return ANYTHING
    ordered = sorted(options, key=lambda option: not option.is_class)  # an array is an array before a sequence

    def convert(value: Any) -> Any:
        refusals = []
        for option in ordered:
            try:
                return option.convert(value)
            except _Refused as refused:
                refusals.append(refused)
        nearest = next((refused for refused in refusals if refused.words), None)  # a sequence, but for an element
        raise nearest or _Refused(any(refused.out_of_range for refused in refusals))

    return _Check(_listed(list(dict.fromkeys(option.words for option in options))), convert)


def _sequence(cls: type, element: _Check) -> _Check:
    words = f"a list, each {element.words}" if " or " not in element.words and element is not ANYTHING else "a list"

    def convert(value: Any) -> Any:
        is_sequence = hasattr(value, "__len__") and hasattr(value, "__getitem__")
        if not is_sequence or isinstance(value, str | bytes | Mapping | type) or getattr(value, "ndim", 1) == 0:
            raise _Refused
        values = list(value.tolist() if hasattr(value, "tolist") else value)
        own = tuple(values) if cls is tuple or isinstance(value, tuple) else values
        if element is ANYTHING:
            return value if isinstance(value, Sequence) else own
        new = [_at(f"[{i}]", element, x) for i, x in enumerate(values)]
        if isinstance(value, cls) and all(a is b for a, b in zip(new, values, strict=True)):
            return value
        return type(own)(new)

    return _Check(words, convert)


def _fixed(elements: list[_Check]) -> _Check:
    def convert(value: Any) -> Any:
        if not isinstance(value, tuple | list) or len(value) != len(elements):
            raise _Refused
        return tuple(_at(f"[{i}]", *both) for i, both in enumerate(zip(elements, value, strict=True)))

    return _Check(f"{len(elements)} values: {', '.join(element.words for element in elements)}", convert)


def _mapping(key: _Check, element: _Check) -> _Check:
    def convert(value: Any) -> Any:
        if not isinstance(value, Mapping):
            raise _Refused
        new = {_at(f" key {name!r:.40}", key, name): _at(f"[{name!r:.40}]", element, x) for name, x in value.items()}
        return value if all(new[name] is x for name, x in value.items()) else new

    return _Check("a mapping" if element is ANYTHING else f"a mapping to {element.words}", convert)


def _at(place: str, element: _Check, value: Any) -> Any:
    """Convert an element; a refusal says where it stands."""
    try:
        return element.convert(value)
    except _Refused as refused:
        if refused.place:
            raise _Refused(refused.out_of_range, place + refused.place, refused.words, refused.value) from None
        raise _Refused(refused.out_of_range, place, refused.words or element.words, value) from None


def _listed(words: list[str]) -> str:
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
