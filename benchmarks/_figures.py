"""Means and variances over a few runs, for the tables."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
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
    values, others = ([x for x in each if np.isfinite(x)] for each in (values, others))
    if min(len(values), len(others)) < 3:
        return "–"
    (mine, my_error), (theirs, their_error) = log_variance(values), log_variance(others)
    reach = student.ppf(0.975, len(values) + len(others) - 2) * np.hypot(my_error, their_error)
    low, middle, high = np.exp(mine - theirs + np.array([-reach, 0.0, reach]))
    return f"{middle:.2f}; {low:.2f} to {high:.2f}"


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
    finite = [x for x in logs if np.isfinite(x)]
    sd = f"{np.std(finite, ddof=1):.3f}" if len(finite) > 1 else "–"
    return sd if len(finite) == len(logs) else f"{sd}, and {len(logs) - len(finite)} of {len(logs)} runs with Ẑ = 0"
