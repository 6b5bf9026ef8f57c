"""Policies: functions of observations (*, observation_size) float32 and steps (*) int64 that return logits (*, A)."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from bayeslm.files import atomic_file, reading
from bayeslm.models.lm import ModuleWithProperties, forked, read_tensors, write_tensors
from bayeslm.validation import Count, Seed, validated

from .environments import Environment

Policy = Callable[[Tensor, Tensor], Tensor]
WEIGHTS = "policy.safetensors"


@validated
class UniformPolicy(nn.Module):
    """The policy under which all actions are equally likely."""

    def __init__(self, num_actions: Count) -> None:
        super().__init__()
        self.num_actions = num_actions

    def forward(self, observations: Tensor, steps: Tensor) -> Tensor:
        return observations.new_zeros(*observations.shape[:-1], self.num_actions)


class TrainablePolicy(ModuleWithProperties):
    """A policy whose weights can be saved and loaded."""

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write the weights to ``policy.safetensors`` in ``folder``, which is created if missing.

        :raises OSError: if the disk refuses, with the path; weights that were there are then kept.
        """
        with atomic_file(Path(folder) / WEIGHTS) as unfinished:
            write_tensors(unfinished, self.state_dict())

    def load_pretrained(self, folder: str | os.PathLike[str]) -> Self:
        """Load the weights that `save_pretrained` of a policy of the same shape wrote, and return this policy.

        :raises ValueError: if the file ``policy.safetensors`` in ``folder`` is missing or damaged, or of other shapes.
        """
        with reading(Path(folder) / WEIGHTS) as file:
            self.load_state_dict(read_tensors(file))
        return self


@validated
class TabularPolicy(TrainablePolicy):
    """A trainable table of logits.

    :param logits: (S, A), or one table for each step (T, S, A).
    :raises ValueError: if ``logits`` has another number of dimensions.
    """

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        if logits.dim() not in (2, 3):
            raise ValueError(f"TabularPolicy: logits must be (S, A) or (T, S, A), got {tuple(logits.shape)}")
        self.logits = nn.Parameter(logits.float().clone())

    @staticmethod
    @validated
    def uniform(num_states: Count, num_actions: Count, horizon: Count | None = None) -> TabularPolicy:
        """Return the uniform policy as a table, (S, A), or (horizon, S, A) where ``horizon`` is not None."""
        return TabularPolicy(torch.zeros(*(() if horizon is None else (horizon,)), num_states, num_actions))

    @property
    def probabilities(self) -> Tensor:
        """Action probabilities, (S, A) or (T, S, A) float64, without gradient, for `SoftValueIteration.evaluate`."""
        return self.logits.detach().double().softmax(-1)

    def forward(self, observations: Tensor, steps: Tensor) -> Tensor:
        state = observations[..., 0].long()
        return self.logits[state] if self.logits.dim() == 2 else self.logits[steps, state]


@validated
class CountdownPolicy(TrainablePolicy):
    """Trainable tables of logits, interpolated in the logarithm of the number of steps to go; uniform at first.

    ``num_tables`` tables belong to numbers of steps to go from 1 to T, evenly spaced on a logarithmic scale. The best
    policy for a finite horizon changes most in the last steps and hardly before. A table for each step could represent
    it too, but would learn each step's logits from that step alone.

    :param num_states: S, states of the environment.
    :param num_actions: A, actions of the environment.
    :param horizon: T, largest number of steps in an episode.
    :param num_tables: number of tables, at least 2.
    :raises ValueError: if there are fewer than two tables or steps; when called, if a step is beyond the horizon.
    """

    def __init__(self, num_states: Count, num_actions: Count, horizon: Count, num_tables: Count = 3) -> None:
        super().__init__()
        if num_tables < 2 or horizon < 2:
            raise ValueError(
                f"CountdownPolicy: num_tables and horizon must be at least 2, got {num_tables} and {horizon}: use "
                "TabularPolicy for one table"
            )
        self.logits = nn.Parameter(torch.zeros(num_tables, num_states, num_actions))
        self.horizon = horizon

    @property
    def probabilities(self) -> Tensor:
        """Action probabilities, (T, S, A) float64, without gradient, for `SoftValueIteration.evaluate`."""
        steps = torch.arange(self.horizon, device=self.logits.device)[:, None]
        states = torch.arange(self.logits.shape[1], device=self.logits.device)[None, :, None]
        with torch.no_grad():
            logits = self(states.expand(self.horizon, -1, -1), steps.expand(-1, states.shape[1]))
        return logits.double().softmax(-1)

    def forward(self, observations: Tensor, steps: Tensor) -> Tensor:
        if steps.numel() and (last := int(steps.max())) >= self.horizon:
            raise ValueError(
                f"CountdownPolicy: a horizon of {self.horizon} has steps 0 to {self.horizon - 1}, but step {last} was "
                "requested; give the policy the horizon of the program"
            )
        state = observations[..., 0].long()
        position = (self.horizon - steps).float().log2() / math.log2(self.horizon) * (len(self.logits) - 1)
        lower = position.long().clamp_max(len(self.logits) - 2)
        fraction = (position - lower)[..., None]
        return torch.lerp(self.logits[lower, state], self.logits[lower + 1, state], fraction)


@validated
class MLPPolicy(TrainablePolicy):
    """A trainable multilayer perceptron, which is the same at every step.

    Its input is an observation scaled by the bounds of its coordinates, where these exist, or the one-hot vector of a
    discrete observation. Its initial weights make it nearly uniform, so that its KL to the uniform prior is near 0.

    :param environment: gives the sizes of input and output, and the device.
    :param hidden: widths of the hidden layers, each followed by tanh.
    :param seed: seed of the initial weights.
    """

    scale: Tensor

    def __init__(self, environment: Environment, hidden: Sequence[Count] = (64, 64), seed: Seed = 0) -> None:
        super().__init__()
        self.num_states = environment.num_states
        scale = getattr(environment, "observation_scale", None)  # tables have none
        self.register_buffer("scale", torch.ones(environment.observation_size) if scale is None else scale.clone())
        widths = [environment.observation_size if self.num_states is None else self.num_states, *hidden]
        layers: list[nn.Module] = []
        with forked(seed):
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
