"""Comparisons of completions, in the preference formats of Hugging Face ``datasets`` and TRL.

A row has a ``prompt`` and two completions of it, ``chosen`` and ``rejected``. Each is a string or a conversation (a
list of ``{"role", "content"}``, whose content is a string or a list of text parts). Without a ``prompt``, the prompt is
what both completions begin with: messages, or the characters of strings, without a space at the end, which belongs to
the completions. Conversations that repeat the prompt are cut after it; system turns and others before it become a part
of the prompt.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, ClassVar

import numpy as np
import torch

from bayeslm.validation import validated

from .rows import PreferenceData, PreferenceError, check_texts, is_missing, lines_of, read_json_lines, require_fields

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
    @validated
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
    @validated
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
    prompt: Any = row.get("prompt")
    if is_missing(prompt):
        prompt, chosen, rejected = _implicit(chosen, rejected)
    if not isinstance(chosen, str):
        prompt, chosen, rejected = _explicit(prompt, _messages("chosen", chosen), _messages("rejected", rejected))
        chosen, rejected = template(chosen), template(rejected)
    if not isinstance(prompt, str):
        prompt = template(_messages("prompt", prompt))
    texts = Comparisons._check_row(prompt, chosen, rejected)
    scores = row.get("score_chosen"), row.get("score_rejected")
    if scores[0] is not None and scores[0] == scores[1]:
        raise PreferenceError(f"is a tie (both scores are {scores[0]}): drop it, or say which is better")
    return texts


def _implicit(chosen: Any, rejected: Any) -> tuple[Any, Any, Any]:
    """Return the common beginning of two completions, and the rest of each.

    :raises PreferenceError: if there is none, or nothing else.
    """
    if isinstance(chosen, str) and isinstance(rejected, str):
        size = _shared(chosen, rejected)
        size -= chosen[:size].endswith(" ")
    else:
        chosen, rejected = _messages("chosen", chosen), _messages("rejected", rejected)
        size = _shared(chosen, rejected, _same)
    if not 0 < size < min(len(chosen), len(rejected)):
        raise PreferenceError(
            "has completions that are equal, differ from the beginning on, or of which one begins the other, so that "
            "they have no common prompt: add the field 'prompt', or drop the row"
        )
    return chosen[:size], chosen[size:], rejected[size:]


def _explicit(prompt: Any, chosen: list[Message], rejected: list[Message]) -> tuple[Any, list[Message], list[Message]]:
    """Return a prompt with the turns before it, and what follows it in conversations that both repeat it.

    :raises PreferenceError: if the turns before it differ.
    """
    asked: list[Message] = (
        [{"role": "user", "content": prompt}] if isinstance(prompt, str) else _messages("prompt", prompt)
    )
    system = list(takewhile(lambda message: message["role"] in ("system", "developer"), asked[:-1]))
    asked = asked[len(system) :]
    at, other = _place(asked, chosen), _place(asked, rejected)
    if at is None or other is None:
        return prompt, chosen, rejected
    before = chosen[:at]
    if not _equal(before, rejected[:other]) or (before and system and not _equal(before, system)):
        raise PreferenceError(
            "has other turns before the prompt in one conversation than in the other, or in the prompt"
        )
    return [*before, *asked] if before else prompt, chosen[at + len(asked) :], rejected[other + len(asked) :]


def _messages(name: str, value: Any) -> list[Message]:
    """Return a field's value as a list of messages whose content is a string.

    :raises PreferenceError: if it is none.
    """
    listed = list(value) if isinstance(value, list | tuple | np.ndarray) else []  # arrays in rows of pandas
    messages: list[Message] = [{**m, "content": _content(m)} for m in listed if isinstance(m, Mapping) and "role" in m]
    if not messages or len(messages) < len(listed) or any(m["content"] is None for m in messages):
        raise PreferenceError(
            f"has {value!r:.60} for {name!r}: it must be a string, or a list of role and content, which is a text"
        )
    return messages


def _content(message: Message) -> str | None:
    """Return the text of a message, also of one in parts; None if there is none, or another part than text."""
    content = message.get("content")
    if isinstance(content, list | tuple | np.ndarray) and len(content):
        parts = [
            part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None for part in content
        ]
        return "".join(map(str, parts)) if all(isinstance(part, str) for part in parts) else None
    return content if isinstance(content, str) else None


def _place(asked: list[Message], conversation: list[Message]) -> int | None:
    """Return where a conversation repeats a prompt, and goes on after it; None if it begins with the answer."""
    last = len(conversation) - len(asked) - 1
    last = min(last, 0) if conversation[0]["role"] == "assistant" else last
    return next((i for i in range(last + 1) if _equal(conversation[i : i + len(asked)], asked)), None)


def _shared(one: Sequence[Any], two: Sequence[Any], same: Callable[[Any, Any], bool] = operator.eq) -> int:
    """Return the number of items with which both sequences begin."""
    return sum(1 for _ in takewhile(bool, map(same, one, two)))


def _equal(one: list[Message], two: list[Message]) -> bool:
    return len(one) == len(two) == _shared(one, two, _same)


def _same(one: Message, two: Message) -> bool:
    """Whether two messages say the same; space around it, and further fields, such as an id, are ignored."""
    fields = ("role", "tool_calls")
    return one["content"].strip() == two["content"].strip() and all(one.get(x) == two.get(x) for x in fields)
