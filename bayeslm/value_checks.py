"""Checks of values at a call: what a value must be, in words, and a function that converts it or refuses it.

`bayeslm.annotations` makes checks of annotations, `bayeslm.validation` is what other files use.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import numbers
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from .characters import lone_surrogate
from .short_repr import show

PLAIN: tuple[type, ...] = (int, float)  # numbers that are kept as they come
LARGEST = 2**63 - 1  # whole numbers become tensors of int64
WORDS = {
    (int, "[1, inf)"): "a positive whole number",
    (int, "[0, inf)"): "0 or a positive whole number",
    (float, "(-inf, inf)"): "a finite number",
    (float, "(0, inf)"): "positive and finite",
    (float, "[0, inf)"): "non-negative and finite",
}


class Refused(Exception):
    """A value is none of what an annotation means.

    :param out_of_range: whether it is a number of the right type.
    :param place: of an element, such as "[3]", and what it must be, and its value.
    """

    def __init__(self, out_of_range: bool = False, place: str = "", words: str = "", value: Any = None) -> None:
        super().__init__()
        self.out_of_range, self.place, self.words, self.value = out_of_range, place, words, value


@dataclasses.dataclass(frozen=True)
class Check:
    """What an annotation means: words for it, and a function that returns a value, converted, or raises `Refused`."""

    words: str
    convert: Callable[[Any], Any]
    is_class: bool = False


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


ANYTHING = Check("anything", lambda value: value)
_Parameter: TypeAlias = tuple[str, Check, Any]  # name, check, default
UNNAMED: _Parameter = ("", ANYTHING, None)


def checked(function: Callable[..., Any], checks_of: Callable[[Iterable[str]], dict[str, Check]]) -> Any:
    """Return a function that checks and converts its arguments first.

    :param checks_of: returns the checks of named parameters, by name, without those that are not annotated.
    """

    @functools.cache  # at the first call: annotations may name what is defined later
    def compiled() -> tuple[inspect.Signature, list[_Parameter], dict[str, _Parameter]]:
        signature = inspect.signature(function)
        every = signature.parameters.values()
        named = [each for each in every if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)]
        checks = checks_of([each.name for each in named])
        parameters = {each.name: (each.name, checks.get(each.name, ANYTHING), each.default) for each in named}
        by_place = [parameters[each.name] for each in named if each.kind is not each.KEYWORD_ONLY]
        by_name = {each.name: parameters[each.name] for each in named if each.kind is not each.POSITIONAL_ONLY}
        return signature, by_place, by_name

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        signature, by_place, by_name = compiled()
        places, names = list(args), dict(kwargs)
        name, value, check = "", None, ANYTHING
        try:
            for i, (parameter, value) in enumerate(zip(by_place, args, strict=False)):
                name, check, default = parameter
                if check is not ANYTHING and value is not default:
                    places[i] = check.convert(value)
            for key, value in kwargs.items():
                name, check, default = by_name.get(key, UNNAMED)
                if check is not ANYTHING and value is not default:
                    names[key] = check.convert(value)
        except Refused as refused:
            try:
                signature.bind(*args, **kwargs)
            except TypeError:
                return function(*args, **kwargs)  # Python's own error names the argument
            owner = function.__qualname__
            if "self" in signature.parameters:  # a method is named after the class of the object, not its base
                name_of = "" if function.__name__ in ("__init__", "forward") else f".{function.__name__}"
                owner = type(args[0]).__name__ + name_of
            error = ValueError if refused.out_of_range else TypeError
            words, value = refused.words or check.words, refused.value if refused.place else value
            got = show(value) + _hint(words, value)
            raise error(f"{owner}: {name}{refused.place} must be {words}, got {got}") from None
        return function(*places, **names)

    return call


def _hint(words: str, value: Any) -> str:
    """Return what to write in the place of a value that is no list, or one of this library's classes; or nothing."""
    if isinstance(value, str) and "a list" in words:
        return f": write [{show(value)}]"
    if isinstance(value, type) and value.__module__.partition(".")[0] == "bayeslm":
        return f": that is a class, write {value.__name__}(...)"
    return ""


def check_program(model: Any) -> None:
    """Check that the first argument of an engine's ``run`` is a program.

    :raises TypeError: if it cannot be called, as where it was exchanged with the prompts; with its value.
    """
    if not callable(model):
        raise TypeError(f"model must be a Pyro program, a function, got {show(model)}: write run(model, prompts)")


def instance_of(cls: type) -> Callable[[Any], Any]:
    """Return a conversion that passes on instances of a class; of a protocol, not the classes that implement it."""
    if getattr(cls, "_is_protocol", False):
        return only(lambda value: isinstance(value, cls) and not isinstance(value, type))
    return only(lambda value: isinstance(value, cls))


def only(holds: Callable[[Any], bool]) -> Callable[[Any], Any]:
    """Return a conversion that passes on what holds, and refuses everything else."""

    def convert(value: Any) -> Any:
        if not holds(value):
            raise Refused
        return value

    return convert


def text(value: Any) -> str:
    """Refuse what is no string, or has half of a character."""
    if not isinstance(value, str):
        raise Refused
    if not value.isascii() and (found := lone_surrogate(value)) is not None:
        raise Refused(out_of_range=True, words=f"a string without {found}, which is half of a character")
    return value


def path(value: Any) -> Any:
    """Refuse what cannot be the name of a file, which may have any bytes but 0."""
    if not isinstance(value, str):
        raise Refused
    try:
        name = os.fsencode(value)
    except UnicodeEncodeError:
        name = b"\0"
    if b"\0" in name:
        raise Refused(out_of_range=True, words="the name of a file")
    return value


def array_of_numbers(value: Any) -> Any:
    """Refuse what NumPy makes no array of numbers of."""
    try:
        kind = np.asarray(value).dtype.kind
    except Exception:  # a ragged list, a tensor with a gradient, an object of any kind
        raise Refused from None
    if kind not in "biuf":
        raise Refused
    return value


def shaped(array: Check, shape: Shape) -> Check:
    """Return the check of an array with named axes."""
    words = f"{array.words} of {'whole numbers of ' * shape.whole}shape ({shape.axes})"

    def convert(value: Any) -> Any:
        value = array.convert(value)
        if value not in shape:
            raise Refused(out_of_range=True, words=f"{words}, not {tuple(np.shape(value))}")
        return value

    return Check(words, convert)


def filled(entries: Check) -> Check:
    """Return the check of a list or mapping that is not empty."""
    words = f"{entries.words}, and not empty"

    def convert(value: Any) -> Any:
        value = entries.convert(value)
        if not len(value):
            raise Refused(out_of_range=True, words=words)
        return value

    return Check(words, convert)


ITERABLE = Check("an iterable", only(lambda value: isinstance(value, Iterable) and getattr(value, "ndim", 1) > 0))
NONE = Check("None", only(lambda value: value is None), is_class=True)
NUMBERS = Check("an array of numbers", array_of_numbers)
PATH = Check("a string", path, is_class=True)


def function_of(count: int) -> Check:
    """Return the check of a function that can be called with so many arguments, as far as its signature says."""

    def convert(value: Any) -> Any:
        if not callable(value):
            raise Refused
        try:
            inspect.signature(value).bind(*[None] * count)
        except TypeError:
            raise Refused(words=f"a function of {count} argument{'' if count == 1 else 's'}") from None
        except ValueError:  # a built-in function without a signature
            pass
        return value

    return Check("a function", convert)


def one_of(options: tuple[Any, ...]) -> Callable[[Any], Any]:
    """Return a conversion that passes on one of some values."""

    def convert(value: Any) -> Any:
        if not any(type(value) is type(option) and value == option for option in options):
            raise Refused(out_of_range=any(isinstance(value, type(option)) for option in options))
        return value

    return convert


def number(kind: type, interval: Within | None) -> Check:
    """Return the check of a number of Python's, NumPy's or torch's."""
    what = "a whole number" if kind is int else "a number"
    if interval is not None and interval.high == math.inf and kind is int:
        what = f"{what} of at least {interval.low:.0f}"
    elif interval is not None:
        what = f"{what} in {interval.interval}"
    words = what if interval is None else WORDS.get((kind, interval.interval), what)

    def convert(value: Any) -> Any:
        value = _without_array(value)
        if isinstance(value, bool) or not isinstance(value, numbers.Integral if kind is int else numbers.Real):
            raise Refused
        try:
            number = value if type(value) in PLAIN else kind(value)
            inside = not math.isnan(number) if interval is None else float(number) in interval
        except OverflowError:
            raise Refused(out_of_range=True) from None
        if not inside:
            raise Refused(out_of_range=True)
        if kind is int and abs(number) > LARGEST:
            raise Refused(out_of_range=True, words=f"{words} below 2 ** 63")
        return float(number) if kind is float and isinstance(number, int) and abs(number) > LARGEST else number

    return Check(words, convert)


def _without_array(value: Any) -> Any:
    """Return the number in an array or a tensor without dimensions; one with a gradient to lose is none."""
    if getattr(value, "ndim", None) != 0 or not hasattr(value, "item") or getattr(value, "requires_grad", False):
        return value
    try:
        return value.item()
    except (RuntimeError, ValueError):  # on the device "meta"
        return value


def union(options: list[Check]) -> Check:
    """Return the check of a value that passes one of some checks."""
    if ANYTHING in options:
        return ANYTHING
    ordered = sorted(options, key=lambda option: not option.is_class)  # an array is an array before a sequence

    def convert(value: Any) -> Any:
        refusals = []
        for option in ordered:
            try:
                return option.convert(value)
            except Refused as refused:
                refusals.append(refused)
        nearest = next((refused for refused in refusals if refused.words), None)  # a sequence, but for an element
        raise nearest or Refused(any(refused.out_of_range for refused in refusals))

    return Check(listed(list(dict.fromkeys(option.words for option in options))), convert)


def sequence(cls: type, element: Check) -> Check:
    """Return the check of a list, tuple or other sequence, and of its elements."""
    words = f"a list, each {element.words}" if " or " not in element.words and element is not ANYTHING else "a list"

    def convert(value: Any) -> Any:
        is_sequence = hasattr(value, "__len__") and hasattr(value, "__getitem__")
        if not is_sequence or isinstance(value, str | bytes | Mapping | type) or getattr(value, "ndim", 1) == 0:
            raise Refused
        values = list(value.tolist() if hasattr(value, "tolist") else value)
        own = tuple(values) if cls is tuple or isinstance(value, tuple) else values
        if element is ANYTHING:
            return value if isinstance(value, Sequence) else own
        new = [_at(f"[{i}]", element, x) for i, x in enumerate(values)]
        if isinstance(value, cls) and all(a is b for a, b in zip(new, values, strict=True)):
            return value
        return type(own)(new)

    return Check(words, convert)


def fixed(elements: list[Check]) -> Check:
    """Return the check of a tuple with one check an entry."""

    def convert(value: Any) -> Any:
        if not isinstance(value, tuple | list) or len(value) != len(elements):
            raise Refused
        return tuple(_at(f"[{i}]", *both) for i, both in enumerate(zip(elements, value, strict=True)))

    return Check(f"{len(elements)} values: {', '.join(element.words for element in elements)}", convert)


def mapping(key: Check, element: Check) -> Check:
    """Return the check of a mapping, of its keys and of its values."""

    def convert(value: Any) -> Any:
        if not isinstance(value, Mapping):
            raise Refused
        new = {_at(f" key {name!r:.40}", key, name): _at(f"[{name!r:.40}]", element, x) for name, x in value.items()}
        return value if all(new[name] is x for name, x in value.items()) else new

    return Check("a mapping" if element is ANYTHING else f"a mapping to {element.words}", convert)


def _at(place: str, element: Check, value: Any) -> Any:
    """Convert an element; a refusal says where it stands."""
    try:
        return element.convert(value)
    except Refused as refused:
        if refused.place:
            raise Refused(refused.out_of_range, place + refused.place, refused.words, refused.value) from None
        raise Refused(refused.out_of_range, place, refused.words or element.words, value) from None


def listed(words: list[str]) -> str:
    """Return words as an enumeration."""
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
