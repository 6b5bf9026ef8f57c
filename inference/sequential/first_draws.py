r"""SMC's first particles, from which it learns a twist for the others.

A share \alpha of the particles of each chain are draws of the prior, weighted by their likelihood L = exp(r / beta),
and never resampled. From those of all chains a twist is learned (`TwistLearning`), with which the others are written.
Z is estimated by all of them,

    \hat Z = \alpha \hat Z_1 + (1 - \alpha) \hat Z_2,    \hat Z_1 = mean of L over the first,  \hat Z_2 that of SMC

and E[\hat Z] = Z whatever has been learned: given the first particles E[\hat Z_2] = Z, for any twist; and \alpha is
fixed before they are drawn. (It must be: to leave them out where a twist was found good, and keep them where it was
not, would let their own weights decide whether they count, and E[\hat Z] would not be Z.) So a twist that is refused
costs no draws: all particles then are draws of the prior, as in importance sampling. One that is used at a variance
of V times the prior's leaves \alpha + (1 - \alpha) V of it: 1 / \alpha times as precise at the most.
"""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bayeslm.inference.program import Particles, Program
from bayeslm.models.lm import Twist, is_sharded
from bayeslm.validation import validated

from .population import ResamplingRecord
from .twist_learning import TwistLearning

SHARE = 4  # the first particles are one of so many
LEAST, MOST = 128, 1024  # draws to learn from, of all chains
TOKENS = 2**15  # of all these draws: bounds the memory of their features, and the seconds of learning
GAIN = 0.05  # nats that a learned twist must save


class Chains(NamedTuple):
    """Particles of ``number`` chains, chain by chain; ``records`` are those of `Population.stats`."""

    number: int
    particles: Particles
    log_weights: Tensor
    roots: Tensor
    records: dict[str, np.ndarray]


class FirstDraws(NamedTuple):
    """The first ``number`` particles of each chain, and what is learned from them.

    ``particles`` are those of all chains, chain by chain. ``twists`` and ``gains`` are by site; a twist that does not
    gain enough is left out.
    """

    number: int = 0
    particles: Particles | None = None
    twists: dict[str, Twist] = {}
    gains: dict[str, float] = {}
    seconds: float = 0.0

    @property
    def are_lost(self) -> bool:
        """Whether all have weight 0."""
        return self.particles is None or bool((self.particles.total_log_likelihood == -torch.inf).all())

    def stats(self) -> dict[str, Any]:
        return {"twist_gain": self.gains, "twist_seconds": self.seconds} if self.gains else {}

    def before(self, others: Chains) -> Chains:
        """Return chains that begin with these particles."""
        if self.particles is None or not self.number:
            return others
        n, own = self.number, self.particles[: others.number * self.number]
        both = Particles.concatenate([own, others.particles])
        rows = torch.arange(len(both))
        identity = torch.arange(n, device=others.roots.device)[:, None].expand(-1, others.roots.shape[1])

        def merged(first: Tensor, rest: Tensor) -> Tensor:
            parts = [x.reshape(others.number, -1, *x.shape[1:]) for x in (first, rest)]
            return torch.cat(parts, 1).flatten(0, 1)

        records = dict(others.records)
        if records:  # none is resampled, and all weigh the same until the end
            sizes, _, ancestors = (records[name] for name in ResamplingRecord._fields)
            still = np.broadcast_to(np.arange(n)[:, None], (*ancestors.shape[:2], n, ancestors.shape[3]))
            records |= {"ess_by_step": sizes + n, "ancestors": np.concatenate([still, ancestors], 2)}
        return Chains(
            others.number,
            both[merged(rows[: len(own)], rows[len(own) :])],
            merged(own.total_log_likelihood, others.log_weights),
            merged(identity.repeat(others.number, 1), others.roots),
            records,
        )


@validated
def number_of_first(program: Program, num_particles: int, num_chains: int) -> int:
    """Return how many of a chain's particles are to be draws of the prior; 0 where no twist shall be learned.

    One is for programs with one text in each posterior, on whose beginnings all that is known comes after it: a factor
    or an observation before it is what SMC resamples by without a twist, and the first particles would not be; and of
    several texts each would be valued by the likelihood of all. None is learned from too few draws, nor where they have
    too many tokens, or the network is sharded.
    """
    texts = program.completions
    if len(texts) != 1 or texts[0].fn.batch_shape.numel() != program.weight_prompts:
        return 0
    names = [name for name, site in program.sites.items() if site.kind == "observed" or site.is_completion]
    if names[0] != texts[0].name or any(is_sharded(p) for p in texts[0].fn.lm.network.parameters()):
        return 0
    tokens = program.weight_prompts * texts[0].fn.max_new_tokens
    number = min(num_particles // SHARE, min(MOST, TOKENS // tokens) // num_chains)
    return number if number * num_chains >= LEAST else 0


@validated
def draw_first(program: Program, number: int, num_chains: int, *, progress: bool) -> FirstDraws:
    """Draw the first particles of all chains, and learn a twist of each completion from them.

    :param number: of each chain. From fewer than 128 in all none is learned.
    :param progress: whether to show progress bars.
    """
    begun = time.perf_counter()
    learning = TwistLearning(num_particles=number * num_chains, progress=progress)
    particles, learners = learning.draw(program, [site.name for site in program.completions])
    twists: dict[str, Twist] = {}
    gains: dict[str, float] = {}
    can_learn = number * num_chains >= LEAST and bool((particles.total_log_likelihood > -torch.inf).any(0).all())
    for name, learner in learners.items() if can_learn else ():
        gains[name] = learning.fit(*learner)["gain"]
        if gains[name] > GAIN:
            twists[name] = learner.twist
    return FirstDraws(number, particles, twists, gains, time.perf_counter() - begun)
