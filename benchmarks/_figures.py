"""Means and variances over a few runs, for the tables."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import logsumexp
from scipy.stats import t as student

Estimate = tuple[float, float]  # with its standard error


def log_mean(logs: ArrayLike) -> Estimate:
    """Logarithm of the mean of exp(logs)."""
    logs = np.asarray(logs)
    mean = logsumexp(logs) - np.log(len(logs))
    if not np.isfinite(mean):
        return mean, np.nan
    return mean, np.exp(logs - mean).std(ddof=1) / np.sqrt(len(logs))


def log_variance(values: ArrayLike) -> Estimate:
    """Logarithm of the variance, by the jackknife, which is sound for any distribution (Miller 1968)."""
    values = np.asarray(values)
    n = len(values)
    without = np.array([np.log(np.delete(values, i).var(ddof=1)) for i in range(n)])
    pseudo = n * np.log(values.var(ddof=1)) - (n - 1) * without
    return pseudo.mean(), pseudo.std(ddof=1) / np.sqrt(n)


def variance_ratio(values: Sequence[float], others: Sequence[float]) -> str:
    """The variance of the first over that of the others, with an interval of 95%; of the finite ones alone."""
    values, others = map(_finite, (values, others))
    if min(len(values), len(others)) < 3:
        return "–"
    (mine, my_error), (theirs, their_error) = log_variance(values), log_variance(others)
    reach = student.ppf(0.975, len(values) + len(others) - 2) * np.hypot(my_error, their_error)
    low, middle, high = np.exp(mine - theirs + np.array([-reach, 0.0, reach]))
    return f"{middle:.2f}; {low:.2f} to {high:.2f}"


def log_spread(logs: ArrayLike) -> float:
    """Variance of the logarithms, of the finite ones alone."""
    return float(np.var(_finite(logs), ddof=1))


def interquartile(logs: ArrayLike) -> float:
    """Distance of the quartiles of the logarithms, -inf among them; NaN where a quartile is -inf."""
    low, high = np.quantile(logs, [0.25, 0.75], method="lower")
    return float(high - low) if np.isfinite(low) else np.nan


def relative_variance(logs: ArrayLike) -> float:
    """Variance of exp(logs), zeros among them, over the square of its mean."""
    mean, _ = log_mean(logs)
    return float(np.exp(np.asarray(logs) - mean).var(ddof=1))


def ratio(statistic: Callable[[ArrayLike], float], values: Sequence[float], others: Sequence[float]) -> str:
    """A statistic of the first over that of the others, with the bootstrap's percentiles as an interval of 95%."""
    rng = np.random.default_rng(0)
    both = [np.asarray(each) for each in (values, others)]
    draws = [[statistic(rng.choice(each, len(each))) for _ in range(4000)] for each in both]
    with np.errstate(all="ignore"):
        low, high = np.nanquantile(np.divide(*draws), [0.025, 0.975])
        middle = np.divide(*map(statistic, both))
    return f"{middle:.2f}; {low:.2f} to {high:.2f}"


def spreads(peers: Sequence[float], own: Sequence[float]) -> str:
    """The cells of a row: how far log Z-hat and Z-hat spread over runs, on both sides, and their ratios.

    :param peers: log Z-hat of each run, -inf where Z-hat is 0.
    :param own: likewise.
    """
    cells = [f"{sum(map(np.isneginf, each))} of {len(each)}" for each in (peers, own)]
    for statistic in (log_spread, interquartile, relative_variance):
        cells += [f"{statistic(peers):.2f}, {statistic(own):.2f}: {ratio(statistic, own, peers)}"]
    return "| " + " | ".join(cells) + " |"


def beside(peers: Sequence[Any], own: Sequence[Any]) -> str:
    """The end of a row: tokens a second of both sides, their ratio in pairs, and how they know log Z.

    :param peers: runs with ``seconds``, ``tokens`` and ``log_evidence``.
    :param own: likewise, the one at each place run beside the peer's.
    """
    speeds = [[run.tokens / run.seconds for run in runs] for runs in (peers, own)]
    ratios = [b / a for a, b in zip(*speeds, strict=True)]
    logs = [[run.log_evidence for run in runs] for runs in (peers, own)]
    spreads = [_spread(each) for each in logs]
    evidence = ", ".join(f"{mean:.2f} ± {error:.2f}" for mean, error in map(log_mean, logs))
    return (
        f"| {statistics.median(speeds[0]):.1f} | {statistics.median(speeds[1]):.1f} "
        f"| {statistics.median(ratios):.1f}; {min(ratios):.1f} to {max(ratios):.1f} "
        f"| {spreads[0]} | {spreads[1]} | {variance_ratio(logs[1], logs[0])} "
        f"| {evidence} |"
    )


def _spread(logs: Sequence[float]) -> str:
    """The standard deviation of log Z in the runs that know it, and how many do not."""
    finite = _finite(logs)
    sd = f"{np.std(finite, ddof=1):.3f}" if len(finite) > 1 else "–"
    return sd if len(finite) == len(logs) else f"{sd}, and {len(logs) - len(finite)} of {len(logs)} runs with Ẑ = 0"


def _finite(values: ArrayLike) -> list[float]:
    return [x for x in np.asarray(values).tolist() if np.isfinite(x)]
