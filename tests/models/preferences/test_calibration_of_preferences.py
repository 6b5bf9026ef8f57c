"""Calibration of predicted preferences: figures by hand, errors against the spread over many runs, and the plot."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from support.toys import autoregression, from_prior

from bayeslm.calibration import calibrate
from bayeslm.plots import plot_reliability

matplotlib = pytest.importorskip("matplotlib")

RNG = np.random.default_rng


def sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-x))


def test_figures_by_hand():
    """Four pairs, two draws; the predictive probability is their mean."""
    p = np.array([[[0.92, 0.62, 0.18, 0.5], [0.72, 0.82, 0.38, 0.5]]])  # means 0.82, 0.72, 0.28, 0.5
    found = calibrate(p, [1, 0, 0, 1], bins=5)
    assert found.accuracy.value == pytest.approx((1 + 0 + 1 + 0.5) / 4)
    assert found.log_score.value == pytest.approx(np.log([0.82, 0.28, 0.72, 0.5]).mean())
    # bins [.5, .6), ..., of confidence 0.82, 0.72, 0.72, 0.5
    np.testing.assert_allclose(found.counts, [1, 0, 2, 1, 0])
    np.testing.assert_allclose(found.confidence, [0.5, np.nan, 0.72, 0.82, np.nan])
    np.testing.assert_allclose(found.right, [0.5, np.nan, 0.5, 1.0, np.nan])
    assert found.ece.value == pytest.approx((2 * 0.22 + 0.18) / 4)
    np.testing.assert_allclose(found.right_stderr[[2, 3]], np.sqrt([0.72 * 0.28 / 2, 0.82 * 0.18]))
    table = found.table()
    assert table.loc["ECE", "value"] == found.ece.value
    assert list(table.columns) == ["value", "stderr", "mcse"]


def test_probabilities_of_answers_are_not_folded():
    """An error at 0.1 and one at 0.9 do not cancel: by hand; and the stated ECE and errors hold over 200 data sets."""
    found = calibrate(np.array([[[0.1, 0.15, 0.9, 0.85]]]), [0, 1, 1, 1], bins=2, folded=False)
    np.testing.assert_allclose(found.confidence, [0.125, 0.875])
    np.testing.assert_allclose(found.right, [0.5, 1.0])
    assert (found.accuracy.value, found.ece.value, found.lowest) == pytest.approx((0.75, (0.375 + 0.125) / 2, 0.0))
    assert found.log_score.value == pytest.approx(np.log([0.9, 0.15, 0.9, 0.85]).mean())
    rng = RNG(5)
    p = rng.beta(0.7, 1.0, size=(60, 200))
    sets = [calibrate(x[None, None], rng.random(200) < x, folded=False, seed=i) for i, x in enumerate(p)]
    accuracy, ece = (np.array([getattr(found, name).value for found in sets]) for name in ("accuracy", "ece"))
    assert np.mean([found.accuracy.stderr for found in sets]) == pytest.approx(accuracy.std(), rel=0.4)
    promised = np.mean([found.ece_if_calibrated[0] for found in sets])
    assert abs(ece.mean() - promised) < 4 * ece.std() / np.sqrt(60)
    axis, below = plot_reliability({"prior": sets[0]}).axes
    assert axis.lines[0].get_xdata()[0] == 0.0
    assert below.get_ylabel() == "answers"


def test_the_order_of_a_pair_does_not_matter():
    rng = RNG(0)
    p, y = sigmoid(rng.normal(size=(2, 30, 50))), rng.random(50) < 0.5
    flip = rng.random(50) < 0.5
    one = calibrate(p, y)
    other = calibrate(np.where(flip, 1 - p, p), np.where(flip, ~y, y))
    third = calibrate(np.where(y, p, 1 - p))  # of what happened
    for found in (other, third):
        assert found.accuracy == pytest.approx(one.accuracy)
        assert found.log_score == pytest.approx(one.log_score)
        assert found.ece == pytest.approx(one.ece)


def test_standard_errors_over_pairs():
    """The spread of the figures over 200 data sets is the stated standard error, and calibrated probabilities have the
    stated ECE.
    """
    rng = RNG(1)
    log_odds = rng.normal(size=(200, 300)) * 1.5
    sets = [calibrate(sigmoid(x)[None, None], rng.random(300) < sigmoid(x), seed=i) for i, x in enumerate(log_odds)]
    for name in ("accuracy", "log_score"):
        values = np.array([getattr(found, name).value for found in sets])
        stated = np.mean([getattr(found, name).stderr for found in sets])
        assert stated == pytest.approx(values.std(), rel=0.2)  # 4 standard errors of a spread of 200
    ece = np.array([found.ece.value for found in sets])
    promised = np.mean([found.ece_if_calibrated[0] for found in sets])
    assert abs(ece.mean() - promised) < 4 * ece.std() / np.sqrt(200)
    above = np.mean([found.ece.value > found.ece_if_calibrated[1] for found in sets])
    assert 0.05 - 4 * 0.0154 < above < 0.05 + 4 * 0.0154
    assert np.mean([found.ece.value > 0.5 * promised for found in sets]) > 0.9  # and it is not 0
    over = calibrate(sigmoid(3 * log_odds[0])[None, None], rng.random(300) < sigmoid(log_odds[0]))
    assert over.ece.value > 1.5 * over.ece_if_calibrated[1]  # overconfidence shows


@pytest.mark.parametrize("correlation", [0.0, 0.8])
def test_monte_carlo_errors_over_draws(correlation: float):
    """The spread over 60 runs of 2 chains, independent or autoregressive, is the stated Monte Carlo error."""
    rng = RNG(2)
    centre, y = rng.normal(size=40) * 0.3, rng.random(40) < 0.5
    noise = [autoregression(rng, (2, 400, 40), correlation) for _ in range(60)]
    runs = [calibrate(sigmoid(centre + x), y, seed=i) for i, x in enumerate(noise)]
    for name in ("log_score", "accuracy"):
        values = np.array([getattr(found, name).value for found in runs])
        stated = np.mean([getattr(found, name).mcse for found in runs])
        assert 0.6 < stated / values.std() < 1.5, (name, stated, values.std())


def test_a_single_draw_has_no_known_monte_carlo_error():
    found = calibrate(np.full((1, 1, 10), 0.7))
    assert found.log_score.mcse == np.inf
    assert found.accuracy.value == 1.0
    assert calibrate(np.zeros((1, 4, 3))).log_score.value == -np.inf


def test_a_single_pair_has_no_known_standard_error():
    found = calibrate(RNG(0).uniform(0.4, 0.9, (2, 50, 1)))
    for figure in (found.accuracy, found.log_score, found.ece):
        assert figure.stderr == np.inf
        assert figure.mcse < np.inf


def test_one_probability_a_pair_is_enough():
    p, right = np.array([0.1, 0.4, 0.8, 0.9]), [0, 1, 1, 1]
    short, long = (calibrate(x, right, folded=False) for x in (p, p[None, None]))
    assert (short.ece, short.accuracy) == (long.ece, long.accuracy)


def test_what_is_refused():
    p = np.full((1, 4, 3), 0.5)
    for bad, outcomes, says in [
        (p[0], None, r"must be probabilities \(chain, draw, pair\) or \(pair,\), not empty"),
        (p + 0.6, None, "between 0 and 1, got 1.1"),
        (p * np.nan, None, "between 0 and 1"),
        (p, [1, 0], "one for each of 3 pairs"),
        (p, [1, 0, 2], "0 or 1, got 2"),
        (from_prior(0), None, "has no observed site 'preferred'"),
    ]:
        with pytest.raises(ValueError, match=says):
            calibrate(bad, outcomes)
    with pytest.raises(ValueError, match="bins must be at least 1"):
        calibrate(p, bins=0)


def test_the_reliability_diagram_shows_the_bins():
    rng = RNG(3)
    x = rng.normal(size=200)
    found = calibrate(sigmoid(x)[None, None], rng.random(200) < sigmoid(x), bins=5)
    figure = plot_reliability({"NUTS": found, "SVI": found})
    axis, below = figure.axes
    lines = [container.lines[0] for container in axis.containers]
    np.testing.assert_allclose(
        lines[0].get_xydata(), np.column_stack([found.confidence, found.right])[found.counts > 0]
    )
    assert [f"ECE {found.ece.value:.3f}" in text.get_text() for text in axis.get_legend().get_texts()] == [True, True]
    np.testing.assert_allclose(below.patches[0].get_data().values, found.counts)
    matplotlib.pyplot.close(figure)
    with pytest.raises(ValueError, match=r"calibrations must be a mapping .* not empty"):
        plot_reliability({})
