"""Rows of preference data: what all kinds of it share in reading, checking and writing them."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

from bayeslm.characters import check_characters
from bayeslm.files import write_file
from bayeslm.prompt_files import json_lines
from bayeslm.validation import show, validated

Row = TypeVar("Row")
MAX_ERRORS = 10  # bad rows that an error lists


class PreferenceError(ValueError):
    """An error in rows of preference data, which names the rows, what is wrong with each, and what to do."""


@dataclass(frozen=True)
class PreferenceData:
    """Preference data as lists of one length, one list for each field of a row.

    :raises PreferenceError: if the lists differ in length, or a row is invalid.
    """

    FIELDS: ClassVar[tuple[str, ...]]  # names of a row's fields in the order of the lists
    prompts: list[str]

    def __post_init__(self) -> None:
        names = [field.name for field in dataclasses.fields(self)]
        columns = [getattr(self, name) for name in names]
        for name, column in zip(names, columns, strict=True):
            if not isinstance(column, list | tuple):
                raise PreferenceError(f"{name} must be a list, got {show(column)}")
        if len({len(column) for column in columns}) > 1:
            sizes = _enumeration([str(len(column)) for column in columns])
            raise PreferenceError(f"{_enumeration(names)} must be of one length, not {sizes}")
        parse_rows("row", enumerate(zip(*columns, strict=True)), lambda row: self._check_row(*row))

    def __len__(self) -> int:
        return len(self.prompts)

    @classmethod
    def _check_row(cls, *values: Any) -> tuple[Any, ...]:
        """Check the values of a row's `FIELDS`, and return them in the types of the lists.

        :raises PreferenceError: if a value is invalid.
        """
        raise NotImplementedError

    @classmethod
    @validated
    def from_rows(cls, rows: Iterable[Mapping[str, Any]]) -> Self:
        """Build the data from rows with the fields that the class describes.

        :raises PreferenceError: for invalid rows, by their numbers from 0, or if there are no rows.
        """
        return cls._parse("row", enumerate(rows))

    @classmethod
    @validated
    def from_jsonl(cls, path: str | os.PathLike[str]) -> Self:
        """Build the data from a file with one JSON object per line; empty lines are skipped.

        :raises PreferenceError: for invalid lines, by their numbers from 1, or if there are no rows.
        :raises OSError: if the file cannot be read.
        """
        return cls._parse(lines_of(path), read_json_lines(path))

    @classmethod
    def _parse(
        cls, source: str, rows: Iterable[tuple[int, Any]], parse: Callable[[Any], tuple[Any, ...]] | None = None
    ) -> Self:
        parse = parse or (lambda row: cls._check_row(*require_fields(row, *cls.FIELDS)))
        return cls(*map(list, zip(*parse_rows(source, rows, parse), strict=True)))

    def to_jsonl(self, path: str | os.PathLike[str]) -> None:
        """Write one JSON object per row, in the format of `from_jsonl`.

        :raises OSError: if the disk refuses, with the path; an existing file is then as it was before.
        """
        rows = zip(*(getattr(self, field.name) for field in dataclasses.fields(self)), strict=True)
        objects = (dict(zip(self.FIELDS, row, strict=True)) for row in rows)
        write_file(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in objects))


def _enumeration(words: list[str]) -> str:
    return f"{', '.join(words[:-1])} and {words[-1]}"


def lines_of(path: str | os.PathLike[str]) -> str:
    """Return the source of a file's rows, for errors."""
    return f"{os.fspath(path)}: line"


def read_json_lines(path: str | os.PathLike[str]) -> Iterator[tuple[int, Any]]:
    """Yield the number, from 1, and the JSON value of each line that is not empty.

    The value of a line that is no JSON is a `PreferenceError`.
    """
    for number, value in json_lines(Path(path).read_bytes()):
        yield number, PreferenceError(str(value)) if isinstance(value, ValueError) else value


def parse_rows(source: str, rows: Iterable[tuple[int, Any]], parse: Callable[[Any], Row]) -> list[Row]:
    """Parse numbered rows.

    :param source: what a row's number counts, for errors.
    :raises PreferenceError: with the errors of the first `MAX_ERRORS` invalid rows, or if there is no row.
    """
    parsed, errors = [], []
    for number, row in rows:
        try:
            if isinstance(row, PreferenceError):
                raise row
            parsed.append(parse(row))
        except PreferenceError as error:
            errors.append(f"{source} {number} {error}")
    if errors:
        more = f"\n... and {len(errors) - MAX_ERRORS} more" if len(errors) > MAX_ERRORS else ""
        raise PreferenceError("\n".join(errors[:MAX_ERRORS]) + more)
    if not parsed:
        raise PreferenceError("there are no preferences: give at least one row")
    return parsed


def require_fields(row: Any, *names: str) -> list[Any]:
    """Return the values of a row's fields.

    :raises PreferenceError: if ``row`` is no mapping, or lacks a field.
    """
    if not isinstance(row, Mapping):
        raise PreferenceError(f"is {row!r:.60}, no object: it needs the fields {', '.join(names)}")
    if missing := [name for name in names if is_missing(row.get(name))]:
        found = ", ".join(map(str, row)) or "nothing"
        raise PreferenceError(
            f"lacks {' and '.join(map(repr, missing))} (it has {found}): add it, or rename its column"
        )
    return [row[name] for name in names]


def is_missing(value: Any) -> bool:
    """Return whether a field has no value: None, or NaN in rows of a data frame."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def check_texts(texts: Mapping[str, Any]) -> None:
    """Check that all values are strings of whole characters, and that all but ``prompt`` hold more than white space.

    :raises PreferenceError: otherwise.
    """
    for name, text in texts.items():
        if not isinstance(text, str):
            raise PreferenceError(f"has {text!r:.60} for {name!r}: it must be a string")
        try:
            check_characters(repr(name), text)
        except ValueError as error:
            raise PreferenceError(f"is no text: {error}") from None
        if not text.strip() and name != "prompt":
            raise PreferenceError(f"has no text for {name!r}: fill it in, or drop the row")
