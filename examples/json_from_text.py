"""JSON from text: SmolLM2 fills a schema, under a global and a local constraint.

    python examples/json_from_text.py [--particles 12]        (four minutes on one core)

Each text names a person, an age and a city, and the answer is JSON of a schema. The *local* distribution is what most
tools draw from: each token from those that the grammar allows next, renormalised. The *global* one is the language
model's own, given that the answer is a text of the schema: the same draws, weighted by the mass that was kept. `SMC`
draws from it. Both are always valid; they differ where the grammar cuts off what the model wanted to write.

For each text: the share of draws in which a field is right, with its standard error over chains, and log Z, the
log-probability that the model's unconstrained answer is a text of the schema.
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np

from bayeslm import Posterior
from bayeslm.inference import SMC, ImportanceSampling
from bayeslm.models import LanguageModel, TiltedLM, rewards

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


def shares(posterior: Posterior, weights: np.ndarray) -> list[tuple[str, str]]:
    """Return, of each text, the share of each right field and of whole answers, by weights (chain, draw, prompt)."""
    answers = np.vectorize(parsed, otypes=[object])(posterior.texts["completion"])
    rows = []
    for i, truth in enumerate(TEXTS.values()):
        each, weight = answers[..., i], weights[..., i] * (answers[..., i] != None)  # noqa: E711
        weight = weight / weight.sum(1, keepdims=True)
        cells = []
        for name in (*truth, "all"):
            right = np.array([is_right(answer, truth, name) for answer in each.flat]).reshape(each.shape)
            share = (weight * right).sum(1)
            cells.append(f"{share.mean():.2f} ± {share.std(ddof=1) / len(share) ** 0.5:.2f}")
        rows.append((next(s for s, t in TEXTS.items() if t is truth), " | ".join(cells)))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--particles", type=int, default=12, help="in each of four chains")
    options = parser.parse_args()
    grammar = rewards.Grammar(json_schema=SCHEMA)
    model = TiltedLM(LanguageModel.from_pretrained("smollm2").packed(), grammar, beta=1.0, max_new_tokens=32)
    prompts = [question(text) for text in TEXTS]
    start = time.perf_counter()
    local = ImportanceSampling(options.particles, CHAINS, guide=grammar, seed=0).run(model, prompts)
    smc = SMC(options.particles, CHAINS, twist=grammar, seed=0).run(model, prompts)
    tables = {
        "local": shares(local, np.ones_like(local.log_weights)),
        "global, the same draws weighted": shares(local, np.exp(local.log_weights - local.log_weights.max((0, 1)))),
        "global, SMC": shares(smc, np.exp(smc.log_weights - smc.log_weights.max((0, 1)))),
    }
    valid = np.vectorize(parsed, otypes=[object])(smc.texts["completion"])[smc.log_weights > -np.inf]
    print("| text | constraint | name | age | city | all three |\n|---|---|---|---|---|---|")
    for kind, rows in tables.items():
        for text, cells in rows:
            print(f"| {text} | {kind} | {cells} |")
    for text, log_z, error in zip(TEXTS, smc.log_evidence, smc.log_evidence_stderr, strict=True):
        print(f"\nlog Z of {text!r}: {log_z:.2f} ± {error:.2f}")
    print(f"valid texts with weight: {sum(v is not None for v in valid)} of {len(valid)}")
    print(f"best: {smc.best(k=3)}")
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
