"""Plots of rewards, training, calibration, over-optimisation and regret. They need matplotlib, in the extra "plots"."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from numpy.typing import ArrayLike

from bayeslm.calibration import Calibration
from bayeslm.posterior_draws import PosteriorDraws
from bayeslm.validation import NonEmpty, Within, validated
from bayeslm.weights import Array

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's palette is distinguishable with any colour vision; the line styles are, in grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
STYLES: tuple[Any, ...] = ("-", "--", "-.", (0, (1, 1)), (0, (5, 1, 1, 1, 1, 1)))
PRIOR_COLOUR = "#6E6E6E"
MAX_PANELS = 12


@validated
def plot_rewards(
    posteriors: Annotated[Mapping[str, PosteriorDraws | ArrayLike], NonEmpty],
    *,
    prompts: Sequence[int] | None = None,
    bins: int = 30,
    label: str | None = None,
) -> Figure:
    """Plot weighted histograms of the reward under the prior and each posterior, with means; one panel for each prompt.

    Rewards of −inf are left out of the histogram and counted in the legend.

    :param posteriors: posteriors by name, or rewards (chain, draw, prompt) of equally weighted draws. The prior is
        added from the first posterior that holds draws of it, unless an entry is named "prior".
    :param prompts: the indices of the prompts to show. Default: the first 12.
    :param bins: of the histograms.
    :param label: of the horizontal axis. Default: what the posteriors hold, "reward" or, where none is recorded,
        "log-likelihood" (`Posterior.measure`).
    :raises ImportError: without matplotlib.
    :raises ValueError: if the mapping is empty, numbers of prompts differ, or one posterior has a reward and another
        the log-likelihood alone.
    """
    measures = {getattr(entry, "measure", "reward") for entry in posteriors.values()}
    if len(measures) > 1:
        raise ValueError("plot_rewards needs posteriors that all record a reward, or none: not some of them")
    weighted = {name: _weighted_rewards(entry) for name, entry in posteriors.items()}
    of_priors = [getattr(entry, "prior_measured", None) for entry in posteriors.values()]
    if "prior" not in weighted and (priors := [rewards for rewards in of_priors if rewards is not None]):
        weighted = {"prior": _weighted_rewards(priors[0])} | weighted
    counts = {rewards.shape[2] for rewards, _ in weighted.values()}
    if len(counts) != 1:
        raise ValueError(f"plot_rewards needs posteriors of the same prompts, not {sorted(counts)} of them")
    rows = counts.pop()
    labels = [f"prompt {row}" for row in range(rows)]
    for entry in posteriors.values():
        labels = getattr(entry, "prompt_labels", labels)
    shown = list(range(min(rows, MAX_PANELS))) if prompts is None else list(prompts)

    columns = min(len(shown), 3)
    lines = -(-len(shown) // columns)
    size = (max(4.2 * columns, 6.4), 3.2 * lines + 0.8)
    figure, axes = _subplots(lines, columns, figsize=size, squeeze=False, layout="constrained")
    for axis, row in zip(axes.flat, shown, strict=False):
        _reward_panel(axis, {name: (r[..., row], w[..., row]) for name, (r, w) in weighted.items()}, bins)
        axis.set_title(textwrap.fill(labels[row], 44), fontsize=9, parse_math=False)  # "$5" is not a formula
        axis.set_xlabel(min(measures) if label is None else label)
    for axis in axes[:, 0]:
        axis.set_ylabel("probability of a bin")
    for axis in axes.flat[len(shown) :]:
        axis.set_visible(False)
    names = []
    for name, (rewards, weights) in weighted.items():
        lost = np.sum(weights * np.isneginf(rewards), axis=(0, 1))[shown].mean()
        names.append(f"{name} ({lost:.0%} at −∞)" if lost > 0 else name)
    handles = axes.flat[0].get_legend_handles_labels()[0]
    per_row = max(1, int(size[0] / (0.6 + 0.1 * max(map(len, names)))))  # legend entries that fit the width, in inches
    figure.legend(
        handles,
        names,
        title="vertical lines: means",
        loc="outside lower center",
        ncols=min(len(names), per_row),
        frameon=False,
    )
    return figure


@validated
def plot_training(posterior: PosteriorDraws, figure: Figure | None = None) -> Figure:
    """Plot ELBO, log-likelihood r / β and KL to the prior against the step of an `SVI` run, as means over prompts.

    Shown are each chain's curve (faint), the running mean over chains, held-out figures (`HeldOut`) as points, and the
    posterior's log Z ± 2 standard errors, which exceeds the ELBO by KL(q ‖ posterior).

    :param figure: an empty figure to draw into. Default: a new one of pyplot.
    :raises ImportError: without matplotlib.
    :raises ValueError: if `Posterior.stats` has no "elbo" of shape (chain, step, prompt).
    """
    stats = posterior.stats
    if np.ndim(stats.get("elbo", 0.0)) != 3:
        raise ValueError(f"this posterior of {posterior.engine} has no curve stats['elbo'] (chain, step, prompt)")
    panels = {"elbo": "ELBO", "log_likelihood": "log-likelihood r / β", "kl": "KL to the prior"}
    panels = {key: title for key, title in panels.items() if key in stats}
    held_out = [key.removesuffix("_elbo") for key in stats if key.endswith("_elbo")]
    figure = _figure() if figure is None else figure
    figure.set_size_inches(4.2 * len(panels), 3.8)
    figure.set_layout_engine("constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)
    for axis, (key, title) in zip(axes.flat, panels.items(), strict=True):
        curves = np.asarray(stats[key], dtype=float).mean(-1)  # (chain, step)
        steps = np.arange(1, curves.shape[1] + 1)
        window = max(1, len(steps) // 20)
        label = "trained" if window == 1 else f"trained, mean of {window} steps"
        axis.plot(steps, curves.T, color=COLOURS[0], alpha=0.35, linewidth=1)
        smooth = np.convolve(np.nanmean(curves, 0), np.ones(window) / window, mode="valid")
        axis.plot(steps[window - 1 :], smooth, color=COLOURS[0], linewidth=2, label=label)
        for i, name in enumerate(held_out):
            figures = np.asarray(stats[f"{name}_{key}"], dtype=float).mean(-1)  # (chain, evaluation)
            at, colour = stats["held_out_steps"], COLOURS[2:][i % len(COLOURS[2:])]
            axis.plot(at, np.nanmean(figures, 0), "o-", color=colour, markersize=3, linewidth=1, label=name)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step")
        axis.xaxis.get_major_locator().set_params(integer=True)
    axes[0, 0].set_ylabel("nats")
    log_z = float(posterior.log_evidence.mean())
    if np.isfinite(log_z):
        axes[0, 0].axhline(log_z, color=COLOURS[1], linestyle="--", label="log Z")
        band = 2 * float(np.sqrt(np.sum(posterior.log_evidence_stderr**2)) / posterior.log_evidence.size)
        if np.isfinite(band):
            axes[0, 0].axhspan(log_z - band, log_z + band, color=COLOURS[1], alpha=0.15, linewidth=0)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return figure


@validated
def plot_reliability(calibrations: Annotated[Mapping[str, Calibration], NonEmpty]) -> Figure:
    """Plot a reliability diagram: the share of pairs whose likelier outcome happened against its mean probability.

    Calibrated probabilities are on the diagonal; error bars are two standard errors of the share if they are
    calibrated. A second panel shows the number of pairs in each bin.

    :param calibrations: by name, from `bayeslm.calibration.calibrate`.
    :raises ImportError: without matplotlib.
    :raises ValueError: if the mapping is empty.
    """
    figure, (axis, below) = _subplots(2, 1, figsize=(5.2, 6.0), sharex=True, height_ratios=(3, 1), layout="constrained")
    lowest = min(found.lowest for found in calibrations.values())
    axis.plot((lowest, 1), (lowest, 1), color=PRIOR_COLOUR, linewidth=1)
    for i, (name, found) in enumerate(calibrations.items()):
        colour, some = COLOURS[i % len(COLOURS)], found.counts > 0
        x, y, error = found.confidence[some], found.right[some], 2 * found.right_stderr[some]
        label = f"{name}: ECE {found.ece.value:.3f} ({found.ece_if_calibrated[0]:.3f} if calibrated)"
        axis.errorbar(x, y, error, color=colour, fmt="o-", linewidth=1.2, capsize=2, label=label)
        edges = np.linspace(found.lowest, 1, len(found.counts) + 1)
        below.stairs(found.counts, edges, color=colour, linestyle=STYLES[i % len(STYLES)], linewidth=1.6)
    axis.set(ylabel="share right", ylim=(None, 1.02))
    axis.legend(frameon=False, loc="lower right" if lowest > 0 else "upper left")
    below.set(xlabel="confidence", ylabel="pairs" if lowest > 0 else "answers")
    return figure


@validated
def plot_over_optimisation(panels: Annotated[Mapping[str, Mapping[str, Mapping[str, ArrayLike]]], NonEmpty]) -> Figure:
    """Plot the true reward (line) and the learned reward (faint) against KL(π ‖ prior).

    Curves are means over replicates, with one standard error up and down if there are two or more. KL has a square-root
    scale, as in Gao, Schulman and Hilton 2022 (arXiv 2210.10760).

    :param panels: by title, curves by name. The arrays ``kl``, ``true`` and ``proxy`` of a curve are (replicate,
        strength), a replicate being a data set or seed, and a strength one β, or one n of best-of-n.
    :raises ImportError: without matplotlib.
    :raises ValueError: if there is no panel, or the arrays of a curve differ in shape.
    """
    names = list(dict.fromkeys(name for curves in panels.values() for name in curves))
    columns = min(len(panels), 2)
    lines = -(-len(panels) // columns)
    figure, axes = _subplots(
        lines, columns, figsize=(max(5.0 * columns, 6.4), 3.6 * lines + 0.6), squeeze=False, layout="constrained"
    )
    for axis, (title, curves) in zip(axes.flat, panels.items(), strict=False):
        for name, curve in curves.items():
            if missing := {"kl", "true", "proxy"} - set(curve):
                raise ValueError(f"panels[{title!r}][{name!r}] has no {', '.join(sorted(missing))}")
            kl, true, proxy = (np.asarray(curve[key], dtype=float) for key in ("kl", "true", "proxy"))
            if kl.ndim != 2 or not kl.shape == true.shape == proxy.shape:
                shapes = f"{kl.shape}, {true.shape} and {proxy.shape}"
                raise ValueError(f"kl, true and proxy of {name!r} must be (replicate, strength), not {shapes}")
            i = names.index(name)
            colour, style = COLOURS[i % len(COLOURS)], STYLES[i % len(STYLES)]
            replicates = len(kl)
            error = true.std(0, ddof=1) / np.sqrt(replicates) if replicates > 1 else None
            at = kl.mean(0)
            axis.plot(at, proxy.mean(0), color=colour, linestyle=style, linewidth=0.8, alpha=0.45)
            axis.errorbar(
                at, true.mean(0), error, color=colour, linestyle=style, linewidth=1.8, elinewidth=0.9, label=name
            )
        axis.axhline(0.0, color=PRIOR_COLOUR, linewidth=0.6)
        axis.set_xscale("function", functions=(lambda x: np.sqrt(np.maximum(x, 0.0)), np.square))
        axis.set_xlim(left=0.0)
        axis.set_title(title, fontsize=10, parse_math=False)
    for axis in axes[:, 0]:
        axis.set_ylabel("reward")
    for axis in axes[-1]:
        axis.set_xlabel("KL(π ‖ prior), nats")
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    handles = {
        label: handle for axis in axes.flat for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        handles.values(),
        handles.keys(),
        title="true reward ± one standard error; faint: the learned reward",
        loc="outside lower center",
        ncols=min(len(names), 5),
        frameon=False,
    )
    return figure


@validated
def plot_regret(
    regrets: Annotated[Mapping[str, ArrayLike], NonEmpty],
    *,
    interval: Annotated[float, Within("(0, 1]")] = 0.9,
    axis: Any = None,
    label: str = "episode",
) -> Figure:
    """Plot the cumulative regret against the episode: the mean over runs, and the central ``interval`` of runs.

    :param regrets: by strategy, the regret of each episode, (run, episode).
    :param interval: the share of runs in the shaded band, in (0, 1].
    :param axis: the axes to draw into. Default: those of a new figure.
    :param label: of the horizontal axis.
    :raises ImportError: without matplotlib.
    :raises ValueError: if the mapping is empty, a shape is wrong or ``interval`` is outside (0, 1].
    """
    curves = {name: np.asarray(regret, dtype=float) for name, regret in regrets.items()}
    for name, regret in curves.items():
        if regret.ndim != 2 or regret.size == 0:
            raise ValueError(f"regrets[{name!r}] must be (run, episode), not {regret.shape}")
    if axis is None:
        axis = _subplots(figsize=(6.4, 4.2), layout="constrained")[1]
    for i, (name, regret) in enumerate(curves.items()):
        total = regret.cumsum(1)
        episodes = np.arange(1, total.shape[1] + 1)
        colour, style = COLOURS[i % len(COLOURS)], STYLES[i % len(STYLES)]
        axis.plot(episodes, total.mean(0), color=colour, linestyle=style, label=name)
        low, high = np.quantile(total, [(1 - interval) / 2, (1 + interval) / 2], axis=0)
        axis.fill_between(episodes, low, high, color=colour, alpha=0.15, linewidth=0)
    axis.set_xlabel(label)
    axis.set_ylabel(f"cumulative regret (mean, {interval:.0%} of runs)")
    axis.legend(frameon=False)
    return axis.figure


def _weighted_rewards(entry: PosteriorDraws | ArrayLike) -> tuple[Array, Array]:
    """Return rewards and their weights, both (chain, draw, prompt); weights sum to 1 for each prompt."""
    rewards = np.asarray(getattr(entry, "measured", entry), dtype=float)
    if rewards.ndim != 3:
        raise ValueError(f"rewards among the posteriors must be (chain, draw, prompt), not {rewards.shape}")
    weights = entry.weights() if hasattr(entry, "weights") else np.array(1.0 / rewards[..., 0].size)
    return rewards, np.broadcast_to(weights, rewards.shape)


def _reward_panel(axis: Any, weighted: Mapping[str, tuple[Array, Array]], bins: int) -> None:
    finite = np.concatenate([rewards[np.isfinite(rewards) & (w > 0)] for rewards, w in weighted.values()])
    edges = np.histogram_bin_edges(finite, bins=bins)
    others = 0
    for name, (rewards, weights) in weighted.items():
        if name == "prior":
            colour, style = PRIOR_COLOUR, STYLES[0]
        else:
            colour, style = COLOURS[others % len(COLOURS)], STYLES[others % len(STYLES)]
            others += 1
        alive = np.isfinite(rewards) & (weights > 0)
        heights = np.histogram(rewards[alive], edges, weights=weights[alive])[0]
        axis.stairs(heights, edges, color=colour, alpha=0.22 if name == "prior" else 0.12, fill=True)
        axis.stairs(heights, edges, color=colour, linestyle=style, linewidth=1.6, label=name)
        if mass := weights[alive].sum():
            axis.axvline((rewards[alive] * weights[alive]).sum() / mass, color=colour, linestyle=style, linewidth=1)
    axis.set_ylim(bottom=0)


def _subplots(rows: int = 1, columns: int = 1, *, figsize: tuple[float, float], **settings: Any) -> Any:
    """Return a new figure and its axes."""
    figure = _figure(figsize=figsize, layout=settings.pop("layout"))
    return figure, figure.subplots(rows, columns, **settings)


def _figure(**settings: Any) -> Figure:
    """Return a new figure of pyplot.

    The inline backend of notebooks draws every open figure at the end of a cell, and the notebook the cell's last value
    once more; so there the figure is closed, and drawn as that value alone.
    """
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError('plots need matplotlib: pip install "bayeslm[plots]"') from error
    figure = plt.figure(**settings)
    if "inline" in plt.get_backend():
        plt.close(figure)
    return figure
