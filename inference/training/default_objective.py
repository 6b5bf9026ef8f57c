"""The objective of SVI where none is given: by what new draws cost, beside passes over draws that are there.

A new draw takes a pass of the network for each of its tokens, one after the other; a gradient at draws that are there
takes one for all tokens at once. In a small network a pass takes about as long for one token as for many. So all draws
are kept, and each lot of new ones, which is a step, is followed by seven steps on as many of those kept; by fifteen,
where the run's number of draws is given. A lot is then a fifteenth of them or somewhat less: the noise of a step's
gradient is what ends a training, and more draws are worth larger lots as well as more of them. On eight enumerable
problems (tables, small Llamas and their adapters; 1,920 or 11,469 draws) this left a half to a quarter of the KL to the
posterior, in the median, that was left by lots of 64, each followed by three steps on draws of the last 16 lots.

Of a table of the next token by the last ones no policy is the posterior, and the draws of earlier policies would lead
to another one than new draws. There kept draws count as far as the policy could have drawn them (`LogVariance`,
``truncated``). Of networks, which come near the posterior, all count alike: on one of five problems the weights left
somewhat more KL.

A large network computes for as long as there are tokens. There kept draws save nothing, and led SmolLM2 less far with
as many draws as new ones did: each step has 16 new ones.
"""

from __future__ import annotations

from bayeslm.inference.program import Program
from bayeslm.models.lm import is_table
from bayeslm.validation import validated

from .budget import Budget
from .divergences import LogVariance
from .objective import Objective
from .reverse_kl import ReverseKL
from .sources import Replay

SMALL = 2**22  # weights, all layers together
LOT, SMALLEST_LOT, LARGEST_LOT = 128, 64, 1024  # new draws of each prompt
LOTS = 15  # in a run, at least, where its draws are counted
EVERY, EVERY_OF_COUNTED = 8, 16  # steps from a lot to the next; where draws are counted
EVERY_OF_GIVEN = 4  # where the size of a lot is given: of 8 draws many steps would learn little more
KEPT = 65536  # draws of each prompt, the newest
PARTICLES = 16  # in each step of large networks


@validated
def default_objective(
    program: Program, num_particles: int | None, budget: Budget, *, owns_guide: bool, in_region: bool
) -> Objective:
    """Return the objective of a program.

    `ReverseKL` is also that of `Adam`, of programs with other latents, with parameters of their own, or whose
    prompts are one posterior or subsampled, and of guides of the user's: it differentiates values and parameters too,
    weighs each prompt's score by the terms of that prompt, and has new prompts in each step.

    :param num_particles: in a step; None leaves it to the objective.
    :param budget: of a chain.
    :param owns_guide: whether the guide is the engine's own.
    :param in_region: whether steps stay in a trust region, without which kept draws can be memorised.
    """
    completions = program.completions
    only_texts = len(completions) == len(program.latents) and not program.has_params and owns_guide
    one_by_one = not program.shared and not program.in_chunks and num_particles != 1
    if in_region and only_texts and one_by_one:
        networks = [site.fn.lm.network for site in completions]
        if max(sum(p.numel() for p in network.parameters()) for network in networks) <= SMALL:
            if num_particles is not None:
                lot, every = num_particles, EVERY_OF_GIVEN
            elif budget.samples is None:
                lot, every = LOT, EVERY
            else:
                lot, every = _lot(budget.samples // program.full_size), EVERY_OF_COUNTED
            are_tables = any(map(is_table, networks))
            return LogVariance(lot, Replay(KEPT, every=every), truncated=are_tables)
    return ReverseKL(num_particles or PARTICLES)


def _lot(samples: int) -> int:
    """Return a power of 2: then a training that goes on with somewhat more samples has the same lots."""
    share = min(LARGEST_LOT, max(SMALLEST_LOT, samples // LOTS))
    return 1 << (share.bit_length() - 1)
