r"""Rewards and their algebra.

A reward r(c, x) is evidence about a completion x of a prompt c: exp(r / beta) multiplies the prior's
probability (Korbak, Perez and Buckley 2022, arXiv 2205.11275). It is written as in TRL: a function
``f(prompts, completions, **columns)``, called by keyword, that returns one number a completion. A score of
-inf is a hard constraint.

Rewards combine affinely. With constants w_i and b,

    r = b + \sum_i w_i r_i,     sup r <= b + \sum_{w_i > 0} w_i sup r_i + \sum_{w_i < 0} w_i inf r_i

and 0 r = 0 even where r = -inf, since exp(r)^0 = 1: a weight of zero switches a constraint off.
"""

from __future__ import annotations

import inspect
import math
import numbers
import reprlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from .shapes import broadcast

_short = reprlib.Repr()
_short.maxstring = _short.maxother = 160
_ROUNDING = 1e-6  # how far past a declared bound a score may be, relative to the bound: float32 models round


class RewardError(ValueError):
    """A reward function failed, or gave what is no score; shows the prompt and the completion."""


class Reward:
    """A function of prompts and completions, with bounds.

    ``Reward(f)`` wraps any function in TRL's convention. It is called by keyword and handed what it declares:
    ``prompts``, ``completions``, the columns it names, or all of them if it takes ``**kwargs``. To write a
    reward with settings, inherit and override `score`; bounds may then be attributes of the class.

    :param function: ``f(prompts=[...], completions=[...], **columns)`` giving one number a completion.
    :param upper_bound: no score is above; ``math.inf`` if unknown. Rejection sampling needs it.
    :param lower_bound: no score is below; it bounds ``-reward``.
    :param conversational: hand completions over as ``[{"role": "assistant", "content": text}]``, which is
        what functions written for TRL's conversational data sets (as in ``trl.rewards``) read.
    :raises TypeError: if ``function`` is not callable, or is a coroutine function.
    :raises ValueError: if the bounds are NaN or crossed.
    """

    upper_bound: float = math.inf
    lower_bound: float = -math.inf
    __array_ufunc__ = None  # leaves np.float64(2) * reward to __rmul__
    _function: Callable[..., Sequence[float]] | None = None
    _conversational: bool = False

    def __init__(
        self,
        function: Callable[..., Sequence[float]] | None = None,
        *,
        upper_bound: float | None = None,
        lower_bound: float | None = None,
        conversational: bool = False,
    ) -> None:
        if function is None and type(self).score is Reward.score:
            raise TypeError("Reward needs a function, or a subclass that overrides score")
        if function is not None and not callable(function):
            raise TypeError(f"a reward function must be callable, got {type(function).__name__}")
        if inspect.iscoroutinefunction(function):
            raise TypeError(f"{_name(function)!r} is a coroutine function: wrap it in one that waits for it")
        self._function = function
        self._conversational = conversational
        self._bound(upper_bound, lower_bound)

    def _bound(self, upper_bound: float | None, lower_bound: float | None) -> None:
        """Set the bounds that are given."""
        self.upper_bound = self.upper_bound if upper_bound is None else float(upper_bound)
        self.lower_bound = self.lower_bound if lower_bound is None else float(lower_bound)
        low, high = self.lower_bound, self.upper_bound
        if not (low <= high and low < math.inf and high > -math.inf):
            raise ValueError(f"lower_bound must not be above upper_bound, got [{low}, {high}]")

    # -- evaluation ------------------------------------------------------------------------------------------

    def __call__(self, prompts: Any, completions: Any, **columns: Any) -> Tensor:
        """Scores in the default dtype, on the default device, without gradient.

        :param prompts: a list, or an object array of any shape, of strings, chats (lists of messages) or
            token ids; a prompt is never taken apart.
        :param completions: texts in a list, nested lists or an object array; of shape (prompts,),
            (particles, prompts), ...
        :param columns: further data aligned with ``prompts``, broadcast as they are. What has no length (a
            callback, a number) is handed on as it is.
        :return: shape = broadcast(shape of prompts, shape of completions).
        :raises RewardError: if the function fails, gives the wrong number of scores, or a score is None, NaN,
            +inf, not a number, or outside the declared bounds.
        :raises TypeError, ValueError: if the arguments are not as above, or their shapes do not broadcast.
        """
        shape, flat_prompts, flat_completions, flat_columns = broadcast(prompts, completions, columns)
        if not flat_completions:
            return torch.zeros(shape)
        scores = self._scores(flat_prompts, flat_completions, flat_columns)
        return torch.tensor(scores, dtype=torch.get_default_dtype()).reshape(shape)

    def score(self, prompts: list[Any], completions: list[str], **columns: Any) -> Sequence[float]:
        """One number a completion, from flat lists of equal length (columns too). Override this."""
        function = self._function
        assert function is not None
        texts: list[Any] = completions
        if self._conversational:
            texts = [[{"role": "assistant", "content": text}] for text in completions]
        given = {"prompts": prompts, "completions": texts, **columns}
        accepted, required = _parameters(function)
        if missing := required - given.keys():
            self._fail(
                f"needs {', '.join(sorted(missing))}; it was given {', '.join(given)}, by name",
                prompts[0],
                completions[0],
            )
        return function(**{k: v for k, v in given.items() if accepted is None or k in accepted})

    def _scores(self, prompts: list[Any], completions: list[str], columns: dict[str, Any]) -> np.ndarray:
        """Checked scores of flat lists, float64, shape (len(completions),)."""
        try:
            result: Any = self.score(prompts, completions, **columns)
        except RewardError:
            raise
        except Exception as error:
            i = self._offender(prompts, completions, columns)
            batch = "" if len(completions) == 1 else f" on a batch of {len(completions)}"
            self._fail(f"raised {type(error).__name__}: {error}{batch}", prompts[i], completions[i], error)
        if hasattr(result, "tolist"):  # arrays, tensors, series
            result = result.tolist()
        if not isinstance(result, Sequence) or isinstance(result, str):
            what = f"gave {type(result).__name__} instead of a list of {len(completions)} scores"
            self._fail(what, prompts[0], completions[0])
        if len(result) != len(completions):
            what = f"gave {len(result)} scores for {len(completions)} completions"
            self._fail(what, prompts[0], completions[0])
        scores = np.empty(len(result))
        highest = torch.finfo(torch.get_default_dtype()).max
        for i, value in enumerate(result):
            number = _number(value)
            if number is None or math.isnan(number):
                self._fail(f"gave {_short.repr(value)} instead of a number", prompts[i], completions[i])
            if number > highest:
                self._fail(f"gave {number}: a score must be below +inf", prompts[i], completions[i])
            scores[i] = number
        low, high = self.lower_bound, self.upper_bound
        for outside in (scores < low - _slack(low), scores > high + _slack(high)):
            if outside.any():
                i = int(outside.argmax())
                self._fail(f"gave {scores[i]}, outside its bounds [{low}, {high}]", prompts[i], completions[i])
        return np.clip(scores, low, high)

    def _offender(self, prompts: list[Any], completions: list[str], columns: dict[str, Any]) -> int:
        """The first completion that makes `score` raise, by bisection; 0 if no single one does."""

        def raises(rows: slice) -> bool:
            part = {k: v[rows] if isinstance(v, list) else v for k, v in columns.items()}
            try:
                self.score(prompts[rows], completions[rows], **part)
            except Exception:
                return True
            return False

        low, high = 0, len(completions)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if raises(slice(low, middle)) else (middle, high)
        return low if raises(slice(low, low + 1)) else 0

    def _fail(self, what: str, prompt: Any, completion: str, cause: Exception | None = None) -> NoReturn:
        raise RewardError(
            f"reward {self.__name__!r} {what}\n  prompt:     {_short.repr(prompt)}"
            f"\n  completion: {_short.repr(completion)}"
        ) from cause

    # -- algebra ---------------------------------------------------------------------------------------------

    def __add__(self, other: Reward | float) -> Reward:
        if isinstance(other, Reward):
            mine, yours = _affine(self), _affine(other)
            return Affine([*mine.terms, *yours.terms], mine.offset + yours.offset)
        if _is_real(other):
            mine = _affine(self)
            return Affine(mine.terms, mine.offset + float(other))
        return NotImplemented

    def __mul__(self, weight: float) -> Reward:
        if not _is_real(weight):
            return NotImplemented
        mine, w = _affine(self), float(weight)
        return Affine([(w * v, r) for v, r in mine.terms], w * mine.offset)

    def __neg__(self) -> Reward:
        return self * -1.0

    def __sub__(self, other: Reward | float) -> Reward:
        return self + -other if isinstance(other, Reward) or _is_real(other) else NotImplemented

    def __rsub__(self, other: float) -> Reward:
        return -self + other

    def __truediv__(self, divisor: float) -> Reward:
        return self * (1.0 / float(divisor)) if _is_real(divisor) else NotImplemented

    __radd__ = __add__
    __rmul__ = __mul__

    def map(
        self,
        function: Callable[[float], float],
        *,
        upper_bound: float | None = None,
        lower_bound: float | None = None,
    ) -> Reward:
        """``function`` of every score: ``reward.map(math.tanh, upper_bound=1.0, lower_bound=-1.0)``.

        The bounds are the new reward's; they cannot be told from ``function`` and are unknown if not given.
        """
        return Mapped(self, function, upper_bound=upper_bound, lower_bound=lower_bound)

    # -- what it is called -----------------------------------------------------------------------------------

    @property
    def __name__(self) -> str:  # TRL logs rewards by it
        return _name(self._function) if self._function else _class(self).lower()

    def __repr__(self) -> str:
        return f"{_class(self)}({_name(self._function) if self._function else ''})"


class Affine(Reward):
    """b + sum of w_i r_i; made by the operators of `Reward`.

    :raises ValueError: if a weight or the offset is not finite.
    """

    def __init__(self, terms: Sequence[tuple[float, Reward]], offset: float) -> None:
        if not all(math.isfinite(x) for x in (offset, *(w for w, _ in terms))):
            raise ValueError("a reward can only be scaled by, and added to, finite numbers")
        self.terms = [(w, r) for w, r in terms if w != 0]
        self.offset = offset
        ends = [(w * r.lower_bound, w * r.upper_bound) for w, r in self.terms]
        self._bound(offset + sum(max(e) for e in ends), offset + sum(min(e) for e in ends))

    def score(self, prompts: list[Any], completions: list[str], **columns: Any) -> Sequence[float]:
        total = np.full(len(completions), self.offset)
        for weight, reward in self.terms:
            scores = reward._scores(prompts, completions, columns)
            if weight < 0 and np.isneginf(scores).any():
                i = int(np.isneginf(scores).argmax())
                what = f"negates the -inf of {reward.__name__!r}: a hard constraint can only be added"
                self._fail(what, prompts[i], completions[i])
            total += weight * scores
        return list(total)

    @property
    def __name__(self) -> str:
        return self._written(lambda reward: reward.__name__)

    def __repr__(self) -> str:
        return self._written(repr)

    def _written(self, write: Callable[[Reward], str]) -> str:
        parts = [(w < 0, write(r) if abs(w) == 1 else f"{abs(w):g} * {write(r)}") for w, r in self.terms]
        if self.offset != 0 or not parts:
            parts.append((self.offset < 0, f"{abs(self.offset):g}"))
        first, *rest = parts
        return "-" * first[0] + first[1] + "".join((" - " if n else " + ") + text for n, text in rest)


class Mapped(Reward):
    """A function of a reward; made by `Reward.map`."""

    def __init__(
        self,
        reward: Reward,
        function: Callable[[float], float],
        *,
        upper_bound: float | None,
        lower_bound: float | None,
    ) -> None:
        self.reward = reward
        self.function = function
        self._bound(upper_bound, lower_bound)

    def score(self, prompts: list[Any], completions: list[str], **columns: Any) -> Sequence[float]:
        return [self.function(float(s)) for s in self.reward._scores(prompts, completions, columns)]

    @property
    def __name__(self) -> str:
        return f"{_name(self.function)}({self.reward.__name__})"

    def __repr__(self) -> str:
        inner = f"({self.reward!r})" if isinstance(self.reward, Affine) else repr(self.reward)
        return f"{inner}.map({_name(self.function)})"


def _affine(reward: Reward) -> Affine:
    return reward if isinstance(reward, Affine) else Affine([(1.0, reward)], 0.0)


def _class(reward: Reward) -> str:
    return str(type(reward).__name__)


def _is_real(value: Any) -> bool:
    return isinstance(value, numbers.Real)  # numpy's numbers too


def _number(value: Any) -> float | None:
    """A Python, numpy or torch scalar as a float, None if it is not one."""
    if getattr(value, "ndim", None) == 0:
        value = value.item()
    return float(value) if _is_real(value) else None


def _slack(bound: float) -> float:
    return _ROUNDING * max(1.0, abs(bound)) if math.isfinite(bound) else 0.0


def _name(function: Any) -> str:
    while isinstance(function, partial):
        function = function.func
    return str(getattr(function, "__name__", type(function).__name__))


def _parameters(function: Callable[..., Any]) -> tuple[frozenset[str] | None, frozenset[str]]:
    """Names a function accepts (None: any) and names it must have."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some callables of extension modules have none
        return None, frozenset()
    named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    required = frozenset(p.name for p in named if p.default is p.empty)
    anything = any(p.kind is p.VAR_KEYWORD for p in parameters)
    return (None if anything else frozenset(p.name for p in named)), required
