"""The base class of objectives of variational inference, and their use as losses of Pyro's own `SVI`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from pyro.infer import ELBO
from torch import Tensor

from bayeslm.inference.program import Particles, Program, inspect_or_reuse, ranks
from bayeslm.models.lm import differentiating
from bayeslm.validation import Count, validated

from .epochs import next_minibatch
from .resumable import check_indices
from .state import EMPTY, State

EPOCH = "epoch"  # in an objective's state: the prompts whose turn in this epoch is still to come


@validated
@dataclass(frozen=True)
class Estimate:
    """The result of one step of an objective.

    :param loss: a scalar, with the estimate of its gradient.
    :param figures: one value a prompt, of the target with an inverse temperature of 1: ``elbo``, ``log_likelihood``
        (r / beta and observed terms), ``kl`` (to the prior), ``reward`` where the program records one, and
        ``log_evidence``, the logarithm of the mean weight, where the particles' distribution is known. Of a minibatch
        also ``prompts``, the indices of its prompts.
    :param particles: of the step, without gradient, those of this process; log q is the guide's.
    :param state: what the objective remembers, for its next step.
    """

    loss: Tensor
    figures: Mapping[str, Tensor]
    particles: Particles
    state: State


@validated
class Objective:
    r"""A loss over particles that run all at once; subclasses implement `estimate`.

    An objective holds settings alone. What it remembers of earlier steps is a `State`, which `step` takes and returns.
    One that remembers nothing is a loss of ``pyro.infer.SVI``; for the others `StatefulLoss` keeps the state.

    Of several processes each has its share of the particles, and differentiates the loss of all particles in its own:
    the sum of their gradients is that of one process with all particles.

    ``raises_elbo`` says whether its optimum is the highest ELBO of the guide's class.

    :param num_particles: draws of each prompt in a step.
    """

    raises_elbo = False

    def __init__(self, num_particles: Count) -> None:
        self.num_particles = num_particles

    def num_drawn(self, state: State) -> int:
        """Return the new draws of each prompt in the next step."""
        return self.num_particles

    def estimate(
        self, program: Program, guide: Callable[..., Any], state: State, inverse_temperature: float
    ) -> Estimate:
        r"""Return the loss, summed over the program's prompts, with its gradient, figures and the next state.

        :param state: what the step before returned; empty at the first. Entries that the objective does not know are
            to be kept.
        :param inverse_temperature: \gamma > 0, which multiplies the log-likelihood: the target is
            p(x) exp(\gamma l(x)).
        """
        raise NotImplementedError

    def step(
        self,
        program: Program,
        guide: Callable[..., Any],
        state: State = EMPTY,
        inverse_temperature: float = 1.0,
    ) -> Estimate:
        """Return the `estimate` of all prompts, or of the next minibatch, whose loss estimates that of all."""
        if program.in_chunks:
            prompts, state = self.next_prompts(program, state)
            program = program.on(prompts)
        estimate = self.estimate(program, guide, state, inverse_temperature)
        batch = {} if program.minibatch is None else {"prompts": program.minibatch}
        return replace(estimate, loss=program.scale * estimate.loss, figures={**batch, **estimate.figures})

    def next_prompts(self, program: Program, state: State) -> tuple[Tensor, State]:
        """Return the indices of the next minibatch's prompts, and the next state."""
        batch, waiting = next_minibatch(state.get(EPOCH), program.num_prompts, program.full_size)
        return batch, {**state, EPOCH: waiting}

    def of_another_program(self, state: State) -> State:
        """Return what of a state still holds where the program, or its arguments, are others."""
        return state

    def gathered(self, state: State) -> State:
        """Return, on the first process, the state with what all remember, for a checkpoint; each of them calls this."""
        return state

    def divided(self, state: State) -> State:
        """Return this process's part of such a state, however many processes have written it."""
        return state

    def check_state(self, state: State, program: Program, steps: int) -> None:
        """Check a state that is read from a checkpoint; subclasses check what they remember.

        :param steps: that were done.
        :raises ValueError: if a training of this program cannot have had it; with the entry's name.
        """
        if EPOCH in state:
            check_indices(EPOCH, state[EPOCH], program.full_size)

    @differentiating()
    def __call__(self, model: Callable[..., Any], guide: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Tensor:
        """Return the loss with its gradient, for ``pyro.infer.SVI(..., loss=objective)``.

        :raises TypeError: if the objective remembers something of its steps: see `StatefulLoss`.
        """
        estimate = self.step(inspect_or_reuse(None, model, args, kwargs), guide)
        if estimate.state.keys() - {EPOCH}:
            raise TypeError(
                f"this {type(self).__name__} remembers something from step to step: use loss=StatefulLoss(objective)"
            )
        return estimate.loss


@validated
class StatefulLoss(ELBO):
    """An objective as the loss of one run of ``pyro.infer.SVI``, whose state it keeps.

    ``state`` is what the objective remembers, ``last`` the last step's `Estimate`, and ``inverse_temperature`` that of
    the next step.

    :param objective: the settings, which stay unchanged.
    :param program: the program, if it is inspected already.
    """

    def __init__(self, objective: Objective, program: Program | None = None) -> None:
        super().__init__(num_particles=objective.num_particles, vectorize_particles=True)
        self.objective = objective
        self.state: State = EMPTY
        self.inverse_temperature = 1.0
        self.last: Estimate | None = None
        self._program = program

    def differentiable_loss(
        self, model: Callable[..., Any], guide: Callable[..., Any], /, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Return the loss, summed over prompts, with its estimated gradient."""
        program = inspect_or_reuse(self._program, model, args, kwargs)
        if program is not self._program:
            self.state = self.objective.of_another_program(self.state)
        self._program = program
        estimate = self.objective.step(program, guide, self.state, self.inverse_temperature)
        self.state, self.last = estimate.state, replace(estimate, loss=estimate.loss.detach())
        return estimate.loss

    def loss(self, model: Callable[..., Any], guide: Callable[..., Any], /, *args: Any, **kwargs: Any) -> float:
        """Return the loss, summed over prompts."""
        with torch.no_grad():
            return float(self.differentiable_loss(model, guide, *args, **kwargs))

    @differentiating()
    def loss_and_grads(
        self, model: Callable[..., Any], guide: Callable[..., Any], /, *args: Any, **kwargs: Any
    ) -> float:
        """Return the loss, summed over prompts, and add its gradient to the parameters'.

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
        raise NotImplementedError(f"{type(self.objective).__name__} runs all particles in one trace")


@validated
def of_all_processes(figures: dict[str, Tensor], log_count: Tensor, num: int) -> dict[str, Tensor]:
    """Return the figures (prompt,) of the particles of all processes, from those of this one's own.

    :param figures: means, weighted by q / s; and ``log_evidence``, if it is known.
    :param log_count: the logarithm of the sum of q / s, (prompt,).
    :param num: of this process's particles.
    """
    if ranks().size == 1:
        return figures
    messages = ranks().exchange(num, figures | {"log_count": log_count})
    names = messages[0].tensors
    each = {name: torch.stack([x.tensors[name].to(log_count.device) for x in messages]) for name in names}
    shares = each.pop("log_count").softmax(0)  # (process, prompt)
    found = {}
    if "log_evidence" in each:
        log_num = torch.tensor([[x.value] for x in messages], device=log_count.device).log()
        found["log_evidence"] = (each.pop("log_evidence") + log_num).logsumexp(0) - log_num.logsumexp(0)
    return {name: torch.where(shares > 0, shares * x, 0.0).sum(0) for name, x in each.items()} | found
