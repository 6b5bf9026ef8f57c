"""Short forms of posteriors for a screen and a notebook."""

from __future__ import annotations

from html import escape
from typing import NamedTuple, Protocol

import numpy as np

from bayeslm.visible import visible
from bayeslm.weights import POOL, Array, ess, khat_reasons, normalise, psis

PROMPTS, TEXTS = 5, 3  # shown of a posterior, and of each prompt
WIDTH = 96  # of a line
LONGEST = 60  # of a text


class PosteriorFigures(Protocol):
    """What is shown of a `bayeslm.Posterior`."""

    engine: str
    kind: str
    samples: dict[str, Array]
    texts: dict[str, Array]
    log_weights: Array
    log_evidence: Array
    log_evidence_stderr: Array
    prompts: list[str]

    @property
    def prompt_labels(self) -> list[str]: ...
    @property
    def measure(self) -> str: ...
    @property
    def measured(self) -> Array: ...
    @property
    def prior_measured(self) -> Array | None: ...
    def best(self, prompt: int = 0, k: int = 5, site: str | None = None) -> list[tuple[str, float]]: ...


class PromptFigures(NamedTuple):
    """One prompt's line: its label, the cells of its figures, a note, and its best texts."""

    label: str
    cells: dict[str, str]
    note: str
    texts: list[tuple[str, float]]


def text(posterior: PosteriorFigures) -> str:
    """Return a posterior on a few lines: its figures for the first prompts, and a best text of each."""
    lines = [_title(posterior)]
    for row in _rows(posterior):
        lines.append(f"  {_line(row.label)}")
        lines.append("    " + "  ".join(f"{name} {cell}" for name, cell in row.cells.items()))
        lines += [f"    {row.note}"] if row.note else []
        lines += [f"    best {value:.3g}: {_line(found)!r}" for found, value in row.texts[:1]]
    if rest := len(posterior.prompts) - PROMPTS:
        lines += [f"  ... and {rest} more prompts: see bayeslm.diagnostics.summary"] if rest > 0 else []
    return "\n".join(line if len(line) <= WIDTH else line[: WIDTH - 1] + "…" for line in lines)


def html(posterior: PosteriorFigures) -> str:
    """Return a posterior as a table for a notebook, in which every text is escaped."""
    rows = _rows(posterior)
    names = list(dict.fromkeys(name for row in rows for name in row.cells))
    head = "".join(f"<th>{escape(name)}</th>" for name in ("prompt", *names, "best texts"))
    body = []
    for row in rows:
        best = "<br>".join(f"{value:.3g}&ensp;{escape(_line(found))}" for found, value in row.texts)
        cells = "".join(f"<td>{escape(row.cells.get(name, ''))}</td>" for name in names)
        label = escape(_line(row.label)) + (f"<br><small>{escape(row.note)}</small>" if row.note else "")
        body.append(f"<tr><td>{label}</td>{cells}<td style='text-align:left'>{best}</td></tr>")
    rest = len(posterior.prompts) - PROMPTS
    more = f"<p>and {rest} more prompts: see <code>bayeslm.diagnostics.summary</code></p>" if rest > 0 else ""
    return (
        f"<div><p><b>{escape(_title(posterior))}</b></p><table><thead><tr>{head}</tr></thead>"
        f"<tbody>{''.join(body)}</tbody></table>{more}</div>"
    )


def _title(posterior: PosteriorFigures) -> str:
    chains, draws = posterior.log_weights.shape[:2]
    count = len(posterior.prompts)
    return (
        f"Posterior({visible(posterior.engine)}, {posterior.kind}: {chains} x {draws} draws of "
        f"{', '.join(posterior.samples) or 'nothing'} for {count} prompt{'s' * (count != 1)})"
    )


def _rows(posterior: PosteriorFigures) -> list[PromptFigures]:
    """Return the lines of the first prompts; of prompts that share a latent the figures are those of all together."""
    columns, labels = posterior.log_weights.shape[2], posterior.prompt_labels
    measured, prior = posterior.measured, posterior.prior_measured
    alive = np.isfinite(posterior.log_weights).any(axis=POOL)
    weighted = posterior.kind in ("weighted", "particles", "enumerated") and bool(alive.all())
    weights = np.exp(normalise(posterior.log_weights)) if weighted else np.ones(measured.shape) / measured[..., 0].size
    sizes = ess(posterior.log_weights)
    shapes, reasons = np.full(columns, np.nan), [""] * columns
    if posterior.kind == "weighted" and weighted:
        shapes, reasons = psis(posterior.log_weights)[1], khat_reasons(posterior.log_weights)
    elif posterior.kind == "weighted":
        reasons = ["every draw of a prompt has weight zero"] * columns
    rows = []
    for i, label in enumerate(labels[:PROMPTS]):
        j = min(i, columns - 1)
        w, values = weights[..., min(i, weights.shape[2] - 1)], measured[..., i]
        after = np.where(w > 0, w * np.where(w > 0, values, 0.0), 0.0).sum()
        before = "" if prior is None else f"{prior[..., i].mean():.2f} → "
        cells, note = {posterior.measure: f"{before}{after:.2f}"}, ""
        if np.isfinite(posterior.log_evidence[j]):
            error = posterior.log_evidence_stderr[j]
            cells["log Z"] = f"{posterior.log_evidence[j]:.2f}" + (f" ± {error:.2f}" if 0 < error < np.inf else "")
        if posterior.kind in ("weighted", "particles"):
            cells["ESS"] = f"{sizes[j]:.0f}"
        if posterior.kind == "weighted":
            cells["k̂"] = "unknown" if np.isnan(shapes[j]) else f"{shapes[j]:.2f}"
            note = f"k̂: {reasons[j]}" if reasons[j] else ""
        rows.append(PromptFigures(label, cells, note, posterior.best(i, TEXTS) if len(posterior.texts) == 1 else []))
    return rows


def _line(value: str) -> str:
    """Return a text on one line, cut to length, without characters that a terminal obeys."""
    line = visible(" ".join(value.split()))
    return line if len(line) <= LONGEST else line[: LONGEST - 1] + "…"
