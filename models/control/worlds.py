r"""Unknown worlds: the posterior over the parameters of a Markov decision process that is seen through its steps alone.

Each pair of a state and an action has a law of the next state and a law of the reward, with conjugate priors:

    P( . | s, a) ~ Dirichlet(c),                  P | data ~ Dirichlet(c + counts)
    \tau ~ Gamma(a, b),  \mu | \tau ~ Normal(m, 1 / (k \tau)),  r | \mu, \tau ~ Normal(\mu, 1 / \tau)

    k' = k + n,        m' = (k m + \sum r) / k',
    a' = a + n / 2,    b' = b + (\sum (r - \bar r)^2 + (k n / k') (\bar r - m)^2) / 2

(Gelman et al., Bayesian Data Analysis, sections 3.3 and 3.4; the priors of Osband, Russo and Van Roy 2013, arXiv
1306.0940.) `Worlds` is this posterior in closed form; `UnknownMDP` is the same as a Pyro program, for any engine.
Beta-Bernoulli is the Dirichlet of two.
"""

from __future__ import annotations

from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from .mdp import MDP


@dataclass(frozen=True)
class Dirichlet:
    """The law of a categorical law's probabilities.

    :param concentration: (*batch, category), positive.
    """

    concentration: Tensor

    def update(self, counts: Tensor) -> Dirichlet:
        """The posterior, given how often each category was seen (*batch, category)."""
        return Dirichlet(self.concentration + counts)

    @property
    def mean(self) -> Tensor:
        """(*batch, category): the predictive law of the next category."""
        return self.concentration / self.concentration.sum(-1, keepdim=True)

    def expand(self, runs: int) -> Dirichlet:
        """The same for each of so many runs."""
        return Dirichlet(self.concentration.expand(runs, *self.concentration.shape))

    def sample(self, shape: tuple[int, ...] = ()) -> Tensor:
        """Draws (*shape, *batch, category).

        Made of logarithms, log Gamma(c) = log Gamma(c + 1) + log(U) / c in law: of small concentrations the gamma
        variates themselves are all 0.
        """
        c, size = self.concentration, torch.Size(shape)
        gamma, exponential = dist.Gamma(c + 1, 1.0, validate_args=False), dist.Exponential(c, validate_args=False)
        return (gamma.sample(size).log() - exponential.sample(size)).softmax(-1)


@dataclass(frozen=True)
class NormalGamma:
    """The law of a normal law's mean and precision; all four are (*batch), the last three positive.

    :param location: m, the mean's mean.
    :param count: k, how many observations the prior's mean is worth.
    :param shape: a, of the precision's Gamma law; half as many observations as its spread is worth.
    :param rate: b, of the precision's Gamma law: b / a is about the variance of an observation.
    """

    location: Tensor
    count: Tensor
    shape: Tensor
    rate: Tensor

    def update(self, n: Tensor, total: Tensor, squares: Tensor) -> NormalGamma:
        """The posterior, given the number, the sum and the sum of squares of the observations, each (*batch)."""
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
        """m, k, a, b."""
        return self.location, self.count, self.shape, self.rate

    @property
    def mean(self) -> Tensor:
        """(*batch): the mean's mean."""
        return self.location

    def expand(self, runs: int) -> NormalGamma:
        """The same for each of so many runs."""
        return NormalGamma(*(x.expand(runs, *x.shape) for x in self.parameters))

    def sample(self, shape: tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
        """Draws of the mean and the precision, each (*shape, *batch)."""
        precision = dist.Gamma(self.shape, self.rate, validate_args=False).sample(torch.Size(shape))
        return self.location + torch.randn_like(precision) / (self.count * precision).sqrt(), precision


@dataclass(frozen=True)
class Steps:
    """What an agent saw in an episode, each tensor (*batch, step).

    ``terminated`` says that the step ended the episode, in a terminal state. Steps after that are not ``valid``.
    """

    states: Tensor
    actions: Tensor
    rewards: Tensor
    next_states: Tensor
    terminated: Tensor
    valid: Tensor

    @property
    def returns(self) -> Tensor:
        """(*batch): the sum of the rewards."""
        return (self.rewards * self.valid).sum(-1)


@dataclass(frozen=True)
class Worlds:
    """The posterior over worlds of S states and A actions, or a batch of them for runs that go on side by side.

    Where episodes end is learned when it is seen: a state that ended one is terminal, the others go on.

    :param transitions: of the next state, (*batch, S, A, S).
    :param rewards: of the reward, (*batch, S, A).
    :param initial: of an episode's first state, (*batch, S).
    :param terminal: (*batch, S) bool, states that have ended an episode.
    """

    transitions: Dirichlet
    rewards: NormalGamma
    initial: Dirichlet
    terminal: Tensor

    @staticmethod
    def prior(
        num_states: int,
        num_actions: int,
        *,
        concentration: float | None = None,
        reward: tuple[float, float, float, float] = (0.0, 1.0, 1.0, 1.0),
        device: torch.device | str | None = None,
    ) -> Worlds:
        """The same prior for every state and action, float64.

        :param concentration: of each next state; by default 1 / S, one observation's worth in all.
        :param reward: m, k, a, b of `NormalGamma`: in the units of reward, so say what you know of them.
        :raises ValueError: if a count is not positive, or ``concentration``, k, a or b.
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

    def update(self, steps: Steps) -> Worlds:
        """The posterior, given the steps (*batch, step) of one episode."""
        states, actions = self.num_states, self.num_actions
        weight = steps.valid.to(self.rewards.location)
        pair = steps.states * actions + steps.actions

        def summed(index: Tensor, values: Tensor, *shape: int) -> Tensor:
            """Values summed where they belong, (*batch, *shape)."""
            total = values.new_zeros((*values.shape[:-1], torch.Size(shape).numel()))
            return total.scatter_add_(-1, index, values).unflatten(-1, shape)

        rewards = steps.rewards.to(weight) * weight
        ended = summed(steps.next_states, weight * steps.terminated, states) > 0
        return Worlds(
            self.transitions.update(summed(pair * states + steps.next_states, weight, states, actions, states)),
            self.rewards.update(
                summed(pair, weight, states, actions),
                summed(pair, rewards, states, actions),
                summed(pair, rewards * steps.rewards, states, actions),
            ),
            self.initial.update(torch.nn.functional.one_hot(steps.states[..., 0], states)),
            self.terminal | ended,
        )

    def expand(self, runs: int) -> Worlds:
        """The same for each of so many runs."""
        terminal = self.terminal.expand(runs, *self.terminal.shape)
        return Worlds(self.transitions.expand(runs), self.rewards.expand(runs), self.initial.expand(runs), terminal)

    @property
    def mean(self) -> MDP:
        """The mean world: of all predictions about one step. (*batch)"""
        return self._world(self.transitions.mean, self.rewards.mean, self.initial.mean, self.terminal)

    def sample(self, shape: tuple[int, ...] = ()) -> MDP:
        """Worlds drawn from the posterior, (*shape, *batch)."""
        rewards, _ = self.rewards.sample(shape)
        terminal = self.terminal.expand(*shape, *self.terminal.shape)
        return self._world(self.transitions.sample(shape), rewards, self.initial.sample(shape), terminal)

    @staticmethod
    def _world(transitions: Tensor, rewards: Tensor, initial: Tensor, terminal: Tensor) -> MDP:
        return MDP(transitions, rewards[..., None].expand_as(transitions), terminal, initial)


class UnknownMDP:
    """`Worlds` as a Pyro program, for any engine: latent sites in a plate ``pairs`` of states and actions, s A + a.

    ``transitions`` (pair, S), ``precision`` and ``reward`` (pair,) are latent; each step seen is an observation of
    ``next_state`` and of ``seen_reward``, in the plate ``steps``.

    :param prior: what is believed before; one posterior, without batch dimensions.
    :raises ValueError: if it has any.
    """

    def __init__(self, prior: Worlds) -> None:
        if prior.terminal.dim() > 1:
            raise ValueError(f"UnknownMDP: the prior is of one world, got batch {tuple(prior.terminal.shape[:-1])}")
        self.prior = prior

    def __call__(self, steps: Steps) -> None:
        """Run the program on the steps of episodes, tensors of any shape; those that are not valid are left out."""
        prior, valid = self.prior, steps.valid
        m, k, a, b = (x.flatten().float() for x in prior.rewards.parameters)
        with pyro.plate("pairs", prior.num_states * prior.num_actions):
            concentration = prior.transitions.concentration.flatten(0, 1).float()
            transitions = pyro.sample("transitions", dist.Dirichlet(concentration))  # (*, pair, S)
            precision = pyro.sample("precision", dist.Gamma(a, b))
            reward = pyro.sample("reward", dist.Normal(m, (k * precision).rsqrt()))
        pair = (steps.states * prior.num_actions + steps.actions)[valid]
        with pyro.plate("steps", len(pair)):
            law = dist.Categorical(transitions[..., pair, :])
            pyro.sample("next_state", law, obs=steps.next_states[valid])
            seen = dist.Normal(reward[..., pair], precision[..., pair].rsqrt())
            pyro.sample("seen_reward", seen, obs=steps.rewards[valid].float())
