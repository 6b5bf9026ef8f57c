"""The table of texts in a report: distinct completions with rewards, weights, and moves of tokens."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from bayeslm.posterior_draws import PosteriorDraws
from bayeslm.visible import visible
from bayeslm.weights import Array

MAX_TEXTS = 10_000  # in a report, which every engine and prompt share
MAX_CHARACTERS = 4_000  # of a text
WEIGHT_HELP = {  # what log w is, by the posterior's kind
    "weighted": "log p + log-likelihood − log q",
    "particles": "the particle's weight since its last resampling, scaled so that the mean weight of a chain is Ẑ",
}


def table(posteriors: Mapping[str, PosteriorDraws]) -> dict[str, Any]:
    """Return the distinct completions of all posteriors, of each engine and prompt those of most weight.

    A row has the engine's and the prompt's number, the site's, the number of draws, their share of the weight, reward,
    log-weight, log q − log p, the pieces of the text, and log q − log p of each, if it is known.
    """
    sites = list(dict.fromkeys(site for posterior in posteriors.values() for site in posterior.texts))
    groups = [
        rows
        for number, posterior in enumerate(posteriors.values())
        for site in posterior.texts
        for rows in _rows(posterior, number, site, sites.index(site))
    ]
    total = sum(map(len, groups))
    most = max(1, MAX_TEXTS // max(1, len(groups)))
    shown = [row for rows in groups for row in (rows if total <= MAX_TEXTS else rows[:most])]
    first = next(iter(posteriors.values()))
    return {
        "engines": [visible(name) for name in posteriors],
        "prompts": [visible(label) for label in first.prompt_labels],
        "sites": [visible(site) for site in sites],
        "measure": first.measure,
        "weight_help": _weight_help(posteriors),
        "total": total,
        "rows": shown,
    }


def _weight_help(posteriors: Mapping[str, PosteriorDraws]) -> str:
    """Return what log w is, of the kinds that have one; with the engines' names where there are several."""
    engines: dict[str, list[str]] = {}
    for name, posterior in posteriors.items():
        if posterior.kind in WEIGHT_HELP:
            engines.setdefault(posterior.kind, []).append(visible(name))
    parts = [
        f"of {', '.join(names)}: {WEIGHT_HELP[kind]}" if len(engines) > 1 else WEIGHT_HELP[kind]
        for kind, names in engines.items()
    ]
    return f"log-weight, {'; '.join(parts)}" if len(engines) > 1 else f"log-weight: {''.join(parts)}"


def as_json(data: Any) -> str:
    """Return JSON of ASCII characters in which nothing can end an element ``<script>``."""
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _rows(posterior: PosteriorDraws, engine: int, site: str, site_number: int) -> list[list[list[Any]]]:
    """Return the rows of a site, a list for each prompt, those of most weight first."""
    dims, columns = posterior.dims[site], posterior.log_weights.shape[2]
    by_prompt = "prompt" in dims[:-1]
    weights = posterior.weights()
    log_weights = posterior.log_weights if posterior.kind in WEIGHT_HELP else None
    moved = posterior.token_log_ratio.get(site)
    known = posterior.kind == "weighted" and not posterior.conditional
    with np.errstate(invalid="ignore"):  # of a draw of weight 0, log q is not known
        whole = posterior.total_log_likelihood() - posterior.log_weights if known else None

    def of(values: Array, prompt: int) -> Array:
        """Return the values of a prompt's completions (chain, draw, *rest), rest being plates within the prompt."""
        return np.take(values, prompt, axis=2 + dims.index("prompt")) if by_prompt else values

    found = []
    for prompt in range(len(posterior.prompts) if by_prompt else 1):
        column = prompt if columns > 1 else 0
        ids, texts = of(posterior.samples[site], prompt), of(posterior.texts[site], prompt)
        measured = posterior.measured[..., prompt] if by_prompt else posterior.measured.sum(2)
        moves = None if moved is None else of(moved, prompt)
        ends = None if moved is None else of(posterior.token_ends[site], prompt)
        merged: dict[bytes, list[Any]] = {}
        for index in np.ndindex(texts.shape):
            draw = index[:2]
            share = float(weights[(*draw, column)])
            key = ids[index].tobytes() + np.float64(measured[draw]).tobytes()
            if key in merged:
                merged[key][3] += 1
                merged[key][4] += share
                continue
            pieces, each = _pieces(str(texts[index]), None if ends is None else ends[index], moves, index)
            ratio = moves[index].sum() if moves is not None else None if whole is None else whole[(*draw, column)]
            merged[key] = [engine, prompt if by_prompt else -1, site_number, 1, share, _number(measured[draw])]
            merged[key] += [None if log_weights is None else _number(log_weights[(*draw, column)])]
            merged[key] += [_number(ratio), pieces, each]
        rows = sorted(merged.values(), key=lambda row: -row[4])
        found.append([[*row[:4], round(row[4], 6), *row[5:]] for row in rows])
    return found


def _pieces(text: str, ends: Array | None, moves: Array | None, index: Any) -> tuple[list[str], list[float]]:
    """Return the pieces of a text, one for each token that has characters, and how far the policy moved each.

    The move of a token without characters is added to that of the next piece, and after the last one to the last.
    """
    if ends is None or moves is None:
        return [_cut(text)], []
    pieces: list[str] = []
    each: list[float] = []
    start, pending = 0, 0.0
    for end, move in zip(ends.tolist(), moves[index].tolist(), strict=True):
        pending += move
        if end > start:
            pieces.append(visible(text[start:end]))
            each.append(round(pending, 2))
            start, pending = end, 0.0
    if each:
        each[-1] = round(each[-1] + pending, 2)
    if sum(map(len, pieces)) > MAX_CHARACTERS:
        return [_cut(text)], []
    return pieces or [""], each or [round(pending, 2)]


def _cut(text: str) -> str:
    return visible(text if len(text) <= MAX_CHARACTERS else text[:MAX_CHARACTERS] + "…")


def _number(value: Any) -> Any:
    """Return a number for JSON, which has no infinities: "-inf" for −∞, and None for what is not known."""
    if value is None or np.isnan(value):
        return None
    return round(float(value), 4) if np.isfinite(value) else "-inf" if value < 0 else "inf"
