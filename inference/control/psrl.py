r"""Posterior-sampling reinforcement learning (PSRL): act as if a world drawn from the posterior were the true one.

    for each episode:
        \theta ~ p(\theta | data)                   draw a world
        \pi = the best policy of \theta             solve it
        act by \pi for an episode, and update the posterior with its transitions

(Osband, Russo and Van Roy 2013, arXiv 1306.0940; for bandits Thompson 1933.) Each policy is kept for a complete
episode. Other strategies (see `exploration`) use the values of the mean world instead. All are compared by their
regret, in exact expectation over the episode rather than by its sampled return:

    regret of an episode = V^*(true world) - V^\pi(true world)

`PSRL` is the loop. A task, which is an `EpisodicTask` or a `Bandit`, solves a world and acts in the true one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, Self, TypeVar, runtime_checkable

import torch
from torch import Tensor

from bayeslm.inference.program import running
from bayeslm.models.control import MDP, Environment, Experience
from bayeslm.progress import track
from bayeslm.validation import Count, Seed, validated

from .exploration import Exploration, Thompson
from .soft_value_iteration import SoftValueIteration

BeliefT = TypeVar("BeliefT", bound="Belief")


@runtime_checkable
class Belief(Protocol):
    """A posterior over worlds: `Worlds` over processes, `BernoulliArms` and `GaussianArms` over bandits."""

    @property
    def mean(self) -> Any:
        """The posterior mean world of each run."""

    def sample(self) -> Any:
        """Draw one world for each run."""

    def update(self, experience: Any, /) -> Self:
        """Return the posterior after one more episode of each run."""

    def expand(self, runs: int, /) -> Self:
        """Return a copy for each of ``runs`` runs, as the first batch dimension."""


@runtime_checkable
class Task(Protocol):
    """A problem for `PSRL`. Runs are the first dimension of policies and values, and actions the last."""

    def action_values(self, world: Any, /) -> Tensor:
        """Return each action's value in a world of the belief, (run, ..., action)."""

    def play(self, policy: Tensor, /) -> Any:
        """Act by ``policy`` for an episode in the true world, and return the data that beliefs are updated with.

        The data have a field ``returns``, (run,).
        """

    def regret(self, policy: Tensor, /) -> Tensor:
        """Return the policy's expected loss in the true world, (run,); NaN where the true world is unknown."""


@validated
@dataclass(frozen=True)
class Learning(Generic[BeliefT]):
    """The result of `PSRL`.

    :param regret: expected loss of each episode's policy, (run, episode) float64.
    :param returns: return of each episode, (run, episode) float64.
    :param belief: the final posterior of each run.
    """

    regret: Tensor
    returns: Tensor
    belief: BeliefT

    def __repr__(self) -> str:
        runs, episodes = self.regret.shape
        regret = float(self.regret.sum(1).mean())
        belief = type(self.belief).__name__
        return f"Learning({runs} runs of {episodes} episodes, mean regret {regret:.3g}, belief={belief}(...))"


@validated
@dataclass(frozen=True)
class PSRL:
    """Posterior-sampling reinforcement learning, for a batch of independent runs.

    :param num_episodes: number of episodes; the posterior is updated after each.
    :param exploration: `Thompson` is posterior sampling; the other strategies act on the mean world.
    :param num_runs: number of independent runs, computed in one batch.
    :param seed: seed of all random numbers; None draws from the global random state.
    :param progress: whether to show a progress bar.
    """

    num_episodes: Count
    exploration: Exploration = field(default_factory=Thompson)
    num_runs: Count = 1
    seed: Seed | None = None
    progress: bool = True

    @validated
    def run(self, task: Task, prior: BeliefT) -> Learning[BeliefT]:
        """Learn a task, from the same prior over its worlds in each run.

        Ctrl-C ends the loop and returns the episodes so far, if there is at least one.
        """
        belief = prior.expand(self.num_runs)
        regret: list[Tensor] = []
        returns: list[Tensor] = []
        with running(self.seed), track(type(self.exploration).__name__, self.num_episodes, self.progress) as report:
            for _ in range(self.num_episodes):
                try:
                    world = belief.sample() if self.exploration.needs_draws else belief.mean
                    policy = self.exploration.probabilities(task.action_values(world)[None])
                    loss = task.regret(policy)
                    experience = task.play(policy)
                    belief = belief.update(experience)
                except KeyboardInterrupt:
                    if not regret:
                        raise
                    break
                regret.append(loss)
                returns.append(experience.returns)
                report()
        return Learning(torch.stack(regret, 1), torch.stack(returns, 1), belief)


@validated
class EpisodicTask:
    """A world of S states and A actions, in which an agent acts for one episode at a time; its belief is `Worlds`.

    The agent observes `Experience` only. The true process, ``truth``, is used for the regret only.

    :param environment: a `TabularEnvironment`, or a `GymEnvironment` with discrete observations, which needs no tables.
    :param horizon: T, number of steps that policies plan for; at most the environment's own time limit, which would
        otherwise cut episodes short.
    :param truth: the true process; by default that of a `TabularEnvironment`. Without one, the regret is NaN.
    :raises ValueError: if observations are not discrete, or ``horizon`` is not positive or is above that limit.
    """

    def __init__(self, environment: Environment, horizon: Count, truth: MDP | None = None) -> None:
        if environment.num_states is None:
            raise ValueError("EpisodicTask: observations must be discrete, because the belief is a table of states")
        limit = getattr(environment, "time_limit", None)
        if limit is not None and horizon > limit:
            raise ValueError(
                f"EpisodicTask: horizon {horizon} is above the environment's limit of {limit} steps, so that policies "
                f"would plan for steps that no episode has; use at most {limit}"
            )
        self.environment = environment
        self.horizon = horizon
        self.truth: MDP | None = getattr(environment, "mdp", None) if truth is None else truth
        self._planner = SoftValueIteration(beta=0.0, horizon=horizon)
        self.optimum = None if self.truth is None else self.truth.initial @ self._planner.run(self.truth).values[0]

    def action_values(self, world: MDP) -> Tensor:
        """Return Q_t(s, a) of a world for each run, (run, T, S, A)."""
        return self._planner.run(world).action_values.movedim(0, 1)

    def play(self, policy: Tensor) -> Experience:
        """Play one episode in each run.

        :param policy: action probabilities, (run, T, S, A).
        """
        runs = torch.arange(len(policy), device=self.environment.device)
        probabilities = policy.to(self.environment.device)
        episodes = self.environment.play(torch.full_like(runs, -1))
        state, valid = episodes.observations[:, 0].long(), ~episodes.ended
        steps = []
        for t in range(self.horizon):
            action = torch.multinomial(probabilities[runs, t, state], 1)[:, 0]
            reward = episodes.step(action).to(policy.dtype)
            next_state = episodes.observations[:, 0].long()
            steps.append((state, action, reward, next_state, valid & episodes.terminated, valid))
            state, valid = next_state, valid & ~episodes.ended
        return Experience(*(torch.stack(column, -1).to(policy.device) for column in zip(*steps, strict=True)))

    def regret(self, policy: Tensor) -> Tensor:
        r"""Return V^* - V^\pi, (run,), computed with the state probabilities of each step, (run, S)."""
        if self.truth is None or self.optimum is None:
            return policy.new_full((len(policy),), torch.nan)
        state = self.truth.initial.expand(len(policy), -1)
        loss = self.optimum.expand(len(policy))
        for t in range(self.horizon):
            pair = state[..., None] * policy[:, t]  # P(s_t, a_t), (run, S, A)
            loss = loss - (pair * self.truth.expected_rewards).sum((-2, -1))
            state = pair.flatten(-2) @ self.truth.transitions.flatten(0, 1)
        return loss
