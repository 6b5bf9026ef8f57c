r"""Finite Markov decision processes as tensors, read from Gymnasium or built (`river_swim`).

    s_0 ~ initial,    s_{t+1} ~ P( . | s_t, a_t),    r_t = r(s_t, a_t, s_{t+1})

A terminal state is absorbing, with reward 0.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor

from bayeslm.validation import Within, show, validated


@validated
@dataclass(frozen=True)
class MDP:
    """A process of S states and A actions, or a batch of such processes.

    :param transitions: P(s' | s, a), (*batch, S, A, S) float64.
    :param rewards: r(s, a, s'), (*batch, S, A, S) float64.
    :param terminal: (*batch, S) bool. The rows of ``transitions`` and ``rewards`` of a terminal state are replaced by a
        loop to itself with reward 0.
    :param initial: probabilities of s_0, (*batch, S) float64.
    :param mixed: whether ``rewards`` are means, because the same (s, a, s') may pay different rewards. Expected returns
        are exact even so; E[exp(return / beta)] cannot be computed from means.
    :raises ValueError: if shapes disagree, probabilities are negative or do not sum to 1, or rewards are not finite.
    """

    transitions: Tensor
    rewards: Tensor
    terminal: Tensor
    initial: Tensor
    mixed: bool = False

    def __post_init__(self) -> None:
        if self.transitions.dim() < 3:
            raise ValueError(f"MDP: transitions must have shape (S, A, S), got {tuple(self.transitions.shape)}")
        *batch, states, actions, _ = self.transitions.shape
        for name, shape in {
            "transitions": (*batch, states, actions, states),
            "rewards": (*batch, states, actions, states),
            "terminal": (*batch, states),
            "initial": (*batch, states),
        }.items():
            if tuple(getattr(self, name).shape) != shape:
                raise ValueError(f"MDP: {name} must have shape {shape}, got {tuple(getattr(self, name).shape)}")
        ended = self.terminal[..., None, None]
        loops = torch.eye(states, dtype=torch.float64, device=self.terminal.device)[:, None]
        object.__setattr__(self, "transitions", torch.where(ended, loops, self.transitions.double()))
        object.__setattr__(self, "rewards", self.rewards.double().masked_fill(ended, 0.0))
        object.__setattr__(self, "initial", self.initial.double())
        for name in ("transitions", "initial"):
            p = getattr(self, name)
            if not ((p >= 0).all() and torch.allclose(p.sum(-1), p.new_ones(()), atol=1e-6)):
                raise ValueError(f"MDP: {name} must be probabilities that sum to 1 over the last dimension")
        if not self.rewards.isfinite().all():
            raise ValueError("MDP: rewards must be finite")

    @property
    def num_states(self) -> int:
        return self.transitions.shape[-3]

    @property
    def num_actions(self) -> int:
        return self.transitions.shape[-2]

    @cached_property
    def expected_rewards(self) -> Tensor:
        """E[r | s, a], (*batch, S, A)."""
        return (self.transitions * self.rewards).sum(-1)

    @staticmethod
    def from_gymnasium(env: Any) -> MDP:
        """Return the process of an environment with tables ``P`` and ``initial_state_distrib``.

        FrozenLake, CliffWalking and Taxi have them. Outcomes of an action that lead to the same state are merged, with
        their mean reward; where these rewards differ, the process is `mixed`.

        :raises ValueError: if the environment lacks these tables, or some episodes end in a state that others pass
            through: whether an episode ends would then depend on more than its state.
        """
        if not hasattr(env, "unwrapped"):
            raise TypeError(f"env must be an environment of gymnasium, got {show(env)}")
        table = getattr(env.unwrapped, "P", None)
        initial = getattr(env.unwrapped, "initial_state_distrib", None)
        if table is None or initial is None:
            raise ValueError(
                f"MDP: {env.unwrapped} has no tables `P` and `initial_state_distrib`, so it cannot be solved exactly; "
                "play it as a GymEnvironment"
            )
        states, actions = len(table), len(table[0])
        transitions = torch.zeros(states, actions, states, dtype=torch.float64)
        rewards, ending, continuing = (torch.zeros_like(transitions) for _ in range(3))
        paid: dict[tuple[int, int, int], set[float]] = defaultdict(set)
        for s, row in table.items():
            for a, outcomes in row.items():
                for p, next_state, reward, terminated in outcomes:
                    reward = np.asarray(reward, dtype=np.float64).item()  # which may be of shape (1,)
                    if p > 0:
                        paid[s, a, next_state].add(reward)
                    transitions[s, a, next_state] += p
                    rewards[s, a, next_state] += p * reward
                    (ending if terminated else continuing)[s, a, next_state] += p
        rewards /= torch.where(transitions > 0, transitions, 1.0)
        initial = torch.as_tensor(initial, dtype=torch.float64)
        alive = _reachable(initial > 0, continuing.sum(1) > 0)  # rows of other states are never used
        terminal = (ending[alive].sum((0, 1)) > 0) & ~alive
        if (both := (ending[alive].sum((0, 1)) > 0) & alive).any():
            raise ValueError(f"MDP: episodes both end in and pass through state {int(both.nonzero()[0])}")
        mixed = any(len(values) > 1 for (s, _, _), values in paid.items() if alive[s])
        return MDP(transitions, rewards, terminal, initial, mixed)


LEFT, RIGHT = 0, 1


@validated
def river_swim(num_states: Annotated[int, Within("[3, inf)")] = 6) -> MDP:
    """Return RiverSwim, a chain of states on which random exploration fails.

    Action 0 swims left, with the current, and always succeeds; action 1 swims right and succeeds with probability 0.35,
    and is sometimes swept back. Swimming left at the left bank pays 0.005, swimming right at the right bank pays 1.
    Episodes begin at the left bank. (Strehl and Littman 2008, doi 10.1016/j.jcss.2007.08.009; with the numbers of
    Osband, Russo and Van Roy 2013, arXiv 1306.0940.)

    :raises ValueError: if there are fewer than 3 states.
    """
    last = num_states - 1
    transitions = torch.zeros(num_states, 2, num_states, dtype=torch.float64)
    rewards = torch.zeros_like(transitions)
    for s in range(num_states):
        transitions[s, LEFT, max(s - 1, 0)] = 1.0
        left, stay, right = (0.0, 0.4, 0.6) if s == 0 else (0.4, 0.6, 0.0) if s == last else (0.05, 0.6, 0.35)
        for next_state, p in ((s - 1, left), (s, stay), (s + 1, right)):
            if p > 0:
                transitions[s, RIGHT, next_state] = p
    rewards[0, LEFT] = 0.005
    rewards[last, RIGHT] = 1.0
    initial = torch.zeros(num_states, dtype=torch.float64)
    initial[0] = 1.0
    return MDP(transitions, rewards, torch.zeros(num_states, dtype=torch.bool), initial)


def _reachable(states: Tensor, edges: Tensor) -> Tensor:
    """Return which states can be reached from ``states`` (S,) bool along ``edges`` (S, S), (S,) bool."""
    while True:
        extended = states | edges[states].any(0)
        if torch.equal(extended, states):
            return states
        states = extended
