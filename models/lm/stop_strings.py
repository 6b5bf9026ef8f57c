"""The automaton of stop strings for the tokens of a tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch

from bayeslm.characters import check_characters

from .stops import Stops
from .texts import token_texts

MOST = 512  # characters of all strings, each of which is a row of the automaton, of the length of the vocabulary


def check_stop(stop: str | Sequence[str], tokenizer: Any) -> tuple[str, ...]:
    """Return stop strings, each once.

    :raises TypeError: if they are no strings, or there is no tokenizer to read texts with.
    :raises ValueError: if one is empty, has no encoding, or all together have more than `MOST` characters.
    """
    if not isinstance(stop, Sequence) or not all(isinstance(string, str) for string in stop):
        raise TypeError(f"stop must be a string or several, got {stop!r:.60}")
    strings = (stop,) if isinstance(stop, str) else tuple(stop)
    if "" in strings:
        raise ValueError("stop holds an empty string, with which every text begins: leave it out")
    for string in strings:
        check_characters("stop", string)
    if (size := sum(map(len, strings))) > MOST:
        raise ValueError(f"stop has {size} characters, and may have {MOST}: end texts by shorter strings")
    if strings and tokenizer is None:
        raise TypeError("stop needs a tokenizer: this LanguageModel has none, and its texts cannot be read")
    return tuple(dict.fromkeys(strings))


@lru_cache(maxsize=32)
def stops_of(tokenizer: Any, strings: tuple[str, ...], size: int) -> Stops:
    """Return the automaton of some strings.

    :param size: number of token ids.
    """
    known = len(tokenizer) if hasattr(tokenizer, "__len__") else size
    added = token_texts(tokenizer, [[token] for token in range(min(size, known))])
    letters = set("".join(strings))
    beginnings = list(dict.fromkeys(["", *(s[:n] for s in strings for n in range(1, len(s)))]))
    places = {beginning: i for i, beginning in enumerate(beginnings)}
    ended = len(beginnings)
    table = torch.zeros((ended + 1, size), dtype=torch.long)
    table[ended] = ended
    for token, piece in enumerate(added):
        if not piece:
            table[:ended, token] = torch.arange(ended)
        elif letters & set(piece):
            for beginning, i in places.items():
                table[i, token] = _next(beginning + piece, strings, places, ended)
    return Stops(strings, table)


def _next(text: str, strings: Sequence[str], places: dict[str, int], ended: int) -> int:
    if any(string in text for string in strings):
        return ended
    return next(places[text[i:]] for i in range(len(text) + 1) if text[i:] in places)
