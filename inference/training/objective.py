"""What the objectives of variational inference share as Pyro ELBOs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from pyro.infer import ELBO
from torch import Tensor

from bayeslm.inference.program import Epochs, Program, inspect_or_reuse


@runtime_checkable
class Stateful(Protocol):
    """What remembers something of the steps before: a baseline that learns, a buffer of draws."""

    def reset(self, program: Program) -> None:
        """Forget it: another training begins, of this program."""

    def state_dict(self) -> dict[str, Tensor]:
        """All that is remembered, so that a training can go on as if it had never stopped; of tensors that no later
        step changes in place."""

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Remember what `state_dict` gave; comes after `reset`."""


@dataclass
class Seen:
    """A step's particles: ``values`` of the guide's sites; ``ratio``, log p + l - log q, and ``log_likelihood``, l,
    (particle, weight prompt).
    """

    values: dict[str, Tensor]
    ratio: Tensor
    log_likelihood: Tensor

    def farthest(self, program: Program, labels: Sequence[str]) -> str:
        """Where numbers went wrong, or are likeliest to have: the particle whose ratio is farthest from the others'.

        :param labels: what to call the step's prompts.
        """
        ratio = self.ratio.detach().float()
        away = (ratio - ratio.nanmedian(0).values).abs().nan_to_num(torch.inf, torch.inf)
        particle, prompt = divmod(int(away.argmax()), ratio.shape[1])
        lines = [f"log p + l - log q is {float(ratio[particle, prompt]):.6g} of particle {particle}, prompt {prompt}"]
        for site in program.completions:
            value = self.values.get(site.name)
            if value is not None and site.fn.has_text:
                texts = site.fn.decode(value[particle]).reshape(-1)
                if len(texts) == len(labels):
                    some = [prompt] if len(texts) == ratio.shape[1] else range(len(texts))
                    lines += [f"{site.name} of {labels[i]!r}: {texts[i]!r}" for i in some]
                else:
                    lines.append(f"{site.name}: {', '.join(map(repr, texts))}")
        return "\n".join(lines)

    def texts(self, program: Program, labels: Sequence[str]) -> list[tuple[str, str, float]]:
        """The first particle's completions, as many of them as there are prompts, each with its prompt and l.

        :param labels: what to call the step's prompts.
        """
        rows: list[tuple[str, str, float]] = []
        told = self.log_likelihood[0].expand(len(labels)).tolist()
        for site in program.completions:
            value = self.values.get(site.name)
            if value is not None and site.fn.has_text:
                texts = site.fn.decode(value[0]).reshape(-1)
                rows += zip(labels, texts, told, strict=False)
        return rows


class Objective(ELBO):
    r"""A loss over particles that run all at once; subclasses say `estimate`.

    :param num_particles: draws of each prompt in a step.
    :param parts: what it is made of; those that remember something (`Stateful`) are reset and saved with it.

    After each call ``last`` holds what the particles saw, one value a prompt: ``elbo``, ``log_likelihood`` (r / beta),
    ``kl`` (to the prior), ``score`` where the program records one, and ``log_evidence``, the logarithm of the mean
    weight, where the law of the draws is known; and ``particles`` the particles themselves. Where the plate of prompts
    is subsampled these are of the minibatch's prompts, whose indices are ``prompts``, and losses are estimates of those
    of all prompts.

    ``inverse_temperature``, \gamma > 0, multiplies the log-likelihood: the target is p(x) exp(\gamma l(x)), the
    posterior at 1. `SVI` moves it for tempering and to hold the KL to the prior; ``last`` is always told at 1.
    """

    def __init__(self, num_particles: int, *parts: Any) -> None:
        super().__init__(num_particles=num_particles, vectorize_particles=True)
        self.inverse_temperature = 1.0
        self.last: dict[str, Tensor] = {}
        self.particles: Seen | None = None
        self._program: Program | None = None
        self._epochs = Epochs()
        self._parts = [part for part in (*parts, self._epochs) if isinstance(part, Stateful)]

    def estimate(self, program: Program, guide: Callable[..., Any]) -> Tensor:
        """The loss, summed over the program's prompts, with the estimate of its gradient; sets ``last``."""
        raise NotImplementedError

    def reset(self, program: Program) -> None:
        """Forget what is remembered of the steps before: another training begins, of this program."""
        self._program = program
        self.inverse_temperature = 1.0
        for part in self._parts:
            part.reset(program)

    def state_dict(self) -> dict[str, Tensor]:
        """All that is remembered of the steps before."""
        return {f"{i}.{key}": value for i, part in enumerate(self._parts) for key, value in part.state_dict().items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Remember what `state_dict` gave; comes after `reset`."""
        for i, part in enumerate(self._parts):
            own = f"{i}."
            part.load_state_dict({key.removeprefix(own): value for key, value in state.items() if key.startswith(own)})

    def differentiable_loss(
        self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Tensor:
        """The loss, summed over prompts, with its estimated gradient."""
        self._program = program = inspect_or_reuse(self._program, model, args, kwargs)
        if program.in_chunks:
            program = program.on(self._minibatch(program))
        loss = program.scale * self.estimate(program, guide)
        if program.minibatch is not None:
            self.last.setdefault("prompts", program.minibatch)
        return loss

    def _minibatch(self, program: Program) -> Tensor:
        """Which prompts the next step is of."""
        return self._epochs.next(program.num_prompts, program.full_size)

    def loss(self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any) -> float:
        """The loss, summed over prompts."""
        with torch.no_grad():
            return float(self.differentiable_loss(model, guide, *args, **kwargs))

    def loss_and_grads(self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any) -> float:
        """The loss, summed over prompts; adds its gradient to the parameters'.

        :raises FloatingPointError: if the loss is not finite.
        """
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward(retain_graph=self.retain_graph)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise FloatingPointError(f"the loss is {value}")
        return value

    def _get_trace(self, *args: Any) -> Any:
        raise NotImplementedError(f"{type(self).__name__} runs all particles in one trace")
