"""Bounds on the evidence, and on the divergence of draws from the posterior: bidirectional Monte Carlo.

Ẑ is a chain's estimate of Z, the mean of its N weights w. It is unbiased, so log Ẑ is low by Jensen's inequality. If an
exact draw of the posterior π* replaces one particle, 1/Ẑ is unbiased for 1/Z, so log Ẑ is high.

    E[log Ẑ] ≤ log Z ≤ E[log Ẑ | draw 0 ~ π*]

For importance sampling, draws of q with log w = log joint − log q:

    KL(q ‖ π*) = log Z − E_q[log w],    KL(π* ‖ q) = E_π*[log w] − log Z

For any sampler of weighted draws (importance sampling and particle systems alike), let s be the distribution of one
draw picked from a chain by weight. On the space of all N draws and the index picked, the distribution of the chain with
a retained draw has density Ẑ/Z with respect to that of the chain without. So log Z − E[log Ẑ] and
E[log Ẑ | draw 0 ~ π*] − log Z are the divergences there, and by the data processing inequality neither KL(s ‖ π*) nor
KL(π* ‖ s) is larger.

Sources: Grosse, Ghahramani, Adams 2015, arXiv 1511.02543; Grosse, Ancha, Roy 2016, arXiv 1606.02275; the density is
that of Andrieu, Doucet, Holenstein 2010, Particle Markov chain Monte Carlo methods.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from bayeslm.posterior_draws import DiagnosticsWarning, PosteriorDraws
from bayeslm.weights import Array, Estimate, as_log_weights, chain_log_evidence

from .validation import Positive, validated

if TYPE_CHECKING:
    import pandas as pd


@validated
def certify(runs: PosteriorDraws, conditional: PosteriorDraws, *, level: float = 0.95) -> pd.DataFrame:
    """Return bounds on log Z and on divergences, in nats, for any engines: a table with a row for each prompt.

      log_evidence_lower, log_evidence_upper   mean log Ẑ over the chains of ``runs``, of ``conditional``; with `_se`
      log_evidence_low, _high         interval of log Z
      log_evidence_limit              upper limit of log Z that counts what no retained draw has hit
      kl_to_posterior_low, _high      interval of KL(q ‖ π*), q being the distribution of one raw draw of ``runs``
      kl_from_posterior_low, _high    interval of KL(π* ‖ q), q being that of ``conditional``
      kl_sampler_high                 upper limit of KL(s ‖ π*) and KL(π* ‖ s) (of the latter if both runs have the same
                                      settings), s being the distribution of one draw picked by weight from a chain

    The ends of an interval are one-sided Student t limits over chains at (1 + level) / 2 (Welch's where two runs meet),
    so the interval contains the truth with probability ``level`` or more; a single upper limit is at ``level``. All are
    approximate if few chains have skewed log Ẑ. The columns of KL(q ‖ π*) and KL(π* ‖ q) need draws of kind "weighted"
    in ``runs`` and in ``conditional``: a raw particle has no known distribution. If the retained draws are not exact,
    every upper bound is wrong.

    Upper ends know nothing of a part of the posterior that none of the C retained draws has hit: its probability is
    below m = 1 − ((1 − level) / 2)^{1/C}, with confidence, and the rest has the evidence (1 − m) Z at least. So the
    limit is log_evidence_high − log(1 − m), and every other upper end may be higher by the same. Where that is more
    than the interval's own error, a `DiagnosticsWarning` says so. Draws of `RejectionSampling` or `Exact` are exact:
    retain many.

    :param runs: weighted draws or particles, at least 2 chains; more chains give narrower intervals.
    :param conditional: a run that retained a draw of the posterior in each chain (``retained=`` of
        `ImportanceSampling` or `SMC`), at least 2 chains.
    :param level: of the intervals, between 0 and 1.
    :raises ValueError: if a run is not as described, or the prompts differ.
    """
    import pandas as pd

    _check(runs, conditional, level)
    below, above = as_log_weights(runs.log_weights), as_log_weights(conditional.log_weights)
    low, high = chain_log_evidence(below), chain_log_evidence(above)  # (chain, prompt)
    tail = (1 + level) / 2
    columns: dict[str, Array] = {}
    for name, chains in {"log_evidence_lower": low, "log_evidence_upper": high}.items():
        columns[name], columns[f"{name}_se"] = _mean(chains)
    unseen = 1 - (1 - tail) ** (1 / len(high))  # no more of the posterior than this misses all retained draws
    higher = -np.log1p(-unseen)
    columns |= {"log_evidence_low": _limit(1 - tail, low), "log_evidence_high": _limit(tail, high)}
    columns["log_evidence_limit"] = columns["log_evidence_high"] + higher
    if (higher > columns["log_evidence_high"] - columns["log_evidence_upper"]).any():
        text = (
            f"{len(high)} retained draws may all miss a part of the posterior of probability up to {unseen:.0%}: "
            f"log Z is then up to {higher:.2f} above log_evidence_high (log_evidence_limit counts it): retain more "
            "exact draws, of RejectionSampling or Exact, in as many chains (num_chains)"
        )
        warnings.warn(text, DiagnosticsWarning, stacklevel=2)
    if runs.kind == "weighted":
        elbo = below.mean(axis=1)  # E_q[log w]
        gap = np.subtract(low, elbo, where=np.isfinite(elbo), out=np.full(low.shape, np.inf))
        columns["kl_to_posterior_low"] = np.maximum(_limit(1 - tail, gap), 0.0)
        columns["kl_to_posterior_high"] = np.maximum(_limit(tail, high, -elbo), 0.0)
    if conditional.kind == "weighted":
        eubo = above[:, 0]  # E_π*[log w]
        columns["kl_from_posterior_low"] = np.maximum(_limit(1 - tail, eubo - high), 0.0)
        columns["kl_from_posterior_high"] = np.maximum(_limit(tail, eubo, -low), 0.0)
    columns["kl_sampler_high"] = np.maximum(_limit(level, high, -low), 0.0)
    index = pd.Index(runs.prompt_labels, name="prompt")
    return pd.DataFrame({name: np.broadcast_to(x, len(index)) for name, x in columns.items()}, index=index)


@validated
def unseen_limit(log_evidence: ArrayLike, stderr: ArrayLike, log_bound: float, prior_draws: Positive) -> Array:
    """Return an upper limit of log Z that counts what no draw has seen: log(Ẑ e^{2 se} + (3/N) e^M).

    With N draws of the prior, what they have not seen has a prior probability below 3/N, with 95% confidence (the rule
    of three), and there the likelihood is at most e^M. A plain interval knows nothing of it: its error is 0 where all
    weights are equal, however rare and large others may be.
    Source: Hanley and Lippman-Hand 1983, If nothing goes wrong, is everything all right?

    :param log_evidence: log Ẑ.
    :param stderr: its standard error; the limit is inf where that is unknown.
    :param log_bound: M, an upper bound of the sum of all log-likelihood terms, r_max / β.
    :param prior_draws: N, the number of draws of the prior; αN for N draws of a mixture that has it with share α.
    """
    try:
        seen = np.add(log_evidence, np.multiply(2.0, stderr))
    except ValueError:
        shapes = np.shape(log_evidence), np.shape(stderr)
        raise ValueError(
            "unseen_limit: log_evidence and stderr must have one shape, got {} and {}".format(*shapes)
        ) from None
    return np.asarray(np.logaddexp(seen, np.log(3.0 / prior_draws) + log_bound))


def _mean(chains: Array) -> Estimate:
    """Return the mean of (chain, prompt) over chains and its standard error, inf where the mean is infinite."""
    mean = chains.mean(axis=0)
    with np.errstate(invalid="ignore"):
        error = chains.std(axis=0, ddof=1) / np.sqrt(len(chains))
    return mean, np.where(np.isfinite(mean), error, np.inf)


def _limit(probability: float, *samples: Array) -> Array:
    """Return a limit that the sum of expectations stays below with a probability, by Student's t.

    Source of the degrees of freedom: Welch 1947, The generalization of Student's problem.

    :param samples: of each expectation, (chain, prompt).
    """
    from scipy.special import stdtrit  # here: its import takes longer than the face's

    means, errors = zip(*map(_mean, samples), strict=True)
    mean, squares = sum(means), [error**2 for error in errors]
    with np.errstate(invalid="ignore", divide="ignore"):
        freedom = sum(squares) ** 2 / sum(s**2 / (len(x) - 1) for s, x in zip(squares, samples, strict=True))
        limit = mean + stdtrit(freedom, probability) * np.sqrt(sum(squares))
    return np.where(np.isfinite(limit), limit, mean)  # chains that all agree, or an infinite mean


def _check(runs: PosteriorDraws, conditional: PosteriorDraws, level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, not {level}")
    for name, posterior in {"runs": runs, "conditional": conditional}.items():
        if posterior.kind not in ("weighted", "particles"):
            raise ValueError(f"{name} must hold weighted draws or particles, not {posterior.kind} ones")
        if posterior.conditional != (name == "conditional"):
            retained = "no" if name == "conditional" else "a"
            raise ValueError(
                f"{name} has {retained} retained draw of the posterior in each chain: certify takes a run without, and "
                "then a conditional run with one (ImportanceSampling(retained=...))"
            )
        if len(posterior.log_weights) < 2:
            raise ValueError(f"{name} has 1 chain: intervals need at least 2, and 10 or more are better (num_chains)")
    if runs.prompts != conditional.prompts or runs.log_weights.shape[2] != conditional.log_weights.shape[2]:
        raise ValueError("runs and conditional must be of the same prompts")
