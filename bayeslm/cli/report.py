"""Tables of posteriors for the terminal: the comparison, the best texts, and warnings."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from bayeslm import diagnostics, reliability
from bayeslm.posterior import Posterior
from bayeslm.reliability import ESS_LIMIT, TELLING
from bayeslm.weights import KHAT_LIMIT

from .console import content


def comparisons(posteriors: Mapping[str, Posterior]) -> Iterator[Table]:
    """Yield a table for each prompt, with a row for each engine and one more for the unweighted draws of a policy."""
    prior_rewards = next((p.prior_measured for p in posteriors.values() if p.prior_measured is not None), None)
    prior_means = None if prior_rewards is None else prior_rewards.mean(axis=(0, 1))
    measure = next(iter(posteriors.values())).measure
    engines = [row for name, posterior in posteriors.items() for row in _rows(name, posterior)]
    for prompt, title in enumerate(next(iter(posteriors.values())).prompt_labels):
        table = Table(title=content(title), title_justify="left", box=SIMPLE_HEAD, padding=0, pad_edge=False)
        table.add_column("engine", no_wrap=True)
        table.add_column(measure.replace("-", "-\n"), justify="right", no_wrap=True)
        for name in ("KL to\nprior", "KL to\nposterior", "log Z", "ESS", "k̂", "sec.", "tokens\na sec."):
            table.add_column(name, justify="right", no_wrap=True)  # fits 80 columns
        if prior_means is not None:
            table.add_row("prior", f"{prior_means[prompt]:.2f}", "0")
        for rows in engines:
            table.add_row(*rows[prompt])
        yield table


def _rows(name: str, posterior: Posterior) -> Iterator[list[list[str]]]:
    """Yield the cells of an engine's rows, a list for each prompt: of a policy's draws, and of its weighted draws."""

    def cells(name: str, *, weighted: bool, repeated: bool = False) -> list[list[str]]:
        records = diagnostics.summary(posterior, weighted=weighted).to_dict("records")
        return [[name, *_cells(record, is_policy=not weighted, repeated=repeated)] for record in records]

    if _has_policy(posterior):
        yield cells(f"{name}: policy", weighted=False)
        yield cells(f"{name}: weighted", weighted=True, repeated=True)  # the policy's row has the cost
    else:
        yield cells(name, weighted=True)


def _cells(row: Mapping[Hashable, Any], *, is_policy: bool, repeated: bool) -> list[str]:
    def value(column: str, digits: int = 2) -> str:
        number = row.get(column, math.nan)
        if not math.isfinite(number):
            return "–"
        error = row.get(f"{column}_se", math.nan)
        shown = f"±{error:.{digits}f}".replace("±0.", "±.") if math.isfinite(error) and error > 0 else ""
        return f"{number:.{digits}f}{shown}"

    return [
        value("reward" if "reward" in row else "log_likelihood"),
        value("kl_to_prior"),
        value("kl_to_posterior") if is_policy else "–",
        "–" if is_policy else value("log_evidence") + _limit(row),
        "–" if is_policy else value("ess_min" if "ess_min" in row else "ess", 0) + _roots(row),
        "–" if is_policy else value("khat"),
        "" if repeated else value("seconds", 0),
        "" if repeated else value("tokens_per_second", 0),
    ]


def _limit(row: Mapping[Hashable, Any]) -> str:
    """Return the upper limit of log Z on a line of its own, where the weights say nothing of what is rare."""
    known = row["log_evidence"] + 2 * row["log_evidence_se"]
    tells = (row.get("khat_reason") or row["log_evidence_se"] == 0) and row.get(
        "log_evidence_high", -math.inf
    ) > known + TELLING
    return f"\n<{row['log_evidence_high']:.2f}" if tells else ""


def _roots(row: Mapping[Hashable, Any]) -> str:
    """Return the number of particles' surviving roots in parentheses."""
    return f" ({row['roots']:.0f})" if "roots" in row else ""


def _has_policy(posterior: Posterior) -> bool:
    """Whether the raw draws are those of a trained policy."""
    return posterior.kind == "weighted" and (posterior.policy is not None or posterior.policy_path is not None)


def best_texts(posteriors: Mapping[str, Posterior], k: int = 3) -> Table | None:
    """Return a table of the k completions of highest reward by engine and prompt; None if no engine kept texts."""
    table = Table(title="Best completions", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("engine", no_wrap=True)
    table.add_column(next(iter(posteriors.values())).measure, justify="right")
    table.add_column("prompt and completion")
    labels = next(iter(posteriors.values())).prompts
    for i, prompt in enumerate(labels):
        for name, posterior in posteriors.items():
            if not posterior.texts:
                continue
            for text, reward in posterior.best(i, k):
                line = content(" ".join(prompt.split()), "dim") + content(" " + " ".join(text.split()), "default")
                table.add_row(name, f"{reward:.3f}", line)
                name = ""
    return table if table.row_count else None


def show(posteriors: Mapping[str, Posterior], console: Console, k: int = 3) -> None:
    """Print the comparison, the best texts, and warnings."""
    for table in comparisons(posteriors):
        console.print(table)
    policy = "A trained policy has two rows: its own draws, and the same draws weighted towards the posterior. "
    particles = ""
    if any(posterior.roots is not None for posterior in posteriors.values()):
        particles = "; of particles the smallest ESS along the way, and (the roots that have descendants)"
    console.print(
        f"Means ± one standard error; KL in nats. {policy if any(map(_has_policy, posteriors.values())) else ''}"
        f"Weights are reliable if k̂ < {KHAT_LIMIT} and ESS > {ESS_LIMIT:.0f}{particles}.\n",
        style="dim",
    )
    texts = best_texts(posteriors, k)
    if texts is not None:
        console.print(texts)
    for line in warnings(posteriors):
        console.print("! " + line, style="yellow")


def warnings(posteriors: Mapping[str, Posterior]) -> list[str]:
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
