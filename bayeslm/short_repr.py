"""Short representations of settings, those that differ from the defaults, and of the values that errors show."""

from __future__ import annotations

import dataclasses
import reprlib
from collections.abc import Iterator, Mapping
from typing import Any

LONGEST = 60  # characters of a setting
_shown = reprlib.Repr()
_shown.maxstring = _shown.maxother = LONGEST
_shown.maxlevel = 2


def call(name: str, settings: Mapping[str, Any]) -> str:
    """Return ``name(setting=value, ...)``, with values on one short line."""
    return f"{name}({', '.join(f'{key}={brief(value)}' for key, value in settings.items())})"


def short_repr(record: Any) -> str:
    """Return a dataclass with those of its settings that differ from their defaults."""
    return call(type(record).__name__, dict(_changed(record)))


def brief(value: Any) -> str:
    """Return a value on one short line: a network or an array by its type (and shape), anything long by its type."""
    name = type(value).__name__
    if isinstance(shape := getattr(value, "shape", None), tuple):
        return f"{name} {tuple(shape)}"
    if hasattr(value, "named_parameters"):
        return name
    if callable(value) and hasattr(value, "__name__"):
        return str(value.__name__)
    text = repr(value)
    return text if len(text) <= LONGEST and "\n" not in text and " at 0x" not in text else f"{name}(...)"


def _changed(record: Any) -> Iterator[tuple[str, Any]]:
    for field in dataclasses.fields(record):
        value = getattr(record, field.name)
        factory = field.default_factory
        default = field.default if factory is dataclasses.MISSING else factory()
        comparable = isinstance(value, int | float | str | tuple) or dataclasses.is_dataclass(value)
        if field.repr and not (value is default or (comparable and type(value) is type(default) and value == default)):
            yield field.name, value


def show(value: Any) -> str:
    """Return a value on one short line, for errors; with its type, unless that is plain from its look."""
    try:
        text = " ".join(_shown.repr(value).split())
    except Exception:  # an object's own __repr__ may fail
        return f"a {type(value).__name__}"
    plain = value is None or isinstance(value, str | int | float | list | tuple | dict | set | bytes | type)
    return text if plain else f"a {type(value).__name__}: {text:.60}"
