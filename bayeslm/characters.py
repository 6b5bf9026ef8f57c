"""Texts that have no encoding: half of a surrogate pair is no character, and no tokenizer or file takes it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def lone_surrogate(text: str) -> str | None:
    """Return what is wrong with a text that has no encoding, in the words of errors; None of any other text."""
    if text.isascii():
        return None
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"the lone surrogate {text[error.start]!r} at character {error.start}"
    return None


def check_characters(what: str, text: str) -> None:
    """Refuse a text that has no encoding.

    :param what: the text, for the error.
    :raises ValueError: if it holds half of a surrogate pair.
    """
    if (found := lone_surrogate(text)) is not None:
        raise ValueError(f"{what} holds {found}, which is half of a character: remove it, or write the whole character")


def texts_in(value: Any) -> Iterator[str]:
    """Yield all texts in a value of a column: in lists, tuples and mappings, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for pair in value.items():
            yield from texts_in(pair)
    elif isinstance(value, list | tuple):
        for x in value:
            yield from texts_in(x)
