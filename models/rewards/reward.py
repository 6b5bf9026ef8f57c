r"""Rewards and their algebra.

A reward r(c, x) is evidence about a completion x of a prompt c: exp(r / beta) multiplies the prior's probability
(Korbak, Perez and Buckley 2022, arXiv 2205.11275). It is written as in TRL: a function ``f(prompts, completions,
**columns)``, called by keyword, that returns one number a completion, its score. A score of -inf is a hard constraint.

Rewards combine affinely. With constants w_i and b,

    r = b + \sum_i w_i r_i,     sup r <= b + \sum_{w_i > 0} w_i sup r_i + \sum_{w_i < 0} w_i inf r_i

and 0 r = 0 even where r = -inf, since exp(r)^0 = 1: a weight of zero switches a constraint off. A part that abstains
from a text, by None as in TRL, adds 0 to it, which the part's bounds must allow. The reward of an unfinished text (see
`unfinished`) is the same combination of the parts' rewards of it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import numpy as np

from bayeslm.chats import is_chat
from bayeslm.validation import validated

from .calling import check_timeout
from .function_checks import ABSTAINED, check_function, is_real, name_of, parameters, with_none
from .scorer import RewardError, RewardFunction, Scorer, Scores


@validated
class Reward(Scorer):
    """A function of prompts and completions, with bounds.

    ``Reward(f)`` wraps any function in TRL's convention. It is called by keyword with the arguments that it declares:
    ``prompts``, ``completions``, the columns it names, or all of them if it takes ``**kwargs``. It may be a coroutine
    function, and return None for completions on which it abstains: None adds 0 to a sum, and is an error if no other
    reward scores the completion. To write a reward with settings, inherit and override `score`, and `prefix` if it can
    judge unfinished texts; bounds may then be attributes of the class.

    Functions and overridden methods are called once for a batch, also where they fail, and on copies of its lists: what
    they change, nobody else reads. A score must not depend on the other texts of the batch, as a normalised one does:
    no run checks that, since it would have to score texts again.

    :param function: ``f(prompts=[...], completions=[...], **columns)``, which returns one number a completion.
    :param prefix: the same for unfinished texts, see `Reward.prefix`; one function may serve as both.
    :param upper_bound: the highest possible score; ``math.inf`` if unknown. Rejection sampling needs it.
    :param lower_bound: the lowest possible score, from which the upper bound of ``-reward`` follows.
    :param conversational: give completions as ``[{"role": "assistant", "content": text}]``. None, as TRL does: where
        the prompt is a chat.
    :param timeout: the time limit of a batch in seconds, see `with_timeout`.
    :raises TypeError: if a function is not callable.
    :raises ValueError: if the bounds are NaN or crossed, or ``timeout`` is not positive.
    """

    __array_ufunc__ = None  # leaves np.float64(2) * reward to __rmul__
    _prefix: RewardFunction | None = None
    _conversational: bool | None = None

    def __init__(
        self,
        function: RewardFunction | None = None,
        *,
        prefix: RewardFunction | None = None,
        upper_bound: float | None = None,
        lower_bound: float | None = None,
        conversational: bool | None = None,
        timeout: float | None = None,
    ) -> None:
        if function is None and type(self).score is Reward.score:
            raise TypeError("Reward needs a function, or a subclass that overrides score")
        for f in (function, prefix):
            if f is not None:
                check_function(f)
        check_timeout(timeout)
        self._function, self._prefix = function, prefix
        self._conversational, self.timeout = conversational, timeout
        self._bound(upper_bound, lower_bound)

    def identity(self) -> Mapping[str, Any]:
        """Return the settings on which scores depend, by which checkpoints tell runs apart."""
        return {name: value for name, value in vars(self).items() if name != "timeout"}

    def with_timeout(self, timeout: float | None) -> Self:
        """Return this reward with a time limit of a batch; at the limit an engine raises a `RewardError`.

        In the main thread, on POSIX, Python code and waiting are stopped. Elsewhere a call that reaches the limit is
        abandoned, and works on in the background; coroutines are cancelled. An extension that computes for long without
        returning to Python is not stopped.

        :param timeout: seconds for one call of the function with a batch of texts; None for no limit.
        :raises ValueError: if it is not positive and finite.
        """
        check_timeout(timeout)
        limited = copy.copy(self)
        limited.timeout = timeout
        return limited

    def score(self, prompts: list[Any], completions: list[str], **columns: Any) -> Scores:
        """Return one number a completion, from flat lists of equal length (columns too). Override this."""
        assert self._function is not None
        return self._apply(self._function, prompts, completions, columns)

    def prefix(self, prompts: list[Any], completions: list[str], **columns: Any) -> Scores:
        """Return one number an unfinished text: an estimate of the score of its continuations. Override this.

        It must keep within the bounds. -inf means that every continuation of the text, itself among them, scores -inf;
        one that does not is lost to the posterior. Any other error of the estimate costs an engine time only.

        :raises RewardError: if the reward has no such method.
        """
        if self._prefix is None:
            raise RewardError(
                f"reward {self.__name__!r} cannot score unfinished texts: give it a `prefix` method, write "
                'Reward(f, prefix=g), or score the text so far like a finished one, with twist="partial"'
            )
        return self._apply(self._prefix, prompts, completions, columns)

    def _apply(
        self, function: RewardFunction, prompts: list[Any], completions: list[str], columns: dict[str, Any]
    ) -> Any:
        """Call a function with the arguments that it declares."""
        if isinstance(function, Reward):
            return with_none(function._scores(prompts, completions, columns))
        chats = [is_chat(p) if self._conversational is None else self._conversational for p in prompts]
        pairs = zip(chats, completions, strict=True)
        texts = [[{"role": "assistant", "content": text}] if chat else text for chat, text in pairs]
        arguments = {"prompts": prompts, "completions": texts, **columns}
        accepted, required = parameters(function)
        if missing := required - arguments.keys():
            what = f"needs {', '.join(sorted(missing))}; its arguments are {', '.join(arguments)}, by name"
            self._fail(what, prompts[0], completions[0])
        return function(**{k: v for k, v in arguments.items() if accepted is None or k in accepted})

    def _of_prefixes(self, partial: bool) -> Reward:
        """Return the reward of unfinished texts, with the same time limit.

        :param partial: where there is no `prefix`, score the text so far like a finished one.
        """
        return self._unfinished(partial).with_timeout(self.timeout)

    def _unfinished(self, partial: bool) -> Reward:
        """Return the reward of unfinished texts; see `_of_prefixes`."""
        able = self._prefix is not None or type(self).prefix is not Reward.prefix
        return PartialScore(self) if partial and not able else PrefixScore(self)

    # -- algebra ---------------------------------------------------------------------------------------------

    def __add__(self, other: Reward | float) -> Reward:
        if isinstance(other, Reward):
            mine, yours = _affine(self), _affine(other)
            return Affine([*mine.terms, *yours.terms], mine.offset + yours.offset)
        if is_real(other):
            mine = _affine(self)
            return Affine(mine.terms, mine.offset + float(other))
        return NotImplemented

    def __mul__(self, weight: float) -> Reward:
        if not is_real(weight):
            return NotImplemented
        mine, w = _affine(self), float(weight)
        return Affine([(w * v, r) for v, r in mine.terms], w * mine.offset)

    def __neg__(self) -> Reward:
        return self * -1.0

    def __sub__(self, other: Reward | float) -> Reward:
        return self + -other if isinstance(other, Reward) or is_real(other) else NotImplemented

    def __rsub__(self, other: float) -> Reward:
        return -self + other

    def __truediv__(self, divisor: float) -> Reward:
        return self * (1.0 / float(divisor)) if is_real(divisor) else NotImplemented

    __radd__ = __add__
    __rmul__ = __mul__

    def map(
        self, function: Callable[[float], float], *, upper_bound: float | None = None, lower_bound: float | None = None
    ) -> Reward:
        """Apply a function to every score: ``reward.map(math.tanh, upper_bound=1.0, lower_bound=-1.0)``.

        :param function: of one score.
        :param upper_bound: of the new reward; unknown if None, since it does not follow from ``function``.
        :param lower_bound: of the new reward, likewise.
        """
        return Mapped(self, function, upper_bound=upper_bound, lower_bound=lower_bound)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({name_of(self._function) if self._function else ''})"


class PrefixScore(Reward):
    """`Reward.prefix`, as a reward of unfinished texts."""

    def __init__(self, reward: Reward) -> None:
        self.reward = reward
        self._bound(reward.upper_bound, reward.lower_bound)

    def score(self, prompts: list[Any], completions: list[str], **columns: Any) -> Scores:
        return self.reward.prefix(prompts, completions, **columns)

    @property
    def __name__(self) -> str:
        return f"{self.reward.__name__}.prefix"


class PartialScore(PrefixScore):
    """The score of the text so far, like that of a finished one; its -inf may not be final."""

    def score(self, prompts: list[Any], completions: list[str], **columns: Any) -> Scores:
        return with_none(np.array([self._mendable(s) for s in self.reward._scores(prompts, completions, columns)]))


class Combination(Reward):
    """A reward composed of others."""

    def prefix(self, prompts: list[Any], completions: list[str], **columns: Any) -> Scores:
        return self._of_prefixes(partial=False).score(prompts, completions, **columns)


class Affine(Combination):
    """b + sum of w_i r_i, as the operators of `Reward` return.

    :param terms: w_i and r_i; those of weight 0 are dropped.
    :param offset: b.
    :raises ValueError: if a weight or the offset is not finite.
    """

    def __init__(self, terms: Sequence[tuple[float, Reward]], offset: float) -> None:
        if not all(math.isfinite(x) for x in (offset, *(w for w, _ in terms))):
            raise ValueError("a reward can only be scaled by, and added to, finite numbers")
        self.terms = [(w, r) for w, r in terms if w != 0]
        self.offset = offset
        ends = [(w * r.lower_bound, w * r.upper_bound) for w, r in self.terms]
        self._bound(offset + sum(max(e) for e in ends), offset + sum(min(e) for e in ends))

    def score(self, prompts: list[Any], completions: list[str], **columns: Any) -> Scores:
        total = np.full(len(completions), self.offset)
        scored = np.full(len(completions), not self.terms)
        for weight, reward in self.terms:
            scores = reward._scores(prompts, completions, columns)
            abstained = np.isnan(scores)
            if weight < 0 and np.isneginf(scores).any():
                i = int(np.isneginf(scores).argmax())
                what = f"negates the -inf of {reward.__name__!r}: a hard constraint can only be added"
                self._fail(what, prompts[i], completions[i])
            if abstained.any() and not reward.lower_bound <= 0 <= reward.upper_bound:
                i = int(abstained.argmax())
                bounds = f"[{reward.lower_bound}, {reward.upper_bound}]"
                reward._fail(f"{ABSTAINED}, which adds 0, outside its bounds {bounds}", prompts[i], completions[i])
            with np.errstate(over="ignore"):  # infinity is refused
                total += np.where(abstained, 0.0, weight * scores)
            scored |= ~abstained
        return with_none(np.where(scored, total, np.nan))

    def _unfinished(self, partial: bool) -> Reward:
        return Affine([(w, r._of_prefixes(partial)) for w, r in self.terms], self.offset)

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


class Mapped(Combination):
    """A function of a reward, as `Reward.map` returns."""

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

    def score(self, prompts: list[Any], completions: list[str], **columns: Any) -> Scores:
        expected = self.reward._scores(prompts, completions, columns)
        return self._each(self._of, expected.tolist(), prompts, completions)

    def _of(self, score: float) -> float | None:
        """Return the function of a score; None where the reward abstains."""
        return None if math.isnan(score) else self.function(score)

    def _unfinished(self, partial: bool) -> Reward:
        reward = self.reward._of_prefixes(partial)
        return MappedPrefix(reward, self.function, upper_bound=self.upper_bound, lower_bound=self.lower_bound)

    @property
    def __name__(self) -> str:
        return f"{name_of(self.function)}({self.reward.__name__})"

    def __repr__(self) -> str:
        inner = f"({self.reward!r})" if isinstance(self.reward, Affine) else repr(self.reward)
        return f"{inner}.map({name_of(self.function)})"


class MappedPrefix(Mapped):
    """A function of a reward of unfinished texts; its -inf of a finite score may not be final."""

    def _of(self, score: float) -> float | None:
        value = super()._of(score)
        return value if value is None or math.isinf(score) else self._mendable(value)


def _affine(reward: Reward) -> Affine:
    return reward if isinstance(reward, Affine) and reward.timeout is None else Affine([(1.0, reward)], 0.0)
