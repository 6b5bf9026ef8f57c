"""Environments with discrete actions, which play many episodes at once, and the environment of an `MDP`.

All their random numbers come from torch's generator, or from generators seeded by it, so that the seed of an engine
reproduces episodes as well as texts.
"""

from __future__ import annotations

from typing import Annotated, Protocol, runtime_checkable

import torch
from torch import Tensor

from bayeslm.validation import Shape, validated

from .mdp import MDP


@runtime_checkable
class Episodes(Protocol):
    """Running episodes, one per row."""

    observations: Tensor
    """(row, observation_size) float32, before the next action."""
    ended: Tensor
    """(row,) bool: terminated, or truncated by the environment's time limit; later rewards are 0."""
    terminated: Tensor
    """(row,) bool: ended in a terminal state."""

    def step(self, actions: Tensor) -> Tensor:
        """Take actions (row,) and return rewards (row,) float32, which are 0 for rows that had ended before."""

    def select(self, rows: Tensor) -> None:
        """Replace each row i by a copy of row ``rows[i]``, whose further random numbers are its own."""


@runtime_checkable
class Environment(Protocol):
    """A source of episodes with discrete actions."""

    num_actions: int
    observation_size: int
    num_states: int | None
    """Number of values of a discrete observation; None where observations are arrays."""
    device: torch.device

    def play(self, starts: Tensor, *, copies: bool = False) -> Episodes:
        """Begin one episode per row.

        :param starts: first states, (row,) int64; -1 draws one at random.
        :param copies: whether rows will be copied by `Episodes.select`.
        """


@validated
class TabularEnvironment:
    """Episodes of an `MDP`. Observations are its states, and so are ``starts``.

    A step pays the entry of ``MDP.rewards``, which is a mean where the process is `MDP.mixed`. Expected returns are
    right even so, but log Z is then a lower bound of that of the process whose rewards vary (Jensen's inequality).

    :raises ValueError: if ``mdp`` is a batch of several processes.
    """

    observation_size = 1

    def __init__(self, mdp: MDP) -> None:
        if mdp.transitions.dim() > 3:
            raise ValueError(
                f"TabularEnvironment: mdp must be one process, got a batch of shape {tuple(mdp.transitions.shape[:-3])}"
            )
        self.mdp = mdp
        self.num_actions = mdp.num_actions
        self.num_states: int | None = mdp.num_states
        self.device = mdp.initial.device
        outcomes = int((mdp.transitions > 0).sum(-1).amax())  # most states are followed by a few
        mass, self._next_states = mdp.transitions.topk(outcomes)
        self._cdf = mass.cumsum(-1)
        self._rewards = mdp.rewards.gather(-1, self._next_states).float()

    @validated
    def play(self, starts: Annotated[Tensor, Shape("row", whole=True)], *, copies: bool = False) -> TabularEpisodes:
        starts = starts.to(self.device)
        drawn = self.mdp.initial.multinomial(len(starts), replacement=True) if len(starts) else starts
        return TabularEpisodes(self, torch.where(starts < 0, drawn, starts))

    def outcome(self, states: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Draw next states and their rewards, both (row,), after states and actions (row,)."""
        cdf = self._cdf[states, actions]
        u = torch.rand(len(states), 1, dtype=cdf.dtype, device=cdf.device) * cdf[:, -1:]
        drawn = (cdf <= u).sum(-1, keepdim=True).clamp_max(cdf.shape[-1] - 1)
        next_states, rewards = (
            x[states, actions].gather(-1, drawn).squeeze(-1) for x in (self._next_states, self._rewards)
        )
        return next_states, rewards


class TabularEpisodes:
    """`Episodes` of a `TabularEnvironment`."""

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
