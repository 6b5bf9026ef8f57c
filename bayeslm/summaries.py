"""Rows of a comparison of posteriors and remarks on them, which tables on a terminal and in a report share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from bayeslm import diagnostics, reliability
from bayeslm.posterior import Posterior


class Row(NamedTuple):
    """A row of a comparison, of draws by weight or of a policy's own: a record for each prompt, and one of all."""

    engine: str
    name: str
    records: list[dict[str, Any]]
    of_all: dict[str, Any]
    is_policy: bool = False
    repeated: bool = False
    """Whether another row of the same engine has the cost."""


def rows(posteriors: Mapping[str, Posterior]) -> Iterator[Row]:
    """Yield a row for each posterior; where there is a policy, one more for its unweighted draws before it."""
    for engine, posterior in posteriors.items():
        weighted = _records(posterior, weighted=True)
        if has_policy(posterior):
            yield Row(engine, f"{engine}: policy", *_records(posterior, weighted=False), is_policy=True)
            yield Row(engine, f"{engine}: weighted", *weighted, repeated=True)
        else:
            yield Row(engine, engine, *weighted)


def _records(posterior: Posterior, *, weighted: bool) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return the summary of each prompt and that of all."""
    table = diagnostics.summary(posterior, weighted=weighted).to_dict("records")
    records = [{str(name): value for name, value in record.items()} for record in table]
    return records, _over_prompts(records, joint=posterior.log_weights.shape[2] == 1)


def _over_prompts(records: list[dict[str, Any]], *, joint: bool) -> dict[str, Any]:
    """Return the summary of all prompts: means, the smallest ESS and number of roots, the largest k̂ and R̂.

    :param joint: whether they are one posterior, whose errors depend on one another; the mean error bounds that of the
        mean.
    """
    found: dict[str, Any] = {}
    for name in records[0]:
        if name == "khat_reason":
            continue
        values = np.array([record[name] for record in records], dtype=float)
        if name in ("ess", "ess_min", "roots"):
            found[name] = values.min()
        elif name.startswith(("khat", "rhat")):
            found[name] = np.nan if np.isnan(values).all() else np.nanmax(values)
        elif name.endswith("_se") and not joint:
            found[name] = np.sqrt(np.square(values).sum()) / len(values)
        else:
            found[name] = values.mean()
    return found


def has_policy(posterior: Posterior) -> bool:
    """Return whether the raw draws are those of a trained policy."""
    return posterior.kind == "weighted" and (posterior.policy is not None or posterior.policy_path is not None)


def remarks(posteriors: Mapping[str, Posterior]) -> list[str]:
    """Return a sentence for each problem that the diagnostics show."""
    lines = []
    for name, posterior in posteriors.items():
        if posterior.kind == "uncorrected":
            lines.append(
                f"{name} is a baseline: its draws are not from the posterior, and its log Z is from draws of the prior."
            )
        if posterior.stats.get("interrupted"):
            lines.append(f"{name} was interrupted: its figures are of the draws or steps before that.")
        if posterior.conditional:
            lines.append(f"{name} retained draws of the posterior: use it for bounds on log Z, not for comparison.")
        for label, sentences in zip(posterior.prompt_labels, reliability.problems(posterior), strict=False):
            lines += [f"{name}, {label!r}: {sentence}" for sentence in sentences]
    return lines
