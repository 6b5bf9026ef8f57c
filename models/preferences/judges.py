r"""Judges: who says which of two completions is better.

A judge is any function ``judge(prompt, first, second)``: True if the first completion is better, False if the second,
None if it does not say. `SimulatedJudge` knows a reward that the learner does not see, and answers as Bradley and Terry
(1952) have it, at a temperature \tau:

    P(first \succ second) = \sigma((r(first) - r(second)) / \tau)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b

from bayeslm.models.rewards import Reward

from .comparisons import Comparisons

Judge = Callable[[str, str, str], bool | None]


@dataclass(frozen=True)
class Question:
    """Which is better, the ``first`` completion of the prompt or the ``second``?

    ``probability`` that it is the first, by what was known when it was asked.
    """

    prompt: str
    first: str
    second: str
    probability: float

    def answered(self, first_is_better: bool | None) -> Answer:
        """With a judge's answer.

        :raises TypeError: if that is none of True, False and None.
        """
        if first_is_better is not None and not isinstance(first_is_better, bool):
            raise TypeError(f"a judge answers True, False or None, not {first_is_better!r}")
        return Answer(self.prompt, self.first, self.second, self.probability, first_is_better)


@dataclass(frozen=True)
class Answer(Question):
    """A question with its answer: whether the first completion is better; None if the judge did not say."""

    first_is_better: bool | None

    @property
    def pair(self) -> tuple[str, frozenset[str]]:
        """What was compared, in either order."""
        return self.prompt, frozenset((self.first, self.second))

    @property
    def surprisal(self) -> float:
        """-log of the probability that the answer had before it was given, nats; 0 if there was none."""
        if self.first_is_better is None:
            return 0.0
        probability = self.probability if self.first_is_better else 1.0 - self.probability
        return -math.log(probability) if probability > 0 else math.inf

    @property
    def foreseen(self) -> bool:
        """Whether the answer was the likelier one; of two alike neither is."""
        if self.first_is_better is None:
            return False
        return (self.probability > 0.5) if self.first_is_better else (self.probability < 0.5)


def answered(answers: Sequence[Answer]) -> Comparisons | None:
    """What was answered, in its order; None if nothing was."""
    given = [answer for answer in answers if answer.first_is_better is not None]
    if not given:
        return None
    return Comparisons(
        [answer.prompt for answer in given],
        [answer.first if answer.first_is_better else answer.second for answer in given],
        [answer.second if answer.first_is_better else answer.first for answer in given],
    )


@dataclass(frozen=True)
class SimulatedJudge:
    """Answers by a hidden reward, with noise; to the same question always the same, whatever was asked before.

    :param reward: the true reward, which the learner does not see.
    :param temperature: of the noise, in the reward's units. 0 is none: only of equal rewards is the answer by chance.
    :param seed: of the noise.
    :raises ValueError: if the temperature is negative or not finite.
    """

    reward: Reward
    temperature: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise ValueError(f"SimulatedJudge: temperature must be 0 or more and finite, got {self.temperature}")

    def __call__(self, prompt: str, first: str, second: str) -> bool:
        return self._uniform(prompt, first, second) < self.probability(prompt, first, second)

    def probability(self, prompt: str, first: str, second: str) -> float:
        """That the first is called better."""
        one, two = self.reward([prompt] * 2, [first, second]).tolist()
        if one == two:  # also where both are -inf
            return 0.5
        margin = math.copysign(math.inf, one - two) if self.temperature == 0 else (one - two) / self.temperature
        return 1.0 / (1.0 + math.exp(-margin)) if margin > -700 else 0.0

    def _uniform(self, *texts: str) -> float:
        """A number of U(0, 1) that the seed and the texts determine."""
        digest = blake2b(repr((self.seed, *texts)).encode(), digest_size=7).digest()
        return int.from_bytes(digest) / 2**56
