r"""Multi-armed bandits: unknown worlds with a single state, whose episodes last for one action.

    Bernoulli arms   r ~ Bernoulli(p_a),             p_a ~ Beta(a, b), the Dirichlet of two categories
    Gaussian arms    r ~ Normal(\mu_a, \sigma_a^2),  both parameters unknown, with a NormalGamma prior

The posterior of an arm follows from its own pulls in closed form (see `worlds`). A draw of the belief is one value for
each arm.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bayeslm.validation import Count, Finite, Positive, validated

from .worlds import Dirichlet, NormalGamma


@validated
@dataclass(frozen=True)
class Pull:
    """One pull in each run.

    :param arms: indices of the arms pulled, (run,).
    :param returns: their rewards, (run,).
    """

    arms: Tensor
    returns: Tensor


@validated
@dataclass(frozen=True)
class BernoulliArms:
    """The posterior over each arm's probability of the reward 1.

    :param rewards: distribution of the probabilities of the rewards 1 and 0, (*batch, arm, 2).
    """

    rewards: Dirichlet

    @staticmethod
    @validated
    def prior(
        num_arms: Count, a: Positive = 1.0, b: Positive = 1.0, *, device: torch.device | str | None = None
    ) -> BernoulliArms:
        """Return Beta(a, b) for each arm, float64."""
        return BernoulliArms(Dirichlet(torch.tensor([a, b], dtype=torch.float64, device=device).expand(num_arms, 2)))

    @property
    def mean(self) -> Tensor:
        """The posterior mean of each arm's probability, (*batch, arm)."""
        return self.rewards.mean[..., 0]

    def sample(self, shape: tuple[int, ...] = ()) -> Tensor:
        """Draw the arms' probabilities, (*shape, *batch, arm)."""
        return self.rewards.sample(shape)[..., 0]

    def expand(self, runs: int) -> BernoulliArms:
        """Return a copy for each of ``runs`` runs, as the first batch dimension."""
        return BernoulliArms(self.rewards.expand(runs))

    def update(self, pull: Pull) -> BernoulliArms:
        """Return the posterior after one more pull in each run."""
        outcome = torch.stack([pull.returns, 1 - pull.returns], -1)[:, None]  # (run, 1, 2)
        return BernoulliArms(self.rewards.update(_one_hot_arms(pull, self.mean)[..., None] * outcome))


@validated
@dataclass(frozen=True)
class GaussianArms:
    """The posterior over each arm's mean and precision.

    :param rewards: distribution of the mean and the precision of each arm's reward, (*batch, arm).
    """

    rewards: NormalGamma

    @staticmethod
    @validated
    def prior(
        num_arms: Count,
        reward: tuple[Finite, Positive, Positive, Positive] = (0.0, 1.0, 1.0, 1.0),
        *,
        device: torch.device | str | None = None,
    ) -> GaussianArms:
        """Return the same prior for each arm, float64.

        :param reward: m, k, a, b of `NormalGamma`.
        """
        return GaussianArms(NormalGamma(*torch.tensor(reward, dtype=torch.float64, device=device)).expand(num_arms))

    @property
    def mean(self) -> Tensor:
        """The posterior mean of each arm's mean reward, (*batch, arm)."""
        return self.rewards.mean

    def sample(self, shape: tuple[int, ...] = ()) -> Tensor:
        """Draw the arms' mean rewards, (*shape, *batch, arm)."""
        return self.rewards.sample(shape)[0]

    def expand(self, runs: int) -> GaussianArms:
        """Return a copy for each of ``runs`` runs, as the first batch dimension."""
        return GaussianArms(self.rewards.expand(runs))

    def update(self, pull: Pull) -> GaussianArms:
        """Return the posterior after one more pull in each run."""
        pulled, reward = _one_hot_arms(pull, self.mean), pull.returns[:, None]
        return GaussianArms(self.rewards.update(pulled, pulled * reward, pulled * reward**2))


def _one_hot_arms(pull: Pull, like: Tensor) -> Tensor:
    """Return 1 for the arm that was pulled and 0 for the others, (run, arm), in the dtype of ``like``."""
    return torch.nn.functional.one_hot(pull.arms, like.shape[-1]).to(like)


@validated
@dataclass(frozen=True)
class Bandit:
    """The true arms: a task for `bayeslm.inference.control.PSRL`.

    :param means: mean rewards, (arm,).
    :param scale: standard deviation of normal rewards, (arm,) or a number; None for Bernoulli rewards.
    :raises ValueError: if Bernoulli means are not in [0, 1], or a scale is not positive.
    """

    means: Tensor
    scale: Tensor | Positive | None = None

    def __post_init__(self) -> None:
        if self.means.dim() != 1 or not len(self.means):
            raise ValueError(f"Bandit: means must be (arm,), got shape {tuple(self.means.shape)}")
        if self.scale is None:
            if not ((self.means >= 0) & (self.means <= 1)).all():
                raise ValueError(
                    f"Bandit: means of Bernoulli arms must be probabilities, in [0, 1], got {self.means.tolist()}; "
                    "for normal rewards give a scale"
                )
        elif not (torch.as_tensor(self.scale) > 0).all():
            raise ValueError(f"Bandit: scale must be positive, got {self.scale}")
        object.__setattr__(self, "means", self.means.double())

    def action_values(self, world: Tensor) -> Tensor:
        """Return each arm's value, which is its mean reward, (run, arm)."""
        return world

    def play(self, policy: Tensor) -> Pull:
        """Pull one arm in each run.

        :param policy: probabilities of the arms, (run, arm).
        """
        arms = torch.multinomial(policy, 1)[:, 0]
        means = self.means[arms]
        if self.scale is None:
            return Pull(arms, torch.bernoulli(means))
        scale = torch.as_tensor(self.scale).to(means).expand_as(self.means)
        return Pull(arms, means + scale[arms] * torch.randn_like(means))

    def regret(self, policy: Tensor) -> Tensor:
        """Return the highest mean reward minus the policy's, (run,).

        :param policy: probabilities of the arms, (run, arm).
        """
        return self.means.max() - policy.to(self.means) @ self.means
