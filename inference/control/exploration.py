r"""Exploration: which action to take, where values are known by their posterior alone.

Q_1 .. Q_n are draws of the posterior over the actions' values, and \bar Q their mean. A strategy is a law of actions:

    Random          \pi(a) = 1 / A
    EpsilonGreedy   \pi(a) = (1 - \epsilon) 1[a = \argmax \bar Q] + \epsilon / A
    Boltzmann       \pi(a) \propto \exp(\bar Q(a) / \tau)
    Thompson        \pi(a) = (1/n) \sum_i 1[a = \argmax Q_i],  for one fresh draw as for many P(a is best | data)

(Thompson 1933; Sutton and Barto 2018, chapter 2; Russo et al. 2018, arXiv 1707.02038.) Actions that share the highest
value share its probability. The same objects choose an arm, the policy of an episode (`psrl`), or a completion to ask
about: an action is whatever the last axis of the values is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bayeslm.inference.program import check_positive


class Exploration(ABC):
    """A law of actions, given draws of the posterior over their values.

    ``samples`` says what a strategy reads: draws of the posterior, or its mean alone. Who would have to solve a world
    to have its values solves the drawn world for the first kind, and the mean world for the second.
    """

    samples: ClassVar[bool] = False

    def probabilities(self, values: Tensor) -> Tensor:
        """The law of actions (*batch, action), given draws of values (draw, *batch, action), or one mean as one draw.

        :raises ValueError: if values have no axis of draws, or are NaN.
        """
        if values.dim() < 2 or not values.is_floating_point():
            raise ValueError(
                f"values must be floats (draw, *batch, action), got {values.dtype} of shape {tuple(values.shape)}; "
                "a mean is one draw: mean[None]"
            )
        if values.isnan().any():
            raise ValueError("values hold NaN: which action is best is then unknown")
        return self._law(values)

    def choose(self, values: Tensor) -> Tensor:
        """Actions (*batch) drawn from the law, int64."""
        law = self.probabilities(values)
        return torch.multinomial(law.reshape(-1, law.shape[-1]), 1).reshape(law.shape[:-1])

    @abstractmethod
    def _law(self, values: Tensor) -> Tensor: ...


def best(values: Tensor) -> Tensor:
    """The law (*, action) of the best action of each row: all on the highest value, shared where several have it."""
    highest = (values == values.amax(-1, keepdim=True)).to(values.dtype)
    return highest / highest.sum(-1, keepdim=True)


def _uniform(values: Tensor) -> Tensor:
    return torch.full_like(values[0], 1.0 / values.shape[-1])


@dataclass(frozen=True)
class Random(Exploration):
    """Every action alike, whatever is known."""

    def _law(self, values: Tensor) -> Tensor:
        return _uniform(values)


@dataclass(frozen=True)
class EpsilonGreedy(Exploration):
    """The action that is best in the mean; with probability ``epsilon`` any. 0 is greedy.

    :raises ValueError: if ``epsilon`` is not in [0, 1].
    """

    epsilon: float = 0.1

    def __post_init__(self) -> None:
        if not 0.0 <= self.epsilon <= 1.0:
            raise ValueError(f"EpsilonGreedy: epsilon must be in [0, 1], got {self.epsilon}")

    def _law(self, values: Tensor) -> Tensor:
        return (1.0 - self.epsilon) * best(values.mean(0)) + self.epsilon * _uniform(values)


@dataclass(frozen=True)
class Boltzmann(Exploration):
    """A softmax of the mean values at a temperature, in the values' own units.

    :raises ValueError: if ``temperature`` is not positive and finite.
    """

    temperature: float = 1.0

    def __post_init__(self) -> None:
        check_positive(self, "temperature")

    def _law(self, values: Tensor) -> Tensor:
        return (values.mean(0) / self.temperature).softmax(-1)


@dataclass(frozen=True)
class Thompson(Exploration):
    """An action with the probability that it is the best: the best of one draw of the posterior."""

    samples: ClassVar[bool] = True

    def _law(self, values: Tensor) -> Tensor:
        return best(values).mean(0)
