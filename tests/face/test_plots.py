"""Plots show the posterior's values, and nothing is hidden or cut off."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from support.toys import LOG_Z, TARGET, Gaussian, enumerated, from_prior

from bayeslm import diagnostics
from bayeslm.plots import COLOURS, plot_over_optimisation, plot_rewards, plot_training

matplotlib = pytest.importorskip("matplotlib")


@pytest.fixture(autouse=True)
def _close() -> Iterator[None]:
    yield
    matplotlib.pyplot.close("all")


def panels(figure: Any) -> list[Any]:
    return [axis for axis in figure.axes if axis.get_visible()]


def outlines(axis: Any) -> dict[str, Any]:
    """The outline of each histogram, by its label."""
    return {patch.get_label(): patch for patch in axis.patches if patch.get_label().strip("_")}


def means(axis: Any) -> list[float]:
    return [float(line.get_xdata()[0]) for line in axis.lines]


def legend(figure: Any) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_rewards_are_drawn_weighted_with_the_prior_first() -> None:
    posterior = from_prior(0)
    figure = plot_rewards({"IS": posterior, "oracle": enumerated()}, bins=4)
    for prompt, axis in enumerate(panels(figure)):
        drawn = outlines(axis)
        assert list(drawn) == ["prior", "IS", "oracle"]
        heights, edges, _ = drawn["oracle"].get_data()
        finite = np.where(TARGET[prompt] > 0, enumerated().rewards["reward"][0, :, prompt], 0.0)
        np.testing.assert_allclose(heights, np.histogram(finite, edges, weights=TARGET[prompt])[0])
        mean = diagnostics.expectation(posterior, posterior.measured)[0][prompt]
        np.testing.assert_allclose(means(axis)[:2], [0.05, mean])
        assert axis.get_title() == posterior.prompts[prompt]
    assert legend(figure) == ["prior", "IS", "oracle"]


def test_rewards_may_be_arrays() -> None:
    rewards = np.zeros((1, 10, 2))
    figure = plot_rewards({"prior": rewards, "IS": from_prior(0)}, prompts=[1])
    (axis,) = panels(figure)
    assert means(axis)[0] == 0.0
    assert axis.get_title() == "Is it bad?"
    assert panels(plot_rewards({"a": rewards, "b": rewards}))[1].get_title() == "prompt 1"


def test_rewards_of_minus_infinity_are_counted_in_the_legend() -> None:
    rewards = np.zeros((1, 4, 1))
    rewards[0, 0] = -np.inf
    figure = plot_rewards({"prior": rewards, "SVI": np.ones((1, 4, 1)), "dead": np.full((1, 4, 1), -np.inf)})
    assert legend(figure) == ["prior (25% at −∞)", "SVI", "dead (100% at −∞)"]
    assert means(panels(figure)[0]) == [0.0, 1.0]


def test_only_some_panels_of_many_prompts() -> None:
    posterior = Gaussian().posterior(0, "exact", prompts=20)
    assert len(panels(plot_rewards({"exact": posterior}))) == 12
    assert len(panels(plot_rewards({"exact": posterior}, prompts=[3, 19, 0, 1]))) == 4


def test_histograms_differ_in_colour_and_style() -> None:
    figure = plot_rewards({str(i): from_prior(i) for i in range(6)})
    drawn = outlines(panels(figure)[0])
    assert len({patch.get_edgecolor() for patch in drawn.values()}) == len(COLOURS) + 1
    assert len({str(patch.get_linestyle()) for patch in list(drawn.values())[1:]}) >= 5


@pytest.mark.parametrize("prompts", [1, 2, 5])
def test_nothing_is_cut_off_or_covered(prompts: int) -> None:
    posterior = Gaussian().posterior(0, "exact", prompts=prompts)
    posterior.prompts = [f"{i}: a prompt that is so long that its title has to be broken" for i in range(prompts)]
    figure = plot_rewards({f"a posterior with a long name {i}": posterior for i in range(4)}, label="sentiment")
    figure.draw_without_rendering()
    frame, box = figure.bbox, figure.legends[0].get_window_extent()
    for axis in panels(figure):
        for part in (axis.title, axis.xaxis.label, box, axis.get_tightbbox()):
            extent = part.get_window_extent() if hasattr(part, "get_window_extent") else part
            assert extent.x0 >= frame.x0
            assert extent.x1 <= frame.x1
            assert extent.y0 >= frame.y0
            assert extent.y1 <= frame.y1
        assert not box.overlaps(axis.get_tightbbox())


def test_rewards_of_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"posteriors must be .* not empty"):
        plot_rewards({})
    with pytest.raises(ValueError, match="same prompts"):
        plot_rewards({"a": np.zeros((1, 4, 2)), "b": np.zeros((1, 4, 3))})
    with pytest.raises(ValueError, match="chain, draw, prompt"):
        plot_rewards({"a": np.zeros(4)})


def test_training_and_evidence() -> None:
    posterior = enumerated()
    with pytest.raises(ValueError, match="has no curve"):
        plot_training(from_prior(0, stats={}))
    grows = np.linspace(-2.0, 0.1, 40)
    posterior.stats["elbo"] = np.stack([grows, grows - 0.2])[..., None] + np.array([-1.0, 1.0])  # (chain, step, prompt)
    posterior.stats |= {"held_out_steps": [0, 20, 40], "gold_elbo": np.zeros((2, 3, 2))}
    (axis,) = panels(plot_training(posterior))
    first, second, running, gold, evidence = axis.lines
    np.testing.assert_allclose(first.get_ydata(), grows)
    np.testing.assert_allclose(second.get_ydata(), grows - 0.2)
    np.testing.assert_allclose(running.get_ydata(), grows[1:] - 2.1 / 39 / 2 - 0.1)  # of 2 steps, of both chains
    assert list(gold.get_xdata()) == [0, 20, 40]
    assert evidence.get_ydata()[0] == pytest.approx(LOG_Z.mean())
    posterior.stats["elbo"][1, 30:] = np.nan  # a chain that had ended
    posterior.log_evidence[:] = np.nan
    _, _, running, _ = panels(plot_training(posterior))[0].lines
    assert running.get_ydata()[-1] == pytest.approx(0.1 - 2.1 / 39 / 2)


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r'pip install "bayeslm\[plots\]"'):
        plot_rewards({"IS": from_prior(0)})


def test_over_optimisation_is_drawn_as_means_and_standard_errors() -> None:
    rng = np.random.default_rng(0)
    curve = {key: rng.random((5, 4)).cumsum(1) for key in ("kl", "true", "proxy")}
    figure = plot_over_optimisation({"one": {"mean": curve, "draw": curve}, "two": {"mean": curve}})
    first = figure.axes[0]
    bars = first.containers[0]
    line, _, (segments,) = bars
    np.testing.assert_allclose(line.get_data(), [curve["kl"].mean(0), curve["true"].mean(0)])
    ends = np.array(segments.get_segments())
    np.testing.assert_allclose(ends[:, 1, 1] - ends[:, 0, 1], 2 * curve["true"].std(0, ddof=1) / np.sqrt(5))
    drawn = [line.get_ydata() for line in first.lines if len(line.get_xdata()) == 4]
    assert any(np.allclose(y, curve["proxy"].mean(0)) for y in drawn)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["mean", "draw"]
    assert [axis.get_title() for axis in figure.axes] == ["one", "two"]
    with pytest.raises(ValueError, match=r"must be \(replicate, strength\)"):
        plot_over_optimisation({"one": {"mean": curve | {"true": np.zeros(4)}}})
    with pytest.raises(ValueError, match=r"panels must be .* not empty"):
        plot_over_optimisation({})
