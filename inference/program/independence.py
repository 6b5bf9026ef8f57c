"""Whether a program's particles stand alone: a few of them must get the same scores together as one by one.

Engines run all particles at once, in an outermost plate. A program whose data stand in dimensions that no plate
declares, or that sums over all of a tensor, mixes them there: silently, where a size happens to be the number of
particles.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor

from bayeslm.models.lm import Autoregressive
from bayeslm.models.rewards import rehearsal

from .errors import ProgramError
from .handlers import PARTICLES, Arbitrary, Assign, Assignment, explained, seeded
from .program import Program, in_prompts, sample_sites, site_value
from .prompts import prompts_of, side_by_side

MISFITS = (RuntimeError, ValueError, IndexError)  # the very types that torch and Pyro raise where shapes do not fit
ADVICE = (
    "Engines run all particles at once, in an outermost plate, so that a latent has the shape (particle, *plates, "
    "*event). Declare the dimensions of data as plates (with pyro.plate('data', n): pyro.sample('y', dist.Normal(mu, "
    "1), obs=y)), or give a latent a last dimension before it meets them (mu[..., None]); reduce over last dimensions "
    "(x.sum(-1), not x.sum()), index from the end (x[..., 0], not x[0]), and let a reward depend on its own text only. "
    "ImportanceSampling, RejectionSampling, BestOfN, Laplace and NUTS can run particles one by one: vectorize=False"
)


def check_independence(program: Program) -> None:
    """Compare the scores of a few particles that run together and one by one; once for each program.

    No network of a completion runs, no `Reward` is called, and the random state is restored: completions and rewards
    are arbitrary, other latents are drawn from the prior. Sites whose scores differ from run to run (a judge that is
    random) are not compared.

    :raises ProgramError: if a site's scores differ, or the program does not run with several particles.
    """
    if "independence" in program.verified:
        return
    program.verified.add("independence")
    if program.in_chunks:
        program = program.on(torch.arange(program.num_prompts))
    # a seed whose first normal draws have both signs
    with seeded(2), torch.no_grad(), rehearsal(), poutine.block():
        try:
            alone = _different_particles(program)
            expected = _joined(program, alone)
        except Exception:  # the run meets the error too, where it is explained, or has no particle like these
            return
        values: list[dict[str, Any]] = [
            {site.name: trace.nodes[site.name]["value"] for site in program.latents} for trace in alone
        ]
        try:
            found = _scores(program, _together(program, values), len(values))
        except MISFITS as error:
            if type(error) not in MISFITS:  # out of memory, a failing reward, or explained already
                raise
            text = str(error).partition("\n")[0]
            raise ProgramError(
                f"the program does not run with several particles: {text.rstrip('.')}. {ADVICE}"
            ) from error
        different = [name for name in expected if not _agree(found.get(name), expected[name])]
        if different:
            again = _joined(program, [_alone(program, _assign(x)) for x in values])
            different = [name for name in different if _agree(again.get(name), expected[name])]
    if different:
        name = different[0]
        site, other = program.sites[name], "log-probability"
        if site.kind == "deterministic":
            other = "value"
        what = (
            f"the prompts of site {name!r} are others" if site.is_completion else f"site {name!r} has another {other}"
        )
        raise ProgramError(
            f"{what} where particles run together than where each runs alone"
            f"{_shown(found.get(name), expected[name])}: the program mixes particles. {ADVICE}"
        )


def _different_particles(program: Program) -> list[Trace]:
    """Run 4 particles one by one, and up to 8, until no discrete latent is constant.

    What is mixed cannot be seen on particles that are all alike.
    """
    discrete = [site.name for site in program.latents if not site.is_completion and site.fn.support.is_discrete]
    alone = [_alone(program, Arbitrary(1 + i)) for i in range(4)]

    def are_constant() -> bool:
        values: list[list[Any]] = [[trace.nodes[name]["value"] for name in discrete] for trace in alone]
        first, *rest = values
        return any(all(torch.equal(x, y[i]) for y in rest) for i, x in enumerate(first))

    while len(alone) < 8 and are_constant():
        alone.append(_alone(program, Arbitrary(1 + len(alone))))
    return alone


def _alone(program: Program, handler: Any) -> Trace:
    """Run one particle, with arbitrary or assigned values."""
    with explained(), handler:
        trace = poutine.trace(program.pinned(program.model)).get_trace(*program.args, **program.kwargs)
    return prune_subsample_sites(trace)


def _together(program: Program, values: list[dict[str, Tensor]]) -> Trace:
    """Run several particles in one plate, at the values of latents that each had alone."""
    stacked = {}
    for name in values[0]:
        each = [value[name].expand(program.sites[name].shape) for value in values]
        stacked[name] = program.under_plate(name, torch.stack(each))
    plate = pyro.plate(PARTICLES, len(values), dim=-1 - program.max_plate_nesting)
    with explained(), _assign(stacked), plate:
        trace = poutine.trace(program.pinned(program.model)).get_trace(*program.args, **program.kwargs)
    return prune_subsample_sites(trace)


def _assign(values: Mapping[str, Tensor]) -> Assign:
    def constant(value: Tensor, fn: Any) -> Assignment:
        return value, None

    assignments: dict[str, Callable[[Any], Assignment]] = {k: partial(constant, x) for k, x in values.items()}
    return Assign(assignments)


def _joined(program: Program, alone: list[Trace]) -> dict[str, Tensor]:
    """Return the scores of particles that ran alone, (particle, ...) by site."""
    each = [_scores(program, trace, 1) for trace in alone]
    return {name: torch.cat(side_by_side([scores[name] for scores in each])) for name in each[0]}


def _scores(program: Program, trace: Trace, num_particles: int) -> dict[str, Tensor]:
    """Return log-densities (particle, prompt), values of deterministic sites, and prompts of completions, by site."""
    scores = {}
    for name, node in sample_sites(trace):
        site, fn = program.sites[name], node["fn"]
        if isinstance(fn, Autoregressive):
            ids, mask = prompts_of(fn, (num_particles, *site.shape[: site.batch_dims]))
            scores[name] = ids.masked_fill(mask == 0, -1)
        elif site.kind == "deterministic":
            scores[name] = site_value(site, node["value"], num_particles)
        else:
            log_prob = scale_and_mask(fn.log_prob(node["value"]), node["scale"], node["mask"])
            scores[name] = program.terms(log_prob, num_particles, in_prompts(node))
    return scores


def _agree(found: Tensor | None, expected: Tensor) -> bool:
    """Return whether scores (particle, ...) are equal, but for the rounding of networks and sums.

    What is mixed differs by about as much as the particles do.
    """
    if found is None or found.shape[:-1] != expected.shape[:-1]:
        return False
    found, expected = (x.double() for x in side_by_side([found, expected]))
    spread = (expected.amax(0) - expected.amin(0)).nan_to_num(nan=0.0, posinf=0.0)
    tolerance = 1e-3 + 1e-3 * expected.abs().nan_to_num(posinf=0.0) + 0.01 * spread
    close = ((found - expected).abs() <= tolerance) | (found == expected) | (found.isnan() & expected.isnan())
    return bool(close.all())


def _shown(found: Tensor | None, expected: Tensor) -> str:
    """Return the scores for an error, if there is one of each particle."""
    if found is None or found.shape != expected.shape or found.numel() != len(found):
        return ""
    together, alone = (", ".join(f"{x:.6g}" for x in scores.reshape(-1).tolist()) for scores in (found, expected))
    return f" ({together}, not {alone})"
