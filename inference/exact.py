r"""Exact inference by enumeration, the reference of the tests.

    Z = \sum_x p(x) exp(r(x)/beta),    \pi^*(x) = p(x) exp(r(x)/beta) / Z

The atoms are all joint assignments of the latent sites. Prompts that are posteriors of their own are enumerated
independently, each in its own column; elements of any other plate are combined in all ways.
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
    inspect,
    of_prompts,
    posterior,
    running,
    score_values,
)
from bayeslm.models.lm import Autoregressive
from bayeslm.posterior import Posterior
from bayeslm.progress import track
from bayeslm.validation import Count, Seed, validated


@validated
@dataclass(frozen=True)
class Exact:
    """Every joint assignment of the latents, with its exact posterior weight.

    :param max_atoms: the largest number of joint assignments for each prompt.
    :param num_prior_samples: the number of draws of the prior in the posterior's ``prior``, for comparison.
    :param seed: seed of these draws; None draws from the global random state.
    :param progress: whether to show the progress.
    :raises ValueError: if a setting is out of range.
    """

    max_atoms: Count = 1_000_000
    num_prior_samples: Count = 1000
    seed: Seed | None = None
    progress: bool = True

    def run(self, model: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Posterior:
        """Enumerate ``model(*args, **kwargs)``: one chain whose draws are the atoms, and the exact log Z.

        ``stats``: ``atoms`` (their number), ``seconds``, ``tokens`` and ``model_calls``.

        :raises ProgramError: if a latent cannot be enumerated, or there are more than ``max_atoms`` atoms.
        :raises EvidenceError: if no atom has positive probability.
        """
        with running(self.seed) as watch:
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
                # as if drawn uniformly from the atoms, so that the mean weight is Z, as for all engines
                log_weights=particles.log_joint + np.log(atoms),
                evidence=(log_z, np.zeros_like(log_z)),
                stats=watch.stats() | {"atoms": atoms},
                prior=self._prior(program, particles),
            )

    def _enumerate(self, program: Program) -> Particles:
        """Score all joint assignments, in batches of bounded memory."""
        free = {site.name: math.prod(_free_dims(program, site)) for site in program.latents}
        sizes = {site.name: _support_size(site) ** free[site.name] for site in program.latents}
        total = math.prod(sizes.values())
        if total > self.max_atoms:
            each = " x ".join(f"{size:,} of {name!r}" for name, size in sizes.items())
            raise ProgramError(
                f"{total:,} atoms ({each}) are more than max_atoms={self.max_atoms:,}: raise max_atoms, use a smaller "
                "vocabulary or fewer tokens, or use another engine"
            )
        values: dict[str, Tensor] = {}
        inner, outer = total, 1
        for site in program.latents:
            inner //= sizes[site.name]
            atoms = _atoms(program, site, free[site.name])
            atoms = atoms.repeat_interleave(inner, 0)
            values[site.name] = atoms.repeat(outer, *(1,) * (atoms.dim() - 1))
            outer *= sizes[site.name]
        with track("Exact", total, self.progress, plan=f"{total} atoms {of_prompts(program)}") as report:
            return score_values(program, values, report=report)

    def _prior(self, program: Program, atoms: Particles) -> Particles:
        """Draw from the prior by the exact probabilities of the atoms."""
        mass = (atoms.log_prior - atoms.log_prior.amax(0)).exp()
        index = torch.multinomial(mass.T.cpu(), self.num_prior_samples, replacement=True).T
        return atoms.gather(program, index)


def _support_size(site: Site) -> int:
    """Return the number of values of one element of a site."""
    if site.masked:
        raise ProgramError(
            f"Exact cannot enumerate site {site.name!r}: it is masked, so its values have no probabilities"
        )
    if isinstance(site.fn, Autoregressive):
        return site.fn.support_size
    try:
        return len(site.fn.enumerate_support(expand=False))
    except NotImplementedError:
        raise ProgramError(
            f"Exact cannot enumerate site {site.name!r}: {type(site.fn).__name__} has no enumerable support. Use "
            "ImportanceSampling or SVI"
        ) from None


def _free_dims(program: Program, site: Site) -> list[int]:
    """Return the sizes of a site's batch dims, but 1 for the prompts' where each is enumerated on its own."""
    separate = None if program.shared else PROMPTS
    batch = enumerate(site.shape[: site.batch_dims])
    return [1 if site.plates.get(i - site.batch_dims) == separate else size for i, size in batch]


def _atoms(program: Program, site: Site, elements: int) -> Tensor:
    """Return all values of a site, (atom, *batch, *event), by the number of its combined ``elements``."""
    batch, event = site.shape[: site.batch_dims], site.shape[site.batch_dims :]
    support = site.fn.enumerate_support(expand=False).reshape(-1, *event)
    one = torch.arange(len(support), device=support.device)
    index = torch.cartesian_prod(*[one] * elements).reshape(-1, *_free_dims(program, site))
    return support[index.expand(-1, *batch)]
