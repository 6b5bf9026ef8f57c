"""Rewards that a rule checks: length, required words, patterns and answers, hard constraints.

Rewards of this kind are "verifiable" (Lambert et al. 2024, "Tulu 3", arXiv 2411.15124): right or wrong, without a model
that could be exploited. They depend on the completion alone.

All score unfinished texts, see `Reward.prefix`: a reward that counts or finds something scores the text so far, one
that has a target scores the best length still within reach, and a constraint holds until it is certainly broken.
"""

from __future__ import annotations

import math
import re
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal

import regex

from bayeslm.validation import NonNegative, validated

from .answers import is_missing, written
from .calling import TimeLimitError, check_timeout
from .reward import Reward
from .scorer import RewardError, Scores


@validated
@dataclass(eq=False)
class Length(Reward):
    """How long the completion is: n, or -abs(n - target).

    ``-0.1 * Length()`` charges a tenth for every word and is never above 0.

    :param target: the length with the highest score, 0; None to score the length itself.
    :param unit: "words" (between spaces), "characters", or a function that counts something else, for example
        ``lambda text: len(tokenizer.tokenize(text))``.
    :raises ValueError: if ``target`` is negative or not finite, or ``unit`` is unknown.
    """

    target: NonNegative | None = None
    unit: Literal["words", "characters"] | Callable[[str], float] = "words"

    def __post_init__(self) -> None:
        if self.target is None:
            self.lower_bound = 0.0
        else:
            self.upper_bound = 0.0

    def score(self, prompts: list[Any], completions: list[str], **columns: Any) -> Sequence[float]:
        lengths = self._each(self._count, completions, prompts, completions)
        return lengths if self.target is None else [-abs(n - self.target) for n in lengths]

    def prefix(self, prompts: list[Any], completions: list[str], **columns: Any) -> Sequence[float]:
        """Return the length so far; with a target, the best score within reach of a text that only grows."""
        scores = self.score(prompts, completions, **columns)
        if self.target is None:
            return scores
        return [s if self._count(text) > self.target else 0.0 for s, text in zip(scores, completions, strict=True)]

    def _count(self, text: str) -> float:
        if callable(self.unit):
            return self.unit(text)
        return len(text.split() if self.unit == "words" else text)


@validated
@dataclass(eq=False)
class Contains(Reward):
    """1 if the completion contains a phrase, else 0. For words and alternatives see `Matches`.

    :param phrase: letter for letter, but for case if ``ignore_case``.
    :param ignore_case: whether capital and small letters are the same.
    :raises ValueError: if ``phrase`` is empty.
    """

    phrase: str
    ignore_case: bool = False
    lower_bound, upper_bound = 0.0, 1.0

    def __post_init__(self) -> None:
        if not self.phrase:
            raise ValueError("phrase must not be empty: every text contains it")

    def score(self, prompts: list[Any], completions: list[str], **columns: Any) -> Sequence[float]:
        if self.ignore_case:
            phrase = self.phrase.casefold()
            return [float(phrase in text.casefold()) for text in completions]
        return [float(self.phrase in text) for text in completions]

    prefix = score  # a phrase stays contained; one that is not contained yet counts as 0


@validated
@dataclass(eq=False)
class Matches(Reward):
    r"""1 if a regular expression is found in the completion, or if the part that it finds is the right answer; else 0.

    ``Matches(r"#### (\d+)", column="answer")`` takes the last match, since a final answer stands last, and
    compares its first group (the whole match if there are no groups) with the prompt's entry in the column
    ``answer``: equal as strings, without the spaces around them. ``\A`` and ``\Z`` anchor a full match.

    Some patterns, such as ``(a|aa)+$``, try exponentially many ways to match a text: ``timeout`` stops them.

    :param pattern: searched anywhere, in the syntax of the package ``regex``, which extends that of ``re``; flags
        inside, as in ``(?i)yes``, or compiled in.
    :param column: name of the column of right answers.
    :param timeout: the time limit of a batch in seconds; None for no limit.
    :raises TypeError: if ``pattern`` is neither a string nor compiled by ``re``.
    :raises ValueError: if ``pattern`` is not a regular expression, or ``timeout`` is not positive.
    """

    pattern: str | re.Pattern[str]
    column: str | None = None
    timeout: float | None = field(default=10.0, repr=False)
    lower_bound, upper_bound = 0.0, 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.pattern, str | re.Pattern):
            raise TypeError(f"pattern must be a string or a pattern compiled by re, got {self.pattern!r:.60}")
        check_timeout(self.timeout)
        text, flags = (self.pattern, 0) if isinstance(self.pattern, str) else (self.pattern.pattern, self.pattern.flags)
        same = [name for name in ("ASCII", "IGNORECASE", "MULTILINE", "DOTALL", "VERBOSE") if flags & getattr(re, name)]
        try:
            self._regex = regex.compile(text, sum(getattr(regex, name) for name in same))
        except regex.error as error:
            raise ValueError(f"{self.pattern!r} is not a regular expression: {error}") from error

    def score(self, prompts: list[Any], completions: list[str], **columns: Any) -> Sequence[float]:
        if self.column is None:
            return [float(match is not None) for match in self._search(completions)]
        if self.column not in columns:
            self._fail(f"needs the column {self.column!r}", prompts[0], completions[0])
        answers = columns[self.column]
        if missing := [i for i, answer in enumerate(answers) if is_missing(answer)]:
            i = missing[0]
            self._fail(
                f"needs an answer in the column {self.column!r}, and has {answers[i]}", prompts[i], completions[i]
            )
        found = [None if match is None else match.strip() for match in self._search(completions)]
        right = [{text.strip() for text in written(answer)} for answer in answers]
        return [float(text in texts) for text, texts in zip(found, right, strict=True)]

    prefix = score  # an estimate: a match may still grow or be followed by another

    def _search(self, texts: list[str]) -> list[str | None]:
        """Return what the pattern finds in each text: with a column the last match, or its first group.

        :raises TimeLimitError: at the time limit, which also ends a search that was abandoned in another thread.
        """
        limits: dict[str, Any] = {"timeout": self.timeout, "concurrent": True}
        try:
            if self.column is None:
                return [None if (m := self._regex.search(text, **limits)) is None else m[0] for text in texts]
            last = [deque(self._regex.finditer(text, **limits), maxlen=1) for text in texts]
        except TimeoutError:
            raise TimeLimitError from None
        return [m[0][1 if self._regex.groups else 0] if m else None for m in last]


@validated
@dataclass(eq=False)
class Constraint(Reward):
    """0 where a predicate holds, -inf where it does not: there the posterior has no probability.

    Add constraints to rewards and to each other; scaling by a positive number does not change them, and scaling by zero
    switches them off. For the opposite, negate the predicate: a reward's negative would be +inf.

    An unfinished text scores 0, unless the predicate is prefix-closed: then a text that breaks it scores -inf.

    :param predicate: of the completion's text, taken as true or false as by ``filter``; or a reward that is 1 or 0,
        such as `Contains` and `Matches`.
    :param prefix_closed: the predicate holds for every beginning of a text for which it holds, the empty one included,
        as ``lambda text: "refund" not in text`` does: no continuation of a text that breaks it is allowed again. A word
        that is still being written counts as a word, so "every word is in my list" is not prefix-closed.
    :raises ValueError: if ``prefix_closed`` is set, and the predicate does not hold for the empty text.
    """

    predicate: Callable[[str], object] | Reward
    prefix_closed: bool = False
    upper_bound = 0.0

    def __post_init__(self) -> None:
        if self.prefix_closed:
            with suppress(RewardError):  # a predicate that needs columns cannot be tried here
                if self._scores([""], [""], {})[0] < 0:
                    raise ValueError(
                        "a prefix-closed predicate holds for the empty text, with which every completion begins: "
                        "correct the predicate or leave out prefix_closed"
                    )

    def score(self, prompts: list[Any], completions: list[str], **columns: Any) -> Scores:
        if not isinstance(self.predicate, Reward):
            truths = self._each(self.predicate, completions, prompts, completions)
            for truth, prompt, text in zip(truths, prompts, completions, strict=True):
                if isinstance(truth, str):  # "no" is true to Python
                    self._fail(f"needs its predicate to say True or False, got {truth!r:.60}", prompt, text)
            return [0.0 if truth else -math.inf for truth in truths]
        truths = self.predicate._scores(prompts, completions, columns).tolist()
        for truth, prompt, text in zip(truths, prompts, completions, strict=True):
            if truth not in (0.0, 1.0) and not math.isnan(truth):
                self._fail(f"needs {self.predicate.__name__!r} to be 0 or 1, got {truth}", prompt, text)
        return [None if math.isnan(truth) else 0.0 if truth else -math.inf for truth in truths]

    def prefix(self, prompts: list[Any], completions: list[str], **columns: Any) -> Scores:
        return self.score(prompts, completions, **columns) if self.prefix_closed else [0.0] * len(completions)
