"""Weights and chains alone: effective sample sizes, Pareto smoothing, R-hat."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from support.toys import autoregression

from bayeslm import diagnostics


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("function", [diagnostics.log_evidence, diagnostics.ess, diagnostics.psis])
def test_invalid_weights_are_refused(function: Callable[..., object], bad: float) -> None:
    weights = np.zeros((1, 9, 1))
    weights[0, 3] = bad
    with pytest.raises(ValueError, match="NaN or \\+inf"):
        function(weights)
    with pytest.raises(ValueError, match="chain, draw, prompt"):
        function(np.zeros(9))


def test_ess_by_hand() -> None:
    weights = np.array([[[4.0], [1.0]], [[1.0], [0.0]]])
    with np.errstate(divide="ignore"):
        assert diagnostics.ess(np.log(weights) - 900.0) == pytest.approx(36.0 / 18.0)


@pytest.mark.parametrize("k", [0.2, 0.5, 0.9])
def test_khat_of_pareto_weights(k: float) -> None:
    """w = U^−k has tail index k.

    One k̂ has sd (1 + k)/√190, at most 0.14, so the mean of 50 at most 0.02; the fit's prior (at 0.5) and
    its own bias may add 0.05. So 0.14 leaves 4.5 sd, and separates 0.2, 0.5, 0.9.
    """
    uniform = np.random.default_rng(0).random((4, 1000, 50))
    smoothed, khat = diagnostics.psis(-k * np.log(uniform))
    assert khat.mean() == pytest.approx(k, abs=0.14)
    np.testing.assert_allclose(np.exp(smoothed).sum(axis=(0, 1)), 1.0)


def test_smoothing_tames_the_largest_weight_and_keeps_the_rest() -> None:
    raw = -0.9 * np.log(np.random.default_rng(1).random((1, 1000, 1)))
    raw[0, 0] = 30.0  # one draw would take all the weight
    raw[0, 1] = -np.inf
    smoothed = diagnostics.psis(raw)[0].ravel()
    assert np.isneginf(smoothed[1])
    order = np.argsort(raw.ravel())
    body = order[1:850]
    np.testing.assert_allclose(np.diff(smoothed[body]), np.diff(raw.ravel()[body]), atol=1e-9)
    assert np.all(np.diff(smoothed[order]) >= 0)
    normalised = raw.ravel() - np.log(np.exp(raw).sum())
    assert np.exp(smoothed).max() < np.exp(normalised).max()


@pytest.mark.parametrize(
    "weights",
    [
        np.zeros((4, 100, 1)),
        np.full((4, 100, 1), -800.0) + 1e-6 * np.random.default_rng(0).normal(size=(4, 100, 1)),
        np.arange(12.0).reshape(1, 12, 1),
        np.random.default_rng(0).choice([0.0, 1.0, 3.0], size=(4, 100, 1)),
        np.floor(np.random.default_rng(0).exponential(2.0, size=(4, 100, 1))),
        np.repeat([0.0, 3.0, 5.0], [350, 20, 30]).reshape(4, 100, 1)
        + 1e-6 * np.random.default_rng(0).normal(size=(4, 100, 1)),
        np.full((1, 1, 1), 5.0),
    ],
    ids=["constant", "nearly constant", "few draws", "few values", "many with ties", "nearly few", "one draw"],
)
def test_without_a_continuous_tail_weights_stay_raw_and_khat_is_undefined(weights: np.ndarray) -> None:
    smoothed, khat = diagnostics.psis(weights)
    assert np.isnan(khat).all()
    relative = np.exp(weights - weights.max())
    np.testing.assert_allclose(np.exp(smoothed), relative / relative.sum())


def test_a_tail_beyond_floating_point_is_infinitely_heavy() -> None:
    weights = np.random.default_rng(0).normal(scale=2000.0, size=(4, 100, 1))
    smoothed, khat = diagnostics.psis(weights)
    assert khat == np.inf
    assert np.exp(smoothed).max() == pytest.approx(1.0)


def test_rhat_sees_chains_that_disagree_and_drift() -> None:
    draws = np.random.default_rng(0).normal(size=(4, 400, 2, 3))
    assert diagnostics.rhat(draws).shape == (2, 3)
    assert np.all(diagnostics.rhat(draws) < 1.03)  # 1.00 ± 0.003 in simulation
    assert np.all(diagnostics.rhat(draws[:1]) < 1.05)
    assert np.all(diagnostics.rhat(draws + np.arange(4)[:, None, None, None]) > 1.2)
    assert np.all(diagnostics.rhat(draws[:1] + np.linspace(0, 3, 400)[:, None, None]) > 1.2)
    assert np.isnan(diagnostics.rhat(np.ones((4, 400))))


def test_ess_bulk_of_an_autoregression() -> None:
    """N (1 − ρ) / (1 + ρ) = 1000 of 4000 at ρ = 0.6; the estimate's spread is 6% in simulation."""
    x = autoregression(np.random.default_rng(0), (4, 1000, 10))
    assert diagnostics.ess_bulk(x).mean() == pytest.approx(1000, rel=0.1)
