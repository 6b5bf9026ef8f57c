"""Whether particles of a program or a guide stand alone: a few must get the same scores together as one by one.

Engines run all particles at once, in an outermost plate. A program whose data stand in dimensions that no plate
declares, or that sums over all of a tensor, mixes them there: silently, where a size happens to be the number of
particles.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import Delta, ExpandedDistribution, Independent, MaskedDistribution
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor

from bayeslm.models.lm import Autoregressive
from bayeslm.models.rewards import rehearsal

from .errors import ProgramError
from .handlers import PARTICLES, Arbitrary, Assign, Assignment, explained, seeded
from .program import Program
from .prompts import prompts_of, side_by_side
from .sites import Site, check_site, in_prompts, sample_sites, site_of, site_value

COMPANY, OWN = 4, 2  # particles that run together, and which of them has run alone: neither the first nor the last
FAR = 1  # the one whose values are farthest from those of `OWN`, beyond 0 or the mean
TRIES = 64  # draws of a latent, at most, for values other than this particle's
MISFITS = (RuntimeError, ValueError, IndexError)  # the very types that torch and Pyro raise where shapes do not fit
ADVICE = (
    "Engines run all particles at once, in an outermost plate, so that a latent has the shape (particle, *plates, "
    "*event). Declare the dimensions of data as plates (with pyro.plate('data', n): pyro.sample('y', dist.Normal(mu, "
    "1), obs=y)), or give a latent a last dimension before it meets them (mu[..., None]); reduce over last dimensions "
    "(x.sum(-1), not x.sum()), index from the end (x[..., 0], not x[0]), and let a reward depend on its own text only. "
    "ImportanceSampling, RejectionSampling, BestOfN, Laplace and NUTS can run particles one by one: vectorize=False"
)


def check_independence(program: Program) -> None:
    """Compare the scores of a few particles that run together with those that each has alone; once for each program.

    The program is run once for `COMPANY` particles, and once for one of them, `FAR`. Another one is the particle of the
    program's inspection, which ran alone; in the others each latent has another value. Only where the scores of these
    two differ, or all particles have the same at a site, which a sum over all of them would give too, the others run
    alone as well. No network of a completion runs, no `Reward` is called, and the random state is restored: completions
    and rewards are arbitrary, other latents are drawn from the prior. Sites whose scores differ from run to run, by a
    judge that is random, are not compared.

    :raises ProgramError: if a site's scores differ, or the program does not run with several particles.
    """
    if "independence" in program.verified:
        return
    program.verified.add("independence")
    origin = program.inspected
    assert origin is not None
    if origin.prompts is not None:
        program = program.on(origin.prompts)
    # a seed whose first normal draws have both signs
    with seeded(2), torch.no_grad(), rehearsal(), poutine.block():
        inspected: Trace = origin.trace
        together: Trace | None = None
        try:
            reference = _scores(program, inspected, 1)
            own: dict[str, Any] = {site.name: inspected.nodes[site.name]["value"] for site in _drawn(program)}
            together = _in_plate(program, _Company(program, own), COMPANY)
            if _stand_alone(program, own, reference, together):
                return
        except Exception:  # of shapes, or of values that the program does not take: others run alone to tell
            together = None
        _check(program, "program", inspected, together)


def check_guide(program: Program, guide: Callable[..., Any]) -> None:
    """Compare the scores of a guide's sites as `check_independence` does; once for each guide.

    Guides that are made of the program (their attribute ``is_of_program``) mix particles where the program does.

    :param guide: has run before, so that its parameters exist.
    :raises ProgramError: if a site's scores differ, or the guide does not run with several particles.
    """
    key = f"independence of the guide {id(guide)}"
    if key in program.verified or getattr(guide, "is_of_program", False):
        return
    program.verified.add(key)
    with seeded(2), torch.no_grad(), rehearsal(), poutine.block():
        try:
            trace = _alone(replace(program, model=guide), Arbitrary(1))
        except Exception:  # of these values: the guide has run before
            return
        sites = {name: site_of(name, node) for name, node in sample_sites(trace)}
        for name, node in sample_sites(trace):
            check_site(sites[name], node)
        _check(replace(program, model=guide, sites=sites), "guide", trace)


def _check(program: Program, what: str, inspected: Trace, together: Trace | None = None) -> None:
    """Compare particles that run together with the same particles alone.

    :param program: also a guide in its place.
    :param what: program or guide, for the errors.
    :param inspected: a run of one particle.
    :param together: a run of `COMPANY` particles, with that one as `OWN`; None to run others alone first.
    """
    found: dict[str, Tensor] | None = None
    values: list[dict[str, Any]]
    try:
        if together is None:
            alone = _different_particles(program, inspected)
            values = [{site.name: trace.nodes[site.name]["value"] for site in _drawn(program)} for trace in alone]
        else:
            found, values = _scores(program, together, COMPANY), _values_of(program, together)
            alone = [inspected if i == OWN else _alone(program, _assign(x)) for i, x in enumerate(values)]
        expected = _joined(program, alone)
    except Exception:  # the run meets the error too, where it is explained, or has no particle like these
        return
    if found is None:
        found = _found_together(program, what, values)
    different = [name for name in expected if not _agree(found.get(name), expected[name])]
    if different:
        again = _joined(program, [_alone(program, _assign(x)) for x in values])
        different = [name for name in different if _agree(again.get(name), expected[name])]
    if different:
        name = different[0]
        site, other = program.sites[name], "log-probability"
        if site.kind == "deterministic":
            other = "value"
        which = (
            f"the prompts of site {name!r} are others" if site.is_completion else f"site {name!r} has another {other}"
        )
        raise ProgramError(
            f"{which} where particles run together than where each runs alone"
            f"{_shown(found.get(name), expected[name])}: the {what} mixes particles. {ADVICE}"
        )


def _found_together(program: Program, what: str, values: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the scores of particles that run together, at the values that each had alone.

    :raises ProgramError: if they do not run.
    """
    stacked = {}
    for name in values[0]:
        each = [value[name].expand(program.sites[name].shape) for value in values]
        stacked[name] = program.under_plate(name, torch.stack(each))
    try:
        return _scores(program, _in_plate(program, _assign(stacked), len(values)), len(values))
    except MISFITS as error:
        if type(error) not in MISFITS:  # out of memory, a failing reward, or explained already
            raise
        text = str(error).partition("\n")[0]
        raise ProgramError(f"the {what} does not run with several particles: {text.rstrip('.')}. {ADVICE}") from error


class _Company(Messenger):
    """Draw each latent for several particles: `OWN` has the value of one that ran alone, the others have others.

    :param own: the values of that one.
    """

    def __init__(self, program: Program, own: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._program, self._own = program, own

    def _pyro_sample(self, msg: Any) -> None:
        name, fn = msg["name"], msg["fn"]
        if msg["value"] is not None or name not in self._own:
            return
        own = self._program.under_plate(name, self._own[name].expand(self._program.sites[name].shape)[None])
        value = fn.arbitrary(1) if isinstance(fn, Autoregressive) else _far_apart(_others(fn, own), own)
        value = value.clone()
        value[OWN] = own[0]
        msg["value"] = value


def _others(fn: Any, own: Tensor) -> Tensor:
    """Draw values (particle, ...) other than ``own`` (1, ...); of continuous latents, on both sides of it and of 0.

    So the particle is none that a sum, the largest or the smallest of all could be taken for.
    """
    value = fn.sample()
    for _ in range(TRIES):
        if fn.support.is_discrete:
            same = (value == own).reshape(*value.shape[: value.dim() - fn.event_dim], -1).all(-1)
            if not same.any():
                break
            value = torch.where(same.reshape(*same.shape, *[1] * fn.event_dim), fn.sample(), value)
        else:
            sums = value.reshape(COMPANY, -1).sum(1)
            if sums.min() < own.sum().clamp(max=0) and sums.max() > own.sum().clamp(min=0):
                break
            value = fn.sample()
    return value


def _far_apart(value: Tensor, own: Tensor) -> Tensor:
    """Return values (particle, ...) in an order whose `FAR` is the farthest from ``own`` (1, ...).

    Where a program takes one branch for all, by their mean, their largest or their smallest, one of the two takes the
    other alone.
    """
    sums, mine = value.reshape(COMPANY, -1).double().sum(1), float(own.double().sum())
    middle = 0.0 if sums.min() < 0 < sums.max() else float((sums.sum() + mine) / (COMPANY + 1))
    return value.roll(FAR - int(sums.argmin() if mine > middle else sums.argmax()), 0)


def _drawn(program: Program) -> list[Site]:
    """Return the latents whose values are drawn; those of guides may be computed from others (`Delta`)."""
    return [site for site in program.latents if not isinstance(_base(site.fn), Delta)]


def _base(fn: Any) -> Any:
    while isinstance(fn, Independent | MaskedDistribution | ExpandedDistribution):
        fn = fn.base_dist
    return fn


def _values_of(program: Program, trace: Trace) -> list[dict[str, Tensor]]:
    """Return the values that each particle of a run of `COMPANY` has."""
    nodes: dict[str, Any] = trace.nodes
    drawn = {site.name: site_value(site, nodes[site.name]["value"], COMPANY) for site in _drawn(program)}
    return [{name: value[i] for name, value in drawn.items()} for i in range(COMPANY)]


def _stand_alone(program: Program, own: dict[str, Tensor], alone: dict[str, Tensor], together: Trace) -> bool:
    """Return whether the scores of `COMPANY` particles show that they stand alone; if not, that is still open.

    :param own: the values of the particle `OWN`.
    :param alone: its scores (1, ...) where it runs alone.
    :param together: the run of all.
    """
    found = _scores(program, together, COMPANY)

    def is_as_alone(name: str, particle: int, scores: dict[str, Tensor]) -> bool:
        both = name in found and name in scores
        return both and _agree(found[name][particle : particle + 1], scores[name], among=found[name])

    def is_one_for_all(name: str) -> bool:
        site = program.sites[name]
        if site.is_completion or (site.kind == "latent" and site.fn.support.is_discrete):
            return False  # prompts, and probabilities of a uniform distribution, are
        return alone[name].numel() > 0 and bool((found[name] == found[name][:1]).all())

    names = list(alone)
    if other := [name for name in names if not is_as_alone(name, OWN, alone)]:
        again = _scores(program, _alone(program, _assign(own)), 1)
        if any(_agree(again.get(name), alone[name]) for name in other):
            return False
        names = [name for name in names if name not in other]  # those are random
    if any(is_one_for_all(name) for name in alone if name in found):
        return False
    far = _scores(program, _alone(program, _assign(_values_of(program, together)[FAR])), 1)
    return all(is_as_alone(name, FAR, far) for name in names)


def _different_particles(program: Program, inspected: Trace) -> list[Trace]:
    """Run particles one by one until there are 4, and up to 8, until no discrete latent is constant.

    What is mixed cannot be seen on particles that are all alike.
    """
    discrete = [site.name for site in _drawn(program) if not site.is_completion and site.fn.support.is_discrete]
    alone = [inspected, *(_alone(program, Arbitrary(1 + i)) for i in range(3))]

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


def _in_plate(program: Program, handler: Any, num_particles: int) -> Trace:
    """Run several particles in one plate."""
    plate = pyro.plate(PARTICLES, num_particles, dim=-1 - program.max_plate_nesting)
    with explained(), handler, plate:
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
        if name not in program.sites:  # the run refuses programs whose sites change
            continue
        site, fn = program.sites[name], node["fn"]
        if isinstance(fn, Autoregressive):
            ids, mask = prompts_of(fn, (num_particles, *site.shape[: site.batch_dims]))
            scores[name] = ids.masked_fill(mask == 0, -1)
            if fn.where is not None:
                where = fn.where.expand(fn.batch_shape).reshape(*ids.shape[:-1], 1)
                scores[name] = torch.cat([scores[name], where.to(ids)], -1)
        elif site.kind == "deterministic":
            scores[name] = site_value(site, node["value"], num_particles)
        else:
            log_prob = scale_and_mask(fn.log_prob(node["value"]), node["scale"], node["mask"])
            scores[name] = program.terms(log_prob, num_particles, in_prompts(node))
    return scores


def _agree(found: Tensor | None, expected: Tensor, among: Tensor | None = None) -> bool:
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


def _shown(found: Tensor | None, expected: Tensor) -> str:
    """Return the scores for an error, if there is one of each particle."""
    if found is None or found.shape != expected.shape or found.numel() != len(found):
        return ""
    together, alone = (", ".join(f"{x:.6g}" for x in scores.reshape(-1).tolist()) for scores in (found, expected))
    return f" ({together}, not {alone})"
