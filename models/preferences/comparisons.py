"""Comparisons of completions, in the preference format of Hugging Face ``datasets`` and TRL.

A row has a ``prompt`` and two completions of it, ``chosen`` and ``rejected``: all strings, or all conversations (lists
of ``{"role", "content"}``). Where both conversations begin with the prompt it is no part of the completions, and may be
left out. `Rankings` are rows of several completions, best first.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any, TypeVar

import torch

Message = Mapping[str, Any]
Row = TypeVar("Row")
MOST = 10  # bad rows that an error names


class PreferenceError(ValueError):
    """Rows that are no preferences: which, why, and what to do about it."""


@dataclass(frozen=True)
class Comparisons:
    """Pairs of completions of which people preferred the first: three lists of strings of one length.

    :raises PreferenceError: if the lists differ in length, or a completion was compared with itself.
    """

    prompts: list[str]
    chosen: list[str]
    rejected: list[str]

    def __post_init__(self) -> None:
        if not len(self.prompts) == len(self.chosen) == len(self.rejected):
            sizes = f"{len(self.prompts)}, {len(self.chosen)} and {len(self.rejected)}"
            raise PreferenceError(f"prompts, chosen and rejected must be of one length, not {sizes}")
        collect("row", enumerate(zip(self.prompts, self.chosen, self.rejected, strict=True)), _check_texts)

    def __len__(self) -> int:
        return len(self.prompts)

    def __add__(self, other: Comparisons) -> Comparisons:
        return Comparisons(self.prompts + other.prompts, self.chosen + other.chosen, self.rejected + other.rejected)

    def take(self, rows: Sequence[int]) -> Comparisons:
        """The rows of these indices."""
        columns = (self.prompts, self.chosen, self.rejected)
        return Comparisons(*([column[i] for i in rows] for column in columns))

    def split(self, fraction: float, seed: int = 0) -> tuple[Comparisons, Comparisons]:
        """A random ``fraction`` of the rows, and the rest: to learn from, and to hold out.

        :raises ValueError: if either part would be empty.
        """
        first = round(fraction * len(self))
        if not 0 < first < len(self):
            raise ValueError(f"a fraction {fraction} of {len(self)} comparisons leaves one part empty")
        order = torch.randperm(len(self), generator=torch.Generator("cpu").manual_seed(seed), device="cpu").tolist()
        return self.take(order[:first]), self.take(order[first:])

    @classmethod
    def from_rows(
        cls, rows: Iterable[Mapping[str, Any]], template: Callable[[Sequence[Message]], str] | None = None
    ) -> Comparisons:
        """Comparisons of an iterable of rows; a ``datasets.Dataset`` is one.

        :param template: makes a text of a conversation's messages, as a tokenizer's ``apply_chat_template`` does. By
            default a single message is its content, and several are paragraphs that begin with their role.
        :raises PreferenceError: for rows that lack a field, hold something else than texts, are empty or ties, by their
            numbers from 0.
        """
        return cls._of("row", enumerate(rows), template)

    @classmethod
    def from_jsonl(
        cls, path: str | os.PathLike[str], template: Callable[[Sequence[Message]], str] | None = None
    ) -> Comparisons:
        """Comparisons of a file with one JSON object a line; empty lines are left out.

        :raises PreferenceError: as `from_rows`, and for lines that are no JSON, by their numbers from 1.
        :raises OSError: if the file cannot be read.
        """
        return cls._of(f"{os.fspath(path)}: line", read_lines(path), template)

    @classmethod
    def _of(
        cls, what: str, rows: Iterable[tuple[int, Any]], template: Callable[[Sequence[Message]], str] | None
    ) -> Comparisons:
        read = collect(what, rows, lambda row: _comparison(row, template or plain))
        prompts, chosen, rejected = map(list, zip(*read, strict=True))
        return cls(prompts, chosen, rejected)

    def to_jsonl(self, path: str | os.PathLike[str]) -> None:
        """Write one JSON object a line, as `from_jsonl` reads."""
        rows = zip(self.prompts, self.chosen, self.rejected, strict=True)
        lines = [
            json.dumps({"prompt": prompt, "chosen": chosen, "rejected": rejected}, ensure_ascii=False) + "\n"
            for prompt, chosen, rejected in rows
        ]
        Path(path).write_bytes("".join(lines).encode())


@dataclass(frozen=True)
class Rankings:
    """Completions of each prompt, best first: two or more, not necessarily as many everywhere.

    :raises PreferenceError: if the lists differ in length, or a row has fewer than two completions or one twice.
    """

    prompts: list[str]
    completions: list[list[str]]

    def __post_init__(self) -> None:
        if len(self.prompts) != len(self.completions):
            raise PreferenceError(f"{len(self.prompts)} prompts for {len(self.completions)} rankings")
        collect("row", enumerate(zip(self.prompts, self.completions, strict=True)), _check_ranking)

    def __len__(self) -> int:
        return len(self.prompts)

    @classmethod
    def from_rows(cls, rows: Iterable[Mapping[str, Any]]) -> Rankings:
        """Rankings of rows with ``prompt``, a string, and ``completions``, a list of strings, best first.

        :raises PreferenceError: for rows that are not so, by their numbers from 0.
        """
        return cls._of("row", enumerate(rows))

    @classmethod
    def from_jsonl(cls, path: str | os.PathLike[str]) -> Rankings:
        """Rankings of a file with one JSON object a line; empty lines are left out.

        :raises PreferenceError: as `from_rows`, and for lines that are no JSON, by their numbers from 1.
        :raises OSError: if the file cannot be read.
        """
        return cls._of(f"{os.fspath(path)}: line", read_lines(path))

    @classmethod
    def _of(cls, what: str, rows: Iterable[tuple[int, Any]]) -> Rankings:
        def ranking(row: Any) -> tuple[str, list[str]]:
            prompt, completions = fields(row, "prompt", "completions")
            _check_ranking((prompt, completions))
            return prompt, list(completions)

        prompts, completions = map(list, zip(*collect(what, rows, ranking), strict=True))
        return cls(prompts, completions)


def plain(messages: Sequence[Message]) -> str:
    """A single message's content; of several messages paragraphs that begin with their role."""
    if len(messages) == 1:
        return str(messages[0]["content"])
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in messages)


def read_lines(path: str | os.PathLike[str]) -> Iterator[tuple[int, Any]]:
    """The JSON value of each line that is not empty, with its number from 1; what is no JSON, as an error."""
    for number, line in enumerate(Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line.decode())
        except UnicodeDecodeError:
            yield number, PreferenceError("is not UTF-8: write the file in that encoding")
        except (json.JSONDecodeError, RecursionError) as error:
            yield number, PreferenceError(f"is no JSON ({error}): write one JSON object a line")


def collect(what: str, rows: Iterable[tuple[int, Any]], read: Callable[[Any], Row]) -> list[Row]:
    """What is read of each row.

    :raises PreferenceError: with all bad rows, up to `MOST`; or if there is no row.
    """
    good, bad = [], []
    for number, row in rows:
        try:
            if isinstance(row, PreferenceError):
                raise row
            good.append(read(row))
        except PreferenceError as error:
            bad.append(f"{what} {number} {error}")
    if bad:
        more = f"\n... and {len(bad) - MOST} more" if len(bad) > MOST else ""
        raise PreferenceError("\n".join(bad[:MOST]) + more)
    if not good:
        raise PreferenceError("there are no preferences: give at least one row")
    return good


def fields(row: Any, *names: str) -> list[Any]:
    if not isinstance(row, Mapping):
        raise PreferenceError(f"is {row!r:.60}, no object: it needs the fields {', '.join(names)}")
    if missing := [name for name in names if row.get(name) is None]:
        has = ", ".join(map(str, row)) or "nothing"
        raise PreferenceError(f"lacks {' and '.join(map(repr, missing))} (it has {has}): add it, or rename its column")
    return [row[name] for name in names]


def _comparison(row: Any, template: Callable[[Sequence[Message]], str]) -> tuple[str, str, str]:
    """Prompt, chosen and rejected text of a row."""
    chosen, rejected = fields(row, "chosen", "rejected")
    prompt: Any
    if isinstance(chosen, str):
        (prompt,) = fields(row, "prompt")
    else:
        chosen, rejected = _messages("chosen", chosen), _messages("rejected", rejected)
        prompt = row.get("prompt")
        if prompt is None:
            shared = takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False))
            prompt = [message for message, _ in shared]
            chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
            if not (prompt and chosen and rejected):
                raise PreferenceError(
                    "has conversations that differ in nothing or from the first message on, so no prompt shows: "
                    "add the field 'prompt', or drop the row"
                )
        else:
            asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else _messages("prompt", prompt)
            if _begins_with(chosen, asked) and _begins_with(rejected, asked):
                chosen, rejected = chosen[len(asked) :], rejected[len(asked) :]
        if not isinstance(prompt, str):
            prompt = template(_messages("prompt", prompt))
        chosen, rejected = template(chosen), template(rejected)
    _check_texts((prompt, chosen, rejected))
    scores = row.get("score_chosen"), row.get("score_rejected")
    if scores[0] is not None and scores[0] == scores[1]:
        raise PreferenceError(f"is a tie (both scores are {scores[0]}): drop it, or say which is better")
    return prompt, chosen, rejected


def _messages(name: str, value: Any) -> list[Message]:
    good = isinstance(value, list | tuple) and len(value) > 0
    if not (good and all(isinstance(m, Mapping) and isinstance(m.get("content"), str) and "role" in m for m in value)):
        raise PreferenceError(f"has {value!r:.60} for {name!r}: it must be a string, or a list of role and content")
    return list(value)


def _begins_with(conversation: Sequence[Message], asked: Sequence[Message]) -> bool:
    """Whether it is those messages, and more."""
    pairs = zip(conversation, asked, strict=False)
    same = all((one["role"], one["content"]) == (two["role"], two["content"]) for one, two in pairs)
    return same and len(conversation) > len(asked)


def _check_texts(row: tuple[Any, Any, Any]) -> None:
    check_strings(dict(zip(("prompt", "chosen", "rejected"), row, strict=True)))
    _, chosen, rejected = row
    if chosen == rejected:
        raise PreferenceError(f"compares a text with itself ({chosen!r:.60}): drop it, it says nothing of preference")


def _check_ranking(row: tuple[Any, Any]) -> None:
    prompt, completions = row
    if not isinstance(completions, list | tuple) or len(completions) < 2:
        raise PreferenceError(f"has {completions!r:.60} for 'completions': it must be two texts or more, best first")
    check_strings({"prompt": prompt} | {f"completions[{i}]": text for i, text in enumerate(completions)})
    if twice := next((text for i, text in enumerate(completions) if text in completions[:i]), None):
        raise PreferenceError(f"ranks {twice!r:.60} twice: name each text once")


def check_strings(texts: Mapping[str, Any]) -> None:
    """A prompt may be empty, a completion not."""
    for name, text in texts.items():
        if not isinstance(text, str):
            raise PreferenceError(f"has {text!r:.60} for {name!r}: it must be a string")
        if not text.strip() and name != "prompt":
            raise PreferenceError(f"has no text for {name!r}: fill it in, or drop the row")
