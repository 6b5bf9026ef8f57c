"""Learn a judge's reward from comparisons of a language model's texts, and check how reliable it is.

    python examples/preferences.py [folder, by default runs/preferences]

SmolLM2 writes completions. A judge compares pairs of them: it prefers the one with the more positive sentiment by
VADER, makes mistakes on close pairs, and skips pairs of equal sentiment. NUTS and SVI infer a linear reward on sentence
embeddings from these comparisons. Both predict comparisons of held-out texts, and the calibration of these
probabilities is measured. This takes about a minute on two cores.
"""

from __future__ import annotations

import sys
from pathlib import Path

import arviz as az
import numpy as np
from pyro.infer.autoguide import AutoMultivariateNormal

from bayeslm import diagnostics
from bayeslm.calibration import calibrate
from bayeslm.inference import NUTS, SVI, predict
from bayeslm.inference.program import seeded
from bayeslm.models import LanguageModel, rewards
from bayeslm.models.preferences import BradleyTerry, Comparisons, SentenceEmbedding, Standardised
from bayeslm.plots import plot_reliability

PROMPTS = ["My dinner at the restaurant was", "The film I saw was", "The hotel room was", "My new phone is"]
TEXTS = 64  # completions of each prompt
SHARPNESS = 6.0  # P(a is preferred) = sigmoid(sharpness * (sentiment of a - sentiment of b))


def judged(texts: np.ndarray, number: int, rng: np.random.Generator) -> Comparisons:
    """Draw random pairs from texts (text, prompt), and let the judge compare them."""
    sentiment = rewards.Sentiment()
    rows = []
    while len(rows) < number:
        column = int(rng.integers(len(PROMPTS)))
        prompt, pair = PROMPTS[column], texts[rng.choice(len(texts), 2, replace=False), column]
        first, second = sentiment([prompt] * 2, list(pair)).tolist()
        if first == second:
            continue
        wins = rng.random() < 1 / (1 + np.exp(-SHARPNESS * (first - second)))
        chosen, rejected = pair if wins else pair[::-1]
        rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return Comparisons.from_rows(rows)


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    lm = LanguageModel.from_pretrained("smollm2").packed()
    with seeded(0):
        texts = lm.decode(lm(PROMPTS, max_new_tokens=16).sample((TEXTS,)))  # (text, prompt)
    train, held_out = judged(texts[:40], 400, rng), judged(texts[40:], 300, rng)  # they share no text
    train.to_jsonl(folder / "comparisons.jsonl")

    features = Standardised(SentenceEmbedding(), PROMPTS * TEXTS, list(texts.flat), components=24)
    model = BradleyTerry(features, scale=2.0)
    engines = {
        "NUTS": NUTS(num_samples=200, warmup=150, num_chains=2, max_tree_depth=5, seed=0),
        "SVI": SVI(num_steps=300, num_samples=1000, guide=AutoMultivariateNormal, seed=0),
    }
    calibrations = {}
    for name, engine in engines.items():
        posterior = engine.run(model, train)
        calibrations[name] = found = calibrate(predict(posterior, model, held_out, seed=1))
        mean, limit = found.ece_if_calibrated
        print(f"\n{name}: {posterior.stats['seconds']:.0f} seconds. {len(held_out)} held-out comparisons:")
        print(found.table().round(4).to_string())
        print(f"(calibrated probabilities have a mean ECE of {mean:.3f}, and below {limit:.3f} in 95% of data sets)")
        loo = az.loo(posterior.to_arviz(), var_name="preferred").elpd_loo / len(train)
        print(f"leave-one-out log score of the {len(train)} training comparisons: {loo:.3f} nats each")
        if name == "NUTS":
            print(f"largest R-hat: {diagnostics.rhat(posterior.samples['weights']).max():.3f}")
            weights = posterior.samples["weights"]
        posterior.save(folder / name)

    best = [(PROMPTS[column], text) for text, column in zip(texts[40:].flat, 24 * [*range(4)], strict=True)]
    learned = model.reward([prompt for prompt, _ in best], [text for _, text in best], weights)  # (chain, draw, text)
    mean, spread = learned.mean((0, 1)), learned.std((0, 1))
    print("\nHeld-out texts with the highest and lowest learned rewards, posterior mean ± standard deviation:")
    for i in [*mean.argsort(descending=True)[:3].tolist(), *mean.argsort()[:3].tolist()]:
        print(f"{mean[i]:6.2f} ± {spread[i]:.2f}  {' '.join((best[i][0] + best[i][1]).split())[:90]}")
    plot_reliability(calibrations).savefig(folder / "reliability.png", dpi=150)
    print(f"\nPosteriors, comparisons and reliability.png are in {folder}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/preferences"))
