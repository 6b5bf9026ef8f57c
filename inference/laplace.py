r"""Laplace's approximation: a normal distribution at the mode with the curvature there, and weights that correct it.

    z* = \argmin U(z),    H = \nabla^2 U(z*),    q(z) = Normal(z*, H^{-1}),    w_i = exp(-U(z_i)) / q(z_i)

over real numbers z, each latent being x = f(z), U(z) = -log p(f(z), y) - log |det f'(z)| (Laplace 1774; Tierney and
Kadane 1986; MacKay 1992, "The evidence framework applied to classification networks"). Newton's method with
backtracking (Boyd and Vandenberghe 2004, algorithm 9.5) finds the mode. It ends where the Newton decrement

    \lambda^2 / 2 = g^T H^{-1} g / 2,    the decrease of U in nats that the quadratic model still predicts,

is small. Where U is not convex, the eigenvalues of H are replaced by their absolute values (Dauphin et al. 2014, arXiv
1406.2572). Draws of q are weighted as in importance sampling, so that \hat Z is unbiased, and k-hat measures how far
the posterior is from normal.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from bayeslm import diagnostics
from bayeslm.inference.markov import Potential, ScoreOnce, score_unconstrained, starting_point, unconstrained_shapes
from bayeslm.inference.program import (
    ProgramError,
    inspect,
    posterior,
    running,
    to_numpy,
)
from bayeslm.posterior import Posterior
from bayeslm.progress import Report, track
from bayeslm.validation import Count, Positive, Seed, validated

HALVINGS = 30  # of one Newton step
LONGEST = 1e3  # norm of a step: where the curvature is nearly 0, log-densities overflow at longer ones
SUFFICIENT = 0.1  # a step must lower U by this share of the decrease that the slope predicts


@validated
@dataclass(frozen=True)
class Laplace:
    """Weighted draws of the normal approximation at a mode, in milliseconds where `NUTS` takes minutes.

    It is for programs with some tens or hundreds of continuous latents and a posterior that is nearly normal, such as a
    `BradleyTerry` reward: its posterior has one mode, which Newton's method always finds.

    :param num_samples: the number of draws.
    :param weighted: whether draws have the weights that correct the approximation. In tens of dimensions, where
        k-hat is high, a few draws have most of the weight, and the normal approximation itself may serve better: False
        gives all draws equal weights.
    :param max_steps: the largest number of steps of Newton's method.
    :param tolerance: the Newton decrement, in nats, at which it ends.
    :param batch_size: the number of particles in one run of the program; None for as many as bounded memory allows.
    :param vectorize: whether one run of the program holds all particles of a batch. False runs them one by one, for
        programs whose Python code depends on the value of a latent.
    :param seed: seed of all random numbers; None draws from the global random state.
    :param progress: whether to show the progress.
    :raises ValueError: if a setting is out of range.
    """

    num_samples: Count = 500
    weighted: bool = True
    max_steps: Count = 100
    tolerance: Positive = 1e-4
    batch_size: Count | None = None
    vectorize: bool = True
    seed: Seed | None = None
    progress: bool = True

    def run(self, model: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Posterior:
        """Approximate the posterior of ``model(*args, **kwargs)``; log Z is estimated from the weights.

        ``stats``: ``steps`` of Newton's method; ``decrement`` at its end; ``ess`` (prompt,), the effective sample size
        of the weights, and ``khat`` (prompt,), the shape of their tail, whether the draws are weighted or not;
        ``seconds``, ``tokens`` and ``model_calls``.

        :raises ProgramError: if a latent is not continuous; if prompts are posteriors of their own (run them one by
            one); if no mode is found, or the posterior is flat there.
        :raises EvidenceError: if no starting point has positive probability.
        """
        with running(self.seed) as watch:
            program = inspect(model, *args, **kwargs)
            shapes = unconstrained_shapes(program)
            if program.weight_prompts > 1:
                raise ProgramError(
                    f"the program's {program.weight_prompts} prompts are posteriors of their own: run Laplace on one "
                    "at a time, or put a latent outside the plate"
                )
            score_once = ScoreOnce(program)
            batches: dict[str, Any] = {"batch_size": self.batch_size, "vectorize": self.vectorize}
            start = starting_point(program, score_once, shapes, zero_first=True, **batches)
            mode, hessian, stats = self._mode(Potential(program, score_once), start)
            normal = MultivariateNormal(mode, precision_matrix=hessian)
            z = normal.sample((self.num_samples,))  # (draw, d)
            particles, log_det = score_unconstrained(program, score_once, _unflatten(z, start), **batches)
            log_q = (normal.log_prob(z) - log_det).to(particles.log_proposal)
            particles = replace(particles, log_proposal=log_q[:, None])
            weights = to_numpy(particles.log_weights)[None]
            stats |= diagnostics.quality(weights)
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
        """Return a minimum of U (d,), the Hessian there (d, d), and ``steps`` and ``decrement`` of Newton's method."""
        z = torch.cat([x.reshape(-1) for x in start.values()])
        with track("Laplace", None, self.progress) as report:
            return self._newton(potential, z, start, report)

    def _newton(
        self, potential: Potential, z: Tensor, start: dict[str, Tensor], report: Report
    ) -> tuple[Tensor, Tensor, dict[str, Any]]:
        for steps in range(self.max_steps):
            report()
            value, slope, hessian = _derivatives(potential, z, start)
            curvature, axes = torch.linalg.eigh(hessian)
            precision = torch.finfo(z.dtype)
            floor = (curvature.abs().max() * len(z) * precision.eps).clamp_min(precision.tiny)  # rounding error
            direction = -axes @ ((axes.T @ slope) / curvature.abs().clamp_min(floor))
            predicted = -slope @ direction  # lambda^2
            if predicted / 2 <= self.tolerance:
                if curvature[0] > floor:
                    return z, hessian, {"steps": steps, "decrement": float(predicted / 2)}
                if curvature[0] > -floor:
                    raise ProgramError(
                        "the posterior is flat where its slope is zero, but Laplace needs a mode with curvature: give "
                        "every latent a proper prior, or use NUTS"
                    )
                direction, predicted = axes[:, 0] / curvature[0].abs().sqrt(), torch.ones(())  # down from a saddle
            shrink = (LONGEST / direction.norm()).clamp_max(1.0)
            direction, predicted = shrink * direction, shrink * predicted
            z = _backtrack(potential, z, start, direction, value, predicted)
        raise ProgramError(f"Newton's method found no mode in max_steps={self.max_steps}: raise max_steps, or use NUTS")


def _backtrack(
    potential: Potential, z: Tensor, like: dict[str, Tensor], direction: Tensor, value: Tensor, predicted: Tensor
) -> Tensor:
    """Return the point after the longest of the steps direction * (1, 1/2, 1/4, ...) that lowers U enough.

    :param potential: U.
    :param z: the present point, (d,).
    :param like: tensors of the latents' shapes, by site.
    :param direction: the full step, (d,).
    :param value: U at z.
    :param predicted: the decrease of U along the full step by its slope.
    """
    rounding = 8 * torch.finfo(z.dtype).eps * value.abs()
    with torch.no_grad():
        for halvings in range(HALVINGS):
            size = 0.5**halvings
            if potential(_unflatten(z + size * direction, like)) <= value - SUFFICIENT * size * predicted + rounding:
                return z + size * direction
    raise ProgramError("no step of Newton's method lowers U: the log-density is not smooth here, use NUTS")


def _derivatives(potential: Potential, z: Tensor, like: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Return U, its gradient (d,) and its Hessian (d, d) at z."""
    z = z.detach().requires_grad_()
    value = potential(_unflatten(z, like))
    (slope,) = torch.autograd.grad(value, z, create_graph=True)
    (hessian,) = torch.autograd.grad(slope, z, torch.eye(len(z)).to(z), is_grads_batched=True)
    if not hessian.isfinite().all():
        raise ProgramError(
            "Newton's method met a point where the log-density has no finite second derivative: use NUTS"
        )
    return value.detach(), slope.detach(), (hessian + hessian.T) / 2


def _unflatten(z: Tensor, like: dict[str, Tensor]) -> dict[str, Tensor]:
    """Split real numbers (*, d) by site, (*, *batch, *event)."""
    parts = z.split([x.numel() for x in like.values()], dim=-1)
    return {name: part.reshape((*z.shape[:-1], *like[name].shape)) for name, part in zip(like, parts, strict=True)}
