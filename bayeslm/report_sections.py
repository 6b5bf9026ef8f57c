"""The contents of a report's sections, as values for its template: words, numbers as texts, and pictures."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from markupsafe import Markup

from bayeslm import report_figures
from bayeslm.diagnostics import ess_bulk, rhat
from bayeslm.posterior_draws import PosteriorDraws
from bayeslm.reliability import ESS_LIMIT, MARKOV_ESS_LIMIT, RHAT_LIMIT
from bayeslm.summaries import Row, rows
from bayeslm.weights import KHAT_LIMIT, Array, ess, num_draws, num_roots, smallest_ess, standard_error

MAX_PROMPTS = 12  # with a table and pictures of their own
MAX_LISTED = 200  # in the list of prompts
MAX_CHAINS = 16  # in a picture
KINDS = {
    "enumerated": "every completion once, with its exact weight",
    "exact": "independent draws of the posterior",
    "weighted": "independent draws of a proposal, with weights",
    "particles": "weighted particles, resampled along the way",
    "markov": "Markov chains that converge to the posterior",
    "uncorrected": "draws of an unknown distribution: a baseline",
}
TRAINING = {
    "elbo": ("ELBO, nats", "The ELBO comes near log Z as the policy comes near the posterior."),
    "reward": ("reward", "The reward of the policy's draws."),
    "log_likelihood": ("log-likelihood, nats", "The log-likelihood, r / β, of the policy's draws."),
    "kl": ("KL to the prior, nats", "How far the policy is from the prior."),
}
FACTS = {
    "unfinished": "No result yet of",
    "program": "Program",
    "prior": "Language model",
    "reward": "Reward",
    "scale": "Reward is multiplied by",
    "beta": "β",
    "max_new_tokens": "Longest completion",
    "temperature": "Temperature of the prior",
    "top_k": "Likeliest tokens of the prior",
    "top_p": "Probability of the prior's tokens",
    "stop": "Strings that end a completion",
    "power": "Power of the prior",
}


# -- words ----------------------------------------------------------------------------------------------------------


def title(posteriors: Mapping[str, PosteriorDraws], settings: Mapping[str, object]) -> str:
    """Return a title: the reward and the model, if they are known, else the engines."""
    if "reward" in settings and "prior" in settings:
        return f"{settings['prior']} under {settings['reward']}"
    return f"Posterior by {', '.join(posteriors)}"


def facts(posteriors: Mapping[str, PosteriorDraws], settings: Mapping[str, object]) -> list[tuple[str, str]]:
    """Return what was inferred, as names and values."""
    first = next(iter(posteriors.values()))
    known = [(name, str(settings[key])) for key, name in FACTS.items() if key in settings]
    known = [(name, value) for name, value in known if (name, value) != (FACTS["scale"], "1.0")]
    draws = ", ".join(f"{name} {num_draws(posterior.log_weights):,}" for name, posterior in posteriors.items())
    shared = first.log_weights.shape[2] < len(first.prompts)
    return [
        *known,
        ("Prompts", f"{len(first.prompts)}{', which share a latent and have one joint posterior' if shared else ''}"),
        ("Draws of each prompt", draws),
    ]


def prompts(posterior: PosteriorDraws) -> dict[str, Any]:
    """Return the first prompts, and the number of all; of chats the last user's turn, and the whole."""
    whole = posterior.prompts[:MAX_LISTED]
    names = posterior.prompt_names[:MAX_LISTED] or whole
    shown = [{"label": x, "whole": "" if x == y else y} for x, y in zip(names, whole, strict=True)]
    return {"shown": shown, "total": len(posterior.prompts)}


def engines(posteriors: Mapping[str, PosteriorDraws]) -> list[dict[str, Any]]:
    """Return each engine with its number, which chooses its colour, and what its draws are."""
    return [
        {"name": name, "engine": posterior.engine, "kind": KINDS[posterior.kind], "series": i % 6}
        for i, (name, posterior) in enumerate(posteriors.items())
    ]


def number(value: float, digits: int = 2) -> str:
    """Return a number as a text, with a minus sign, and a dash for what is not known."""
    if math.isnan(value):
        return "–"
    return f"{value:,.{digits}f}".replace("-", "−") if math.isfinite(value) else "∞" if value > 0 else "−∞"


# -- engines side by side -------------------------------------------------------------------------------------------


def comparison(posteriors: Mapping[str, PosteriorDraws]) -> dict[str, Any]:
    """Return the tables of engines: of the mean over prompts, and of the first prompts."""
    first = next(iter(posteriors.values()))
    found = list(rows(posteriors))
    series = {name: i % 6 for i, name in enumerate(posteriors)}
    prior = next((p.prior_measured for p in posteriors.values() if p.prior_measured is not None), None)
    tables = [
        _table(label, i, [(row, row.records[i]) for row in found], series, prior)
        for i, label in enumerate(first.prompt_labels[:MAX_PROMPTS])
    ]
    if len(first.prompts) > 1:
        over_all = [(row, row.of_all) for row in found]
        tables.insert(0, _table(f"Mean over the {len(first.prompts)} prompts", None, over_all, series, prior))
    return {
        "tables": tables,
        "total": len(first.prompts),
        "shown": min(len(first.prompts), MAX_PROMPTS),
        "has_policy": any(row.is_policy for row in found),
        "ess_limit": f"{ESS_LIMIT:.0f}",
        "khat_limit": KHAT_LIMIT,
        "rhat_limit": RHAT_LIMIT,
        "markov_ess_limit": f"{MARKOV_ESS_LIMIT:.0f}",
    }


def _table(
    label: str, prompt: int | None, found: list[tuple[Row, dict[str, Any]]], series: dict[str, int], prior: Array | None
) -> dict[str, Any]:
    lines: list[dict[str, Any]] = []
    if prior is not None:
        of = prior.mean(axis=2, keepdims=True) if prompt is None else prior[..., [prompt]]
        mean = of.mean(axis=(0, 1))
        error = standard_error(mean, of - mean)[0]
        lines.append({"name": "prior", "series": None, "measured": (float(mean[0]), float(error)), "kl_to_prior": "0"})
    for row, record in found:
        measure = "reward" if "reward" in record else "log_likelihood"
        reason = record.get("khat_reason")
        lines.append(
            {
                "name": row.shown(prompt),
                "series": series[row.engine],
                "measured": _estimate(record, measure),
                "log_z": None if row.is_policy else _estimate(record, "log_evidence"),
                "kl_to_prior": _text(record, "kl_to_prior"),
                "kl_to_posterior": _text(record, "kl_to_posterior") if row.is_policy else "–",
                "ess": "–" if row.is_policy else number(record.get("ess_min", record.get("ess", math.nan)), 0),
                "khat": "–" if row.is_policy else number(record.get("khat", math.nan)),
                "khat_reason": reason if isinstance(reason, str) and not row.is_policy else "",
                "rhat": number(record.get(f"rhat_{measure}", math.nan)) if row.kind == "markov" else "–",
                "seconds": "" if row.repeated else number(record.get("seconds", math.nan), 0),
                "speed": "" if row.repeated else number(record.get("tokens_per_second", math.nan), 0),
            }
        )
    for column in ("measured", "log_z"):
        _add_intervals(lines, column)
    return {"label": label, "prompt": prompt, "rows": lines}


def _estimate(record: Mapping[str, Any], name: str) -> tuple[float, float]:
    return float(record.get(name, math.nan)), float(record.get(f"{name}_se", math.nan))


def _text(record: Mapping[str, Any], name: str) -> str:
    return _with_error(*_estimate(record, name))


def _with_error(value: float, error: float) -> str:
    shown = f" ± {number(error)}" if math.isfinite(error) and error > 0 and math.isfinite(value) else ""
    return number(value) + shown


def _add_intervals(lines: list[dict[str, Any]], column: str) -> None:
    """Replace estimates and errors by their text and by the place of ± 2 errors on a scale of 0 to 100 of all rows."""
    known = [line[column] for line in lines if line.get(column) and math.isfinite(line[column][0])]
    ends = [v + s * 2 * e for v, e in known for s in (-1, 1) if math.isfinite(e)] + [v for v, _ in known]
    low, high = min(ends, default=0.0), max(ends, default=1.0)

    def at(value: float) -> float:
        return round(4 + 92 * (value - low) / (high - low), 2) if high > low else 50.0

    for line in lines:
        value, error = line.get(column) or (math.nan, math.nan)
        error = error if math.isfinite(error) else 0.0
        shown = math.isfinite(value)
        line[column] = {
            "text": _with_error(value, error) if line.get(column) else "–",
            "at": at(value) if shown else None,
            "from": at(value - 2 * error) if shown else None,
            "to": at(value + 2 * error) if shown else None,
        }


# -- pictures -------------------------------------------------------------------------------------------------------


def rewards(posteriors: Mapping[str, PosteriorDraws]) -> list[dict[str, Any]]:
    """Return a histogram of the reward for each of the first prompts, of the prior and of each posterior."""
    first = next(iter(posteriors.values()))
    prior = next((p.prior_measured for p in posteriors.values() if p.prior_measured is not None), None)
    panels = []
    for i, label in enumerate(first.prompt_labels[:MAX_PROMPTS]):
        weighted: dict[str, tuple[Array, Array]] = {}
        if prior is not None:
            weighted["prior"] = (prior[..., i].ravel(), np.full(prior[..., i].size, 1 / prior[..., i].size))
        for name, posterior in posteriors.items():
            measured = posterior.measured
            weights = np.broadcast_to(posterior.weights(), measured.shape)
            weighted[f"{name} "] = (measured[..., i].ravel(), weights[..., i].ravel())  # "prior" is the prior alone
        if any((np.isfinite(r) & (w > 0)).any() for r, w in weighted.values()):
            lost = {name.rstrip(): float(w[np.isneginf(r)].sum()) for name, (r, w) in weighted.items()}
            note = ", ".join(f"{name} {share:.0%}" for name, share in lost.items() if share > 0)
            svg = Markup(report_figures.rewards(weighted, first.measure))
            panels.append({"label": label, "svg": svg, "lost": note})
    return panels


def trainings(posteriors: Mapping[str, PosteriorDraws]) -> list[dict[str, Any]]:
    """Return the curves of each training, as means over prompts."""
    found = []
    for i, (name, posterior) in enumerate(posteriors.items()):
        stats = posterior.stats
        keys = [key for key in TRAINING if np.ndim(stats.get(key, 0.0)) == 3]
        if "elbo" not in keys or np.shape(stats["elbo"])[1] < 2:
            continue
        held_out = [key.removesuffix("_elbo") for key in stats if key.endswith("_elbo") and "held_out_steps" in stats]
        log_z = float(posterior.log_evidence.mean())
        error = float(np.sqrt(np.sum(posterior.log_evidence_stderr**2)) / posterior.log_evidence.size)
        panels = []
        for key in keys:
            label, words = TRAINING[key]
            evaluated = [
                (np.asarray(stats["held_out_steps"]), np.nanmean(np.asarray(stats[f"{each}_{key}"]).mean(-1), axis=0))
                for each in held_out
                if f"{each}_{key}" in stats
            ]
            level = {"level": log_z, "error": error} if key == "elbo" else {}
            raw = np.asarray(stats[key], dtype=float).mean(-1)
            svg = report_figures.curves(raw, label, i % 6, held_out=evaluated, **level)
            panels.append({"words": words, "label": label, "svg": Markup(svg)})
        length = np.shape(stats["elbo"])[1]
        about = {"name": name, "steps": length, "chains": np.shape(stats["elbo"])[0], "held_out": held_out}
        found.append({**about, "panels": panels, "window": report_figures.window(length)})
    return found


def sizes(posteriors: Mapping[str, PosteriorDraws]) -> list[dict[str, Any]]:
    """Return the effective sample sizes of each posterior: the least and the median over prompts, and their shares."""
    found = []
    for i, (name, posterior) in enumerate(posteriors.items()):
        if posterior.kind == "enumerated":
            continue
        total = num_draws(posterior.log_weights)
        if posterior.kind == "weighted":
            size, what = ess(posterior.log_weights), "by weights (Kish)"
        elif posterior.roots is not None:
            size = smallest_ess(posterior.log_weights, posterior.stats.get("ess_by_step"))
            what = "the smallest along the way"
        else:
            size, what = np.atleast_1d(ess_bulk(posterior.measured)), "of the reward (bulk)"
        known = size[np.isfinite(size)]
        least, median = (float(known.min()), float(np.median(known))) if len(known) else (math.nan, math.nan)
        found.append(
            {
                "name": name,
                "series": i % 6,
                "draws": f"{total:,}",
                "least": number(least, 0),
                "median": number(median, 0),
                "what": what,
                "share": round(100 * min(1.0, median / total), 2) if len(known) else 0,
                "least_share": round(100 * min(1.0, least / total), 2) if len(known) else 0,
                "roots": "" if posterior.roots is None else f"{int(num_roots(posterior.roots).min())}",
            }
        )
    return found


def genealogies(posteriors: Mapping[str, PosteriorDraws]) -> list[dict[str, Any]]:
    """Return for engines of particles the genealogy of the first chain, and the ESS of all, for the first prompts."""
    found = []
    for i, (name, posterior) in enumerate(posteriors.items()):
        ancestors = np.asarray(posterior.stats.get("ancestors", 0))
        if ancestors.ndim != 4 or not ancestors.size:
            continue
        panels = []
        for prompt in range(min(ancestors.shape[3], MAX_PROMPTS)):
            label = posterior.prompt_labels[prompt] if ancestors.shape[3] > 1 else "all prompts"
            svgs = [report_figures.genealogy(ancestors[0, :, :, prompt], i % 6)]
            sizes_by_step = np.asarray(posterior.stats.get("ess_by_step", 0))
            if sizes_by_step.ndim == 3:
                svgs.append(report_figures.ess_by_step(sizes_by_step[..., prompt], ancestors.shape[2], i % 6))
            panels.append({"label": label, "svgs": [Markup(svg) for svg in svgs]})
        resampled = np.asarray(posterior.stats.get("resampled", np.zeros(1)))
        found.append(
            {
                "name": name,
                "panels": panels,
                "particles": ancestors.shape[2],
                "chains": ancestors.shape[0],
                "steps": ancestors.shape[1],
                "followed": min(ancestors.shape[2], report_figures.MAX_LINEAGES),
                "resampled": f"{float(resampled.mean()):.0%}",
            }
        )
    return found


def chains(posteriors: Mapping[str, PosteriorDraws]) -> list[dict[str, Any]]:
    """Return for Markov chains the traces of the reward, with R̂ and ESS, for the first prompts."""
    found = []
    for name, posterior in posteriors.items():
        if posterior.kind != "markov":
            continue
        measured = posterior.measured
        between, size = rhat(measured), ess_bulk(measured)
        panels = [
            {
                "label": label,
                "rhat": number(float(between[i])),
                "ess": number(float(size[i]), 0),
                "svg": Markup(report_figures.traces(_finite(measured[:MAX_CHAINS, :, i]), posterior.measure)),
            }
            for i, label in enumerate(posterior.prompt_labels[:MAX_PROMPTS])
        ]
        shape = measured.shape
        acceptance = {
            key.removeprefix("acceptance_"): f"{float(np.mean(value)):.0%}"
            for key, value in posterior.stats.items()
            if key.startswith("acceptance_") and not key.startswith("acceptance_by_cut_")
        }
        found.append(
            {
                "name": name,
                "panels": panels,
                "chains": shape[0],
                "draws": shape[1],
                "shown": min(shape[0], MAX_CHAINS),
                "acceptance": acceptance,
            }
        )
    return found


def _finite(values: Array) -> Array:
    return np.where(np.isfinite(values), values, np.nan)
