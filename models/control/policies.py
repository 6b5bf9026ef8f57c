"""Policies: functions of observations (*, observation_size) float32 and steps (*) int64 that give logits (*, A)."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Self

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import one_hot

if TYPE_CHECKING:
    from .environments import Environment

Policy = Callable[[Tensor, Tensor], Tensor]
WEIGHTS = "policy.safetensors"


class UniformPolicy(nn.Module):
    """Every action is as likely as any other."""

    def __init__(self, num_actions: int) -> None:
        super().__init__()
        self.num_actions = num_actions

    def forward(self, observations: Tensor, steps: Tensor) -> Tensor:
        return observations.new_zeros(*observations.shape[:-1], self.num_actions)


class TrainablePolicy(nn.Module):
    """A policy that is kept as a language model is."""

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write the weights into ``folder``, made if it is missing: policy.safetensors."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        save_file({name: x.contiguous() for name, x in self.state_dict().items()}, Path(folder) / WEIGHTS)

    def load_pretrained(self, folder: str | os.PathLike[str]) -> Self:
        """Read the weights that a policy of the same shape wrote, and give this one.

        :raises FileNotFoundError: if there are none.
        :raises RuntimeError: if they are of a policy of another shape.
        """
        self.load_state_dict(load_file(Path(folder) / WEIGHTS))
        return self


class TabularPolicy(TrainablePolicy):
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
        """The uniform policy, to begin a training from; with a table for each of ``horizon`` steps if that is given."""
        return TabularPolicy(torch.zeros(*(() if horizon is None else (horizon,)), num_states, num_actions))

    @property
    def probabilities(self) -> Tensor:
        """The shape of ``logits``, float64, without gradient: as `SoftValueIteration.evaluate` takes it."""
        return self.logits.detach().double().softmax(-1)

    def forward(self, observations: Tensor, steps: Tensor) -> Tensor:
        state = observations[..., 0].long()
        return self.logits[state] if self.logits.dim() == 2 else self.logits[steps, state]


class CountdownPolicy(TrainablePolicy):
    """Tables of logits that change with the steps to go, the more slowly the more there are: ``num_tables`` of them
    stand at 1, ..., T steps to go, evenly on a logarithmic scale, and between them logits are interpolated.

    The best policy for a finite horizon hurries at the end, and hardly changes before. A table for each step could say
    so, too, but would learn each step's from that step alone. Trainable, and uniform at first.

    :param num_states, num_actions: of the environment.
    :param horizon: T.
    :raises ValueError: if there are fewer than two tables or steps; or, of a call, if a step is beyond the horizon.
    """

    def __init__(self, num_states: int, num_actions: int, horizon: int, num_tables: int = 3) -> None:
        super().__init__()
        if num_tables < 2 or horizon < 2:
            raise ValueError("CountdownPolicy: needs two tables and two steps at least; TabularPolicy has one table")
        self.logits = nn.Parameter(torch.zeros(num_tables, num_states, num_actions))
        self.horizon = horizon

    @property
    def probabilities(self) -> Tensor:
        """(T, S, A) float64, without gradient: as `SoftValueIteration.evaluate` takes it."""
        steps = torch.arange(self.horizon, device=self.logits.device)[:, None]
        states = torch.arange(self.logits.shape[1], device=self.logits.device)[None, :, None]
        with torch.no_grad():
            logits = self(states.expand(self.horizon, -1, -1), steps.expand(-1, states.shape[1]))
        return logits.double().softmax(-1)

    def forward(self, observations: Tensor, steps: Tensor) -> Tensor:
        if steps.numel() and (last := int(steps.max())) >= self.horizon:
            raise ValueError(
                f"CountdownPolicy: a horizon of {self.horizon} has steps 0 to {self.horizon - 1}, and step {last} was "
                "asked for: make the policy for the horizon of the program"
            )
        state = observations[..., 0].long()
        place = (self.horizon - steps).float().log2() / math.log2(self.horizon) * (len(self.logits) - 1)
        below = place.long().clamp_max(len(self.logits) - 2)
        share = (place - below)[..., None]
        return torch.lerp(self.logits[below, state], self.logits[below + 1, state], share)


class MLPPolicy(TrainablePolicy):
    """A multilayer perceptron, trainable; the same at every step.

    It reads the coordinates of an observation scaled by their bounds, where they have any, or a discrete one as a
    one-hot vector. It begins near the uniform policy, whose KL to the uniform prior is 0.

    :param environment: what it is a policy of.
    :param hidden: widths of the layers between, each followed by tanh.
    :param seed: of the first weights.
    """

    scale: Tensor

    def __init__(self, environment: Environment, hidden: Sequence[int] = (64, 64), seed: int = 0) -> None:
        super().__init__()
        self.num_states = environment.num_states
        scale = getattr(environment, "observation_scale", None)  # which tables have no need of
        self.register_buffer("scale", torch.ones(environment.observation_size) if scale is None else scale.clone())
        widths = [environment.observation_size if self.num_states is None else self.num_states, *hidden]
        layers: list[nn.Module] = []
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for inputs, outputs in itertools.pairwise(widths):
                layers += [nn.Linear(inputs, outputs), nn.Tanh()]
            last = nn.Linear(widths[-1], environment.num_actions)
        with torch.no_grad():
            last.weight.mul_(0.01)
            last.bias.zero_()
        self.layers = nn.Sequential(*layers, last).to(environment.device)

    def forward(self, observations: Tensor, steps: Tensor) -> Tensor:
        if self.num_states is None:
            features = observations / self.scale
        else:
            features = one_hot(observations[..., 0].long(), self.num_states).float()
        logits: Tensor = self.layers(features)
        return logits
