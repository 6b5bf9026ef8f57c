"""Importance weights, given as log weights (chain, draw, prompt): their mean, effective sample size and smoothing.

A log weight may be −inf (a draw that breaks a constraint); NaN and +inf raise ValueError. Every function pools chains
and draws and returns one value for each prompt.
"""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .validation import Shape, validated

Array = NDArray[Any]
PerDraw = Annotated[Array, Shape("chain, draw, prompt")]
Estimate = tuple[Array, Array]  # (estimate, standard error)

POOL = (0, 1)  # the chain and draw axes
KHAT_LIMIT = 0.7  # above it, estimates by importance weights are unreliable (Vehtari et al., arXiv 1507.02646)
MIN_TAIL = 10  # draws in the tail, below which ties that are not exact cannot be told from a continuous tail
TIE = 1e-4  # log weights closer than this count as equal: the precision of sums of float32 log-probabilities
NEARLY_EQUAL = 0.01  # nats: a tail whose log weights have a smaller scale than this has weights that are nearly equal
JACKKNIFE_ESS = 100.0  # below it, errors of independent draws are by the jackknife
LARGE = 1e6  # nats
LUMPY = 0.1  # the median of the normalised gaps of a tail over their mean: ln 2 for an exponential one, 0 for levels


def _logsumexp(x: Array, axis: int | tuple[int, ...]) -> Array:
    from scipy.special import logsumexp  # here: its import takes longer than the face's

    total: Array = logsumexp(x, axis=axis)
    return total


@validated
def log_evidence(log_weights: ArrayLike, roots: ArrayLike | None = None) -> Estimate:
    """Estimate log Z = log mean(w), and its standard error, both (prompt,).

    mean(w) is unbiased for Z; its logarithm is low by about var(w) / (2 N Z²). The influence of a draw is
    φ = w / mean(w), so the standard error for independent draws is sd(w) / (mean(w) √N); for particles see
    `standard_error`. If every weight is zero the estimate is −inf and its standard error inf.
    Source: Owen 2013, Monte Carlo theory, methods and examples, ch. 9.

    :param log_weights: (chain, draw, prompt), of independent weighted draws or of particles.
    :param roots: of particles, see `Posterior.roots`.
    """
    lw = as_log_weights(log_weights)
    estimate = _logsumexp(lw, axis=POOL) - np.log(num_draws(lw))
    return estimate, standard_error(estimate, evidence_influence(lw, roots), roots=roots)


@validated
def chain_log_evidence(log_weights: ArrayLike) -> Array:
    """Return log Ẑ of each chain, the log mean weight of its draws, (chain, prompt)."""
    lw = as_log_weights(log_weights)
    return _logsumexp(lw, axis=1) - np.log(lw.shape[1])


@validated
def conditional_log_evidence(log_weights: ArrayLike) -> Estimate:
    """Estimate log Z of conditional runs, and its standard error, both (prompt,); NaN where a weight is zero.

    1 / Ẑ of a chain is unbiased for 1 / Z, unless all its weights can be 0.
    """
    lw = as_log_weights(log_weights)
    inverse, stderr = log_evidence(-chain_log_evidence(lw)[:, None])
    unknown = np.isneginf(lw).any(POOL)
    return np.where(unknown, np.nan, -inverse), np.where(unknown, np.nan, stderr)


@validated
def ess(log_weights: ArrayLike) -> Array:
    """Return Kish's effective sample size (Σw)² / Σw², (prompt,); 0 if every weight is zero.

    Source: Kish 1965, Survey Sampling.
    """
    weights = _relative(as_log_weights(log_weights))
    return weights.sum(axis=POOL) ** 2 / np.maximum(np.sum(weights**2, axis=POOL), np.finfo(float).tiny)


@validated
def smallest_ess(
    log_weights: ArrayLike, ess_by_step: Annotated[ArrayLike, Shape("chain, step, prompt")] | None
) -> Array:
    """Return the smallest effective sample size of particles along the way, (prompt,).

    Resampling makes weights equal again, so that the ESS at the end says little.

    :param ess_by_step: (chain, step, prompt), before each resampling, of which the chains' are summed; None for draws
        without steps.
    """
    size = ess(log_weights)
    if ess_by_step is None:
        return size
    return np.asarray(np.minimum(size, np.asarray(ess_by_step, dtype=float).sum(axis=0).min(axis=0, initial=np.inf)))


@validated
def psis(log_weights: ArrayLike) -> tuple[Array, Array]:
    """Return Pareto-smoothed log weights (chain, draw, prompt), normalised for each prompt, and k̂, (prompt,).

    The largest weights are replaced by quantiles of a generalised Pareto distribution fitted to them (by ArviZ), whose
    tail index is k̂. Below 0.7 the estimates can be trusted; above, the proposal misses part of the posterior. Draws of
    zero weight keep it and take no part in the fit.

    k̂ is NaN, and the weights stay raw, if the tail is not that of a continuous distribution: `khat_reasons` says why. k̂
    is inf, and the weights stay raw, if the tail is too heavy to be fitted.
    Source: Vehtari, Simpson, Gelman, Yao, Gabry 2024, arXiv 1507.02646.

    :raises ValueError: if every weight of a prompt is zero.
    """
    from bayeslm.arviz_versions import psislw

    smoothed = normalise(log_weights)
    khat = np.full(smoothed.shape[2], np.nan)
    for prompt in range(smoothed.shape[2]):
        column = smoothed[..., prompt]
        alive = np.isfinite(column)
        if not _tail_problem(column[alive]):
            values, khat[prompt] = psislw(column[alive])
            if np.isfinite(khat[prompt]) and np.isfinite(values).all():
                column[alive] = values
            else:
                khat[prompt] = np.inf
    return normalise(smoothed), khat


@validated
def quality(log_weights: ArrayLike) -> dict[str, Any]:
    """Return ``ess`` and ``khat`` (prompt,), and ``khat_reason`` where a k̂ is NaN: why, and what to look at instead."""
    reasons = khat_reasons(log_weights)
    found = {"ess": ess(log_weights), "khat": psis(log_weights)[1]}
    return found | ({"khat_reason": reasons} if any(reasons) else {})


@validated
def khat_reasons(log_weights: ArrayLike) -> list[str]:
    """Return for each prompt why its k̂ is NaN, and what to look at instead, or an empty string where it is a number.

    The reasons: few draws of positive weight, weights that are all equal, or largest weights that are equal or nearly
    equal or lie on few levels, as those of a reward of 0 or 1 or of counts (`bayeslm.reliability.levels`).
    """
    lw = as_log_weights(log_weights)
    return [_tail_problem(column[np.isfinite(column)]) for column in lw.reshape(-1, lw.shape[2]).T]


@validated
def smoothed_where_reliable(log_weights: ArrayLike) -> Array:
    """Return normalised log weights (chain, draw, prompt), Pareto-smoothed where k̂ < 0.7, else raw.

    Where k̂ is larger, or cannot be told, the fitted tail is not that of the weights, and its quantiles would move the
    estimates by any amount.

    :raises ValueError: if every weight of a prompt is zero.
    """
    smoothed, khat = psis(log_weights)
    return np.where(khat < KHAT_LIMIT, smoothed, normalise(log_weights))


@validated
def normalise(log_weights: ArrayLike) -> Array:
    """Return a copy of the log weights, shifted so that the weights of each prompt sum to 1 over chains and draws.

    :raises ValueError: if every weight of a prompt is zero.
    """
    lw = as_log_weights(log_weights)
    total = _logsumexp(lw, axis=POOL)
    if (dead := np.flatnonzero(np.isneginf(total))).size:
        raise ValueError(
            f"every draw of prompt {', '.join(map(str, dead))} has weight zero (log weight -inf), so none meets the "
            "constraint: use more draws, a better proposal or a softer reward"
        )
    shifted: Array = lw - total
    if (large := np.abs(total) > LARGE).any():  # whose own rounding would count
        shifted[..., large] -= _logsumexp(shifted[..., large], axis=POOL)
    return shifted


@validated
def as_log_weights(log_weights: ArrayLike) -> Array:
    """Return a copy of the log weights as floats.

    :raises ValueError: if they are not (chain, draw, prompt), empty, NaN or +inf.
    """
    lw = np.array(log_weights, dtype=float)
    if lw.ndim != 3 or lw.size == 0:
        raise ValueError(f"log_weights must be (chain, draw, prompt) and not empty, not {lw.shape}")
    if np.isnan(lw).any() or np.isposinf(lw).any():
        raise ValueError("log_weights must be finite or -inf: found NaN or +inf")
    return lw


def num_draws(array: Annotated[Array, Shape("chain, draw, ...")]) -> int:
    """Return the number of draws in all chains."""
    return array.shape[0] * array.shape[1]


@validated
def evidence_influence(log_weights: PerDraw, roots: ArrayLike | None = None) -> Array:
    """Return the influence of each draw on log mean(w) up to a constant, (chain, draw, prompt).

    φ = w / mean(w); where the ESS of independent draws is small, that of the jackknife (`jackknife_influence`).
    """
    weights = _relative(log_weights)
    total = np.maximum(weights.sum(axis=POOL), np.finfo(float).tiny)
    phi = weights * num_draws(weights) / total
    if roots is None and (few := has_small_ess(log_weights)).any():
        with np.errstate(divide="ignore"):
            without = np.log(np.maximum(total - weights, 0.0))
        phi = np.where(few, jackknife_influence(without), phi)
    return phi


def has_small_ess(log_weights: Array) -> Array:
    """Return whether the jackknife takes the place of the delta method, (prompt,)."""
    return ess(log_weights) < JACKKNIFE_ESS


@validated
def jackknife_influence(without: PerDraw) -> Array:
    """Return φ_i = (N − 1) (mean(θ_−) − θ_−i), whose variance over N is that of the jackknife, (chain, draw, prompt).

    Where few draws have most of the weight, the estimate is far from linear in a draw's share, and the delta method's
    error is too small. In 14 families of weights with 64 to 1024 draws the share of log Z, E[l] and KL within two
    errors was never lower, and by up to 0.24 higher where the ESS was below 20; above 100 both are the same.
    Source: Efron and Stein 1981, The jackknife estimate of variance; Owen 2013, ch. 9.

    :param without: θ_−i, the estimate without draw i, (chain, draw, prompt).
    """
    with np.errstate(invalid="ignore"):  # an estimate that needs one draw has no error: NaN, which is shown as inf
        return (num_draws(without) - 1) * (without.mean(axis=POOL) - without)


@validated
def standard_error(
    estimate: Array,
    influence: PerDraw,
    *,
    size: Array | None = None,
    roots: ArrayLike | None = None,
) -> Array:
    """Return √(var(φ) / N), the standard error of an estimator with influence φ, (prompt,).

    Particles that share a root are dependent, so all descendants of a root count as one draw. With S_k = Σ φ over the
    descendants of root k (0 if it has none) and K roots that have some,

        var = K / (K − 1) Σ_k (S_k − mean(S))² / N²,    k = 1 ... N.

    For an expectation this is consistent; for log Z it may be high, by at most the number of resamplings over N (under
    multinomial resampling; less under the other schemes). Where the particles of each chain have one root in common, S
    of these roots alone is compared: then chains are the draws.
    Source: Chan and Lai 2013, arXiv 1312.5114; Lee and Whiteley 2018, arXiv 1509.00394.

    :param estimate: (prompt,).
    :param influence: φ, up to a constant, (chain, draw, prompt).
    :param size: the effective number of draws of a Markov chain, which replaces N, (prompt,).
    :param roots: of particles, see `Posterior.roots`.
    :returns: inf where the error is unknown: for one draw, one root, or an infinite estimate.
    """
    count = clusters = num_draws(influence)
    is_draw = np.ones(influence.shape, dtype=bool)
    if roots is not None:
        influence, alive = by_root(influence, np.asarray(roots))
        clusters = alive.sum(axis=POOL)
        is_draw = alive | (clusters > len(alive))  # with a root for each chain, its number of descendants is known
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = influence.sum(axis=POOL) / is_draw.sum(axis=POOL)
        spread = np.sum(np.where(is_draw, influence - mean, 0.0) ** 2, axis=POOL) / count
        error = np.sqrt(spread * np.divide(clusters, np.subtract(clusters, 1)) / (count if size is None else size))
    return np.where(np.isfinite(estimate) & np.isfinite(error), error, np.inf)


@validated
def num_roots(roots: Annotated[ArrayLike, Shape("chain, draw, prompt", whole=True)]) -> Array:
    """Return the number of roots that have descendants among the particles, (prompt,)."""
    roots = np.asarray(roots)
    return by_root(np.zeros(roots.shape), roots)[1].sum(axis=POOL)


@validated
def by_root(
    influence: PerDraw,
    roots: Annotated[Array, Shape("chain, draw, prompt", whole=True)],
) -> tuple[Array, Array]:
    """Return Σ φ over the descendants of each root, and whether it has any, both (chain, root, prompt)."""
    chains, size, columns = influence.shape
    chain, _, column = np.ogrid[:chains, :size, :columns]
    cell = ((chain * size + roots) * columns + column).ravel()  # roots may have one column for all prompts
    sums = np.bincount(cell, influence.ravel(), minlength=influence.size)
    alive = np.bincount(cell, minlength=influence.size) > 0
    return sums.reshape(influence.shape), alive.reshape(influence.shape)


def _relative(log_weights: Array) -> Array:
    """Return weights divided by the largest of their prompt; 0 if all are 0."""
    peak = log_weights.max(axis=POOL)
    return np.exp(log_weights - np.where(np.isneginf(peak), 0.0, peak))


def _tail_problem(lw: Array) -> str:
    """Return why the largest of the log weights (draw,) tell no k̂, or an empty string.

    With the tail t_0 < ... < t_M, the gaps (M − i + 1) (t_i − t_{i−1}) of an exponential distribution are independent,
    of the same exponential distribution (Rényi 1953), so their median is their mean times ln 2. The tail of a reward
    with few levels has many gaps that are small or zero, and a few large ones. The three last gaps do not count, as one
    draw far out is what k̂ is for.
    """
    size = int(min(len(lw) / 5, 3 * np.sqrt(len(lw))))
    tail = np.sort(lw)[max(len(lw) - size - 1, 0) :]  # the cutoff, then the tail
    if len(lw) > 1 and tail[-1] - lw.min() < TIE:
        return "all weights are equal: look at the number of draws"
    if size < MIN_TAIL:
        return f"only {len(lw)} draws have positive weight, {5 * MIN_TAIL} are needed: look at the ESS"
    gaps = np.diff(tail)
    normalised = gaps * np.arange(size, 0, -1)
    if np.mean(gaps < TIE) > 1 / 4 or np.median(normalised[:-3]) < LUMPY * normalised[:-3].mean():
        return f"the {size} largest weights are ties, or nearly: look at the ESS"
    if np.median(normalised) < NEARLY_EQUAL:
        return f"the {size} largest weights are nearly equal: look at the ESS"
    return ""
