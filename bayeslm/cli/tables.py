"""Tables of posteriors for the terminal: the comparison, the best texts, and warnings."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from bayeslm import advice, reliability, summaries
from bayeslm.posterior import Posterior
from bayeslm.reliability import ESS_LIMIT, TELLING
from bayeslm.weights import KHAT_LIMIT, khat_reasons

from .console import content

MOST = 20  # prompts that are printed, and warnings
OF_ALL = "means, the smallest ESS, the largest k̂ (– if one is unknown)"


def comparisons(posteriors: Mapping[str, Posterior]) -> Iterator[Table]:
    """Yield a table for each prompt, with a row for each engine and one more for the unweighted draws of a policy.

    Of several prompts the last table is of all of them, see `summaries`.
    """
    prior_rewards = next((p.prior_measured for p in posteriors.values() if p.prior_measured is not None), None)
    prior_means = None if prior_rewards is None else prior_rewards.mean(axis=(0, 1))
    measure = next(iter(posteriors.values())).measure
    engines = list(summaries.rows(posteriors))
    titles = next(iter(posteriors.values())).prompt_labels
    for prompt, title in enumerate([*titles, *([f"all {len(titles)} prompts: {OF_ALL}"] if len(titles) > 1 else [])]):
        table = Table(title=content(title), title_justify="left", box=SIMPLE_HEAD, padding=0, pad_edge=False)
        table.add_column("engine", no_wrap=True)
        table.add_column(measure.replace("-", "-\n"), justify="right", no_wrap=True)
        for name in ("KL to\nprior", "KL to\nposterior", "log Z", "ESS", "k̂", "sec.", "tokens\na sec."):
            table.add_column(name, justify="right", no_wrap=True)  # fits 80 columns
        if prior_means is not None:
            mean = prior_means[prompt] if prompt < len(titles) else prior_means.mean()
            table.add_row("prior", f"{mean:.2f}", "0")
        for row in engines:
            record = row.records[prompt] if prompt < len(titles) else row.of_all
            name = row.shown(prompt if prompt < len(titles) else None)
            table.add_row(name, *_cells(record, is_policy=row.is_policy, repeated=row.repeated))
        yield table


def _cells(row: Mapping[str, Any], *, is_policy: bool, repeated: bool) -> list[str]:
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


def _limit(row: Mapping[str, Any]) -> str:
    """Return the upper limit of log Z on a line of its own, where the weights say nothing of what is rare."""
    known = row["log_evidence"] + 2 * row["log_evidence_se"]
    tells = (row.get("khat_reason") or row["log_evidence_se"] == 0) and row.get(
        "log_evidence_high", -math.inf
    ) > known + TELLING
    return f"\n<{row['log_evidence_high']:.2f}" if tells else ""


def _roots(row: Mapping[str, Any]) -> str:
    """Return the number of particles' surviving roots in parentheses."""
    return f" ({row['roots']:.0f})" if "roots" in row else ""


def best_texts(posteriors: Mapping[str, Posterior], k: int = 3, most: int | None = None) -> Table | None:
    """Return a table of the k completions of highest reward by prompt and engine; None if no engine kept texts.

    :param most: so many prompts, the first.
    """
    table = Table(title="Best completions", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("engine", no_wrap=True)
    table.add_column(next(iter(posteriors.values())).measure, justify="right")
    table.add_column("completion")
    kept = {name: posterior for name, posterior in posteriors.items() if posterior.texts}
    labels = next(iter(posteriors.values())).prompt_labels
    for i, label in enumerate(labels[:most] if kept and k > 0 else []):
        table.add_row("", "", content(label, "dim"))
        for name, posterior in kept.items():
            for text, reward in posterior.best(i, k):
                table.add_row(name, f"{reward:.3f}", " ".join(text.split()))
                name = ""
        table.add_section()
    return table if table.row_count else None


def show(
    posteriors: Mapping[str, Posterior],
    console: Console,
    k: int = 3,
    *,
    most: int | None = MOST,
    whole: str = "`infer` writes all into a folder --out",
) -> None:
    """Print the comparison, the best texts, and warnings.

    :param most: prompts, the first, and warnings that are printed; None prints all.
    :param whole: where the rest is, in a sentence.
    """
    number = len(next(iter(posteriors.values())).prompts)
    shown = number if most is None else min(most, number)
    tables = comparisons(posteriors)
    for table in islice(tables, shown):
        _print(table, console)
    if shown < number:
        console.print(f"… and {number - shown} prompts more: {whole}\n", style="dim")
    for table in islice(tables, number - shown, None):  # of all prompts
        _print(table, console)
    policy = particles = marked = ""
    if any(any(row.doubted) for row in summaries.rows(posteriors)):
        marked = " ! marks figures whose errors cannot be believed: why stands below."
    if any(map(summaries.draws_are_of_policy, posteriors.values())):
        policy = "A trained policy has two rows: its own draws, and the same draws weighted towards the posterior. "
        policy += "The KL to the posterior is that of its own draws. "
    if any(posterior.roots is not None for posterior in posteriors.values()):
        particles = "; of particles the smallest ESS along the way, and (the roots that have descendants)"
    console.print(
        f"Means ± one standard error; KL in nats. {policy}"
        f"Weights are reliable if k̂ < {KHAT_LIMIT} and ESS > {ESS_LIMIT:.0f}{particles}.{marked}\n",
        style="dim",
    )
    for line in _unknown_khats(posteriors):
        console.print(line, style="dim")
    texts = best_texts(posteriors, k, most)
    if texts is not None:
        _print(texts, console)
    lines = summaries.remarks(posteriors)
    for line in lines[:most]:
        console.print("! " + line, style="yellow")
    if most is not None and len(lines) > most:
        console.print(f"! and {len(lines) - most} warnings more: {whole}", style="yellow")
    for line in summaries.next_steps(posteriors, advice.on_command_line):
        console.print("> " + line, style="yellow")


def _unknown_khats(posteriors: Mapping[str, Posterior]) -> list[str]:
    """Return why each k̂ that no warning explains is unknown."""
    reasons: dict[str, str] = {}
    for name, posterior in posteriors.items():
        if posterior.kind == "weighted":
            found = zip(khat_reasons(posterior.log_weights), reliability.problems(posterior), strict=True)
            reasons |= {reason: name for reason, said in found if reason and not said}
    return [f"No k̂ of {name}: {reason}." for reason, name in reasons.items()]


def _print(table: Table, console: Console) -> None:
    """Print a table; in a file its lines end where their words do."""
    if console.is_terminal:
        console.print(table)
        return
    with console.capture() as capture:
        console.print(table)
    console.file.write("\n".join(line.rstrip() for line in capture.get().splitlines()) + "\n")
