"""What translations are worth: chrF (sacrebleu, the extra "translation"), decisions, and their table and picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from _figures import mean, over_seeds, stderr, table
from sacrebleu.metrics import CHRF

from bayeslm.decisions import ChrF
from bayeslm.inference import ImportanceSampling
from bayeslm.models import LanguageModel, TiltedLM
from bayeslm.plots import COLOURS, PRIOR_COLOUR

Figures = dict[str, np.ndarray]


def chrf(translations: Sequence[str], references: Sequence[str]) -> list[float]:
    """Return the chrF of each translation, between 0 and 1."""
    metric = CHRF()
    return [metric.sentence_score(a, [b]).score / 100 for a, b in zip(translations, references, strict=True)]


def reward(completions: list[str], reference: list[str], **columns: object) -> list[float]:
    """Return chrF to the reference, which is a column of the prompts."""
    return chrf(completions, reference)


def translations(lm: LanguageModel, prompts: Sequence[str], draws: int, **writing: Any) -> dict[str, list[list[str]]]:
    """Return texts of each source: draws, and the decision among them.

    :param writing: how texts are drawn, as `LanguageModel.__call__` has it.
    """
    drawn = ImportanceSampling(draws, 1, seed=1).run(TiltedLM(lm, None, **writing), prompts)
    decided = [[text] for text in drawn.decide(ChrF()).texts]
    return {"draws": drawn.texts["completion"][0].T.tolist(), "decided": decided}


def figures(texts: Mapping[str, Sequence[Sequence[str]]], references: Sequence[str]) -> Figures:
    """Return figures of each source, in percent: chrF of its texts, and how many are all right."""
    found = {}
    for name, of_sources in texts.items():
        rows = [([text.strip() for text in own], right) for own, right in zip(of_sources, references, strict=True)]
        found[f"{name}: chrF"] = 100 * np.array([np.mean(chrf(own, [right] * len(own))) for own, right in rows])
        found[f"{name}: all right"] = 100 * np.array([np.mean([text == right for text in own]) for own, right in rows])
    return found


def baseline(texts: Sequence[str], references: Sequence[str]) -> Figures:
    """Return the chrF of texts that no model wrote, in percent."""
    return {"draws: chrF": 100 * np.array(chrf(texts, references))}


def lines_of(runs: Sequence[dict[str, Figures]]) -> list[str]:
    """Return the table of runs that have baselines, a prior and a policy: means and their errors, and what was gained.

    Errors are over the sources of one run, or over several runs.
    """
    names = list(runs[0]["prior"])
    rows = {}
    for model, values in runs[0].items():
        found = {each: over_seeds([run[model][each] for run in runs]) for each in values}
        rows[model] = [mean(found[each], 1) if each in found else "" for each in names]
    gains = [over_seeds([run["policy"][each] - run["prior"][each] for run in runs]) for each in names]
    rows["policy − prior, paired"] = [mean(gain, 1) for gain in gains]
    kind = f"{len(runs)} seeds" if len(runs) > 1 else f"{len(runs[0]['prior'][names[0]])} held-out sources"
    return [f"percent, mean ± standard error over {kind}", "", *table(rows, ["", *names])]


def picture(runs: Sequence[dict[str, Figures]], path: Path) -> None:
    """Draw prior and policy, and lines for the chrF of the baselines."""
    figure, axis = plt.subplots(figsize=(8.4, 4.0), layout="constrained")
    for i, (name, colour) in enumerate({"prior": PRIOR_COLOUR, "policy": COLOURS[0]}.items()):
        values = {each: over_seeds([run[name][each] for run in runs]) for each in runs[0][name]}
        at = np.arange(len(values)) + 0.36 * i
        heights, errors = ([f(each) for each in values.values()] for f in (np.mean, stderr))
        axis.bar(at, heights, 0.34, yerr=errors, color=colour, label=name, capsize=3)
        axis.set_xticks(at - 0.18, [each.replace(": ", ":\n") for each in values])
    others = [name for name in runs[0] if name not in ("prior", "policy")]
    for name, style in zip(others, (":", "--"), strict=False):
        height = np.mean([run[name]["draws: chrF"].mean() for run in runs])
        axis.axhline(height, color="0.4", linestyle=style, label=f"chrF of {name}")
    axis.set(ylabel="percent, ± one standard error", ylim=(0, 105))
    axis.set_title(f"{len(runs[0]['prior']['draws: chrF'])} held-out sources", fontsize=10)
    figure.legend(loc="outside lower center", ncols=2 + len(others), frameon=False)
    figure.savefig(path, dpi=100)
    plt.close(figure)
