r"""Unknown worlds: the posterior over the parameters of a Markov decision process, given observed transitions.

Each pair of a state and an action has a distribution of the next state and one of the reward, with conjugate priors:

    P( . | s, a) ~ Dirichlet(c),                  P | data ~ Dirichlet(c + counts)
    \tau ~ Gamma(a, b),  \mu | \tau ~ Normal(m, 1 / (k \tau)),  r | \mu, \tau ~ Normal(\mu, 1 / \tau)

    k' = k + n,        m' = (k m + \sum r) / k',
    a' = a + n / 2,    b' = b + (\sum (r - \bar r)^2 + (k n / k') (\bar r - m)^2) / 2

(Gelman et al., Bayesian Data Analysis, sections 3.3 and 3.4; the priors of Osband, Russo and Van Roy 2013, arXiv
1306.0940.) `Worlds` is this posterior in closed form; `UnknownMDP` is the same model as a Pyro program, for any engine.
"""

from __future__ import annotations

from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from bayeslm.validation import Count, Finite, Positive, validated

from .mdp import MDP


@validated
@dataclass(frozen=True)
class Dirichlet:
    """The distribution of the probabilities of a categorical variable; of two categories, the Beta distribution.

    :param concentration: (*batch, category), positive.
    """

    concentration: Tensor

    def update(self, counts: Tensor) -> Dirichlet:
        """Return the posterior after observing each category ``counts`` times, (*batch, category)."""
        return Dirichlet(self.concentration + counts)

    @property
    def mean(self) -> Tensor:
        """The predictive probabilities of the next category, (*batch, category)."""
        return self.concentration / self.concentration.sum(-1, keepdim=True)

    def expand(self, runs: int) -> Dirichlet:
        """Return a copy for each of ``runs`` runs, as the first batch dimension."""
        return Dirichlet(self.concentration.expand(runs, *self.concentration.shape))

    def sample(self, shape: tuple[int, ...] = ()) -> Tensor:
        """Draw probabilities, (*shape, *batch, category).

        They are computed from logarithms of gamma variates, log Gamma(c) = log Gamma(c + 1) + log(U) / c in
        distribution, because the variates themselves underflow to 0 where all concentrations are small.
        """
        c, size = self.concentration, torch.Size(shape)
        gamma, exponential = dist.Gamma(c + 1, 1.0, validate_args=False), dist.Exponential(c, validate_args=False)
        return (gamma.sample(size).log() - exponential.sample(size)).softmax(-1)


@validated
@dataclass(frozen=True)
class NormalGamma:
    """The joint distribution of the mean and the precision of a normal variable; all parameters are (*batch).

    :param location: m, mean of the mean.
    :param count: k > 0, number of observations that the prior of the mean counts for.
    :param shape: a > 0, shape of the precision's Gamma distribution; it counts for 2 a observations.
    :param rate: b > 0, rate of the precision's Gamma distribution; b / a is about the variance of an observation.
    """

    location: Tensor
    count: Tensor
    shape: Tensor
    rate: Tensor

    def update(self, n: Tensor, total: Tensor, squares: Tensor) -> NormalGamma:
        """Return the posterior after more observations.

        :param n: their number, (*batch).
        :param total: their sum, (*batch).
        :param squares: the sum of their squares, (*batch).
        """
        average = total / n.clamp_min(1)
        scatter = (squares - n * average**2).clamp_min(0)
        count = self.count + n
        return NormalGamma(
            (self.count * self.location + total) / count,
            count,
            self.shape + n / 2,
            self.rate + (scatter + self.count * n / count * (average - self.location) ** 2) / 2,
        )

    @property
    def parameters(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The parameters m, k, a, b."""
        return self.location, self.count, self.shape, self.rate

    @property
    def mean(self) -> Tensor:
        """The mean of the mean, (*batch)."""
        return self.location

    def expand(self, runs: int) -> NormalGamma:
        """Return a copy for each of ``runs`` runs, as the first batch dimension."""
        return NormalGamma(*(x.expand(runs, *x.shape) for x in self.parameters))

    def sample(self, shape: tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
        """Draw means and precisions, each (*shape, *batch)."""
        precision = dist.Gamma(self.shape, self.rate, validate_args=False).sample(torch.Size(shape))
        return self.location + torch.randn_like(precision) / (self.count * precision).sqrt(), precision


@validated
@dataclass(frozen=True)
class Experience:
    """The observed transitions of an episode.

    :param states: state before each step, (*batch, step) int64.
    :param actions: (*batch, step) int64.
    :param rewards: (*batch, step).
    :param next_states: state after each step, (*batch, step) int64.
    :param terminated: whether the step ended the episode in a terminal state, (*batch, step) bool.
    :param valid: (*batch, step) bool; false for padding after the end of the episode.
    """

    states: Tensor
    actions: Tensor
    rewards: Tensor
    next_states: Tensor
    terminated: Tensor
    valid: Tensor

    @property
    def returns(self) -> Tensor:
        """The sum of the rewards, (*batch)."""
        return (self.rewards * self.valid).sum(-1)


@validated
@dataclass(frozen=True)
class Worlds:
    """The posterior over worlds of S states and A actions, or a batch of posteriors for parallel runs.

    A state is taken to be terminal once an episode has terminated in it, and not before.

    :param transitions: distribution of P(s' | s, a), (*batch, S, A, S).
    :param rewards: distribution of the mean and the precision of the reward, (*batch, S, A).
    :param initial: distribution of the probabilities of an episode's first state, (*batch, S).
    :param terminal: states that have ended an episode, (*batch, S) bool.
    """

    transitions: Dirichlet
    rewards: NormalGamma
    initial: Dirichlet
    terminal: Tensor

    @staticmethod
    @validated
    def prior(
        num_states: Count,
        num_actions: Count,
        *,
        concentration: Positive | None = None,
        reward: tuple[Finite, Positive, Positive, Positive] = (0.0, 1.0, 1.0, 1.0),
        device: torch.device | str | None = None,
    ) -> Worlds:
        """Return the same prior for every state and action, float64.

        :param concentration: Dirichlet concentration of each next state; by default 1 / S, which counts for one
            observation in all.
        :param reward: m, k, a, b of `NormalGamma`. The default suits rewards of about unit size only.
        :raises ValueError: if ``num_states``, ``num_actions``, ``concentration``, k, a or b is not positive.
        """
        if num_states < 1 or num_actions < 1:
            raise ValueError(f"Worlds: need at least one state and one action, got {num_states} and {num_actions}")
        concentration = 1 / num_states if concentration is None else concentration
        if not (concentration > 0 and min(reward[1:]) > 0):
            raise ValueError(
                f"Worlds: concentration and k, a, b must be positive, got {concentration} and {reward[1:]}"
            )

        def full(value: float, *shape: int) -> Tensor:
            return torch.full(shape, value, dtype=torch.float64, device=device)

        return Worlds(
            Dirichlet(full(concentration, num_states, num_actions, num_states)),
            NormalGamma(*(full(x, num_states, num_actions) for x in reward)),
            Dirichlet(full(1 / num_states, num_states)),
            full(0.0, num_states).bool(),
        )

    @property
    def num_states(self) -> int:
        return self.terminal.shape[-1]

    @property
    def num_actions(self) -> int:
        return self.rewards.location.shape[-1]

    def update(self, experience: Experience) -> Worlds:
        """Return the posterior after one more episode, (*batch, step)."""
        states, actions = self.num_states, self.num_actions
        weight = experience.valid.to(self.rewards.location)
        pair = experience.states * actions + experience.actions

        def summed(index: Tensor, values: Tensor, *shape: int) -> Tensor:
            """Return the sums of values with the same index, (*batch, *shape)."""
            total = values.new_zeros((*values.shape[:-1], torch.Size(shape).numel()))
            return total.scatter_add_(-1, index, values).unflatten(-1, shape)

        rewards = experience.rewards.to(weight) * weight
        ended = summed(experience.next_states, weight * experience.terminated, states) > 0
        return Worlds(
            self.transitions.update(summed(pair * states + experience.next_states, weight, states, actions, states)),
            self.rewards.update(
                summed(pair, weight, states, actions),
                summed(pair, rewards, states, actions),
                summed(pair, rewards * experience.rewards, states, actions),
            ),
            self.initial.update(torch.nn.functional.one_hot(experience.states[..., 0], states)),
            self.terminal | ended,
        )

    def expand(self, runs: int) -> Worlds:
        """Return a copy for each of ``runs`` runs, as the first batch dimension."""
        terminal = self.terminal.expand(runs, *self.terminal.shape)
        return Worlds(self.transitions.expand(runs), self.rewards.expand(runs), self.initial.expand(runs), terminal)

    @property
    def mean(self) -> MDP:
        """The world of posterior mean probabilities and rewards, which predicts a single step; (*batch)."""
        return self._world(self.transitions.mean, self.rewards.mean, self.initial.mean, self.terminal)

    def sample(self, shape: tuple[int, ...] = ()) -> MDP:
        """Draw worlds from the posterior, (*shape, *batch)."""
        rewards, _ = self.rewards.sample(shape)
        terminal = self.terminal.expand(*shape, *self.terminal.shape)
        return self._world(self.transitions.sample(shape), rewards, self.initial.sample(shape), terminal)

    @staticmethod
    def _world(transitions: Tensor, rewards: Tensor, initial: Tensor, terminal: Tensor) -> MDP:
        return MDP(transitions, rewards[..., None].expand_as(transitions), terminal, initial)


@validated
class UnknownMDP:
    """A Pyro program with the posterior `Worlds`, for any engine.

    Latent sites are ``transitions`` (pair, S), ``precision`` and ``reward`` (pair,), in a plate ``pairs`` of states and
    actions, whose index is s A + a. Observed sites are ``next_state`` and ``observed_reward`` (step,), in a plate
    ``steps``.

    :param prior: the prior, without batch dimensions.
    :raises ValueError: if it has batch dimensions.
    """

    def __init__(self, prior: Worlds) -> None:
        if prior.terminal.dim() > 1:
            raise ValueError(
                f"UnknownMDP: the prior must be of one world, got a batch of shape {tuple(prior.terminal.shape[:-1])}"
            )
        self.prior = prior

    def __call__(self, experience: Experience) -> None:
        """Run the program on the valid transitions of ``experience``, tensors of any shape."""
        prior, valid = self.prior, experience.valid
        m, k, a, b = (x.flatten().float() for x in prior.rewards.parameters)
        with pyro.plate("pairs", prior.num_states * prior.num_actions):
            concentration = prior.transitions.concentration.flatten(0, 1).float()
            transitions = pyro.sample("transitions", dist.Dirichlet(concentration))  # (*, pair, S)
            precision = pyro.sample("precision", dist.Gamma(a, b))
            reward = pyro.sample("reward", dist.Normal(m, (k * precision).rsqrt()))
        pair = (experience.states * prior.num_actions + experience.actions)[valid]
        with pyro.plate("steps", len(pair)):
            next_state = dist.Categorical(transitions[..., pair, :])
            pyro.sample("next_state", next_state, obs=experience.next_states[valid])
            observed_reward = dist.Normal(reward[..., pair], precision[..., pair].rsqrt())
            pyro.sample("observed_reward", observed_reward, obs=experience.rewards[valid].float())
