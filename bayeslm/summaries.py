"""Rows of a comparison of posteriors and remarks on them, which tables on a terminal and in a report share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from bayeslm import diagnostics, reliability
from bayeslm.posterior import Posterior


class Row(NamedTuple):
    """One row of a comparison: a posterior's draws by weight, or a policy's own draws, and a record for each prompt."""

    engine: str
    name: str
    records: list[dict[str, Any]]
    is_policy: bool = False
    repeated: bool = False
    """Whether another row of the same engine has the cost."""


def rows(posteriors: Mapping[str, Posterior]) -> Iterator[Row]:
    """Yield a row for each posterior; where there is a policy, one more for its unweighted draws before it."""
    for engine, posterior in posteriors.items():
        weighted = _records(posterior, weighted=True)
        if has_policy(posterior):
            yield Row(engine, f"{engine}: policy", _records(posterior, weighted=False), is_policy=True)
            yield Row(engine, f"{engine}: weighted", weighted, repeated=True)
        else:
            yield Row(engine, engine, weighted)


def _records(posterior: Posterior, *, weighted: bool) -> list[dict[str, Any]]:
    records = diagnostics.summary(posterior, weighted=weighted).to_dict("records")
    return [{str(name): value for name, value in record.items()} for record in records]


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
