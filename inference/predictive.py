r"""Posterior predictive checks: replicated data from a posterior, to compare with the observed data.

    y^{rep}_s ~ p(y | \theta_s),     \theta_s ~ p(\theta | y)

If a program fits, a statistic T(y) of the observed data is no outlier among the T(y^{rep}_s) (Rubin 1984; Gelman, Meng
and Stern 1996, "Posterior predictive assessment of model fitness via realized discrepancies").
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from pyro import poutine
from torch import Tensor

from bayeslm.inference.program import (
    Particles,
    ProgramError,
    assign_values,
    inspect,
    run_particles,
    running,
    sample_sites,
    site_value,
    to_numpy,
    traces,
)
from bayeslm.posterior import Posterior
from bayeslm.validation import Count, Seed, validated


@validated
def predict(
    posterior: Posterior,
    model: Callable[..., Any],
    /,
    *args: Any,
    num_draws: Count | None = None,
    seed: Seed | None = None,
    **kwargs: Any,
) -> Posterior:
    """Draw a replicated data set for each of the posterior's equally weighted draws.

    The result is the resampled posterior with ``predictive[name]`` (chain, draw, *batch, *event) for each observed
    site, which is ArviZ's group ``posterior_predictive``. If the program has other data than the posterior's (held-out
    data), then ``observed``, ``log_likelihood`` and ``pointwise`` are those of the program's data, while ``log_joint``
    and log Z remain the posterior's.

    :param posterior: the posterior by any engine, of a program with the same latents as ``model(*args, **kwargs)``.
    :param model: the program; ``args`` and ``kwargs`` are its arguments.
    :param num_draws: the number of draws in each chain; None for as many as the posterior has, or 1000
        if it is an enumeration.
    :param seed: seed of all random numbers; None draws from the global random state.
    :raises ProgramError: if the program has other latents than the posterior, or no observed data.
    """
    with running(seed), torch.no_grad():
        program = inspect(model, *args, **kwargs)
        observed = [site for site in program.sites.values() if site.kind == "observed" and site.value.numel()]
        if not observed:
            raise ProgramError("the program has no observed data to replicate (a factor is none): give a site obs=...")
        draws = posterior.resample(num_draws, seed=int(torch.randint(2**31, ())))
        chains, per_chain = draws.log_weights.shape[:2]
        values = {}
        for site in program.latents:
            x = draws.samples.get(site.name)
            if x is None or x.shape[2:] != site.shape:
                raise ProgramError(
                    f"the posterior has no {site.name!r} of shape {site.shape}: it must be of the same program"
                )
            values[site.name] = torch.as_tensor(x.reshape(-1, *site.shape)).to(site.value)
        unconditioned = replace(program, model=poutine.uncondition(program.model))
        scored, replicated = [], []
        for rows in torch.arange(chains * per_chain).split(program.particles_a_run):
            with assign_values(program, {name: x[rows.to(x.device)] for name, x in values.items()}):
                scored.append(run_particles(program, None, len(rows)))
                nodes = dict(sample_sites(traces(unconditioned, None, len(rows))[0]))
            replicated.append({site.name: site_value(site, nodes[site.name]["value"], len(rows)) for site in observed})
    particles = Particles.concatenate(scored)

    def split(x: Tensor) -> np.ndarray:
        return to_numpy(x).reshape(chains, per_chain, *x.shape[1:])

    return replace(
        draws,
        predictive={site.name: split(torch.cat([part[site.name] for part in replicated])) for site in observed},
        pointwise={name: split(x) for name, x in particles.pointwise.items()},
        log_likelihood={name: split(x) for name, x in particles.log_likelihood.items()},
        observed={site.name: to_numpy(site.value) for site in observed},
        dims=draws.dims | {site.name: site.dims for site in observed},
    )
