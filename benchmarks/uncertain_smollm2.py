"""Uncertain rewards on real texts: does pessimism help SmolLM2's best of n?

    python benchmarks/uncertain_smollm2.py [--texts 256] [--repeats 20] [--comparisons 20 60 200]

A judge whose log-odds are 4 times VADER's sentiment compares texts of SmolLM2 on three prompts; a Bradley-Terry reward
on 16 principal components of sentence embeddings is inferred by NUTS, and picks the best of n of the same texts in each
of its four forms. The figures are the judge's reward of what is picked, above the mean of the prompt's texts, averaged
over all ways to draw n of them: with r_(k) the judge's reward of the k-th lowest score of N,

    sum_k r_(k) C(k - 1, n - 1) / C(N, n)

and, for each form but the mean, how much more that is than the mean form's on the same comparisons, ± one standard
error over data sets.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import expit, gammaln

from bayeslm.inference import NUTS
from bayeslm.models import LanguageModel, rewards
from bayeslm.models.preferences import BradleyTerry, Comparisons, Form, SentenceEmbedding, Standardised, UncertainReward

PROMPTS = ["My dinner at the restaurant was", "The hotel room was", "The film I saw was"]
FORMS: tuple[Form, ...] = ("mean", "draw", "quantile", "marginal")
Array = NDArray[np.float64]


def best_of(scores: Array, reward: Array, ns: Array) -> Array:
    """Expected reward (n,) of the text with the highest score among n of N, for each n."""
    size = len(scores)
    k, n = np.arange(1, size + 1), ns[:, None]
    outside = np.where(k >= n, 0.0, -np.inf)
    log_share = gammaln(k) - gammaln(n) - gammaln(np.maximum(k - n, 0) + 1)
    log_all = gammaln(size + 1) - gammaln(n + 1) - gammaln(size - n + 1)
    return np.exp(log_share - log_all + outside) @ reward[np.argsort(scores, kind="stable")]


def compare(texts: NDArray[np.object_], reward: Array, number: int, seed: int) -> Comparisons:
    """Pairs of texts (prompt, text) of one prompt each, judged with the odds of Bradley and Terry."""
    rng = np.random.default_rng(seed)
    rows = []
    while len(rows) < number:
        prompt = rng.integers(len(PROMPTS))
        i, j = rng.choice(texts.shape[1], 2, replace=False)
        if rng.random() > expit(reward[prompt, i] - reward[prompt, j]):
            i, j = j, i
        if texts[prompt, i] != texts[prompt, j]:
            rows.append((PROMPTS[prompt], texts[prompt, i], texts[prompt, j]))
    return Comparisons(*map(list, zip(*rows, strict=True)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=256, help="of each prompt")
    parser.add_argument("--repeats", type=int, default=20, help="data sets")
    parser.add_argument("--comparisons", type=int, nargs="+", default=[20, 60, 200])
    options = parser.parse_args()

    torch.manual_seed(0)
    distribution = LanguageModel.from_pretrained("smollm2").packed()(PROMPTS, max_new_tokens=16)
    texts = distribution.decode(distribution.sample(torch.Size([options.texts]))).T  # (prompt, text)
    prompts = np.repeat(PROMPTS, options.texts).tolist()
    flat = texts.ravel().tolist()
    reward = 4.0 * rewards.Sentiment()(prompts, flat).double().numpy().reshape(texts.shape)
    reward -= reward.mean(1, keepdims=True)
    features = Standardised(SentenceEmbedding(), prompts, flat, components=16)
    typical = dict(zip(PROMPTS, features(prompts, flat).reshape(*texts.shape, -1).mean(1), strict=True))
    ns = 2 ** np.arange(0, int(np.log2(options.texts)) + 1)

    for number in options.comparisons:
        picked: dict[str, list[Array]] = {form: [] for form in FORMS}
        for seed in range(options.repeats):
            model = BradleyTerry(features, scale=2.0)
            data = compare(texts, reward, number, seed)
            posterior = NUTS(num_samples=128, warmup=80, num_chains=1, seed=seed, progress=False).run(model, data)
            for form in FORMS:
                learned = UncertainReward.from_posterior(model, posterior, form, typical=typical, seed=seed)
                scores = learned(prompts, flat).double().numpy().reshape(texts.shape)
                picked[form].append(np.mean([best_of(s, r, ns) for s, r in zip(scores, reward, strict=True)], axis=0))
        print(f"\n{number} comparisons, the judge's reward of the best of n\n")
        print("| form | " + " | ".join(f"n = {n}" for n in ns[1::2]) + f" | less the mean form at {ns[-1]} |")
        print("|---|" + "---|" * (len(ns[1::2]) + 1))
        for form in FORMS:
            found = np.stack(picked[form])
            more = found[:, -1] - np.stack(picked["mean"])[:, -1]
            excess = "" if form == "mean" else f"{more.mean():+.2f} ± {more.std(ddof=1) / np.sqrt(len(more)):.2f}"
            print(f"| {form} | " + " | ".join(f"{x:.2f}" for x in found.mean(0)[1::2]) + f" | {excess} |", flush=True)


if __name__ == "__main__":
    main()
