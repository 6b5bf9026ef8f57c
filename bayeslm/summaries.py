"""Rows of a comparison of posteriors and remarks on them, which tables on a terminal and in a report share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, NamedTuple

import numpy as np

from bayeslm import reliability
from bayeslm.diagnostics import summary
from bayeslm.posterior_draws import PosteriorDraws
from bayeslm.validation import NonEmpty, Unchecked, validated

NAMED = 3  # prompts that one remark names
Name = Annotated[str, Unchecked]  # of an engine, as its caller writes it: half a character is shown as an escape


class Row(NamedTuple):
    """A row of a comparison, of draws by weight or of a policy's own: a record for each prompt, and one of all."""

    engine: str
    name: str
    records: list[dict[str, Any]]
    of_all: dict[str, Any]
    is_policy: bool = False
    repeated: bool = False
    """Whether another row of the same engine has the cost."""
    kind: str = ""
    """Of the posterior."""
    doubted: tuple[bool, ...] = ()
    """For each prompt whether `reliability.problems` finds any: the row's errors cannot be believed there."""

    def shown(self, prompt: int | None) -> str:
        """Return the name for the row of a prompt, or None for all of them, with a mark if it is doubted there."""
        doubted = any(self.doubted) if prompt is None else self.doubted[prompt : prompt + 1] == (True,)
        return f"{self.name} !" if doubted else self.name


def rows(posteriors: Mapping[str, PosteriorDraws]) -> Iterator[Row]:
    """Yield a row for each posterior; where there is a policy, one more for its unweighted draws before it."""
    for engine, posterior in posteriors.items():
        weighted = _records(posterior, weighted=True)
        found = [bool(sentences) for sentences in reliability.problems(posterior)]
        doubted = tuple(found if len(found) > 1 else found * len(posterior.prompts))
        if draws_are_of_policy(posterior):
            yield Row(engine, f"{engine}: policy", *_records(posterior, weighted=False), is_policy=True)
            yield Row(engine, f"{engine}: weighted", *weighted, repeated=True, kind=posterior.kind, doubted=doubted)
        else:
            yield Row(engine, engine, *weighted, kind=posterior.kind, doubted=doubted)


def _records(posterior: PosteriorDraws, *, weighted: bool) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return the summary of each prompt and that of all."""
    table = summary(posterior, weighted=weighted).to_dict("records")
    records = [{str(name): value for name, value in record.items()} for record in table]
    return records, over_prompts(records, joint=posterior.log_weights.shape[2] == 1)


@validated
def over_prompts(records: Annotated[list[dict[str, Any]], NonEmpty], *, joint: bool) -> dict[str, Any]:
    """Return the summary of all prompts: means, the smallest ESS and number of roots, the largest k̂ and R̂.

    If k̂ or R̂ of any prompt is unknown, so is the largest; "khat_reason" says of how many prompts k̂ is.

    :param records: the summary of each prompt.
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
            found[name] = values.max()
        elif name.endswith("_se") and not joint:
            found[name] = np.sqrt(np.square(values).sum()) / len(values)
        else:
            found[name] = values.mean()
    if unknown := sum(bool(np.isnan(record.get("khat", 0.0))) for record in records):
        found["khat_reason"] = f"unknown for {unknown} of {len(records)} prompts"
    return found


@validated
def draws_are_of_policy(posterior: PosteriorDraws) -> bool:
    """Return whether the raw draws are of the trained policy alone, as those of SVI, which says what it has kept.

    The draws of adaptive importance sampling are of the prior and of earlier policies too.
    """
    has_policy = posterior.policy is not None or posterior.policy_path is not None
    return posterior.kind == "weighted" and has_policy and "kept_steps" in posterior.stats


@validated
def remarks(posteriors: Mapping[Name, PosteriorDraws]) -> list[str]:
    """Return a sentence for each problem that the diagnostics show; one that several prompts share is said once."""
    lines = []
    for name, posterior in posteriors.items():
        if posterior.kind == "uncorrected":
            lines.append(
                f"{name} is a baseline: its draws are not from the posterior, and its log Z is from draws of the prior."
            )
        if posterior.stats.get("interrupted"):
            lines.append(f"{name} was interrupted: its figures are of what it had by then.")
        if posterior.conditional:
            lines.append(f"{name} retained draws of the posterior: use it for bounds on log Z, not for comparison.")
        where: dict[str, list[str]] = {}
        for label, sentences in zip(posterior.prompt_labels, reliability.problems(posterior), strict=False):
            for sentence in sentences:
                where.setdefault(sentence, []).append(repr(label))
        lines += [f"{name}{_of_prompts(posterior, labels)}: {sentence}" for sentence, labels in where.items()]
    return lines


def _of_prompts(posterior: PosteriorDraws, labels: list[str]) -> str:
    """Return of which prompts a remark is, unless it is of all of them."""
    if len(labels) == posterior.log_weights.shape[2]:
        return ""
    more = f" and {len(labels) - NAMED} prompts more" if len(labels) > NAMED else ""
    return f", {', '.join(labels[:NAMED])}{more}"


@validated
def next_steps(posteriors: Mapping[Name, PosteriorDraws], advise: Callable[[PosteriorDraws, str], str]) -> list[str]:
    """Return what to do about the problems of each engine that has any.

    :param advise: returns it for a posterior and its name.
    """
    return [
        f"{name}: {advise(posterior, name)}."
        for name, posterior in posteriors.items()
        if any(reliability.problems(posterior))
    ]
