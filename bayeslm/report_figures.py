"""Pictures of a report, each as an element ``<svg>`` for the page that has the styles.

Matplotlib draws them. There is no text in them but numbers and fixed words, as names and texts of a model are written
by the page. Colours are variables of the page, so that it can be light or dark, and no attribute is a style, so that
the page's Content-Security-Policy can forbid these.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle, pairwise
from typing import Any
from xml.etree import ElementTree

import numpy as np

from bayeslm.plots import COLOURS, STYLES
from bayeslm.weights import Array

INK, MUTED = "#111111", "#777777"
VARIABLES = {INK: "currentColor", MUTED: "var(--muted)"}
VARIABLES |= {colour.lower(): f"var(--series-{i})" for i, colour in enumerate(COLOURS)}
SIZE = (4.4, 2.5)  # inches, of which a page shows 96 points each
SETTINGS: dict[Any, Any] = {
    **dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
    **dict.fromkeys(("axes.linewidth", "xtick.major.width", "ytick.major.width"), 0.6),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right"), False),
    "svg.fonttype": "none",
    "svg.hashsalt": "bayeslm",
    "font.size": 9,
}
NAMESPACE = re.compile(r"\{[^}]*\}")
NUMBER = re.compile(r"-?\d+\.\d+")
MAX_POINTS = 1000  # of a curve
MAX_LINEAGES, MAX_STEPS = 64, 96  # of a genealogy
BINS = 24


def rewards(weighted: Mapping[str, tuple[Array, Array]], label: str) -> str:
    """Draw histograms of rewards, the prior's filled, and their means.

    :param weighted: by name, rewards and weights, flat; "prior" is drawn first and without a colour of its own.
    :param label: of the reward's axis, a fixed word.
    """

    def draw(axis: Any) -> None:
        finite = np.concatenate([r[np.isfinite(r) & (w > 0)] for r, w in weighted.values()])
        edges = np.histogram_bin_edges(finite, bins=BINS)
        for i, (name, (r, w)) in enumerate(weighted.items()):
            style = _style(i - ("prior" in weighted)) if name != "prior" else {"color": MUTED, "linestyle": "-"}
            alive = np.isfinite(r) & (w > 0)
            heights = np.histogram(r[alive], edges, weights=w[alive])[0]
            if name == "prior":
                axis.stairs(heights, edges, color=MUTED, fill=True, alpha=0.25)
            axis.stairs(heights, edges, linewidth=1.5, **style)
            if mass := w[alive].sum():
                axis.axvline((r[alive] * w[alive]).sum() / mass, linewidth=1, alpha=0.8, **style)
        axis.set(xlabel=label, ylabel="probability of a bin", ylim=(0, None))

    return _svg(draw)


def curves(
    raw: Array,
    label: str,
    series: int = 0,
    *,
    held_out: Sequence[tuple[Array, Array]] = (),
    level: float = np.nan,
    error: float = np.nan,
) -> str:
    """Draw curves of a training: each chain's raw values, and behind which steps their running mean over chains is.

    :param raw: (chain, step), NaN after the end of a chain.
    :param label: of the vertical axis, a fixed word.
    :param series: of the engine, which chooses its colour in all pictures, as for `ess_by_step` and `genealogy`.
    :param held_out: steps and values of evaluations.
    :param level: log Z, and its standard error, for a curve that should come near it.
    """

    def draw(axis: Any) -> None:
        steps = np.arange(1, raw.shape[1] + 1)
        some = _thinned(len(steps))
        axis.plot(steps[some], raw[:, some].T, color=COLOURS[series], alpha=0.45, linewidth=0.8)
        axis.plot(steps[some], smooth(raw)[some], color=COLOURS[series], linewidth=1.8)
        for (at, values), marker in zip(held_out, cycle("os^D")):
            axis.plot(at, values, f"{marker}-", color=MUTED, markersize=3, linewidth=1)
        if np.isfinite(level):
            axis.axhline(level, color=INK, linestyle="--", linewidth=1.2)
            if np.isfinite(error):
                axis.axhspan(level - 2 * error, level + 2 * error, color=MUTED, alpha=0.2, linewidth=0)
        axis.set(xlabel="step", ylabel=label)
        axis.xaxis.get_major_locator().set_params(integer=True)

    return _svg(draw)


def window(steps: int) -> int:
    """Return the number of steps in the running mean of a curve."""
    return max(1, steps // 12)


def smooth(raw: Array) -> Array:
    """Return the mean over chains (chain, step), and over a window that ends at each step, without NaN."""
    known = np.isfinite(raw)
    sums, counts = np.where(known, raw, 0.0).sum(0), known.sum(0)
    kernel = np.ones(window(len(sums)))
    with np.errstate(invalid="ignore"):
        return np.convolve(sums, kernel)[: len(sums)] / np.convolve(counts, kernel)[: len(sums)]


def ess_by_step(sizes: Array, threshold: float, series: int = 0) -> str:
    """Draw the effective sample size of each chain of particles before each step's resampling.

    :param sizes: (chain, step).
    :param threshold: the number of particles in a chain.
    """

    def draw(axis: Any) -> None:
        axis.plot(np.arange(1, sizes.shape[1] + 1), sizes.T, color=COLOURS[series], linewidth=1, alpha=0.6)
        axis.set(xlabel="step", ylabel="ESS of a chain", ylim=(0, threshold * 1.05))
        axis.xaxis.get_major_locator().set_params(integer=True)

    return _svg(draw)


def genealogy(ancestors: Array, series: int = 0) -> str:
    """Draw who descends from whom: lines of particles with descendants at the end, and faint, of those without.

    :param ancestors: (step, particle), the index of each particle's ancestor at a step.
    """
    places, alive = lineages(ancestors)

    def draw(axis: Any) -> None:
        for mask, style in ((~alive, {"color": MUTED, "alpha": 0.6}), (alive, {"color": COLOURS[series]})):
            steps, particles = np.nonzero(mask)
            gap = np.full(len(steps), np.nan)
            xs = np.stack([steps, steps + 1, gap], axis=1).ravel()
            ys = np.stack([places[steps, particles], particles, gap], axis=1).ravel()
            axis.plot(xs, ys, linewidth=0.5, solid_capstyle="round", **style)
        axis.set(xlabel="step", ylabel="particle", xlim=(0, len(places)))
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.yaxis.get_major_locator().set_params(integer=True)

    return _svg(draw)


def lineages(ancestors: Array) -> tuple[Array, Array]:
    """Return the ancestor of each particle at each step, and whether it has descendants at the end, (step, particle).

    Ancestors of many steps are composed to those of a few, and of many particles the first are followed.
    """
    steps, size = ancestors.shape
    stops = np.unique(np.linspace(0, steps, min(steps, MAX_STEPS) + 1).astype(int))
    composed = []
    for start, stop in pairwise(stops):
        index = np.arange(size)
        for step in range(stop - 1, start - 1, -1):
            index = ancestors[step][index]
        composed.append(index)
    places, alive = np.array(composed), np.zeros((len(composed), size), dtype=bool)
    living = np.arange(size)
    for step in range(len(places) - 1, -1, -1):
        alive[step, living] = True
        living = np.unique(places[step][living])
    return places[:, :MAX_LINEAGES], alive[:, :MAX_LINEAGES]


def traces(values: Array, label: str) -> str:
    """Draw the values of Markov chains by draw, (chain, draw)."""

    def draw(axis: Any) -> None:
        some = _thinned(values.shape[1])
        for i, chain in enumerate(values):
            axis.plot(some, chain[some], color=COLOURS[i % len(COLOURS)], linewidth=0.8, alpha=0.75)
        axis.set(xlabel="draw", ylabel=label)
        axis.xaxis.get_major_locator().set_params(integer=True)

    return _svg(draw)


def _thinned(length: int) -> Array:
    """Return indices of so many points of a curve as a picture can show."""
    return np.unique(np.linspace(0, length - 1, min(length, MAX_POINTS)).astype(int))


def _style(i: int) -> dict[str, Any]:
    return {"color": COLOURS[i % len(COLOURS)], "linestyle": STYLES[i % len(STYLES)]}


def _svg(draw: Callable[[Any], None]) -> str:
    """Return a picture with one pair of axes, which ``draw`` fills."""
    try:
        import matplotlib
        from matplotlib.figure import Figure  # without pyplot, whose backend a file in the working folder may name
    except ImportError as error:
        raise ImportError('a report needs matplotlib: pip install "bayeslm[plots]"') from error
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(SETTINGS)
        figure = Figure(figsize=SIZE)
        draw(figure.add_axes((0.14, 0.19, 0.84, 0.77)))  # a layout that finds its margins takes twice the time
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _for_html(file.getvalue())


def _for_html(svg: str) -> str:
    """Return matplotlib's picture as an element for HTML: without styles, fonts and identifiers that nobody uses."""
    root = ElementTree.fromstring(svg[svg.index("<svg") :])
    for parent in root.iter():
        for child in [x for x in parent if NAMESPACE.sub("", x.tag) in ("style", "metadata")]:
            parent.remove(child)
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', svg))
    for element in root.iter():
        attributes = {NAMESPACE.sub("", name): value for name, value in element.attrib.items()}
        element.tag = NAMESPACE.sub("", element.tag)
        element.text, element.tail = element.text if element.tag == "text" else None, None
        for declaration in attributes.pop("style", "").split(";"):
            name, _, value = declaration.partition(":")
            if value and name.strip() != "font-family":
                attributes[name.strip()] = VARIABLES.get(value.strip().lower(), value.strip())
        if attributes.get("id") not in used:
            attributes.pop("id", None)
        element.attrib = {name: NUMBER.sub(_rounded, value).replace("\n", "") for name, value in attributes.items()}
    root.attrib = {"viewBox": root.attrib["viewBox"], "aria-hidden": "true", "focusable": "false"}
    root.attrib |= {"stroke-linejoin": "round", "fill": "currentColor"}
    return ElementTree.tostring(root, encoding="unicode")


def _rounded(match: re.Match[str]) -> str:
    return f"{float(match[0]):.2f}".rstrip("0").removesuffix(".")
