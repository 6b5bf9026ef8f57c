"""Scores of texts by a user's code: checked, within the time limit, with errors that show the text."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NoReturn, TypeVar

import numpy as np
import torch
from torch import Tensor

from .broadcasting import Flat, broadcast, take
from .calling import TimeLimitError, call, copied
from .function_checks import ABSTAINED, check_scores, name_of, place_of, short
from .rehearsal import arbitrary_scores, is_rehearsal, is_trial, remember, repeated
from .unfinished import UnfinishedTexts, suspended

Item = TypeVar("Item")
Scores = Sequence[float | None]
RewardFunction = Callable[..., Scores | Awaitable[Scores]]


class RewardError(ValueError):
    """A reward function failed, or returned something other than a score; names the prompt and the completion."""


class Scorer:
    """What scores texts, finished or not, by its methods `score` and `_of_prefixes`; `Reward` is its one subclass."""

    upper_bound: float = math.inf
    lower_bound: float = -math.inf
    timeout: float | None = None
    _function: RewardFunction | None = None

    @property
    def __name__(self) -> str:  # TRL logs rewards by it
        return name_of(self._function) if self._function else str(type(self).__name__).lower()

    def score(self, prompts: list[Any], completions: list[str], **columns: Any) -> Scores:
        """Return one number a completion, from flat lists of equal length (columns too)."""
        raise NotImplementedError

    def _of_prefixes(self, partial: bool) -> Scorer:
        """Return what scores unfinished texts, with the same time limit.

        :param partial: where nothing does, score the text so far like a finished one.
        """
        raise NotImplementedError

    def __call__(self, /, prompts: Any, completions: Any, **columns: Any) -> Tensor:
        """Return scores in the default dtype, on the default device, without gradient.

        Within the context `prefixes` they are the rewards of unfinished texts.

        :param prompts: a list, or an object array of any shape, of strings, chats (lists of messages) or token ids;
            each is one element, never part of the shape.
        :param completions: texts in a list, nested lists or an object array; of shape (prompt,), (particle, prompt) ...
        :param columns: further data aligned with ``prompts``, and broadcast with them. A value without length (a
            callback, a number) is passed on unchanged.
        :returns: scores of the shape to which those of prompts and completions broadcast.
        :raises RewardError: if the function fails, exceeds the time limit, returns the wrong number of scores, or a
            score is NaN, +inf, not a number, outside the declared bounds, or None from all rewards.
        :raises TypeError: if prompts, completions or a column are of another type.
        :raises ValueError: if their shapes do not broadcast, or a column has a reserved name.
        """
        shape, text_shape, flat = broadcast(prompts, completions, columns)
        if 0 in shape:
            return torch.zeros(shape)
        if (known := repeated(self, flat)) is not None:
            return torch.tensor(known, dtype=torch.get_default_dtype()).reshape(shape)
        if is_rehearsal():
            return torch.tensor(arbitrary_scores(*flat[:2])).reshape(shape)
        with suspended() as context:
            if context is None:
                scores = self._scores(*flat)
                remember(self, flat, scores.tolist())
            else:
                scores = self._scores_so_far(context, context.finished_of(text_shape, shape), flat)
            if (abstained := np.isnan(scores)).any():
                i = int(abstained.argmax())
                self._fail(f"{ABSTAINED} on a completion, and no other reward scores it", flat[0][i], flat[1][i])
            if context is not None:
                context.record(scores.reshape(shape))
        if is_trial():
            return torch.tensor(arbitrary_scores(*flat[:2])).reshape(shape)
        return torch.tensor(scores, dtype=torch.get_default_dtype()).reshape(shape)

    def _bound(self, upper_bound: float | None, lower_bound: float | None) -> None:
        """Set the bounds that are not None.

        :raises ValueError: if they are NaN or crossed.
        """
        self.upper_bound = self.upper_bound if upper_bound is None else float(upper_bound)
        self.lower_bound = self.lower_bound if lower_bound is None else float(lower_bound)
        low, high = self.lower_bound, self.upper_bound
        if not (low <= high and low < math.inf and high > -math.inf):
            raise ValueError(f"lower_bound must not be above upper_bound, got [{low}, {high}]")

    def _scores_so_far(self, context: UnfinishedTexts, finished: np.ndarray, flat: Flat) -> np.ndarray:
        """Return `_scores` of the texts that are ``finished``, bool (len(completions),), and `prefix` of the others."""
        scores = np.empty(len(finished))
        if finished.any():
            scores[finished] = self._scores(*take(np.flatnonzero(finished), flat))
        if not finished.all():
            prompts, texts, columns = take(np.flatnonzero(~finished), flat)
            texts = [text.rstrip("\ufffd") for text in texts]  # of a character some of whose bytes are missing
            scores[~finished] = self._of_prefixes(context.partial)._scores(prompts, texts, columns)
        return scores

    def _scores(self, prompts: list[Any], completions: list[str], columns: dict[str, Any]) -> np.ndarray:
        """Return checked scores of flat lists, float64, shape (len(completions),); NaN where the reward abstains."""

        def fail(what: str, i: int) -> NoReturn:
            self._fail(what, prompts[i], completions[i])

        def fail_all(what: str, cause: Exception | None) -> NoReturn:
            several = len(completions) > 1
            batch = f" on a batch of {len(completions)} texts" if several else ""
            self._fail(f"{what}{batch}", prompts[0], completions[0], cause, first=several)

        try:
            result = self._call_score(prompts, completions, columns)
        except RewardError:
            raise
        except TimeLimitError:
            fail_all(f"reached its time limit of {self.timeout:g} s", None)
        except Exception as error:
            fail_all(f"raised {type(error).__name__}: {error}", error)
        return check_scores(result, len(completions), self.lower_bound, self.upper_bound, fail)

    def _call_score(self, prompts: list[Any], completions: list[str], columns: dict[str, Any]) -> Any:
        """Call `score`, the one place where a user's code is called: on copies, and within the time limit."""
        prompts, completions, columns = copied(prompts), list(completions), copied(columns)
        return call(lambda: self.score(prompts, completions, **columns), self.timeout)

    def _each(
        self, function: Callable[[Item], Any], items: Sequence[Item], prompts: list[Any], completions: list[str]
    ) -> list[Any]:
        """Return the values of a function of single items, one a completion; an error shows its completion."""
        values = []
        for item, prompt, text in zip(items, prompts, completions, strict=True):
            try:
                values.append(function(item))
            except Exception as error:
                self._fail(f"raised {type(error).__name__}: {error}", prompt, text, error)
        return values

    def _fail(
        self, what: str, prompt: Any, completion: str, cause: Exception | None = None, *, first: bool = False
    ) -> NoReturn:
        """Raise an error that shows a prompt and its completion.

        :param first: whether they are the first of several that may be the reason.
        """
        of = "first " if first else ""
        raise RewardError(
            f"reward {self.__name__!r} {what}{place_of(self._function)}\n  {of}prompt:     {short.repr(prompt)}"
            f"\n  {of}completion: {short.repr(completion)}"
        ) from cause

    def _mendable(self, score: float) -> float:
        """Return the score of an unfinished text, or the one nearest to 0 if it is -inf, which may not be final."""
        return min(max(0.0, self.lower_bound), self.upper_bound) if score == -math.inf else score
