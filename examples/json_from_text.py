"""JSON from text: SmolLM2 fills a schema, under a global and a local constraint.

    python examples/json_from_text.py [--particles 12]        (a minute of one core)

Each text names a person, an age and a city, and the answer is JSON of a schema. The *local* distribution is what most
tools draw from: each token from those that the grammar allows next, renormalised. The *global* one is the language
model's own, given that the answer is a text of the schema: the same draws, weighted by the mass that was kept. `SMC`
draws from it. Both are always valid; they differ where the grammar cuts off what the model wanted to write.

For each text: the share of draws in which a field is right, with its standard error over chains, and log Z, the
log-probability that the model's unconstrained answer is a text of the schema.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from _figures import count, mean, parser, table, with_error, write

from bayeslm import Posterior
from bayeslm.inference import SMC, ImportanceSampling
from bayeslm.models import LanguageModel, TiltedLM, rewards
from bayeslm.plots import COLOURS, PRIOR_COLOUR

SCHEMA = {
    "x-guidance": {"whitespace_flexible": False, "key_separator": ": ", "item_separator": ", "},
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 16},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "city": {"type": "string", "maxLength": 12},
    },
    "required": ["name", "age", "city"],
    "additionalProperties": False,
}
TEXTS = {
    "Maria Keller, who lives in Zurich, turned 34 last week.": {"name": "Maria Keller", "age": 34, "city": "Zurich"},
    "Tom Baker is 51 years old. He moved to Boston.": {"name": "Tom Baker", "age": 51, "city": "Boston"},
}
CHAINS = 4


def question(text: str) -> str:
    example = '{"name": "Ann Smith", "age": 28, "city": "Paris"}'
    return f"Text: Ann Smith is 28 years old and lives in Paris.\nJSON: {example}\n\nText: {text}\nJSON: "


def parsed(text: str) -> dict[str, object] | None:
    """Return what a text says, or None if it was cut off at the limit."""
    try:
        return dict(json.loads(text))
    except ValueError:
        return None


def is_right(answer: dict[str, object] | None, truth: dict[str, object], name: str) -> bool:
    return answer is not None and (answer == truth if name == "all" else answer[name] == truth[name])


def shares(posterior: Posterior, weights: np.ndarray) -> list[np.ndarray]:
    """Return of each text the shares of each right field and of whole answers, by weights (chain, draw, prompt).

    :returns: for each text (chain, share).
    """
    answers = np.vectorize(parsed, otypes=[object])(posterior.texts["completion"])
    found = []
    for i, truth in enumerate(TEXTS.values()):
        each, weight = answers[..., i], weights[..., i] * (answers[..., i] != None)  # noqa: E711
        weight = weight / weight.sum(1, keepdims=True)
        judged = [[is_right(answer, truth, name) for answer in each.flat] for name in (*truth, "all")]
        found.append(np.stack([(weight * np.reshape(right, each.shape)).sum(1) for right in judged], axis=1))
    return found


def picture(found: dict[str, list[np.ndarray]], path: Path) -> None:
    figure, axes = plt.subplots(1, len(TEXTS), figsize=(9.6, 3.8), sharey=True, layout="constrained")
    for axis, (i, text) in zip(axes, enumerate(TEXTS), strict=True):
        for k, ((kind, of_text), colour) in enumerate(zip(found.items(), (PRIOR_COLOUR, *COLOURS), strict=False)):
            values = of_text[i]
            errors = values.std(0, ddof=1) / len(values) ** 0.5
            axis.bar(np.arange(4) + 0.27 * k, values.mean(0), 0.25, yerr=errors, color=colour, capsize=2, label=kind)
        axis.set_xticks(np.arange(4) + 0.27, ["name", "age", "city", "all three"])
        axis.set_title(text, fontsize=9)
    axes[0].set(ylabel="share right, ± one standard error", ylim=(0, 1.05))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=100)


def main() -> None:
    options = parser(__doc__, "json_from_text")
    options.add_argument("--particles", type=count, default=12, help="in each of four chains")
    chosen = options.parse_args()
    particles = 2 if chosen.quick else chosen.particles
    grammar = rewards.Grammar(json_schema=SCHEMA)
    model = TiltedLM(LanguageModel.from_pretrained("smollm2").packed(), grammar, beta=1.0, max_new_tokens=32)
    prompts = [question(text) for text in TEXTS]
    start = time.perf_counter()
    local = ImportanceSampling(particles, CHAINS, guide=grammar, seed=0).run(model, prompts)
    smc = SMC(particles, CHAINS, twist=grammar, seed=0).run(model, prompts)
    found = {
        "local": shares(local, np.ones_like(local.log_weights)),
        "global, the same draws weighted": shares(local, np.exp(local.log_weights - local.log_weights.max((0, 1)))),
        "global, SMC": shares(smc, np.exp(smc.log_weights - smc.log_weights.max((0, 1)))),
    }
    valid = np.vectorize(parsed, otypes=[object])(smc.texts["completion"])[smc.log_weights > -np.inf]
    rows = {
        f"{text} | {kind}": [mean(of_text[i][:, k]) for k in range(4)]
        for kind, of_text in found.items()
        for i, text in enumerate(TEXTS)
    }
    lines = table(rows, ["text", "constraint", "name", "age", "city", "all three"])
    for text, log_z, error in zip(TEXTS, smc.log_evidence, smc.log_evidence_stderr, strict=True):
        lines.append(f"\nlog Z of {text!r}: {with_error(log_z, error)}")
    lines += [f"valid texts with weight: {sum(v is not None for v in valid)} of {len(valid)}", f"best: {smc.best(k=3)}"]
    write(chosen.folder, lines, start)
    picture(found, chosen.folder / "json-from-text.png")


if __name__ == "__main__":
    main()
