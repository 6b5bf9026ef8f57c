r"""Exploration: which action to take where the actions' values are uncertain.

Q_1 .. Q_n are draws of the posterior over the actions' values, and \bar Q their mean. A strategy is a distribution of
actions:

    Random          \pi(a) = 1 / A
    EpsilonGreedy   \pi(a) = (1 - \epsilon) 1[a = \argmax \bar Q] + \epsilon / A
    Boltzmann       \pi(a) \propto \exp(\bar Q(a) / \tau)
    Thompson        \pi(a) = (1/n) \sum_i 1[a = \argmax Q_i],  an estimate of P(a is best | data)

(Thompson 1933; Sutton and Barto 2018, chapter 2; Russo et al. 2018, arXiv 1707.02038.) Actions that tie for the highest
value share its probability. The same strategies choose an arm, the policy of an episode (see `psrl`), or a completion
to ask about: the last axis of the values is that of the actions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bayeslm.validation import Positive, Share, validated


class Exploration(ABC):
    """A distribution of actions, given draws of the posterior over their values."""

    needs_draws: ClassVar[bool] = False
    """Whether the strategy depends on draws of the posterior rather than on its mean alone. Where computing values
    means solving a world, a drawn world is solved for the former, and the mean world for the latter."""

    def probabilities(self, values: Tensor) -> Tensor:
        """Return the probabilities of the actions, (*batch, action).

        :param values: draws of the actions' values, (draw, *batch, action) floats; a mean is passed as one draw.
        :raises ValueError: if ``values`` has no axis of draws, or holds NaN.
        """
        if values.dim() < 2 or not values.is_floating_point():
            raise ValueError(
                f"values must be floats (draw, *batch, action), got {values.dtype} of shape {tuple(values.shape)}; "
                "a mean is one draw: mean[None]"
            )
        if values.isnan().any():
            raise ValueError("values hold NaN, so that no action is the best: check the posterior that they come from")
        return self._probabilities(values)

    def choose(self, values: Tensor) -> Tensor:
        """Draw an action for each element of the batch, (*batch) int64; ``values`` as in `probabilities`."""
        p = self.probabilities(values)
        return torch.multinomial(p.reshape(-1, p.shape[-1]), 1).reshape(p.shape[:-1])

    @abstractmethod
    def _probabilities(self, values: Tensor) -> Tensor: ...


def _greedy(values: Tensor) -> Tensor:
    """Return equal probabilities of the actions with the highest value in each row, (*, action)."""
    highest = (values == values.amax(-1, keepdim=True)).to(values.dtype)
    return highest / highest.sum(-1, keepdim=True)


def _uniform(values: Tensor) -> Tensor:
    return torch.full_like(values[0], 1.0 / values.shape[-1])


@validated
@dataclass(frozen=True)
class Random(Exploration):
    """Uniform probabilities, whatever the values."""

    def _probabilities(self, values: Tensor) -> Tensor:
        return _uniform(values)


@validated
@dataclass(frozen=True)
class EpsilonGreedy(Exploration):
    """The action with the highest mean value; with probability ``epsilon`` a uniformly drawn one.

    :param epsilon: 0 is the greedy strategy.
    :raises ValueError: if ``epsilon`` is not in [0, 1].
    """

    epsilon: Share = 0.1

    def _probabilities(self, values: Tensor) -> Tensor:
        return (1.0 - self.epsilon) * _greedy(values.mean(0)) + self.epsilon * _uniform(values)


@validated
@dataclass(frozen=True)
class Boltzmann(Exploration):
    """A softmax of the mean values.

    :param temperature: divides the values, in their units.
    :raises ValueError: if ``temperature`` is not positive and finite.
    """

    temperature: Positive = 1.0

    def _probabilities(self, values: Tensor) -> Tensor:
        return (values.mean(0) / self.temperature).softmax(-1)


@validated
@dataclass(frozen=True)
class Thompson(Exploration):
    """The best action of one draw of the posterior: each action with the probability that it is the best."""

    needs_draws: ClassVar[bool] = True

    def _probabilities(self, values: Tensor) -> Tensor:
        return _greedy(values).mean(0)
