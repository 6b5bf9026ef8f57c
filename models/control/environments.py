"""Environments with discrete actions, many episodes at once: tables in torch, and whatever Gymnasium has.

Their chance is torch's: every draw comes from torch's generator, or from a seed that it gave, so that the seed of an
engine reproduces episodes as it does texts.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from .mdp import MDP

if TYPE_CHECKING:
    import gymnasium

BOUNDLESS = 1e4  # spaces write "no bound" as inf, or as the largest number of their type


class Episodes(Protocol):
    """Episodes in play, one a row."""

    observations: Tensor
    """(row, observation_size) float32, before the next action."""
    ended: Tensor
    """(row,) bool: terminated, or truncated by a time limit of the environment; no reward comes any more."""
    terminated: Tensor
    """(row,) bool: ended in a terminal state."""

    def step(self, actions: Tensor) -> Tensor:
        """Take actions (row,); the rewards (row,) float32, 0 of rows that had ended."""

    def select(self, rows: Tensor) -> None:
        """Row i becomes a copy of what row ``rows[i]`` is, with chance of its own from here on."""


class Environment(Protocol):
    """What episodes are played in."""

    num_actions: int
    observation_size: int
    num_states: int | None
    """How many values the one observation has, if it is discrete."""
    device: torch.device

    def play(self, starts: Tensor, *, copies: bool = False) -> Episodes:
        """Begin an episode a row.

        :param starts: (row,) int64, where each begins; -1 leaves it to chance.
        :param copies: whether rows will be copied (`Episodes.select`).
        """


# -- tables ------------------------------------------------------------------------------------------------------------


class TabularEnvironment:
    """An `MDP` to be played in; its states are the observations, and may be ``starts``.

    A step pays ``rewards``: means, if the process is `MDP.mixed`. What is best in expectation is the same, but log Z is
    that of this process, never above that of the one whose rewards vary (Jensen).

    :raises ValueError: if there are several processes in one.
    """

    observation_size = 1

    def __init__(self, mdp: MDP) -> None:
        if mdp.transitions.dim() > 3:
            raise ValueError("TabularEnvironment: one MDP is played in, and this one has leading dimensions")
        self.mdp = mdp
        self.num_actions = mdp.num_actions
        self.num_states: int | None = mdp.num_states
        self.device = mdp.initial.device
        outcomes = int((mdp.transitions > 0).sum(-1).amax())  # few follow a state: the others are not looked at
        mass, self._following = mdp.transitions.topk(outcomes)
        self._cdf = mass.cumsum(-1)
        self._rewards = mdp.rewards.gather(-1, self._following).float()

    def play(self, starts: Tensor, *, copies: bool = False) -> TabularEpisodes:
        starts = starts.to(self.device)
        chance = self.mdp.initial.multinomial(len(starts), replacement=True) if len(starts) else starts
        return TabularEpisodes(self, torch.where(starts < 0, chance, starts))

    def outcome(self, states: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Draw what follows states and actions (row,): the next states and the rewards, (row,)."""
        cdf = self._cdf[states, actions]
        u = torch.rand(len(states), 1, dtype=cdf.dtype, device=cdf.device) * cdf[:, -1:]
        which = (cdf <= u).sum(-1, keepdim=True).clamp_max(cdf.shape[-1] - 1)
        following, rewards = (
            x[states, actions].gather(-1, which).squeeze(-1) for x in (self._following, self._rewards)
        )
        return following, rewards


class TabularEpisodes:
    """`Episodes` of a table: a state a row."""

    def __init__(self, environment: TabularEnvironment, states: Tensor) -> None:
        self._environment = environment
        self._states = states

    @property
    def observations(self) -> Tensor:
        return self._states[:, None].float()

    @property
    def ended(self) -> Tensor:
        return self._environment.mdp.terminal[self._states]

    @property
    def terminated(self) -> Tensor:
        return self.ended

    def step(self, actions: Tensor) -> Tensor:
        self._states, rewards = self._environment.outcome(self._states, actions)
        return rewards

    def select(self, rows: Tensor) -> None:
        self._states = self._states[rows]


# -- Gymnasium ---------------------------------------------------------------------------------------------------------


class GymEnvironment:
    """A Gymnasium environment with discrete actions, and observations that are a number (Discrete) or an array (Box).

    Where it has a vectorised version (`gymnasium.make_vec`), and no copies or starts are asked for, that is played in;
    else each row has a copy of the environment (`copy.deepcopy`), whose `numpy.random.Generator` attributes are seeded
    anew: other sources of chance are copied as they are. ``starts`` are seeds of the first observation.

    :param make: the environment's name, or a function that makes it.
    :param kwargs: for it.
    :raises ImportError: if gymnasium is not installed.
    :raises ValueError: if actions are continuous, or observations neither Discrete nor Box.
    """

    device = torch.device("cpu")

    def __init__(self, make: str | Callable[..., gymnasium.Env[Any, Any]], **kwargs: Any) -> None:
        try:
            import gymnasium
        except ImportError as error:
            raise ImportError('GymEnvironment needs gymnasium: pip install "bayeslm[gym]"') from error
        self._env = gymnasium.make(make, **kwargs) if isinstance(make, str) else make(**kwargs)
        name = make if isinstance(make, str) else str(self._env.unwrapped)
        actions: Any = self._env.action_space
        observations: Any = self._env.observation_space
        if not isinstance(actions, gymnasium.spaces.Discrete):
            raise ValueError(
                f"GymEnvironment: {name} has actions {actions}, and only Discrete ones have probabilities that are "
                "enumerated; wrap it in one that chooses among finitely many (gymnasium.wrappers.TransformAction)"
            )
        self.num_states: int | None = None
        self.observation_scale: Tensor | None = None
        self._first_state = 0
        if isinstance(observations, gymnasium.spaces.Discrete):
            self.num_states, self.observation_size = int(observations.n), 1
            self._first_state = int(observations.start)
        elif isinstance(observations, gymnasium.spaces.Box):
            self.observation_size = math.prod(observations.shape)
            self.observation_scale = _scale(observations)
        else:
            raise ValueError(
                f"GymEnvironment: {name} has observations {observations}; wrap it in "
                "gymnasium.wrappers.FlattenObservation, which makes a Box of them"
            )
        self.num_actions = int(actions.n)
        spec = self._env.spec
        self.time_limit: int | None = None if spec is None else spec.max_episode_steps
        self._first_action = int(actions.start)
        self._make_vector: Callable[[int], Any] | None = None
        if isinstance(make, str) and gymnasium.spec(make).vector_entry_point is not None:
            self._make_vector = functools.partial(
                gymnasium.make_vec, make, vectorization_mode="vector_entry_point", **kwargs
            )

    def play(self, starts: Tensor, *, copies: bool = False) -> Episodes:
        if copies or self._make_vector is None or bool((starts >= 0).any()):
            return CopiedEpisodes(self, starts.tolist())
        # a new one each time: `reset` of Gymnasium's own CartPole forgets that episodes had ended, and loses a step
        return VectorEpisodes(self, self._make_vector(len(starts)), len(starts))

    def copy_of(self, env: Any = None) -> Any:
        """A copy of an environment of this kind, by default a fresh one. What no step changes is shared: the spaces,
        and the table of a toy text."""
        env = self._env if env is None else env
        inner = env.unwrapped
        table = getattr(inner, "P", None)
        shared = [inner.spec, inner.action_space, inner.observation_space, table if isinstance(table, dict) else None]
        return copy.deepcopy(env, {id(x): x for x in shared if x is not None})

    def actions_of(self, actions: Tensor) -> np.ndarray:
        return actions.numpy() + self._first_action

    def tensor_of(self, observations: Any) -> Tensor:
        """Observations of rows as float32 (row, observation_size)."""
        array = np.asarray(observations, dtype=np.float32).reshape(len(observations), self.observation_size)
        return torch.from_numpy(array - self._first_state if self._first_state else array)


def _scale(box: gymnasium.spaces.Box) -> Tensor:
    """Half the width of each coordinate of a box, (observation_size,); 1 where it has no bounds worth the name."""
    half = torch.from_numpy((box.high.astype(np.float64) - box.low.astype(np.float64)).reshape(-1) / 2)
    return torch.where((half > 0) & (half < BOUNDLESS), half, 1.0).float()


def _seeds(n: int) -> list[int]:
    """Seeds for generators that are not torch's."""
    return torch.randint(2**31, (n,)).tolist()


class CopiedEpisodes:
    """`Episodes` of an environment a row."""

    def __init__(self, environment: GymEnvironment, starts: list[int]) -> None:
        self._environment = environment
        self._envs = [environment.copy_of() for _ in starts]
        seeds = _seeds(len(starts))
        first = [
            env.reset(seed=seed if start < 0 else start)[0]
            for env, start, seed in zip(self._envs, starts, seeds, strict=True)
        ]
        self._reseed()  # those of one start part from here on
        self.observations = environment.tensor_of(first)
        self.ended, self.terminated = torch.zeros(2, len(starts), dtype=torch.bool)

    def step(self, actions: Tensor) -> Tensor:
        rewards = torch.zeros(len(self._envs))
        observations, ended, terminal = self.observations.clone(), self.ended.clone(), self.terminated.clone()
        given = self._environment.actions_of(actions)
        for i in (~ended).nonzero().squeeze(-1).tolist():
            observation, reward, terminated, truncated, _ = self._envs[i].step(given[i])
            observations[i] = self._environment.tensor_of([observation])[0]
            rewards[i], ended[i], terminal[i] = float(reward), terminated or truncated, terminated
        self.observations, self.ended, self.terminated = observations, ended, terminal
        return rewards

    def select(self, rows: Tensor) -> None:
        self.observations = self.observations[rows]
        self.ended, self.terminated = self.ended[rows], self.terminated[rows]
        taken: set[int] = set()
        envs = []
        for row, ended in zip(rows.tolist(), self.ended.tolist(), strict=True):
            as_it_is = ended or row not in taken  # an episode that has ended is not stepped: one serves all
            envs.append(self._envs[row] if as_it_is else self._environment.copy_of(self._envs[row]))
            taken.add(row)
        self._envs = envs
        self._reseed()

    def _reseed(self) -> None:
        for env, seed in zip(self._envs, _seeds(len(self._envs)), strict=True):
            inner = env.unwrapped
            inner.np_random = rng = np.random.default_rng(seed)
            others = [k for k, x in vars(inner).items() if isinstance(x, np.random.Generator) and x is not rng]
            for name, other in zip(others, rng.spawn(len(others)), strict=True):
                setattr(inner, name, other)


class VectorEpisodes:
    """`Episodes` of a vector environment, which begins another episode where one has ended: nobody looks there."""

    def __init__(self, environment: GymEnvironment, vector: Any, rows: int) -> None:
        self._environment = environment
        self._vector = vector
        self.observations = environment.tensor_of(vector.reset(seed=_seeds(1)[0])[0])
        self.ended, self.terminated = torch.zeros(2, rows, dtype=torch.bool)

    def step(self, actions: Tensor) -> Tensor:
        observations, rewards, terminated, truncated, _ = self._vector.step(self._environment.actions_of(actions))
        self.observations = self._environment.tensor_of(observations)
        rewards = torch.from_numpy(np.asarray(rewards, dtype=np.float32)).masked_fill(self.ended, 0.0)
        self.terminated = self.terminated | torch.from_numpy(terminated) & ~self.ended
        self.ended = self.ended | torch.from_numpy(terminated | truncated)
        return rewards

    def select(self, rows: Tensor) -> None:
        raise NotImplementedError("a vector environment's rows cannot be copied: play with copies=True")
