"""Moments that a distribution over texts is to have, and the program of one that has them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bayeslm.models.rewards import Reward, RewardFunction
from bayeslm.validation import Finite, validated

from .tilted import TiltedLM


@validated
@dataclass(frozen=True, eq=False)
class Moment:
    """A share or a mean that texts are to have: ``Moment(rewards.Contains("science"), 0.5)``, half of the texts.

    :param feature: phi, any reward: 1 or 0 for a property of which ``target`` is the share, any number for a mean.
    :param target: the expectation of the feature, over the texts of all prompts.
    :raises ValueError: if the target is outside the feature's bounds, or at one of them: that is a property of every
        text, for which there is `rewards.Constraint`.
    """

    feature: Reward | RewardFunction
    target: Finite

    def __post_init__(self) -> None:
        if not isinstance(self.feature, Reward):
            object.__setattr__(self, "feature", Reward(self.feature))
        low, high = self.reward.lower_bound, self.reward.upper_bound
        if not low < self.target < high:
            raise ValueError(
                f"the target of {self.name!r} must be between its bounds {low:g} and {high:g}, got {self.target:g}: a "
                "mean at a bound is a property of every text, for which there is rewards.Constraint"
            )

    @property
    def reward(self) -> Reward:
        """The feature as a reward."""
        assert isinstance(self.feature, Reward)
        return self.feature

    @property
    def name(self) -> str:
        """The feature's name."""
        return self.reward.__name__


@validated
def moment_target(base: TiltedLM, moments: Sequence[Moment], coefficients: Sequence[float]) -> TiltedLM:
    """Return the base's posterior times exp(coefficients . features), as a program with beta = 1."""
    terms = [] if base.reward is None else [base.reward / base.beta]
    terms += [weight * moment.reward for weight, moment in zip(coefficients, moments, strict=True) if weight != 0]
    return TiltedLM(
        base.prior, sum(terms[1:], start=terms[0]) if terms else None, 1.0, **base.prior_settings, power=base.power
    )
