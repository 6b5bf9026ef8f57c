r"""Exact inference by enumeration: the oracle of every test.

    Z = \sum_x p(x) exp(r(x)/beta),    \pi^*(x) = p(x) exp(r(x)/beta) / Z

The atoms are all joint assignments of the latent sites. Where prompts are posteriors of their own, they are
enumerated side by side; elements of any other plate combine freely.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bayeslm.inference.program import (
    PROMPTS,
    Particles,
    Program,
    ProgramError,
    Site,
    Stopwatch,
    assign_values,
    check_counts,
    inspect,
    posterior,
    run_particles,
    seeded,
)
from bayeslm.models.lm import Autoregressive
from bayeslm.posterior import Posterior


@dataclass(frozen=True)
class Exact:
    """Every value of every latent, with its exact posterior weight.

    :param max_atoms: refuse above so many joint assignments a prompt.
    :param num_prior_samples: draws of the prior kept for comparison.
    :param seed: of those draws.
    """

    max_atoms: int = 1_000_000
    num_prior_samples: int = 1000
    seed: int | None = None

    def __post_init__(self) -> None:
        check_counts(self, "max_atoms", "num_prior_samples")

    def run(self, model: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Posterior:
        """Enumerate ``model(*args, **kwargs)``: one chain whose draws are the atoms, log Z without error.

        :raises ProgramError: if a latent cannot be enumerated, or there are more than ``max_atoms`` atoms.
        :raises EvidenceError: if no atom has positive probability.
        """
        with seeded(self.seed), Stopwatch() as watch:
            program = inspect(model, *args, **kwargs)
            particles = self._enumerate(program)
            atoms = len(particles)
            log_z = particles.log_joint.double().logsumexp(0).cpu().numpy()
            return posterior(
                program,
                particles,
                engine="Exact",
                kind="enumerated",
                num_chains=1,
                # as if drawn uniformly from the atoms, so that the mean weight is Z for this engine as for all
                log_weights=particles.log_joint + np.log(atoms),
                evidence=(log_z, np.zeros_like(log_z)),
                stats=watch.stats() | {"atoms": atoms},
                prior=self._prior(program, particles),
            )

    def _enumerate(self, program: Program) -> Particles:
        """All joint assignments, scored in batches of bounded memory."""
        free = {site.name: _free_elements(program, site) for site in program.latents}
        sizes = {site.name: _support_size(site) ** free[site.name] for site in program.latents}
        total = math.prod(sizes.values())
        if total > self.max_atoms:
            each = " x ".join(f"{size:,} of {name!r}" for name, size in sizes.items())
            raise ProgramError(
                f"{total:,} atoms ({each}) are more than max_atoms={self.max_atoms:,}: "
                "use a smaller vocabulary or fewer tokens, or another engine"
            )
        values: dict[str, Tensor] = {}
        inner, outer = total, 1
        for site in program.latents:
            inner //= sizes[site.name]
            atoms = _atoms(program, site, free[site.name])
            atoms = atoms.repeat_interleave(inner, 0)
            values[site.name] = atoms.repeat(outer, *(1,) * (atoms.dim() - 1))
            outer *= sizes[site.name]
        step = program.max_particles
        parts = []
        for i in range(0, total, step):
            some = {name: value[i : i + step] for name, value in values.items()}
            with assign_values(program, some):
                parts.append(run_particles(program, None, min(step, total - i)))
        return Particles.concatenate(parts)

    def _prior(self, program: Program, atoms: Particles) -> Particles:
        """Draws of the prior, by its exact probabilities of the atoms."""
        mass = (atoms.log_prior - atoms.log_prior.amax(0)).exp()
        index = torch.multinomial(mass.T.cpu(), self.num_prior_samples, replacement=True).T
        return atoms.gather(program, index)


def _support_size(site: Site) -> int:
    """How many values one element of a site has."""
    if site.masked:
        raise ProgramError(f"Exact cannot enumerate site {site.name!r}: masked, its values have no probabilities")
    if isinstance(site.fn, Autoregressive):
        return site.fn.support_size
    try:
        return len(site.fn.enumerate_support(expand=False))
    except NotImplementedError:
        raise ProgramError(
            f"Exact cannot enumerate site {site.name!r} ({type(site.fn).__name__}): it needs finite supports; "
            "use ImportanceSampling or SVI"
        ) from None


def _free_dims(program: Program, site: Site) -> list[int]:
    """Sizes of a site's batch dims whose elements combine freely, 1 for the others (prompts side by side)."""
    together = None if program.shared else PROMPTS
    batch = enumerate(site.shape[: site.batch_dims])
    return [1 if site.plates.get(i - site.batch_dims) == together else size for i, size in batch]


def _free_elements(program: Program, site: Site) -> int:
    return math.prod(_free_dims(program, site))


def _atoms(program: Program, site: Site, elements: int) -> Tensor:
    """Every value of a site, (atom, *batch, *event)."""
    batch, event = site.shape[: site.batch_dims], site.shape[site.batch_dims :]
    support = site.fn.enumerate_support(expand=False).reshape(-1, *event)
    one = torch.arange(len(support), device=support.device)
    index = torch.cartesian_prod(*[one] * elements).reshape(-1, *_free_dims(program, site))
    return support[index.expand(-1, *batch)]
