"""Whether the figures of a posterior and their errors can be believed, in words; `bayeslm.advice` says what to do.

A standard error is right where many draws contribute to an estimate. It is not where

  k̂ > 0.7 or ESS < 20          the weights have a heavy tail, or few draws have most of the weight
  one draw dominates            one draw (one root, of particles) makes more than 30% of the variance of an estimate
  a level has few hits          the reward has few values (0 or 1, counts), and one of them has more than a tenth of the
                                weight and fewer than ten draws
  nothing rare was seen         the draws have one reward, or few and none at its bound, or, without a bound, few at the
                                highest level: what was not seen has no error
  chains disagree               R̂ of Markov chains; of particles, estimates that differ from chain to chain by more than
                                their errors (χ², once in 200 by chance), or ESS of their Ẑ below half their number
  few roots                     of particles: most descend from a few first ones, or the ESS was small along the way

Sources: Vehtari, Simpson, Gelman, Yao, Gabry 2024, arXiv 1507.02646, for k̂; Vehtari, Gelman, Simpson, Carpenter,
Bürkner 2021, arXiv 1903.08008, for R̂. The limits of the other rules were chosen in benchmarks/calibration.py.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from bayeslm import advice
from bayeslm.diagnostics import ess_bulk, rhat
from bayeslm.posterior_draws import DiagnosticsWarning, PosteriorDraws
from bayeslm.validation import validated
from bayeslm.weights import (
    KHAT_LIMIT,
    POOL,
    Array,
    by_root,
    chain_log_evidence,
    khat_reasons,
    normalise,
    num_draws,
    num_roots,
    psis,
    smallest_ess,
)

__all__ = ["Level", "levels", "problems", "warn"]

ESS_LIMIT = 20.0  # of weighted or exact draws, and the number of roots of particles
ROUNDING = 0.1  # nats
MARKOV_ESS_LIMIT = 400.0  # of Markov chains, whose errors need an estimate of their autocorrelation (Vehtari 2021)
RHAT_LIMIT = 1.05
DOMINANT = 0.3  # the share of the variance of an estimate that one draw may have; see benchmarks/dominance.py
FEW_HITS, LARGE_SHARE = 10, 0.1  # of a level of the reward
CHANCE = 0.005  # of calling chains that agree apart
TELLING = 0.1  # nats by which the upper limit of log Z is above two errors, where that is worth a sentence
ADDED = 0.1  # the share of Z that an unseen level above the highest could add, where that is worth a sentence
SHOWN = 3  # prompts in one Python warning


class Level(NamedTuple):
    """One value of the reward, or of the log-likelihood: its number of draws and its share of the weight.

    Of particles ``hits`` are the roots that they descend from.
    """

    value: float
    hits: int
    share: float


@validated
def levels(posterior: PosteriorDraws) -> list[list[Level]]:
    """Return the levels of the reward, lowest first, for each prompt (all together if they share a latent).

    A reward has levels if its draws have at most a quarter as many different values as there are draws; the list is
    empty for other rewards, and where a posterior has none.
    """
    rewards, weights, roots = _rewards(posterior), _weights(posterior), posterior.roots
    if rewards is None:
        return [[] for _ in range(weights.shape[2])]
    if roots is not None:
        roots = np.broadcast_to(roots + np.arange(len(roots))[:, None, None] * roots.shape[1], weights.shape)
    return [
        _levels(rewards[..., i].ravel(), weights[..., i].ravel(), None if roots is None else roots[..., i].ravel())
        for i in range(weights.shape[2])
    ]


@validated
def problems(posterior: PosteriorDraws) -> list[list[str]]:
    """Return what is wrong with the errors of a posterior, in sentences, for each prompt.

    An empty list means that nothing was found: then two standard errors cover the truth in at least nine of ten cases
    (benchmarks/RESULTS.md has the cases). Of several signs of one fault, as few draws that have most of the weight, the
    first is said. Prompts that share a latent have one list.
    """
    rounded = _rounded(posterior)
    if posterior.conditional or posterior.kind == "enumerated":
        return rounded
    find = _of_weights if posterior.kind in ("weighted", "particles") else _of_equal_draws
    found = list(find(posterior))
    every = zip(rounded, found, _unseen(posterior, found), strict=True)
    return [first + lines + unseen for first, lines, unseen in every]


@validated
def warn(posterior: PosteriorDraws) -> None:
    """Give one `DiagnosticsWarning` of a posterior's problems, if it has any, to the code that called the engine."""
    found = problems(posterior)
    lines = [
        f"{posterior.prompt_labels[i]!r}: {' '.join(lines)}" if len(found) > 1 else " ".join(lines)
        for i, lines in enumerate(found)
        if lines
    ]
    if lines:
        rest = f" And {len(lines) - SHOWN} more prompts: see bayeslm.reliability.problems." if lines[SHOWN:] else ""
        frame, level = sys._getframe(), 1
        while frame.f_back is not None and str(frame.f_globals.get("__name__")).partition(".")[0] == "bayeslm":
            frame, level = frame.f_back, level + 1
        following = "" if posterior.kind == "enumerated" else f"\nNext: {advice.in_python(posterior)}."
        text = f"{posterior.engine}: {' '.join(lines[:SHOWN])}{rest}{following}"
        warnings.warn(text, DiagnosticsWarning, stacklevel=level)


def _rounded(posterior: PosteriorDraws) -> list[list[str]]:
    """Return for each prompt a sentence if its highest log-likelihood, which has the weight, has lost digits."""
    found: list[list[str]] = [[] for _ in range(posterior.log_weights.shape[2])]
    for name, terms in posterior.log_likelihood.items():
        top = np.abs(np.where(np.isfinite(terms), terms, -np.inf).max(POOL).astype(terms.dtype))
        for i, (size, step) in enumerate(zip(top, np.spacing(top), strict=True)):
            column = found[min(i, len(found) - 1)]
            if np.isfinite(size) and step > ROUNDING and not column:
                column.append(
                    f"The log-likelihood of {name!r} is {size:.3g} nats in size, where {terms.dtype} has steps of "
                    f"{step:.3g}: subtract a constant from the reward, or torch.set_default_dtype(torch.float64)."
                )
    return found


def _of_weights(posterior: PosteriorDraws) -> Iterator[list[str]]:
    """Yield the sentences of each prompt's weights."""
    lw, weights, particles = posterior.log_weights, _weights(posterior), posterior.roots is not None
    size, found = smallest_ess(lw, posterior.stats.get("ess_by_step")), levels(posterior)
    influences, dominated = _influences(posterior, weights), dominance(posterior)
    roots = None if posterior.roots is None else num_roots(posterior.roots)
    khat = np.full(lw.shape[2], np.nan) if particles else psis(np.where(weights.any(POOL), lw, 0.0))[1]
    reasons = [] if particles else khat_reasons(lw)
    apart = {name: _apart(phi, posterior.roots) for name, phi in influences.items()} if particles else {}
    chains = chain_log_evidence(lw)
    for i in range(lw.shape[2]):
        lines = []
        if roots is not None:
            if size[i] < ESS_LIMIT or roots[i] < ESS_LIMIT:
                few_roots = f", all draws descend from {roots[i]} first particles" if roots[i] < ESS_LIMIT else ""
                lines.append(f"ESS {size[i]:.0f} at its smallest{few_roots}.")
            lines += _disagreement(chains[:, i], {name: ratio[i] for name, ratio in apart.items()})
        elif khat[i] > KHAT_LIMIT or size[i] < ESS_LIMIT:
            tail = f"k̂ unknown ({reasons[i].partition(':')[0]})" if np.isnan(khat[i]) else f"k̂ {khat[i]:.2f}"
            lines.append(f"{tail}, ESS {size[i]:.0f}.")
        few = [level for level in found[i] if level.share > LARGE_SHARE and level.hits < FEW_HITS]
        if few and not (particles and lines):
            draws = [f"{x.value:.4g} ({x.share:.0%} of the weight, {x.hits} draw{'s' * (x.hits != 1)})" for x in few]
            cause = f"few draws have the {posterior.measure} {', '.join(draws)}."
            lines[-1:] = [f"{lines[-1][:-1]}: {cause}" if lines else cause.replace("few", "Few", 1)]
        name, share = max(((name, shares[i]) for name, shares in dominated.items()), key=lambda pair: pair[1])
        if not lines and share > DOMINANT:
            lines.append(f"One draw makes {share:.0%} of the variance of {name}, whose error is too small.")
        yield lines


def _disagreement(log_z: Array, apart: dict[str, float]) -> list[str]:
    """Return a sentence if chains of particles disagree, else none.

    :param log_z: log Ẑ of each chain, (chain,).
    :param apart: the spread of the chains' estimates over their errors.
    """
    if len(log_z) < 2:
        return []
    from scipy.special import chdtri  # here: its import takes longer than the face's

    relative = np.exp(log_z - log_z.max())
    effective = relative.sum() ** 2 / (relative**2).sum()
    name, ratio = max(apart.items(), key=lambda pair: pair[1])
    if len(log_z) > 2 and effective < len(log_z) / 2:
        return [f"The chains disagree: of {len(log_z)}, {effective:.1f} count by their log Z, for want of particles."]
    if ratio**2 * (len(log_z) - 1) > chdtri(len(log_z) - 1, CHANCE):
        return [f"The chains disagree on {name}, {ratio:.1f} times more than its error says, for want of particles."]
    return []


def _of_equal_draws(posterior: PosteriorDraws) -> Iterator[list[str]]:
    """Yield the sentences of each prompt's Markov chains, or independent draws of equal weight."""
    rewards, total = _rewards(posterior), num_draws(posterior.log_weights)
    columns = posterior.log_weights.shape[2]
    if posterior.kind != "markov" or rewards is None:
        yield from ([*_too_few(posterior, total)] for _ in range(columns))
        return
    for between, size in zip(rhat(rewards), ess_bulk(rewards), strict=True):
        shown = f"{between:.2f}" if between < 100 else "over 100"
        line = f"R̂ {shown}, ESS {size:.0f}."
        yield [line] if between > RHAT_LIMIT or size < MARKOV_ESS_LIMIT else []


def _too_few(posterior: PosteriorDraws, total: int) -> list[str]:
    """Return a sentence if independent draws are fewer than an estimate of errors needs, or than were wanted."""
    stats, wanted = posterior.stats, int(posterior.stats.get("wanted", 0))
    if total < wanted:
        most = "" if stats.get("interrupted") else ", the most that are allowed"
        return [f"{total} of {wanted} draws a prompt after {stats['proposals']} proposals{most}."]
    return [f"Only {total} draws, from which errors are uncertain."] if total < FEW_HITS else []


def _unseen(posterior: PosteriorDraws, said: list[list[str]]) -> Iterator[list[str]]:
    """Yield what each prompt's draws cannot know: values of the reward that none of them has.

    :param said: the sentences about its weights or chains.
    """
    total, high = num_draws(posterior.log_weights), posterior.log_evidence_high
    bound = float(posterior.stats.get("log_bound", np.inf))
    one_is_known = bool(posterior.stats.get("constrained", False))  # the only value that a proposal leaves
    likelihood = posterior.total_log_likelihood()
    if (
        posterior.kind == "particles"
        and posterior.log_likelihood
        and posterior.prior.keys() >= posterior.log_likelihood.keys()
    ):
        likelihood = posterior.total_log_likelihood(posterior.prior)  # Markov moves go further, and add no weight
    for i, found in enumerate(levels(posterior)):
        best = likelihood[..., i].max(initial=-np.inf) >= bound - max(1e-4, 1e-6 * abs(bound))  # up to rounding
        known = posterior.log_evidence[i] + 2 * posterior.log_evidence_stderr[i]
        if found and not best and posterior.kind != "exact" and high is not None and high[i] > known + TELLING:
            yield [
                f"No draw has the highest possible {posterior.measure}, so of log Z only an upper limit is known, "
                f"{high[i]:.2f} (95%)."
            ]
        elif len(found) == 1 and total > 1 and not (best and high is not None) and not one_is_known:
            yield [
                f"All {total} draws have the {posterior.measure} {found[0].value:.4g}: nothing rare was seen, "
                "and errors of 0 do not cover it."
            ]
        else:
            yield [] if best or high is not None or said[i] else _next_level(posterior, found, i)


def _next_level(posterior: PosteriorDraws, found: list[Level], column: int) -> list[str]:
    """Return a sentence if one level more, as far above the highest seen as that is above the one below, could matter.

    Its draws are fewer than 3 with 95% confidence, each with e^gap times the weight of a draw of the highest level.
    """
    rewards = _rewards(posterior)
    if len(found) < 3 or posterior.kind not in ("weighted", "particles") or rewards is None:
        return []
    below, top = found[-2:]
    values, likelihood = rewards[..., column], posterior.total_log_likelihood()[..., column]
    gap = likelihood[values == top.value].mean() - likelihood[values == below.value].mean()
    added = 3 / top.hits * top.share * np.exp(min(gap, 50.0))
    if not added > ADDED:
        return []
    return [
        f"The highest {posterior.measure} seen, {top.value:.4g}, has {top.share:.0%} of the weight and {top.hits} "
        f"draw{'s' * (top.hits != 1)}; a higher one that was not seen could matter (an upper_bound of the reward would "
        "limit it)."
    ]


def _levels(rewards: Array, weights: Array, roots: Array | None) -> list[Level]:
    """Return the levels of one prompt's draws, from three arrays (draw,)."""
    order = np.argsort(rewards, kind="stable")
    rewards, weights = rewards[order], weights[order]
    tie = 1e-6 * max(1.0, np.abs(rewards[np.isfinite(rewards)]).max(initial=0.0))
    with np.errstate(invalid="ignore"):  # −inf − −inf is NaN: a tie
        starts = np.flatnonzero(np.r_[True, np.diff(rewards) > tie])
    if len(starts) > max(1, len(rewards) / 4):
        return []
    ends = [*starts[1:], len(rewards)]
    hits = np.subtract(ends, starts)
    if roots is not None:
        hits = np.array([len(np.unique(roots[order][a:b])) for a, b in zip(starts, ends, strict=True)])
    shares = np.add.reduceat(weights, starts)
    return [Level(float(rewards[a]), int(n), float(share)) for a, n, share in zip(starts, hits, shares, strict=True)]


def _rewards(posterior: PosteriorDraws) -> Array | None:
    """Return the rewards for each column of the weights, summed over prompts that share a latent; None without one."""
    if posterior.measure == "log-likelihood":
        return posterior.total_log_likelihood() if posterior.log_likelihood else None
    (reward,) = posterior.rewards.values()
    return reward if reward.shape == posterior.log_weights.shape else reward.sum(2, keepdims=True)


def _weights(posterior: PosteriorDraws) -> Array:
    """Return the raw weights, normalised for each prompt; 0 where all are 0."""
    lw = posterior.log_weights
    alive = np.isfinite(lw).any(axis=POOL)
    return np.exp(normalise(np.where(alive, lw, 0.0))) * alive


def _influences(posterior: PosteriorDraws, weights: Array) -> dict[str, Array]:
    """Return φ (chain, draw, prompt) of log Z, E[r] and KL(π* ‖ p), each up to a constant."""
    relative = weights * num_draws(weights)

    def centred(values: Array) -> Array:
        values = np.where(relative > 0, values, 0.0)
        return relative * (values - (weights * values).sum(axis=POOL))

    rewards = _rewards(posterior)
    found = {"log Z": relative - relative.mean(axis=POOL)}
    if rewards is not None:
        found[f"the mean {posterior.measure}"] = centred(rewards)
    if posterior.log_likelihood:
        found["the KL to the prior"] = centred(posterior.total_log_likelihood()) - found["log Z"]
    return found


@validated
def dominance(posterior: PosteriorDraws) -> dict[str, Array]:
    """Return the largest share that one draw has of the variance of each estimate, (prompt,)."""
    return {name: _dominance(phi, posterior.roots) for name, phi in _influences(posterior, _weights(posterior)).items()}


def _dominance(influence: Array, roots: Array | None) -> Array:
    """Return the largest share that one draw, or one root's descendants, have of Σφ², (prompt,)."""
    if roots is not None:
        influence = by_root(influence, roots)[0]
    squares = influence**2
    return squares.max(axis=POOL) / np.maximum(squares.sum(axis=POOL), np.finfo(float).tiny)


def _apart(influence: Array, roots: Array | None) -> Array:
    """Return the standard error from the chains' means of φ over that from the draws, or roots, in them, (prompt,)."""
    chains = influence.shape[0]
    within = influence if roots is None else by_root(influence, roots)[0]
    draws = np.sqrt((within**2).sum(axis=POOL)) / within[..., 0].size
    between = influence.mean(axis=1).std(axis=0, ddof=1 if chains > 1 else 0) / np.sqrt(chains)
    return between / np.maximum(draws, np.finfo(float).tiny)
