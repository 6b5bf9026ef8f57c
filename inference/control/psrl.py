r"""Posterior-sampling reinforcement learning (PSRL): act as if a world drawn from the posterior were the true one.

    for each episode:
        \theta ~ p(\theta | what was seen)          draw a world
        \pi = the best policy of \theta             solve it
        act by \pi for an episode, and update the posterior with what was seen

(Osband, Russo and Van Roy 2013, arXiv 1306.0940; for bandits Thompson 1933.) A world that may be good is tried until it
is known whether it is, for a whole episode at a time. Other strategies (`exploration`) read the values of the mean
world instead. What they lose is the regret, in exact expectation over the episode, not by its sampled return:

    regret of an episode = V^*(true world) - V^\pi(true world)

`PSRL` is the loop; a task says how to solve a world and how to act in the true one: `EpisodicTask`, or a `Bandit`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, Self, TypeVar

import torch
from torch import Tensor

from bayeslm.inference.program import check_counts, seeded
from bayeslm.models.control.environments import Environment
from bayeslm.models.control.mdp import MDP
from bayeslm.models.control.worlds import Steps
from bayeslm.progress import track

from .exploration import Exploration, Thompson
from .soft_value_iteration import SoftValueIteration

BeliefT = TypeVar("BeliefT", bound="Belief")


class Belief(Protocol):
    """A posterior over worlds: `Worlds` over processes, `BernoulliArms` and `GaussianArms` over bandits."""

    @property
    def mean(self) -> Any:
        """The mean world, of every run."""

    def sample(self) -> Any:
        """A world drawn for every run."""

    def update(self, seen: Any, /) -> Self:
        """The posterior, given what every run saw."""

    def expand(self, runs: int, /) -> Self:
        """The same for each of so many runs."""


class Task(Protocol):
    """What is to be learned; policies and values have runs first and actions last."""

    def action_values(self, world: Any, /) -> Tensor:
        """What each action is worth in a world that is believed."""

    def play(self, policy: Tensor, /) -> Any:
        """Act for an episode in the true world. What was seen has ``returns`` (run,), and is what beliefs update on."""

    def regret(self, policy: Tensor, /) -> Tensor:
        """(run,) What the policy loses in the true world; NaN where that is not known."""


@dataclass(frozen=True)
class Learning(Generic[BeliefT]):
    """What `PSRL` did, run by run."""

    regret: Tensor
    """(run, episode) float64: expected loss of each episode's policy."""
    returns: Tensor
    """(run, episode) float64: what the episode paid."""
    belief: BeliefT
    """The posterior at the end, of every run."""


@dataclass(frozen=True)
class PSRL:
    """The loop, for many independent runs side by side.

    :param num_episodes: times that a policy is made, used for an episode, and learned from.
    :param exploration: `Thompson` is posterior sampling; the others act on the mean world.
    :param num_runs: independent runs; all are in one batch.
    :param seed: reproduces the runs; None leaves the global random state in charge.
    """

    num_episodes: int
    exploration: Exploration = field(default_factory=Thompson)
    num_runs: int = 1
    seed: int | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        check_counts(self, "num_episodes", "num_runs")

    def run(self, task: Task, prior: BeliefT) -> Learning[BeliefT]:
        """Learn a task from a prior over its worlds, which is the same for all runs. Ctrl-C keeps what was learned."""
        belief = prior.expand(self.num_runs)
        regret: list[Tensor] = []
        returns: list[Tensor] = []
        with seeded(self.seed), track(type(self.exploration).__name__, self.num_episodes, self.progress) as report:
            for _ in range(self.num_episodes):
                try:
                    world = belief.sample() if self.exploration.samples else belief.mean
                    policy = self.exploration.probabilities(task.action_values(world)[None])
                    loss = task.regret(policy)
                    seen = task.play(policy)
                    belief = belief.update(seen)
                except KeyboardInterrupt:
                    if not regret:
                        raise
                    break
                regret.append(loss)
                returns.append(seen.returns)
                report()
        return Learning(torch.stack(regret, 1), torch.stack(returns, 1), belief)


class EpisodicTask:
    """A world of S states and A actions that is acted in for an episode at a time: `Worlds` is the belief.

    The agent sees `Steps` alone. What is known of the true world, its ``truth``, tells the regret and nothing else.

    :param environment: a `TabularEnvironment`, or a `GymEnvironment` whose observations are discrete; it
        need have no tables.
    :param horizon: T, the steps that policies plan for; not above the environment's own time limit, which would cut
        episodes short of that.
    :param truth: the true process; by default a `TabularEnvironment`'s own. None leaves the regret NaN.
    :raises ValueError: if observations are not discrete, or ``horizon`` is above that limit or no positive number.
    """

    def __init__(self, environment: Environment, horizon: int, truth: MDP | None = None) -> None:
        if environment.num_states is None:
            raise ValueError("EpisodicTask: observations must be discrete: a table of states cannot hold others")
        limit = getattr(environment, "time_limit", None)
        if limit is not None and horizon > limit:
            raise ValueError(
                f"EpisodicTask: horizon {horizon} is above the environment's limit of {limit} steps, and policies "
                f"would plan for steps that no episode has: use at most {limit}"
            )
        self.environment = environment
        self.horizon = horizon
        self.truth: MDP | None = getattr(environment, "mdp", None) if truth is None else truth
        self._planner = SoftValueIteration(beta=0.0, horizon=horizon)
        self.optimum = None if self.truth is None else self.truth.initial @ self._planner.run(self.truth).values[0]

    def action_values(self, world: MDP) -> Tensor:
        """Q_t(s, a) of worlds believed, (run, T, S, A)."""
        return self._planner.run(world).action_values.movedim(0, 1)

    def play(self, policy: Tensor) -> Steps:
        """An episode a run, by policies (run, T, S, A)."""
        runs = torch.arange(len(policy), device=self.environment.device)
        law = policy.to(self.environment.device)
        episodes = self.environment.play(torch.full_like(runs, -1))
        state, valid = episodes.observations[:, 0].long(), ~episodes.ended
        steps = []
        for t in range(self.horizon):
            action = torch.multinomial(law[runs, t, state], 1)[:, 0]
            reward = episodes.step(action).to(policy.dtype)
            following = episodes.observations[:, 0].long()
            steps.append((state, action, reward, following, valid & episodes.terminated, valid))
            state, valid = following, valid & ~episodes.ended
        return Steps(*(torch.stack(column, -1).to(policy.device) for column in zip(*steps, strict=True)))

    def regret(self, policy: Tensor) -> Tensor:
        """V^* - V^\\pi (run,), from the law of the state at every step (run, S)."""
        if self.truth is None or self.optimum is None:
            return policy.new_full((len(policy),), torch.nan)
        state = self.truth.initial.expand(len(policy), -1)
        loss = self.optimum.expand(len(policy))
        for t in range(self.horizon):
            pair = state[..., None] * policy[:, t]  # P(s_t, a_t), (run, S, A)
            loss = loss - (pair * self.truth.expected_rewards).sum((-2, -1))
            state = pair.flatten(-2) @ self.truth.transitions.flatten(0, 1)
        return loss
