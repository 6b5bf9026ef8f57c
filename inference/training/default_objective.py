"""The objective of SVI where none is given: by what new draws cost, beside passes over draws that are there.

A new draw takes a pass of the network for each of its tokens, one after the other; a gradient at draws that are there
takes one for all tokens at once. In a small network a pass takes about as long for one token as for many. Then each lot
of 64 new draws is followed by three steps on draws of the last 16 lots: on 16 enumerable problems (tables and small
Llamas) this came nearer to the posterior with as many new draws, and in less time. A large network computes for as long
as there are tokens. There kept draws save nothing, and led SmolLM2 less far with as many draws as new ones did: each
step has 16 new ones.
"""

from __future__ import annotations

from bayeslm.inference.program import Program
from bayeslm.validation import validated

from .divergences import LogVariance
from .objective import Objective
from .reverse_kl import ReverseKL
from .sources import Replay

SMALL = 2**22  # weights, all layers together
LOT, LOTS, EVERY = 64, 16, 4  # particles of a lot of new draws; lots that are kept; steps from a lot to the next
PARTICLES = 16  # in each step of large networks


@validated
def default_objective(program: Program, num_particles: int | None, *, owns_guide: bool, in_region: bool) -> Objective:
    """Return the objective of a program.

    `ReverseKL` is also that of `Adam`, of programs with other latents, with parameters of their own, or whose
    prompts are one posterior or subsampled, and of guides of the user's: it differentiates values and parameters too,
    weighs each prompt's score by the terms of that prompt, and has new prompts in each step.

    :param num_particles: in a step; None leaves it to the objective.
    :param owns_guide: whether the guide is the engine's own.
    :param in_region: whether steps stay in a trust region, without which kept draws can be memorised.
    """
    completions = program.completions
    only_texts = len(completions) == len(program.latents) and not program.has_params and owns_guide
    one_by_one = not program.shared and not program.in_chunks and num_particles != 1
    if in_region and only_texts and one_by_one:
        sizes = [sum(p.numel() for p in site.fn.lm.network.parameters()) for site in completions]
        if max(sizes) <= SMALL:
            lot = num_particles or LOT
            return LogVariance(lot, Replay(LOTS * lot, every=EVERY))
    return ReverseKL(num_particles or PARTICLES)
