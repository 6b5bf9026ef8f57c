r"""Multi-armed bandits: the smallest unknown world, of one state, whose episodes are one action long.

    Bernoulli arms   r ~ Bernoulli(p_a),         p_a ~ Beta(1, 1), the Dirichlet of two
    Gaussian arms    r ~ Normal(\mu_a, \sigma_a^2),  both unknown, NormalGamma

An arm's law is learned from its own pulls in closed form (`worlds`). A draw of the belief is a value of
each arm.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .worlds import Dirichlet, NormalGamma


@dataclass(frozen=True)
class Pull:
    """One pull of each run: which arm, and what it paid; both (run,)."""

    arms: Tensor
    returns: Tensor


@dataclass(frozen=True)
class BernoulliArms:
    """The posterior over the arms' probabilities to pay 1.

    :param law: of paying (1, 0), (*batch, arm, 2).
    """

    law: Dirichlet

    @staticmethod
    def prior(
        num_arms: int, a: float = 1.0, b: float = 1.0, *, device: torch.device | str | None = None
    ) -> BernoulliArms:
        """Beta(a, b) for each arm, float64."""
        return BernoulliArms(Dirichlet(torch.tensor([a, b], dtype=torch.float64, device=device).expand(num_arms, 2)))

    @property
    def mean(self) -> Tensor:
        """(*batch, arm)"""
        return self.law.mean[..., 0]

    def sample(self, shape: tuple[int, ...] = ()) -> Tensor:
        """Draws (*shape, *batch, arm)."""
        return self.law.sample(shape)[..., 0]

    def expand(self, runs: int) -> BernoulliArms:
        """The same for each of so many runs."""
        return BernoulliArms(self.law.expand(runs))

    def update(self, pull: Pull) -> BernoulliArms:
        """The posterior, given one pull of each run."""
        paid = torch.stack([pull.returns, 1 - pull.returns], -1)[:, None]  # (run, 1, 2)
        return BernoulliArms(self.law.update(_chosen(pull, self.mean)[..., None] * paid))


@dataclass(frozen=True)
class GaussianArms:
    """The posterior over the arms' means and precisions.

    :param law: of an arm's reward, (*batch, arm).
    """

    law: NormalGamma

    @staticmethod
    def prior(
        num_arms: int,
        reward: tuple[float, float, float, float] = (0.0, 1.0, 1.0, 1.0),
        *,
        device: torch.device | str | None = None,
    ) -> GaussianArms:
        """The same m, k, a, b of `NormalGamma` for each arm, float64."""
        return GaussianArms(NormalGamma(*torch.tensor(reward, dtype=torch.float64, device=device)).expand(num_arms))

    @property
    def mean(self) -> Tensor:
        """(*batch, arm)"""
        return self.law.mean

    def sample(self, shape: tuple[int, ...] = ()) -> Tensor:
        """Draws of the means (*shape, *batch, arm)."""
        return self.law.sample(shape)[0]

    def expand(self, runs: int) -> GaussianArms:
        """The same for each of so many runs."""
        return GaussianArms(self.law.expand(runs))

    def update(self, pull: Pull) -> GaussianArms:
        """The posterior, given one pull of each run."""
        chosen, reward = _chosen(pull, self.mean), pull.returns[:, None]
        return GaussianArms(self.law.update(chosen, chosen * reward, chosen * reward**2))


def _chosen(pull: Pull, like: Tensor) -> Tensor:
    """(run, arm): 1 for the arm that was pulled, 0 for the others."""
    return torch.nn.functional.one_hot(pull.arms, like.shape[-1]).to(like)


@dataclass(frozen=True)
class Bandit:
    """Arms as they truly are: the task that `PSRL` learns.

    :param means: (arm,) of the rewards.
    :param scale: of normal rewards, (arm,) or a number; None for Bernoulli rewards.
    :raises ValueError: if Bernoulli means are not in [0, 1], or a scale is not positive.
    """

    means: Tensor
    scale: Tensor | float | None = None

    def __post_init__(self) -> None:
        if self.means.dim() != 1 or not len(self.means):
            raise ValueError(f"Bandit: means must be (arm,), got shape {tuple(self.means.shape)}")
        if self.scale is None:
            if not ((self.means >= 0) & (self.means <= 1)).all():
                raise ValueError(
                    "Bandit: means of Bernoulli arms are probabilities, in [0, 1]; give normal ones a scale"
                )
        elif not (torch.as_tensor(self.scale) > 0).all():
            raise ValueError(f"Bandit: scale must be positive, got {self.scale}")
        object.__setattr__(self, "means", self.means.double())

    def action_values(self, world: Tensor) -> Tensor:
        """An arm's value is its mean, (run, arm)."""
        return world

    def play(self, policy: Tensor) -> Pull:
        """Pull an arm a run, by policies (run, arm)."""
        arms = torch.multinomial(policy, 1)[:, 0]
        means = self.means[arms]
        if self.scale is None:
            return Pull(arms, torch.bernoulli(means))
        scale = torch.as_tensor(self.scale).to(means).expand_as(self.means)
        return Pull(arms, means + scale[arms] * torch.randn_like(means))

    def regret(self, policy: Tensor) -> Tensor:
        """(run,): what the highest mean is above the policy's."""
        return self.means.max() - policy.to(self.means) @ self.means
