r"""Draws that another engine makes while steps are taken: asynchronous training, with a bounded staleness.

At step t the engine is asked for the draws of step t + k, by the weights of step t, and draws them while the steps from
t to t + k - 1 are taken:

    x ~ q_{t - k},     log s(x) = log q_{t - k}(x),     a step on  q_t

The engine returns log s with its draws, so that objectives which know the density of their particles (`LogVariance`,
`ForwardKL`, `FDivergence`) are as right with these as with any. IMPALA corrects for the same lag (Espeholt et al. 2018,
arXiv 1802.01561); Noukhovitch et al. 2024 study it for language models (arXiv 2410.18252). What a step gets depends on
no clock.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import torch

from bayeslm.inference.program import (
    PARTICLES,
    Particles,
    Program,
    ProgramError,
    ranks,
    run_particles,
    seeded,
)
from bayeslm.models.lm import answering, asking_ahead
from bayeslm.validation import Count, validated

from .resumable import check_indices, check_tensor
from .state import EMPTY, State


@validated
@dataclass(frozen=True)
class Ahead:
    """A source of draws that the policy's sampler makes while earlier steps are taken.

    The first step asks for the draws of the first ``steps`` + 1, of its own prompts. A run that is resumed from a
    checkpoint draws anew, by the weights that it has, the lots that it was waiting for: these are less stale, and the
    numbers are not those of a run that was not stopped.

    :param steps: between the weights that draw and those that learn from the draws.
    :raises ValueError: if ``steps`` is below 1.
    """

    steps: Count = 1

    def __call__(
        self, program: Program, guide: Callable[..., Any], num_particles: int, state: State = EMPTY
    ) -> tuple[Particles, State]:
        """Return the draws that are due, and ask for those of a later step.

        The state holds of each lot that was asked for ``seeds`` (lot,), and ``prompts`` (lot, prompt) of a minibatch.
        """
        seeds = state.get("seeds", torch.empty(0, dtype=torch.long))
        own = torch.empty(0, dtype=torch.long) if program.minibatch is None else program.minibatch.cpu()
        prompts = state.get("prompts", own.new_empty((0, len(own))))
        new = ranks().agreed(torch.randint(2**31, (self.steps + 1 - len(seeds),)))
        for seed in new.tolist():
            self._ask(program, guide, num_particles, seed)
        seeds, prompts = torch.cat([seeds, new]), torch.cat([prompts, own.expand(len(new), -1)])
        due = program if program.minibatch is None else program.on(prompts[0].to(program.minibatch))
        with seeded(ranks().stream(int(seeds[0]))), answering(int(seeds[0])):
            particles = run_particles(due, guide, ranks().share(num_particles))
        return particles, {"seeds": seeds[1:], "prompts": prompts[1:]}

    def _ask(self, program: Program, guide: Callable[..., Any], num_particles: int, seed: int) -> None:
        plate = pyro.plate(PARTICLES, ranks().share(num_particles), dim=-1 - program.max_plate_nesting)
        with seeded(ranks().stream(seed)), torch.no_grad(), asking_ahead(seed) as lot, plate:
            program.pinned(guide)(*program.args, **program.kwargs)
        if lot.request is None:
            raise ProgramError(
                "Ahead lets another engine draw while steps are taken, and the policy draws by itself: give the "
                "LanguageModel a sampler, such as VLLMServer, or leave out Ahead"
            )

    def check_state(self, state: State, program: Program, steps: int) -> None:
        """Check a state that is read from a checkpoint; see `Objective.check_state`."""
        if not steps and not state:
            return
        check_tensor("seeds", state.get("seeds"), (self.steps,), whole=True)
        size = 0 if program.num_prompts == program.full_size else program.num_prompts
        check_tensor("prompts", state.get("prompts"), (self.steps, size), whole=True)
        for row in state["prompts"]:
            check_indices("prompts", row, program.full_size)
