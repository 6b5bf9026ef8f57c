"""Policies: functions of observations (*, observation_size) float32 and steps (*) int64 that give logits (*, A)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

Policy = Callable[[Tensor, Tensor], Tensor]


class UniformPolicy(nn.Module):
    """Every action is as likely as any other."""

    def __init__(self, num_actions: int) -> None:
        super().__init__()
        self.num_actions = num_actions

    def forward(self, observations: Tensor, steps: Tensor) -> Tensor:
        return observations.new_zeros(*observations.shape[:-1], self.num_actions)


class TabularPolicy(nn.Module):
    """A table of logits, trainable.

    :param logits: (S, A), or one of each step (T, S, A).
    :raises ValueError: if it is neither.
    """

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        if logits.dim() not in (2, 3):
            raise ValueError(f"TabularPolicy: logits must be (S, A) or (T, S, A), got {tuple(logits.shape)}")
        self.logits = nn.Parameter(logits.float().clone())

    @staticmethod
    def uniform(num_states: int, num_actions: int, horizon: int | None = None) -> TabularPolicy:
        """The uniform policy, to begin a training from; of its own in each of ``horizon`` steps if that is given."""
        return TabularPolicy(torch.zeros(*(() if horizon is None else (horizon,)), num_states, num_actions))

    @property
    def probabilities(self) -> Tensor:
        """The shape of ``logits``, float64, without gradient: as `SoftValueIteration.evaluate` takes it."""
        return self.logits.detach().double().softmax(-1)

    def forward(self, observations: Tensor, steps: Tensor) -> Tensor:
        state = observations[..., 0].long()
        return self.logits[state] if self.logits.dim() == 2 else self.logits[steps, state]
