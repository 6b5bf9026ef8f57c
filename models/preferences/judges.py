r"""Judges, which decide which of two completions is better.

A judge is any function ``judge(prompt, first, second)`` that returns True if the first completion is better, False if
the second is, and None if it does not decide. `SimulatedJudge` has a reward that is hidden from the learner, and
answers by the model of Bradley and Terry (1952), at a temperature \tau:

    P(first \succ second) = \sigma((r(first) - r(second)) / \tau)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b

from bayeslm.models.rewards import Reward, TimeLimitError, call
from bayeslm.validation import NonNegative, Seed, Share, validated

from .comparisons import Comparisons

Judge = Callable[[str, str, str], bool | None]


class JudgeError(ValueError):
    """A judge did not answer within its time limit."""


@validated
@dataclass(frozen=True)
class Question:
    """Which is better, the ``first`` completion of the prompt or the ``second``?

    :param probability: posterior probability, when the question is asked, that the answer is the first.
    :raises ValueError: if it is not in [0, 1].
    """

    prompt: str
    first: str
    second: str
    probability: Share

    def put_to(self, judge: Judge, timeout: float | None = None) -> Answer:
        """Ask a judge, and return this question with the answer. What the judge raises passes unchanged.

        :param timeout: the time limit of the answer in seconds, which stops the judge as `Reward.with_timeout` stops a
            reward; None for no limit.
        :raises JudgeError: at the limit.
        :raises TypeError: if the answer is none of True, False and None.
        """
        try:
            return self.with_answer(call(lambda: judge(self.prompt, self.first, self.second), timeout))
        except TimeLimitError:
            raise JudgeError(
                f"the judge reached its time limit of {timeout:g} s: whether {self.first!r:.60} or {self.second!r:.60} "
                f"is the better completion of {self.prompt!r:.60}"
            ) from None

    def with_answer(self, first_is_better: bool | None) -> Answer:
        """Return this question with a judge's answer.

        :raises TypeError: if the answer is none of True, False and None.
        """
        if first_is_better is not None and not isinstance(first_is_better, bool):
            raise TypeError(f"a judge must return True, False or None, not {first_is_better!r}")
        return Answer(self.prompt, self.first, self.second, self.probability, first_is_better)


@validated
@dataclass(frozen=True)
class Answer(Question):
    """A question with its answer.

    :param first_is_better: whether the first completion is better; None if the judge did not decide.
    """

    first_is_better: bool | None

    @property
    def surprisal(self) -> float:
        """-log of the posterior probability of the answer when it was asked, in nats; 0 without an answer."""
        if self.first_is_better is None:
            return 0.0
        probability = self.probability if self.first_is_better else 1.0 - self.probability
        return -math.log(probability) if probability > 0 else math.inf

    @property
    def foreseen(self) -> bool:
        """Whether the answer had a posterior probability above 1/2 when it was asked; False without an answer."""
        if self.first_is_better is None:
            return False
        return (self.probability > 0.5) if self.first_is_better else (self.probability < 0.5)


@validated
def to_comparisons(answers: Sequence[Answer]) -> Comparisons | None:
    """Return the comparisons that were decided, in their order; None if there are none."""
    decided = [answer for answer in answers if answer.first_is_better is not None]
    if not decided:
        return None
    return Comparisons(
        [answer.prompt for answer in decided],
        [answer.first if answer.first_is_better else answer.second for answer in decided],
        [answer.second if answer.first_is_better else answer.first for answer in decided],
    )


@validated
@dataclass(frozen=True)
class SimulatedJudge:
    """A judge that answers by a hidden reward with noise, and answers the same question always alike.

    :param reward: the true reward, hidden from the learner.
    :param temperature: of the noise, in units of reward. At 0 answers are random for equal rewards only.
    :param seed: seed of the noise.
    :raises ValueError: if the temperature is negative or not finite.
    """

    reward: Reward
    temperature: NonNegative = 0.1
    seed: Seed = 0

    def __call__(self, prompt: str, first: str, second: str) -> bool:
        return self._uniform(prompt, first, second) < self.probability(prompt, first, second)

    def probability(self, prompt: str, first: str, second: str) -> float:
        """Return the probability of the answer that the first completion is better."""
        one, two = self.reward([prompt] * 2, [first, second]).tolist()
        if one == two:  # also where both are -inf
            return 0.5
        margin = math.copysign(math.inf, one - two) if self.temperature == 0 else (one - two) / self.temperature
        return 1.0 / (1.0 + math.exp(-margin)) if margin > -700 else 0.0

    def _uniform(self, *texts: str) -> float:
        """Return a number in [0, 1) that is a function of the seed and the texts."""
        digest = blake2b(repr((self.seed, *texts)).encode(), digest_size=7).digest()
        return int.from_bytes(digest) / 2**56
