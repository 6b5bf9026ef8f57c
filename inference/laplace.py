r"""Laplace's approximation: a normal law at the mode, with the curvature there, and what it misses as weights.

    z* = \argmin U(z),    H = \nabla^2 U(z*),    q(z) = Normal(z*, H^{-1}),    w_i = exp(-U(z_i)) / q(z_i)

over real numbers z, each latent being x = f(z), U(z) = -log p(f(z), y) - log |det f'(z)| (Laplace 1774; Tierney and
Kadane 1986; MacKay 1992, "The evidence framework applied to classification networks"). Newton's method finds the mode,
with backtracking (Boyd and Vandenberghe 2004, algorithm 9.5), which ends where the Newton decrement

    \lambda^2 / 2 = g^T H^{-1} g / 2,    the nats that the quadratic model has still to gain,

is small. Where U is not convex on the way, H has its eigenvalues by their absolute values (Dauphin et al. 2014, arXiv
1406.2572). Draws of q are weighed as in importance sampling, so that \hat Z is unbiased and k-hat says how normal the
posterior is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from bayeslm import diagnostics
from bayeslm.inference.markov import Potential, ScoredOnce, score, starting_point, unconstrained_shapes
from bayeslm.inference.program import (
    Program,
    ProgramError,
    Stopwatch,
    check_counts,
    check_positive,
    inspect,
    posterior,
    seeded,
    to_numpy,
)
from bayeslm.posterior import Posterior

STARTS = 100  # points tried, the first of them 0
HALVINGS = 30  # of a Newton step
LONGEST = 1e3  # step tried: beyond it log-densities overflow, where the curvature is all but 0
SUFFICIENT = 0.1  # share of the decrease that the slope promises which a step must keep


@dataclass(frozen=True)
class Laplace:
    """Weighted draws of the normal law at a mode: milliseconds where `NUTS` takes minutes, if the posterior is near it.

    For programs whose latents are continuous and some tens or hundreds in number, as a `BradleyTerry` reward: its
    posterior has one mode, and Newton's method always finds it.

    :param num_samples: draws.
    :param weighted: whether draws have the weights that make them the posterior's. In tens of dimensions few draws have
        most of the weight where k-hat is high, and the normal law itself may serve better: False, and draws are of it.
    :param max_steps: of Newton's method.
    :param tolerance: the Newton decrement, in nats, at which it ends.
    :param batch_size, vectorize, seed: as in `ImportanceSampling`.
    """

    num_samples: int = 500
    weighted: bool = True
    max_steps: int = 100
    tolerance: float = 1e-4
    batch_size: int | None = None
    vectorize: bool = True
    seed: int | None = None

    def __post_init__(self) -> None:
        check_counts(self, "num_samples", "max_steps", "batch_size")
        check_positive(self, "tolerance")

    def run(self, model: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Posterior:
        """Approximate the posterior of ``model(*args, **kwargs)``.

        ``stats``: ``steps`` of Newton's method, ``decrement`` at its end, ``ess`` and ``khat`` of the weights.

        :raises ProgramError: if a latent is not continuous; if prompts are posteriors of their own (run them one by
            one); if no mode is found, or the posterior is flat there.
        :raises EvidenceError: if no starting point has positive probability.
        """
        with seeded(self.seed), Stopwatch() as watch:
            program = inspect(model, *args, **kwargs)
            shapes = unconstrained_shapes(program)
            if program.weight_prompts > 1:
                raise ProgramError(
                    f"the program's {program.weight_prompts} prompts are posteriors of their own: run Laplace on one "
                    "at a time, or put a latent outside the plate"
                )
            scored = ScoredOnce(program)
            batches: dict[str, Any] = {"batch_size": self.batch_size, "vectorize": self.vectorize}
            start = starting_point(program, scored, _starts(program, shapes), **batches)
            mode, hessian, stats = self._mode(Potential(program, scored), start)
            law = _normal(mode, hessian)
            z = law.sample((self.num_samples,))  # (draw, d)
            particles, log_det = score(program, scored, _unflatten(z, start), **batches)
            log_q = (law.log_prob(z) - log_det).to(particles.log_proposal)
            particles = replace(particles, log_proposal=log_q[:, None])
            weights = to_numpy(particles.log_weights)[None]
            stats |= {"ess": diagnostics.ess(weights), "khat": diagnostics.psis(weights)[1]}
            return posterior(
                program,
                particles,
                engine="Laplace",
                kind="weighted" if self.weighted else "uncorrected",
                num_chains=1,
                stats=watch.stats() | stats,
                evidence=diagnostics.log_evidence(weights),
            )

    def _mode(self, potential: Potential, start: dict[str, Tensor]) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """A minimum of U (d,), the Hessian there (d, d), and what Newton's method saw."""
        z = torch.cat([x.reshape(-1) for x in start.values()])
        for steps in range(self.max_steps):
            value, slope, hessian = _derivatives(potential, z, start)
            curvature, axes = torch.linalg.eigh(hessian)
            precision = torch.finfo(z.dtype)
            floor = (curvature.abs().max() * len(z) * precision.eps).clamp_min(precision.tiny)  # less is rounding
            direction = -axes @ ((axes.T @ slope) / curvature.abs().clamp_min(floor))
            promised = -slope @ direction  # lambda^2
            if promised / 2 <= self.tolerance:
                if curvature[0] > floor:
                    return z, hessian, {"steps": steps, "decrement": float(promised / 2)}
                if curvature[0] > -floor:
                    raise ProgramError(
                        "the posterior is flat where its slope is zero: Laplace needs a mode with a curvature. Give "
                        "every latent a proper prior, or use NUTS"
                    )
                direction, promised = axes[:, 0] / curvature[0].abs().sqrt(), torch.ones(())  # down from a saddle
            shrink = (LONGEST / direction.norm()).clamp_max(1.0)
            direction, promised = shrink * direction, shrink * promised
            z = _backtrack(potential, z, start, direction, value, promised)
        raise ProgramError(f"Newton's method found no mode in max_steps={self.max_steps}: allow more, or use NUTS")


def _backtrack(
    potential: Potential, z: Tensor, like: dict[str, Tensor], direction: Tensor, value: Tensor, promised: Tensor
) -> Tensor:
    """The longest of the steps direction * (1, 1/2, 1/4, ...) that lowers U enough."""
    rounding = 8 * torch.finfo(z.dtype).eps * value.abs()
    with torch.no_grad():
        for halvings in range(HALVINGS):
            size = 0.5**halvings
            there = potential(_unflatten(z + size * direction, like))
            if there <= value - SUFFICIENT * size * promised + rounding:
                return z + size * direction
    raise ProgramError("no step of Newton's method lowers U: the log-density is not smooth here, use NUTS")


def _derivatives(potential: Potential, z: Tensor, like: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """U, its gradient (d,) and its Hessian (d, d) at z."""
    z = z.detach().requires_grad_()
    value = potential(_unflatten(z, like))
    (slope,) = torch.autograd.grad(value, z, create_graph=True)
    (hessian,) = torch.autograd.grad(slope, z, torch.eye(len(z)).to(z), is_grads_batched=True)
    if not hessian.isfinite().all():
        raise ProgramError("the log-density has no finite second derivative on the way to its mode: use NUTS")
    return value.detach(), slope.detach(), (hessian + hessian.T) / 2


def _normal(mode: Tensor, hessian: Tensor) -> MultivariateNormal:
    return MultivariateNormal(mode, precision_matrix=hessian)


def _starts(program: Program, shapes: dict[str, torch.Size]) -> dict[str, Tensor]:
    """Points (point, *batch, *event): 0, where most priors are highest, and others of U(-2, 2)."""
    points = {}
    for site in program.latents:
        z = torch.empty((STARTS, *shapes[site.name])).uniform_(-2, 2)
        z[0] = 0.0
        points[site.name] = z.to(site.value)
    return points


def _unflatten(z: Tensor, like: dict[str, Tensor]) -> dict[str, Tensor]:
    """Real numbers (*, d) by site."""
    parts = z.split([x.numel() for x in like.values()], dim=-1)
    return {name: part.reshape((*z.shape[:-1], *like[name].shape)) for name, part in zip(like, parts, strict=True)}
