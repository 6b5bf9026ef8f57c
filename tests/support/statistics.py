"""Comparisons of estimates with exact values, up to sampling error.

Whatever the number of values, a comparison refuses a correct estimate with probability `FALSE_ALARM` or less.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from scipy.stats import chi2, t
from support.oracles import expectation
from torch import Tensor

from bayeslm import Posterior, diagnostics

FALSE_ALARM = 8e-5  # of a mean by Student's t: within 4.0 standard errors of 300 values, 4.2 of 64, 5.0 of 20
LIMIT = 4.0  # standard errors where these are known, or come from many values: false alarm 6e-5


def assert_estimate(estimate: Any, stderr: Any, expected: Any, *, rounding: float = 1e-8) -> None:
    """Assert that estimates are within `LIMIT` standard errors of the expected values: false alarm 6e-5 each.

    :param rounding: the numerical error of the values themselves.
    """
    error = np.asarray(estimate, dtype=float) - np.asarray(expected, dtype=float)
    assert (np.abs(error) <= LIMIT * np.asarray(stderr) + rounding).all(), (error, stderr)


def assert_mean(values: Any, expected: Any, *, rounding: float = 1e-8) -> None:
    """Assert that the mean of independent values (value, ...) is the expected one.

    The standard error is estimated from the values, so the tolerance is a quantile of Student's t for their number:
    false alarm `FALSE_ALARM` a mean, if means are nearly normal.
    """
    values = np.asarray(values, dtype=float)
    stderr = values.std(0, ddof=1) / len(values) ** 0.5
    scale = t.isf(FALSE_ALARM / 2, len(values) - 1) / LIMIT
    assert_estimate(values.mean(0), scale * stderr, expected, rounding=rounding)


def assert_chain_mean(values: Any, expected: Any) -> Any:
    """Assert the mean of correlated draws (chain, draw, ...) by effective sample size; return its standard error."""
    stderr = values.std((0, 1)) / np.sqrt(diagnostics.ess_bulk(values))
    assert_estimate(values.mean((0, 1)), stderr, expected)
    return stderr


def assert_moments(posterior: Posterior, values: Any, mean: Any, covariance: Any) -> None:
    """Assert mean and covariance of values (chain, draw, coordinate) under a posterior."""
    values = np.asarray(values, dtype=float)
    off = values - mean
    i, j = np.triu_indices(len(mean))
    found, stderr = diagnostics.expectation(posterior, np.concatenate([values, off[..., i] * off[..., j]], -1))
    assert_estimate(found, stderr, np.concatenate([mean, covariance[i, j]]))
    assert (stderr[: len(mean)] < 0.2 * np.sqrt(np.diag(covariance))).all(), "too few draws to tell anything"


def assert_uniform(ranks: Any, num_ranks: int, bins: int, alarm: float = 1e-4) -> None:
    """Assert that ranks in 0, ..., num_ranks - 1 are uniform, by Pearson's chi-square test on equal bins."""
    assert num_ranks % bins == 0
    counts = np.bincount(np.asarray(ranks) * bins // num_ranks, minlength=bins)
    expected = counts.sum() / bins
    assert ((counts - expected) ** 2 / expected).sum() < chi2.isf(alarm, bins - 1), counts


def assert_evidence(posterior: Posterior, log_z: Any, *, unbiased: bool = False) -> None:
    """Assert that the estimate of log Z is right by its own standard error.

    :param unbiased: also that the mean of Z-hat / Z over the chains is 1, which holds for any number of particles.
    """
    assert_estimate(posterior.log_evidence, posterior.log_evidence_stderr, log_z, rounding=1e-5)
    if unbiased:
        assert_mean(np.exp(posterior.log_weights - log_z).mean(1), 1.0, rounding=1e-5)


def deviations(posterior: Posterior, values: Any, expected: Any, log_z: Any) -> Any:
    """Independent values whose mean is 0 if E[values] is as expected: (chain, prompt), or (draw, prompt) of one chain.

    w (f - mu) / Z of weighted draws, which has none of a self-normalised mean's bias; f - mu of others.
    """
    error = values - expected
    if posterior.kind in ("weighted", "particles"):
        error = np.exp(posterior.log_weights - log_z) * error
    return error.mean(1) if len(error) > 1 else error[0]


def assert_agrees(
    posterior: Posterior,
    exact: Posterior,
    functions: Iterable[Callable[[Posterior], Any]],
    *,
    order: slice = slice(None),
    unbiased: bool = True,
) -> None:
    """Assert that log Z and the expectations of functions are those of an enumerated posterior.

    Chains are independent, and their means are compared as `assert_mean` does.

    :param order: which of the enumerated prompts the posterior's are.
    :param unbiased: the engine's Z-hat is unbiased; otherwise it is compared by its own standard error alone.
    """
    log_z = exact.log_evidence[order]
    if posterior.kind == "enumerated":
        np.testing.assert_allclose(posterior.log_evidence, log_z, atol=1e-5)
    elif not np.isnan(posterior.log_evidence).any():
        weighted = posterior.kind in ("weighted", "particles") and len(posterior.log_weights) > 1
        assert_evidence(posterior, log_z, unbiased=unbiased and weighted)
    for function in functions:
        mean = expectation(exact, function(exact))[order]
        if posterior.kind == "enumerated":
            np.testing.assert_allclose(expectation(posterior, function(posterior)), mean, atol=1e-5)
        else:
            assert_mean(deviations(posterior, function(posterior), mean, log_z), 0.0, rounding=1e-6)


def assert_roots_follow(posterior: Posterior) -> None:
    """Assert that the roots of particles are those that the ancestors of each step lead back to."""
    ancestors = posterior.stats["ancestors"]  # (chain, step, draw, prompt)
    chains, steps, draws, prompts = ancestors.shape
    roots = np.tile(np.arange(draws)[None, :, None], (chains, 1, prompts))
    for step in range(steps):
        roots = np.take_along_axis(roots, ancestors[:, step], axis=1)
    np.testing.assert_array_equal(posterior.roots, roots)


@contextlib.contextmanager
def assert_random_state_kept() -> Iterator[None]:
    """Assert that the block leaves torch's random state as it was."""
    before = torch.get_rng_state()
    yield
    assert torch.equal(torch.get_rng_state(), before)


def assert_drawn_from(counts: Tensor, log_prob: Tensor) -> None:
    """Assert that counts (values,) come from a distribution, by Pearson's chi-square test: false alarm 1 in a million.

    Values expected fewer than 5 times are counted together, so that the statistic is chi-square.
    """
    expected = counts.sum() * log_prob.double().exp()
    assert (counts[expected == 0] == 0).all(), "a value of probability 0 was drawn"
    rare = expected < 5
    found = torch.cat([counts[~rare].double(), counts[rare].sum()[None].double()])
    means = torch.cat([expected[~rare], expected[rare].sum()[None]])
    found, means = found[means > 0], means[means > 0]
    statistic = float(((found - means) ** 2 / means).sum())
    assert statistic < chi2.isf(1e-6, max(1, len(means) - 1)), (statistic, len(means))


def count_completions(draws: Tensor, support: Tensor, vocab: int) -> Tensor:
    """Count each completion of ``support`` (values, tokens) among ``draws`` (draws, tokens)."""
    digits = vocab ** torch.arange(draws.shape[-1])
    codes, order = (support * digits).sum(-1).sort()
    drawn = (draws * digits).sum(-1)
    place = torch.searchsorted(codes, drawn).clamp_max(len(codes) - 1)
    assert (codes[place] == drawn).all(), "a draw is not in the support"
    return torch.bincount(order[place], minlength=len(codes))
