"""Gymnasium environments with discrete actions, which play many episodes at once.

Their random generators are seeded by torch's, so that the seed of an engine reproduces episodes as well as texts.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from bayeslm.validation import show, validated

from .environments import Episodes

if TYPE_CHECKING:
    import gymnasium

UNBOUNDED = 1e4  # spaces denote "no bound" by inf, or by the largest number of their type


@validated
class GymEnvironment:
    """A Gymnasium environment with discrete actions, and observations that are a number (Discrete) or an array (Box).

    Episodes are played in the environment's vectorised version (`gymnasium.make_vec`) where it has one and neither
    copies nor starts are needed. Otherwise each row has a copy of the environment (`copy.deepcopy`), whose
    `numpy.random.Generator` attributes are seeded anew; other random generators are copied with their state.
    ``starts`` are seeds of the first observation.

    :param make: the environment's name, or a function that makes it.
    :param kwargs: arguments of ``gymnasium.make``, or of that function.
    :raises ImportError: if gymnasium is not installed.
    :raises ValueError: if actions are continuous, or observations neither Discrete nor Box.
    """

    device = torch.device("cpu")

    def __init__(self, make: str | Callable[..., gymnasium.Env[Any, Any]], **kwargs: Any) -> None:
        try:
            import gymnasium
        except ImportError as error:
            raise ImportError('GymEnvironment needs gymnasium: pip install "bayeslm[gym]"') from error
        try:
            self._env = gymnasium.make(make, **kwargs) if isinstance(make, str) else make(**kwargs)
        except gymnasium.error.Error as error:
            raise ValueError(f"GymEnvironment: make must name an environment: {error}") from error
        except TypeError as error:
            raise TypeError(f"GymEnvironment: make, or its kwargs, do not make an environment: {error}") from error
        if not isinstance(self._env, gymnasium.Env):
            raise TypeError(f"GymEnvironment: make must give a gymnasium.Env, got {show(self._env)}")
        name = make if isinstance(make, str) else str(self._env.unwrapped)
        actions: Any = self._env.action_space
        observations: Any = self._env.observation_space
        if not isinstance(actions, gymnasium.spaces.Discrete):
            raise ValueError(
                f"GymEnvironment: {name} has actions {actions}, but only Discrete actions are supported; wrap the "
                "environment so that it has finitely many (gymnasium.wrappers.TransformAction)"
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
                f"GymEnvironment: {name} has observations {observations}, but only Discrete and Box are supported; use "
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
        # made anew each time: `reset` of Gymnasium's vectorised CartPole skips a step of the rows that had ended
        return VectorEpisodes(self, self._make_vector(len(starts)), len(starts))

    def copy_environment(self, env: Any = None) -> Any:
        """Return a copy of ``env``, by default of the environment before its first step.

        The copy shares what no step changes: the spaces, and the transition table of Gymnasium's toy texts.
        """
        env = self._env if env is None else env
        inner = env.unwrapped
        table = getattr(inner, "P", None)
        shared = [inner.spec, inner.action_space, inner.observation_space, table if isinstance(table, dict) else None]
        return copy.deepcopy(env, {id(x): x for x in shared if x is not None})

    def to_gymnasium(self, actions: Tensor) -> np.ndarray:
        """Return actions in the numbers of the environment's action space."""
        return actions.numpy() + self._first_action

    def to_tensor(self, observations: Any) -> Tensor:
        """Return the rows' observations, (row, observation_size) float32."""
        array = np.asarray(observations, dtype=np.float32).reshape(len(observations), self.observation_size)
        return torch.from_numpy(array - self._first_state if self._first_state else array)


def _scale(box: gymnasium.spaces.Box) -> Tensor:
    """Return half the width of each coordinate of a box, (observation_size,); 1 where unbounded or constant."""
    half = torch.from_numpy((box.high.astype(np.float64) - box.low.astype(np.float64)).reshape(-1) / 2)
    return torch.where((half > 0) & (half < UNBOUNDED), half, 1.0).float()


def _row_values(name: str, values: Any, rows: int) -> Tensor:
    """Return a number a row, (row,) float32, from any shape with as many elements, such as (row, 1).

    :raises ValueError: if there are more or fewer, or one is not finite.
    """
    array = np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values)
    if array.size != rows or array.dtype.kind not in "biuf" or not np.isfinite(array).all():
        raise ValueError(f"GymEnvironment: {name} of a step must be {rows} finite numbers, got {values!r:.60}")
    return torch.from_numpy(array.astype(np.float32).reshape(rows))


def _seeds(n: int) -> list[int]:
    """Draw n seeds for NumPy generators from torch's."""
    return torch.randint(2**31, (n,)).tolist()


class CopiedEpisodes:
    """`Episodes` of a `GymEnvironment`, with a copy of the environment for each row."""

    def __init__(self, environment: GymEnvironment, starts: list[int]) -> None:
        self._environment = environment
        self._envs = [environment.copy_environment() for _ in starts]
        seeds = _seeds(len(starts))
        first = [
            env.reset(seed=seed if start < 0 else start)[0]
            for env, start, seed in zip(self._envs, starts, seeds, strict=True)
        ]
        self._reseed()  # rows of one start differ after the first observation
        self.observations = environment.to_tensor(first)
        self.ended, self.terminated = torch.zeros(2, len(starts), dtype=torch.bool)

    def step(self, actions: Tensor) -> Tensor:
        rewards = torch.zeros(len(self._envs))
        observations, ended, terminated = self.observations.clone(), self.ended.clone(), self.terminated.clone()
        numbers = self._environment.to_gymnasium(actions)
        for i in (~ended).nonzero().squeeze(-1).tolist():
            observation, reward, terminal, truncated, _ = self._envs[i].step(numbers[i])
            observations[i] = self._environment.to_tensor([observation])[0]
            plain = isinstance(reward, float | int) and math.isfinite(reward)  # others, of shape (1,), take longer
            rewards[i] = reward if plain else _row_values("rewards", reward, 1)[0]
            ended[i], terminated[i] = bool(terminal or truncated), bool(terminal)
        self.observations, self.ended, self.terminated = observations, ended, terminated
        return rewards

    def select(self, rows: Tensor) -> None:
        self.observations = self.observations[rows]
        self.ended, self.terminated = self.ended[rows], self.terminated[rows]
        taken: set[int] = set()
        envs = []
        for row, ended in zip(rows.tolist(), self.ended.tolist(), strict=True):
            reuse = ended or row not in taken  # an episode that has ended is not stepped again: rows may share it
            envs.append(self._envs[row] if reuse else self._environment.copy_environment(self._envs[row]))
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
    """`Episodes` of Gymnasium's vector environment.

    It begins a new episode in a row whose episode has ended; these steps are not used.
    """

    def __init__(self, environment: GymEnvironment, vector: Any, rows: int) -> None:
        self._environment = environment
        self._vector = vector
        self.observations = environment.to_tensor(vector.reset(seed=_seeds(1)[0])[0])
        self.ended, self.terminated = torch.zeros(2, rows, dtype=torch.bool)

    def step(self, actions: Tensor) -> Tensor:
        observations, rewards, terminated, truncated, _ = self._vector.step(self._environment.to_gymnasium(actions))
        self.observations = self._environment.to_tensor(observations)
        rewards = _row_values("rewards", rewards, len(self.ended)).masked_fill(self.ended, 0.0)
        terminal = _row_values("terminated", terminated, len(self.ended)) != 0
        stopped = _row_values("truncated", truncated, len(self.ended)) != 0
        self.terminated = self.terminated | terminal & ~self.ended
        self.ended = self.ended | terminal | stopped
        return rewards

    def select(self, rows: Tensor) -> None:
        raise NotImplementedError("rows of a vector environment cannot be copied: call play with copies=True")
