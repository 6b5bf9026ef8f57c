r"""Posterior-sampling reinforcement learning (PSRL): act as if a world drawn from the posterior were the true one.

    for each episode:
        \theta ~ p(\theta | what was seen)          draw a world
        \pi = the best policy of \theta             solve it
        act by \pi for an episode, and update the posterior with what was seen

(Osband, Russo and Van Roy 2013, arXiv 1306.0940; for bandits Thompson 1933.) A world that may be good is tried until it is
known whether it is, for a whole episode at a time. Other strategies (`exploration`) read the values of the mean world
instead. What they lose is the regret, in exact expectation over the episode, not by its sampled return:

    regret of an episode = V^*(true world) - V^\pi(true world)

`PSRL` is the loop; a task says what a world is, how to solve one and how to act: `Episodes` of a process whose law the
agent does not see, `GymEpisodes` of a Gymnasium environment, or a `Bandit`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, Self, TypeVar

import torch
from torch import Tensor

from ..models.control.mdp import MDP
from ..models.control.worlds import Steps
from ..models.progress import track
from .checks import check_counts
from .exploration import Exploration, Thompson
from .program import seeded
from .soft_value_iteration import SoftValueIteration

World = TypeVar("World")
Seen = TypeVar("Seen", bound="HasReturns")
BeliefT = TypeVar("BeliefT", bound="Belief[Any, Any]")


class HasReturns(Protocol):
    @property
    def returns(self) -> Tensor: ...


class Belief(Protocol[World, Seen]):
    """A posterior over worlds: `Worlds` over processes, `BernoulliArms` and `GaussianArms` over bandits."""

    @property
    def mean(self) -> World: ...
    def sample(self) -> World: ...
    def update(self, seen: Seen, /) -> Self: ...
    def expand(self, runs: int, /) -> Self: ...


class Task(Protocol[World, Seen]):
    """What is to be learned; policies and values end in an axis of actions, after one of runs and any others."""

    def action_values(self, world: World, /) -> Tensor:
        """What each action is worth in a world that is believed."""

    def play(self, policy: Tensor, /) -> Seen:
        """Act once, for an episode, in the true world."""

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
    """The posterior at the end, (run, ...)."""


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

    def run(self, task: Task[World, Seen], prior: BeliefT) -> Learning[BeliefT]:
        """Learn a task from a prior over its worlds, which is the same for all runs. Ctrl-C keeps what was learned."""
        belief, regret, returns = prior.expand(self.num_runs), [], []
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


class Episodes:
    """A process of S states and A actions, acted in for at most ``horizon`` steps at a time: MDP and Steps.

    Its law is used to draw what the agent sees, and to tell the regret; the agent sees `Steps` alone.
    """

    def __init__(self, mdp: MDP, horizon: int) -> None:
        self.mdp = mdp
        self.horizon = horizon
        self._planner = SoftValueIteration(beta=0.0, horizon=horizon)
        self.optimum = (mdp.initial * self._planner.run(mdp).values[0]).sum()  # V^*

    def action_values(self, world: MDP) -> Tensor:
        """Q_t(s, a), (run, T, S, A)."""
        return self._planner.run(world).action_values.movedim(0, 1)

    def play(self, policy: Tensor) -> Steps:
        runs = torch.arange(len(policy), device=policy.device)
        state = torch.multinomial(self.mdp.initial.expand(len(runs), -1), 1)[:, 0]
        valid = ~self.mdp.terminal[state]
        steps = []
        for t in range(self.horizon):
            action = torch.multinomial(policy[runs, t, state], 1)[:, 0]
            following = torch.multinomial(self.mdp.transitions[state, action], 1)[:, 0]
            terminated = self.mdp.terminal[following] & valid
            steps.append((state, action, self.mdp.rewards[state, action, following], following, terminated, valid))
            state, valid = following, valid & ~terminated
        return stacked(steps)

    def regret(self, policy: Tensor) -> Tensor:
        """V^* - V^\\pi, by the law of the state at every step (run, S)."""
        state = self.mdp.initial.expand(len(policy), -1)
        value = policy.new_zeros(len(policy))
        for t in range(self.horizon):
            pair = state[..., None] * policy[:, t]  # P(s_t, a_t), (run, S, A)
            value = value + (pair * self.mdp.expected_rewards).sum((-2, -1))
            state = pair.flatten(-2) @ self.mdp.transitions.flatten(0, 1)
        return self.optimum - value


class GymEpisodes:
    """A Gymnasium vector environment of discrete states and actions, one environment a run; it need have no tables.

    :param env: from `gymnasium.make_vec`, with as many environments as there are runs.
    :param horizon: the most steps of an episode; the environment's own limit may come first.
    :raises ValueError: if states or actions are not `Discrete` from 0.
    """

    def __init__(self, env: Any, horizon: int) -> None:
        for name in ("single_observation_space", "single_action_space"):
            space = getattr(env, name, None)
            if getattr(space, "n", None) is None or getattr(space, "start", 0) != 0:
                raise ValueError(
                    f"GymEpisodes: {name} must be Discrete, counted from 0, of a vector environment "
                    f"(gymnasium.make_vec), got {space}: a table of states and actions cannot hold others"
                )
        self.env = env
        self.horizon = horizon
        self._planner = SoftValueIteration(beta=0.0, horizon=horizon)
        self._seed: int | None = int(torch.randint(2**31, ()))

    def action_values(self, world: MDP) -> Tensor:
        """Q_t(s, a), (run, T, S, A)."""
        return self._planner.run(world).action_values.movedim(0, 1)

    def play(self, policy: Tensor) -> Steps:
        """:raises ValueError: if there is not one environment a run."""
        if len(policy) != self.env.num_envs:
            raise ValueError(f"GymEpisodes: {len(policy)} runs need as many environments, got {self.env.num_envs}")
        runs = torch.arange(len(policy))
        law = policy.cpu()
        seen, _ = self.env.reset(seed=self._seed)
        self._seed = None  # the environments' own random numbers go on
        state = torch.as_tensor(seen).long()
        valid = torch.ones(len(policy), dtype=torch.bool)
        steps = []
        for t in range(self.horizon):
            action = torch.multinomial(law[runs, t, state], 1)[:, 0]
            seen, reward, ended, cut, _ = self.env.step(action.numpy())
            following, ended, cut = torch.as_tensor(seen).long(), torch.as_tensor(ended), torch.as_tensor(cut)
            steps.append((state, action, torch.as_tensor(reward).double(), following, ended & valid, valid))
            state, valid = following, valid & ~(ended | cut)
            if not valid.any():
                break
        return stacked(steps, policy.device)

    def regret(self, policy: Tensor) -> Tensor:
        return policy.new_full((len(policy),), torch.nan)


def stacked(steps: Sequence[tuple[Tensor, ...]], device: torch.device | None = None) -> Steps:
    """Steps (run, step) of one tuple of tensors (run,) a step."""
    return Steps(*(torch.stack(column, -1).to(device) for column in zip(*steps, strict=True)))
