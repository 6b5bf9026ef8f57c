r"""A finite Markov decision process, as tensors.

    s_0 ~ initial,    s_{t+1} ~ P( . | s_t, a_t),    r_t = r(s_t, a_t, s_{t+1})

Terminal states keep what enters them: nothing happens there any more, and the reward is 0.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class MDP:
    """A process of S states and A actions; or many of the same size, in leading dimensions that all four share.

    :param transitions: (*, S, A, S) float64, P(s' | s, a).
    :param rewards: (*, S, A, S) float64, r(s, a, s').
    :param terminal: (*, S) bool. A terminal state's own rows of the two above are not read: they become a loop to
        itself, without reward.
    :param initial: (*, S) float64, the law of s_0.
    :param mixed: whether ``rewards`` are means of different ones that the same (s, a, s') may pay. Expected returns are
        exact all the same; E[exp(return / beta)] is not known from means.
    :raises ValueError: if shapes disagree, or a law is none: negative, or not of sum 1.
    """

    transitions: Tensor
    rewards: Tensor
    terminal: Tensor
    initial: Tensor
    mixed: bool = False

    def __post_init__(self) -> None:
        if self.transitions.dim() < 3:
            raise ValueError(f"MDP: transitions must have shape (S, A, S), got {tuple(self.transitions.shape)}")
        *many, states, actions, _ = self.transitions.shape
        for name, shape in {
            "transitions": (*many, states, actions, states),
            "rewards": (*many, states, actions, states),
            "terminal": (*many, states),
            "initial": (*many, states),
        }.items():
            if tuple(getattr(self, name).shape) != shape:
                raise ValueError(f"MDP: {name} must have shape {shape}, got {tuple(getattr(self, name).shape)}")
        ended = self.terminal[..., None, None]
        loops = torch.eye(states, dtype=torch.float64, device=self.terminal.device)[:, None]
        object.__setattr__(self, "transitions", torch.where(ended, loops, self.transitions.double()))
        object.__setattr__(self, "rewards", self.rewards.double().masked_fill(ended, 0.0))
        object.__setattr__(self, "initial", self.initial.double())
        for name in ("transitions", "initial"):
            law = getattr(self, name)
            if not ((law >= 0).all() and torch.allclose(law.sum(-1), law.new_ones(()), atol=1e-6)):
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
        """(*, S, A): E[r | s, a]."""
        return (self.transitions * self.rewards).sum(-1)

    @property
    def deterministic(self) -> bool:
        """Whether every action has one outcome."""
        return bool((self.transitions.amax(-1) == 1).all())

    @staticmethod
    def from_gymnasium(env: Any) -> MDP:
        """The process of a tabular environment, as FrozenLake, CliffWalking and Taxi have: ``env.unwrapped.P`` and
        ``env.unwrapped.initial_state_distrib``.

        Outcomes of an action that lead to the same state are one, with their mean reward; where they pay differently,
        the process is `mixed`.

        :raises ValueError: if the environment has no such tables, or a state that some episodes end in and others pass
            through, so that no table of states can say where they end.
        """
        table = getattr(env.unwrapped, "P", None)
        initial = getattr(env.unwrapped, "initial_state_distrib", None)
        if table is None or initial is None:
            raise ValueError(
                f"MDP: {env.unwrapped} has no tables `P` and `initial_state_distrib`, so it cannot be solved exactly; "
                "run it as a GymEnvironment"
            )
        states, actions = len(table), len(table[0])
        transitions = torch.zeros(states, actions, states, dtype=torch.float64)
        rewards, ends, goes_on = (torch.zeros_like(transitions) for _ in range(3))
        paid: dict[tuple[int, int, int], set[float]] = defaultdict(set)
        for s, row in table.items():
            for a, outcomes in row.items():
                for p, following, reward, terminated in outcomes:
                    if p > 0:
                        paid[s, a, following].add(float(reward))
                    transitions[s, a, following] += p
                    rewards[s, a, following] += p * reward
                    (ends if terminated else goes_on)[s, a, following] += p
        rewards /= torch.where(transitions > 0, transitions, 1.0)
        initial = torch.as_tensor(initial, dtype=torch.float64)
        alive = _reached(initial > 0, goes_on.sum(1) > 0)  # of the others the table may say anything
        terminal = (ends[alive].sum((0, 1)) > 0) & ~alive
        if (both := (ends[alive].sum((0, 1)) > 0) & alive).any():
            raise ValueError(f"MDP: episodes both end in and pass through state {int(both.nonzero()[0])}")
        mixed = any(len(different) > 1 for (s, _, _), different in paid.items() if alive[s])
        return MDP(transitions, rewards, terminal, initial, mixed)


def _reached(states: Tensor, edges: Tensor) -> Tensor:
    """(S,) bool: which states can be reached from ``states`` (S,) along ``edges`` (S, S)."""
    while True:
        further = states | edges[states].any(0)
        if torch.equal(further, states):
            return states
        states = further
