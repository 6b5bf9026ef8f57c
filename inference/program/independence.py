"""Whether particles of a program or a guide stand alone: a few must get the same scores together as one by one.

Engines run all particles at once, in an outermost plate. A program whose data stand in dimensions that no plate
declares, or that sums over all of a tensor, mixes them there: silently, where a size happens to be the number of
particles.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from bayeslm.models.lm import Autoregressive
from bayeslm.models.rewards import rehearsal
from bayeslm.validation import validated

from .errors import ProgramError
from .handlers import Arbitrary, seeded
from .program import Program
from .sites import check_site, sample_sites, site_of
from .trials import (
    agree,
    assigned,
    drawn_sites,
    joined,
    run_alone,
    run_together,
    scores_of,
    shown,
    together_at,
    values_of,
)

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


@validated
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
            reference = scores_of(program, inspected, 1)
            own: dict[str, Any] = {site.name: inspected.nodes[site.name]["value"] for site in drawn_sites(program)}
            together = run_together(program, _Company(program, own), COMPANY)
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
        if (inspected := program_of_guide(program, guide)) is not None:
            _check(*inspected)


def program_of_guide(program: Program, guide: Callable[..., Any]) -> tuple[Program, str, Trace] | None:
    """Return a guide in the program's place, what it is called, and a run of it; None if it fails at arbitrary values.

    :raises ProgramError: if a site has a batch dimension that no plate declares.
    """
    try:
        trace = run_alone(replace(program, model=guide), Arbitrary(1))
    except Exception:  # of these values: the guide has run before
        return None
    sites = {name: site_of(name, node) for name, node in sample_sites(trace)}
    for name, node in sample_sites(trace):
        check_site(sites[name], node)
    return replace(program, model=guide, sites=sites), "guide", trace


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
            values = [{site.name: trace.nodes[site.name]["value"] for site in drawn_sites(program)} for trace in alone]
        else:
            found, values = scores_of(program, together, COMPANY), values_of(program, together, COMPANY)
            alone = [inspected if i == OWN else run_alone(program, assigned(x)) for i, x in enumerate(values)]
        expected = joined(program, alone)
    except Exception:  # the run meets the error too, where it is explained, or has no particle like these
        return
    if found is None:
        found = _found_together(program, what, values)
    different = [name for name in expected if not agree(found.get(name), expected[name])]
    if different:
        again = joined(program, [run_alone(program, assigned(x)) for x in values])
        different = [name for name in different if agree(again.get(name), expected[name])]
    if different:
        raise mixing(program, what, different[0], found.get(different[0]), expected[different[0]])


def mixing(program: Program, what: str, name: str, found: Tensor | None, expected: Tensor) -> ProgramError:
    """Return the error that a site has other scores (particle, ...) where particles run together."""
    site = program.sites[name]
    other = "value" if site.kind == "deterministic" else "log-probability"
    which = f"the prompts of site {name!r} are others" if site.is_completion else f"site {name!r} has another {other}"
    return ProgramError(
        f"{which} where particles run together than where each runs alone{shown(found, expected)}: the {what} mixes "
        f"particles. {ADVICE}"
    )


def _found_together(program: Program, what: str, values: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the scores of particles that run together, at the values that each had alone.

    :raises ProgramError: if they do not run.
    """
    try:
        return scores_of(program, together_at(program, values), len(values))
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


def _stand_alone(program: Program, own: dict[str, Tensor], alone: dict[str, Tensor], together: Trace) -> bool:
    """Return whether the scores of `COMPANY` particles show that they stand alone; if not, that is still open.

    :param own: the values of the particle `OWN`.
    :param alone: its scores (1, ...) where it runs alone.
    :param together: the run of all.
    """
    found = scores_of(program, together, COMPANY)

    def is_as_alone(name: str, particle: int, scores: dict[str, Tensor]) -> bool:
        both = name in found and name in scores
        return both and agree(found[name][particle : particle + 1], scores[name], among=found[name])

    def is_one_for_all(name: str) -> bool:
        site = program.sites[name]
        if site.is_completion or (site.kind == "latent" and site.fn.support.is_discrete):
            return False  # prompts, and probabilities of a uniform distribution, are
        return alone[name].numel() > 0 and bool((found[name] == found[name][:1]).all())

    names = list(alone)
    if other := [name for name in names if not is_as_alone(name, OWN, alone)]:
        again = scores_of(program, run_alone(program, assigned(own)), 1)
        if any(agree(again.get(name), alone[name]) for name in other):
            return False
        names = [name for name in names if name not in other]  # those are random
    if any(is_one_for_all(name) for name in alone if name in found):
        return False
    far = scores_of(program, run_alone(program, assigned(values_of(program, together, COMPANY)[FAR])), 1)
    return all(is_as_alone(name, FAR, far) for name in names)


def _different_particles(program: Program, inspected: Trace) -> list[Trace]:
    """Run particles one by one until there are 4, and up to 8, until no discrete latent is constant.

    What is mixed cannot be seen on particles that are all alike.
    """
    discrete = [site.name for site in drawn_sites(program) if not site.is_completion and site.fn.support.is_discrete]
    alone = [inspected, *(run_alone(program, Arbitrary(1 + i)) for i in range(3))]

    def are_constant() -> bool:
        values: list[list[Any]] = [[trace.nodes[name]["value"] for name in discrete] for trace in alone]
        first, *rest = values
        return any(all(torch.equal(x, y[i]) for y in rest) for i, x in enumerate(first))

    while len(alone) < 8 and are_constant():
        alone.append(run_alone(program, Arbitrary(1 + len(alone))))
    return alone
