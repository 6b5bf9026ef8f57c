"""Trials of a program: runs of it at given values, alone or together, and the scores by which they are compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import Delta, ExpandedDistribution, Independent, MaskedDistribution
from pyro.distributions.util import scale_and_mask
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor

from bayeslm.models.lm import Autoregressive

from .handlers import PARTICLES, Assign, Assignment, explained
from .program import Program
from .sites import Site, in_prompts, of_each, prompts_of, sample_sites, side_by_side, site_value


def drawn_sites(program: Program) -> list[Site]:
    """Return the latents whose values are drawn; those of guides may be computed from others (`Delta`)."""
    return [site for site in program.latents if not isinstance(_base(site.fn), Delta)]


def _base(fn: Any) -> Any:
    while isinstance(fn, Independent | MaskedDistribution | ExpandedDistribution):
        fn = fn.base_dist
    return fn


def values_of(
    program: Program, trace: Trace, num_particles: int, which: Sequence[int] | None = None
) -> list[dict[str, Tensor]]:
    """Return the values that the particles of a run of several have.

    :param which: those particles; None for all.
    """
    nodes: dict[str, Any] = trace.nodes
    found = {site.name: site_value(site, nodes[site.name]["value"], num_particles) for site in drawn_sites(program)}
    return [
        {name: value[i] for name, value in found.items()} for i in (range(num_particles) if which is None else which)
    ]


def together_at(program: Program, values: list[dict[str, Tensor]]) -> Trace:
    """Run particles together, at the values (*batch, *event) of each."""
    stacked = {}
    for name in values[0]:
        each = [value[name].expand(program.sites[name].shape) for value in values]
        stacked[name] = program.under_plate(name, torch.stack(each))
    return run_together(program, assigned(stacked), len(values))


def run_alone(program: Program, handler: Any) -> Trace:
    """Run one particle, with arbitrary or assigned values."""
    with explained(), handler:
        trace = poutine.trace(program.pinned(program.model)).get_trace(*program.args, **program.kwargs)
    return prune_subsample_sites(trace)


def run_together(program: Program, handler: Any, num_particles: int) -> Trace:
    """Run several particles in one plate."""
    plate = pyro.plate(PARTICLES, num_particles, dim=-1 - program.max_plate_nesting)
    with explained(), handler, plate:
        trace = poutine.trace(program.pinned(program.model)).get_trace(*program.args, **program.kwargs)
    return prune_subsample_sites(trace)


def assigned(values: Mapping[str, Tensor]) -> Assign:
    """Return the handler that puts values in the place of sites."""

    def constant(value: Tensor, fn: Any) -> Assignment:
        return value, None

    assignments: dict[str, Callable[[Any], Assignment]] = {k: partial(constant, x) for k, x in values.items()}
    return Assign(assignments)


def joined(program: Program, alone: list[Trace]) -> dict[str, Tensor]:
    """Return the scores of particles that ran alone, (particle, ...) by site."""
    each = [scores_of(program, trace, 1) for trace in alone]
    return {name: torch.cat(side_by_side([scores[name] for scores in each])) for name in each[0]}


def scores_of(program: Program, trace: Trace, num_particles: int) -> dict[str, Tensor]:
    """Return log-densities (particle, prompt), values of deterministic sites, and prompts of completions, by site."""
    scores = {}
    for name, node in sample_sites(trace):
        if name not in program.sites:  # the run refuses programs whose sites change
            continue
        site, fn = program.sites[name], node["fn"]
        if isinstance(fn, Autoregressive):
            shape = (num_particles, *site.shape[: site.batch_dims])
            ids, mask = prompts_of(fn, shape)
            scores[name] = ids.masked_fill(mask == 0, -1)
            if fn.where is not None:
                scores[name] = torch.cat([scores[name], of_each(fn, fn.where[..., None].to(ids), shape)], -1)
        elif site.kind == "deterministic":
            scores[name] = site_value(site, node["value"], num_particles)
        else:
            log_prob = scale_and_mask(fn.log_prob(node["value"]), node["scale"], node["mask"])
            scores[name] = program.terms(log_prob, num_particles, in_prompts(node))
    return scores


def agree(found: Tensor | None, expected: Tensor, among: Tensor | None = None) -> bool:
    """Return whether scores (particle, ...) are equal, but for the rounding of networks and sums.

    What is mixed differs by about as much as the particles do.

    :param among: scores whose spread that is; None for ``expected``.
    """
    if found is None or found.shape[:-1] != expected.shape[:-1]:
        return False
    found, expected, among = (x.double() for x in side_by_side([found, expected, expected if among is None else among]))
    spread = (among.amax(0) - among.amin(0)).nan_to_num(nan=0.0, posinf=0.0)
    tolerance = 1e-3 + 1e-3 * expected.abs().nan_to_num(posinf=0.0) + 0.01 * spread
    close = ((found - expected).abs() <= tolerance) | (found == expected) | (found.isnan() & expected.isnan())
    return bool(close.all())


def shown(found: Tensor | None, expected: Tensor) -> str:
    """Return the scores for an error, if there is one of each particle."""
    if found is None or found.shape != expected.shape or found.numel() != len(found):
        return ""
    together, alone = (", ".join(f"{x:.6g}" for x in scores.reshape(-1).tolist()) for scores in (found, expected))
    return f" ({together}, not {alone})"
