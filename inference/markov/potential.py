r"""Programs whose latents are all continuous, as a potential U of unconstrained real numbers z.

Each latent is x = f(z) with f the bijection onto its support, and

    U(z) = -log p(f(z), y) - log |det f'(z)|
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.ops.integrator import potential_grad
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor
from torch.distributions import biject_to

from bayeslm.inference.program import (
    Assign,
    Assignment,
    Particles,
    Program,
    ProgramError,
    check_evidence,
    run_particles,
    same_distribution,
    sample_sites,
    to_numpy,
)
from bayeslm.models.lm import Autoregressive
from bayeslm.validation import validated

STARTS = 100  # points that `starting_point` tries


class Unconstrained:
    """Assignments of f(z) to continuous latents, for one run of a program.

    A support may depend on earlier latents, so f is the bijection of the site's distribution in the run.

    :param z: real numbers by site, in the site's shape, except for event dims that the bijection changes.
    """

    def __init__(self, z: dict[str, Tensor]) -> None:
        self._z = z
        self.log_dets: dict[str, Tensor] = {}
        """log |det f'(z)| by site, in the shape of its batch; set by the run."""

    def assignments(self) -> dict[str, Callable[[Any], Assignment]]:
        """Return the assignment of each site, for `Assign`."""
        return {name: partial(self._assignment, name) for name in self._z}

    def _assignment(self, name: str, fn: Any) -> Assignment:
        to_support, z = biject_to(fn.support), self._z[name]
        value = to_support(z)
        self.log_dets[name] = to_support.log_abs_det_jacobian(z, value)
        return value, None

    @property
    def log_det(self) -> Tensor:
        """log |det f'(z)| of all sites and particles, a scalar."""
        return torch.stack([log_det.sum() for log_det in self.log_dets.values()]).sum()

    def log_det_of_each(self, num_particles: int) -> Tensor:
        """Return log |det f'(z)| of each particle, (particle,); particles are the first axis of z."""
        each = [log_det.reshape(num_particles, -1).sum(-1) for log_det in self.log_dets.values()]
        return torch.stack(each).sum(0)


@validated
class ScoreOnce(Messenger):
    """Score an observed or conditioned completion once, and again only after its value, prompts or network changed.

    Its log p is a constant: no network runs at a leapfrog step, and no gradient passes through one.

    :param program: the inspected program.
    """

    def __init__(self, program: Program) -> None:
        super().__init__()
        sites = [site for site in program.sites.values() if site.is_completion]
        # by site: distribution, value, and log p once it is needed
        self._scored: dict[str, tuple[Any, Tensor, Tensor | None]] = {s.name: (s.fn, s.value, None) for s in sites}

    def _pyro_sample(self, msg: Any) -> None:
        name, fn, value = msg["name"], msg["fn"], msg["value"]
        if value is None or not isinstance(fn, Autoregressive):
            return
        scored, old, log_prob = self._scored[name]
        batch = fn.batch_shape[len(fn.batch_shape) - len(scored.batch_shape) :]
        if not (batch == scored.batch_shape and same_distribution(fn, scored) and torch.equal(old, value)):
            scored, old, log_prob = fn, value, None
        if log_prob is None:
            with torch.no_grad():
                log_prob = scored.log_prob(old)
            self._scored[name] = (scored, old, log_prob)
        msg["fn"] = dist.Delta(value.expand(fn.shape()), log_prob.expand(fn.batch_shape), event_dim=1)


class Potential:
    """The potential U of a program, a differentiable function of z, for Pyro's NUTS.

    :param program: the inspected program.
    :param score_once: the handler that scores its completions.
    """

    def __init__(self, program: Program, score_once: ScoreOnce) -> None:
        self._program = program
        self._score_once = score_once

    def __call__(self, z: dict[str, Tensor]) -> Tensor:
        """Return U(z), a scalar.

        :param z: real numbers (*batch, *event) by site.
        :raises ProgramError: if the run has other latents than ``z``.
        """
        at = Unconstrained(z)
        with self._score_once, Assign(at.assignments()):
            trace = poutine.trace(self._program.model).get_trace(*self._program.args, **self._program.kwargs)
        trace = prune_subsample_sites(trace)
        latents = {name for name, node in sample_sites(trace) if not node["is_observed"]}
        if latents != z.keys():
            raise ProgramError(
                f"the program's latents changed between runs: {sorted(latents)} now, {sorted(z)} when it was inspected"
            )
        return -torch.as_tensor(trace.log_prob_sum() + at.log_det)


@validated
def unconstrained_shapes(program: Program) -> dict[str, torch.Size]:
    """Return the shape of the real numbers z of every latent, by site.

    :raises ProgramError: if a latent is not continuous.
    """
    shapes = {}
    for site in program.latents:
        if site.is_completion:
            raise ProgramError(
                f"site {site.name!r} is a completion, but this engine needs continuous latents: observe it (obs=...), "
                "or use MCMC, which redraws its suffixes"
            )
        if site.fn.support.is_discrete:
            raise ProgramError(
                f"site {site.name!r} is discrete, but this engine needs continuous latents: observe it, or use MCMC"
            )
        try:
            shapes[site.name] = biject_to(site.fn.support).inv(site.value).shape
        except NotImplementedError as error:
            raise ProgramError(
                f"site {site.name!r} has the support {site.fn.support}, onto which PyTorch has no bijection from real "
                "numbers: use ImportanceSampling or SVI"
            ) from error
    return shapes


def score_unconstrained(
    program: Program, score_once: ScoreOnce, z: dict[str, Tensor], *, batch_size: int | None, vectorize: bool
) -> tuple[Particles, Tensor]:
    """Run and score the program at f(z), in batches of bounded memory.

    :param program: the inspected program.
    :param score_once: the handler that scores its completions.
    :param z: real numbers (draw, *batch, *event) by site.
    :param batch_size: draws in one run; None for as many as bounded memory allows.
    :param vectorize: whether one run holds all draws of a batch.
    :returns: the particles, one a draw, and log |det f'(z)| of each, (draw,).
    """
    draws = len(next(iter(z.values())))
    parts, log_dets = [], []
    for rows in torch.arange(draws).split((batch_size or program.particles_a_run) if vectorize else 1):
        at = Unconstrained({name: program.under_plate(name, x[rows]) for name, x in z.items()})
        with score_once, Assign(at.assignments()):
            parts.append(run_particles(program, None, len(rows), vectorize=vectorize))
        log_dets.append(at.log_det_of_each(len(rows)))
    return Particles.concatenate(parts), torch.cat(log_dets)


@validated
def starting_point(
    program: Program,
    score_once: ScoreOnce,
    shapes: dict[str, torch.Size],
    *,
    zero_first: bool,
    batch_size: int | None,
    vectorize: bool,
) -> dict[str, Tensor]:
    """Draw points from U(-2, 2) and return the first with positive posterior density, for each prompt.

    :param program: the inspected program.
    :param score_once: the handler that scores its completions.
    :param shapes: `unconstrained_shapes`.
    :param zero_first: whether the first point is 0, near the mode of most priors.
    :param batch_size: points in one run; None for as many as bounded memory allows.
    :param vectorize: whether one run holds all points of a batch.
    :returns: real numbers (*batch, *event) by site.
    :raises EvidenceError: if the density is 0 at all points.
    :raises ProgramError: if the log-density has no finite gradient there.
    """
    z = {}
    for site in program.latents:
        points = torch.empty((STARTS, *shapes[site.name])).uniform_(-2, 2)
        if zero_first:
            points[0] = 0.0
        z[site.name] = points.to(site.value)
    particles, _ = score_unconstrained(program, score_once, z, batch_size=batch_size, vectorize=vectorize)
    check_evidence(to_numpy(particles.log_joint)[None], program)
    first = particles.log_joint.isfinite().long().argmax(0, keepdim=True)  # (1, prompt)
    z = {name: program.take(name, x, first)[0] for name, x in z.items()}
    gradient, _ = potential_grad(Potential(program, score_once), z)
    for name, slope in gradient.items():
        if not slope.isfinite().all():
            raise ProgramError(
                f"the gradient of the log-density along site {name!r} is not finite at the starting point: make the "
                "program differentiable in it, or use ImportanceSampling or MCMC"
            )
    return z
