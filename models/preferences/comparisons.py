"""Comparisons of completions, in the preference format of Hugging Face ``datasets`` and TRL.

A row has a ``prompt`` and two completions of it, ``chosen`` and ``rejected``: all strings, or all conversations (lists
of ``{"role", "content"}``). If both conversations begin with the prompt, it is not part of the completions, and the
field ``prompt`` may be missing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, ClassVar

import torch

from .rows import PreferenceData, PreferenceError, check_texts, lines_of, read_json_lines, require_fields

Message = Mapping[str, Any]
Template = Callable[[Sequence[Message]], str]


@dataclass(frozen=True)
class Comparisons(PreferenceData):
    """Pairs of completions of which the first was preferred: three lists of strings of one length.

    :raises PreferenceError: if the lists differ in length, or a completion was compared with itself.
    """

    FIELDS: ClassVar = ("prompt", "chosen", "rejected")
    chosen: list[str]
    rejected: list[str]

    def __add__(self, other: Comparisons) -> Comparisons:
        return Comparisons(self.prompts + other.prompts, self.chosen + other.chosen, self.rejected + other.rejected)

    def take(self, rows: Sequence[int]) -> Comparisons:
        """Return the rows with these indices."""
        columns = (self.prompts, self.chosen, self.rejected)
        return Comparisons(*([column[i] for i in rows] for column in columns))

    def split(self, fraction: float, seed: int = 0) -> tuple[Comparisons, Comparisons]:
        """Split the rows at random into a ``fraction`` of them, for training, and the rest, to hold out.

        :raises ValueError: if either part would be empty.
        """
        first = round(fraction * len(self))
        if not 0 < first < len(self):
            raise ValueError(f"a fraction {fraction} of {len(self)} comparisons leaves one part empty")
        order = torch.randperm(len(self), generator=torch.Generator("cpu").manual_seed(seed), device="cpu").tolist()
        return self.take(order[:first]), self.take(order[first:])

    @classmethod
    def _check_row(cls, *values: Any) -> tuple[Any, ...]:
        check_texts(dict(zip(cls.FIELDS, values, strict=True)))
        _, chosen, rejected = values
        if chosen == rejected:
            raise PreferenceError(f"compares a text with itself ({chosen!r:.60}): drop it, it holds no preference")
        return values

    @classmethod
    def from_rows(cls, rows: Iterable[Mapping[str, Any]], template: Template | None = None) -> Comparisons:
        """Build comparisons from an iterable of rows, such as a ``datasets.Dataset``.

        :param template: makes a text of a conversation's messages, as a tokenizer's ``apply_chat_template`` does. By
            default the text of a single message is its content, and that of several has a paragraph for each, which
            begins with its role.
        :raises PreferenceError: for rows that lack a field, have values of other types, are empty or ties, by their
            numbers from 0, or if there are no rows.
        """
        return cls._parse("row", enumerate(rows), lambda row: _parse_row(row, template or _plain_text))

    @classmethod
    def from_jsonl(cls, path: str | os.PathLike[str], template: Template | None = None) -> Comparisons:
        """Build comparisons from a file with one JSON object per line; empty lines are skipped.

        :param template: see `from_rows`.
        :raises PreferenceError: for the rows that `from_rows` refuses and for lines that are no JSON, by their numbers
            from 1, or if there are no rows.
        :raises OSError: if the file cannot be read.
        """
        rows = read_json_lines(path)
        return cls._parse(lines_of(path), rows, lambda row: _parse_row(row, template or _plain_text))


def _plain_text(messages: Sequence[Message]) -> str:
    """Return a single message's content, or a paragraph for each of several messages, which begins with its role."""
    if len(messages) == 1:
        return str(messages[0]["content"])
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in messages)


def _parse_row(row: Any, template: Template) -> tuple[Any, ...]:
    """Return the prompt, chosen and rejected text of a row."""
    chosen, rejected = require_fields(row, "chosen", "rejected")
    prompt: Any
    if isinstance(chosen, str):
        (prompt,) = require_fields(row, "prompt")
    else:
        chosen, rejected = _messages("chosen", chosen), _messages("rejected", rejected)
        prompt = row.get("prompt")
        if prompt is None:
            shared = takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False))
            prompt = [message for message, _ in shared]
            chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
            if not (prompt and chosen and rejected):
                raise PreferenceError(
                    "has conversations that are equal or differ from the first message on, so that they have no common "
                    "prompt: add the field 'prompt', or drop the row"
                )
        else:
            start = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else _messages("prompt", prompt)
            if _continues(chosen, start) and _continues(rejected, start):
                chosen, rejected = chosen[len(start) :], rejected[len(start) :]
        if not isinstance(prompt, str):
            prompt = template(_messages("prompt", prompt))
        chosen, rejected = template(chosen), template(rejected)
    texts = Comparisons._check_row(prompt, chosen, rejected)
    scores = row.get("score_chosen"), row.get("score_rejected")
    if scores[0] is not None and scores[0] == scores[1]:
        raise PreferenceError(f"is a tie (both scores are {scores[0]}): drop it, or say which is better")
    return texts


def _messages(name: str, value: Any) -> list[Message]:
    """Return a field's value as a list of messages.

    :raises PreferenceError: if it is none.
    """
    good = isinstance(value, list | tuple) and len(value) > 0
    if not (good and all(isinstance(m, Mapping) and isinstance(m.get("content"), str) and "role" in m for m in value)):
        raise PreferenceError(f"has {value!r:.60} for {name!r}: it must be a string, or a list of role and content")
    return list(value)


def _continues(conversation: Sequence[Message], start: Sequence[Message]) -> bool:
    """Whether the conversation begins with the messages ``start`` and has more."""
    pairs = zip(conversation, start, strict=False)
    same = all((one["role"], one["content"]) == (two["role"], two["content"]) for one, two in pairs)
    return same and len(conversation) > len(start)
