r"""Moments: the distribution nearest to a posterior that has given expectations.

    argmin_{\pi} mean_c KL(\pi(. | c) || b(. | c))   subject to   mean_c E_\pi[\phi(c, x)] = \mu
      =  b(x | c) exp(\lambda . \phi(c, x)) / Z_\lambda(c),      \lambda = argmin  mean_c log Z_\lambda(c) - \lambda .
      \mu

The prompts c keep their equal weights, and one \lambda holds for all of them. The dual is convex, with gradient E[\phi]
- \mu and Hessian H = mean_c Cov(\phi | c); on weighted draws of b it is a finite sum, solved by Newton's method. If V
is the covariance of the estimated moments at \lambda, that of \lambda is H^-1 V H^-1 (an M-estimator). Source: Csiszár
1975, I-divergence geometry; Khalifa, Elsahar and Dymetman 2021, arXiv 2012.11635; van der Vaart 1998, Asymptotic
statistics, ch. 5.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import numpy as np
from numpy.typing import ArrayLike

from bayeslm.diagnostics import expectation
from bayeslm.posterior import Posterior
from bayeslm.validation import Shape, validated
from bayeslm.weights import POOL, Array, Estimate, ess, normalise

KINDS = ("enumerated", "exact", "weighted", "particles")  # of draws that can be weighted anew
EDGE = 0.999  # of the way to the boundary of what draws can have, where the coefficients are infinite
HALVINGS = 10  # of the step, to find the longest one
SHORTEST = 0.01  # step that is worth another round
DEPENDENT = 1e-9  # the least eigenvalue of correlations, below which moments determine each other


class MomentError(ValueError):
    """Moments that no weights of the draws have, or that too few draws support."""


@dataclass(frozen=True)
class Tilt:
    """An exponential tilt of a posterior: the density is multiplied by exp(coefficients . features)."""

    coefficients: Array
    """(moment,): lambda."""
    stderr: Array
    """(moment,): its standard error, from the draws."""
    step: float
    """The share of the way from the posterior's moments to the targets that the draws support, 1 for all of it."""
    ess: float
    """The effective sample size of the tilted draws of the prompt that has fewest; inf for an enumeration."""


@validated
def fit_tilt(
    posterior: Posterior, features: Array, targets: Array, names: Sequence[str], *, min_ess: float = 50.0
) -> Tilt:
    """Return the tilt of a posterior after which the features have the targets as their means, over prompts too.

    Where the draws do not support all of it, the tilt goes a part of the way; draws of the tilted target may do more.

    :param posterior: weighted or independent draws, particles or an enumeration; each prompt on its own.
    :param features: (chain, draw, prompt, moment), finite where a draw has weight.
    :param targets: (moment,).
    :param names: of the moments, for errors.
    :param min_ess: the least effective sample size of the tilted draws of a prompt.
    :raises MomentError: if the draws support no step, or moments determine each other; with the range of the draws.
    :raises ValueError: if draws of this kind cannot be weighted anew.
    """
    check_kind(posterior)
    log_weights = normalise(posterior.log_weights)
    alive = np.isfinite(log_weights)
    features = np.where(alive[..., None], features, 0.0)
    start = moments(posterior, features)[0]
    scale = _scale(log_weights, features, names)
    scaled = features / scale
    way = (targets - start) / scale
    limit = min(1.0, EDGE * _way_to_edge(scaled, alive, start / scale, way))
    exact = posterior.kind == "enumerated"

    def solved(step: float) -> tuple[Array, float]:
        x = _solve(log_weights, scaled, start / scale + step * way)
        return x, np.inf if exact else float(ess(log_weights + scaled @ x).min())

    step = limit
    x, size = solved(step)
    if size < min_ess:
        step, high = 0.0, limit
        for _ in range(HALVINGS):
            middle = (step + high) / 2
            found, found_size = solved(middle)
            if found_size < min_ess:
                high = middle
            else:
                step, x, size = middle, found, found_size
    if step < SHORTEST or size < min_ess or (exact and step < 1.0):
        raise MomentError(_report(features, alive, start, targets, names, limit, min_ess))
    tilted = tilt(posterior, scaled @ x)
    inverse = np.linalg.inv(_hessian(normalise(tilted.log_weights), scaled))
    stderr = moments(tilted, scaled @ inverse)[1]
    return Tilt(x / scale, stderr / scale, step, size)


@validated
def tilt(posterior: Posterior, log_factor: Annotated[ArrayLike, Shape("chain, draw, prompt")]) -> Posterior:
    """Return the posterior with its density multiplied by exp(log_factor), (chain, draw, prompt), as weighted draws.

    :raises ValueError: if ``log_factor`` is of other draws or prompts.
    """
    if np.shape(log_factor) != posterior.log_weights.shape:
        shapes = posterior.log_weights.shape, np.shape(log_factor)
        raise ValueError("tilt: log_factor must have the shape {} of the log-weights, got {}".format(*shapes))
    kind = "weighted" if posterior.kind == "exact" else posterior.kind
    return replace(posterior, kind=kind, log_weights=posterior.log_weights + log_factor)


@validated
def moments(posterior: Posterior, features: Annotated[ArrayLike, Shape("chain, draw, prompt, moment")]) -> Estimate:
    """Return the means of features (chain, draw, prompt, moment) over draws and prompts, and errors, both (moment,)."""
    features = np.asarray(features)
    each = [expectation(posterior, features[..., j]) for j in range(features.shape[3])]
    means, errors = np.array([mean.mean() for mean, _ in each]), np.array([error for _, error in each])
    return means, np.sqrt((errors**2).sum(axis=1)) / errors.shape[1]


@validated
def check_kind(posterior: Posterior) -> None:
    """Refuse draws that cannot be weighted anew.

    :raises ValueError: if they are of another kind than `KINDS`, or prompts share a latent.
    """
    if posterior.kind not in KINDS:
        raise ValueError(
            f"{posterior.engine} gives {posterior.kind} draws, which cannot be weighted anew for moments: use an "
            "engine of weighted draws, such as ImportanceSampling, SMC or AdaptiveImportance"
        )
    if posterior.log_weights.shape[2] != len(posterior.prompts):
        raise ValueError("moments need prompts that are posteriors of their own, and these share a latent")


def _scale(log_weights: Array, features: Array, names: Sequence[str]) -> Array:
    """Return the standard deviations of the features, (moment,).

    :raises MomentError: if one is constant, or some determine another.
    """
    covariance = _hessian(log_weights, features)
    deviations = np.sqrt(np.diag(covariance))
    for name, deviation, values in zip(names, deviations, np.moveaxis(features, 3, 0), strict=True):
        if deviation <= 1e-12 * max(1.0, np.abs(values).max()):
            raise MomentError(
                f"moment {name!r} is the same in all draws of a prompt, so no weights change it: draw more, or by an "
                "engine whose draws have other values"
            )
    correlations = covariance / np.outer(deviations, deviations)
    if np.linalg.eigvalsh(correlations)[0] < DEPENDENT:
        raise MomentError(f"the moments {', '.join(names)} determine each other in all draws: leave one of them out")
    return deviations


def _hessian(log_weights: Array, features: Array) -> Array:
    """Return the mean over prompts of the covariance of the features, (moment, moment)."""
    weights = np.exp(log_weights)[..., None]
    centred = features - (weights * features).sum(axis=POOL)
    flat = (np.sqrt(weights) * centred).reshape(-1, features.shape[3])
    return np.asarray(flat.T @ flat) / features.shape[2]


def _solve(log_weights: Array, features: Array, targets: Array) -> Array:
    """Return the minimiser of the dual, (moment,)."""
    from scipy.optimize import minimize
    from scipy.special import logsumexp, softmax

    def dual(x: Array) -> tuple[float, Array]:
        logits = log_weights + features @ x
        means = (softmax(logits, axis=POOL)[..., None] * features).sum(axis=POOL).mean(axis=0)
        return float(logsumexp(logits, axis=POOL).mean() - x @ targets), means - targets

    def hessian(x: Array) -> Array:
        return _hessian(normalise(log_weights + features @ x), features)

    found = minimize(dual, np.zeros(len(targets)), jac=True, hess=hessian, method="trust-exact", options={"gtol": 1e-9})
    return np.asarray(found.x)


def _way_to_edge(features: Array, alive: Array, start: Array, way: Array) -> float:
    """Return the largest t for which some weights of the draws have the moments start + t way; inf without a way.

    A linear program in t and a weight for each distinct value of the features in each prompt.
    """
    from scipy.optimize import linprog

    if np.abs(way).max() < 1e-12:
        return np.inf
    count = features.shape[2]
    values = [np.unique(features[:, :, c][alive[:, :, c]], axis=0) for c in range(count)]
    rows = np.concatenate(values)
    owner = np.repeat(np.arange(count), [len(v) for v in values])
    sums = (owner == np.arange(count)[:, None]).astype(float)
    equal = np.block([[rows.T / count, -way[:, None]], [sums, np.zeros((count, 1))]])
    found = linprog(
        np.append(np.zeros(len(rows)), -1.0), A_eq=equal, b_eq=np.append(start, np.ones(count)), bounds=(0, None)
    )
    return float(found.x[-1]) if found.success else 0.0


def _report(
    features: Array, alive: Array, start: Array, targets: Array, names: Sequence[str], limit: float, min_ess: float
) -> str:
    """Return which moments are out of reach, and what the draws have."""
    low = np.where(alive[..., None], features, np.inf).min(axis=POOL).mean(axis=0)
    high = np.where(alive[..., None], features, -np.inf).max(axis=POOL).mean(axis=0)
    parts = [
        f"{name!r} is {now:.4g} and is to be {goal:.4g}, and draws can have {least:.4g} to {most:.4g}"
        for name, now, goal, least, most in zip(names, start, targets, low, high, strict=True)
    ]
    outside = bool(((targets <= low) | (targets >= high)).any())
    why = (
        "are outside of what was drawn"
        if outside
        else "contradict each other: no weights of the draws have all of them"
        if limit < 1.0
        else f"leave fewer than {min_ess:g} effective draws"
    )
    advice = "draw more, or by an engine that finds rare texts, such as AdaptiveImportance"
    return f"the moments {why}: {'; '.join(parts)}. Correct them, {advice}"
