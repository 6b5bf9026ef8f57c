"""When CartPole-v1 is solved, measured in the same way for the policies of every library."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np

GOAL = 475.0  # Gymnasium's own threshold
EPISODES = 100
EVERY = 2000  # environment steps from one evaluation to the next, at least: each one is another chance to pass

Act = Callable[[Any, bool], Any]
"""Observations (100, 4) and whether to take the likeliest actions, or draw them -> actions (100,)."""


def mean_return(act: Act, greedy: bool, seed: int) -> float:
    """Of 100 episodes from starts of their own."""
    envs = gymnasium.make_vec("CartPole-v1", num_envs=EPISODES, vectorization_mode="vector_entry_point")
    observation, _ = envs.reset(seed=seed)
    returns, alive = np.zeros(EPISODES), np.ones(EPISODES, dtype=bool)
    while alive.any():
        observation, reward, terminated, truncated, _ = envs.step(np.asarray(act(observation, greedy)))
        returns += reward * alive
        alive &= ~(terminated | truncated)
    return float(returns.mean())


class Watch:
    """Evaluates a policy every so many steps; its clock stops meanwhile.

    :param greedy: whether the policy's likeliest actions are evaluated, or actions that are drawn from it.
    :param seed: of the evaluations' episodes.
    """

    def __init__(self, act: Act, greedy: bool, seed: int) -> None:
        self._act, self._greedy = act, greedy
        self._rng = np.random.default_rng([seed, 475])
        self._curve: list[tuple[int, float, float]] = []
        self._start = time.perf_counter()

    def __call__(self, steps: int) -> bool:
        """Return whether the goal is reached, after so many environment steps in all."""
        if steps - (self._curve[-1][0] if self._curve else 0) < EVERY:
            return False
        now = time.perf_counter()
        found = self._evaluate()
        self._curve.append((steps, now - self._start, found))
        self._start += time.perf_counter() - now
        return found >= GOAL

    def result(self) -> dict[str, Any]:
        """Return ``curve`` and ``again``.

        ``curve`` are the evaluations, (environment steps, seconds, mean return); ``again`` is the last policy's mean
        return in other episodes.
        """
        return {"curve": self._curve, "again": self._evaluate()}

    def _evaluate(self) -> float:
        return mean_return(self._act, self._greedy, int(self._rng.integers(2**31)))
