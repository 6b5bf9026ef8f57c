"""Learning from comparisons: how many answers does each way of asking need, on texts of SmolLM2?

    python benchmarks/elicitation.py [--seeds 5] [--first 5] [--comparisons 240] [--temperature 0.1] [--gap 0.7]

The hidden reward is VADER's sentiment of completions that SmolLM2-135M draws of eight prompts (drawn once, kept in
build/). The learner sees answers of a judge with Bradley-Terry noise, and the 16 first principal components of
sentence embeddings, whitened on the texts that it may ask about: half of all, at random. Accuracy is measured on the
other half: how often the posterior mean ranks the text of higher true reward higher, of two texts of one prompt. Of the
pairs whose rewards differ by at least `gap`, and of all that differ at all: embeddings without a lexicon cannot rank
two near-equal texts as VADER does, with however many answers ("all": learned from every pair of the first half, without
noise).
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from scipy.stats import t as student

from bayeslm.inference import Laplace
from bayeslm.inference.control import EpsilonGreedy, Random, Thompson
from bayeslm.inference.preferences import Acquisition, Duel, Elicitation, InformationGain, Pool
from bayeslm.models import LanguageModel, rewards
from bayeslm.models.preferences import (
    BradleyTerry,
    Comparisons,
    SentenceEmbedding,
    SimulatedJudge,
    Standardised,
)

PROMPTS = [
    "My dinner at the restaurant was",
    "The film I saw last night was",
    "Our hotel room was",
    "My new phone is",
    "The weather this weekend will be",
    "My first day at work was",
    "The concert was",
    "The customer service was",
]
COMPLETIONS = 100  # of each prompt
EVERY = 10  # answers between measurements
GOAL = 0.8
STRATEGIES: dict[str, Acquisition] = {
    "random pairs": Duel(Random()),
    "information gain": InformationGain(),
    "Thompson duels": Duel(Thompson()),
    "epsilon-greedy duels, 0.3": Duel(EpsilonGreedy(0.3)),
}


def texts(path: Path) -> Pool:
    """SmolLM2's completions, drawn at the first call."""
    if not path.exists():
        drawn = Pool.drawn(LanguageModel.from_pretrained("smollm2").packed(), PROMPTS, COMPLETIONS)
        rows = zip(drawn.prompts, drawn.completions, strict=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in rows))
    kept = [json.loads(line) for line in path.read_text().splitlines()]
    return Pool([row["prompt"] for row in kept], [row["completion"] for row in kept])


class HeldOut:
    """Pairs of texts that the learner never sees, with their true order."""

    def __init__(self, pool: Pool, reward: rewards.Reward, gap: float) -> None:
        self.pool = pool
        true = reward(pool.prompts, pool.completions)
        pairs = pool.pairs()
        difference = true[pairs[:, 0]] - true[pairs[:, 1]]
        self.pairs = pairs[difference != 0]
        difference = difference[difference != 0]
        self.right = difference > 0
        self.clear = difference.abs() >= gap

    def accuracy(self, model: BradleyTerry, weights: torch.Tensor) -> tuple[float, float]:
        """Of clear pairs, and of all, ranked by weights (d,)."""
        reward = model.reward(self.pool.prompts, self.pool.completions, weights)
        hit = ((reward[self.pairs[:, 0]] > reward[self.pairs[:, 1]]) == self.right).float()
        return float(hit[self.clear].mean()), float(hit.mean())


def halves(pool: Pool, seed: int) -> tuple[Pool, Pool]:
    order = np.random.default_rng(seed).permutation(len(pool.prompts))
    middle = len(order) // 2
    return tuple(  # type: ignore[return-value]
        Pool([pool.prompts[i] for i in part], [pool.completions[i] for i in part])
        for part in (order[:middle], order[middle:])
    )


def ceiling(model: BradleyTerry, seen: Pool, reward: rewards.Reward, held: HeldOut) -> tuple[float, float]:
    """The accuracy of weights learned from every pair of the first half, without noise."""
    true = reward(seen.prompts, seen.completions)
    pairs = seen.pairs()
    pairs = pairs[true[pairs[:, 0]] != true[pairs[:, 1]]]
    better = torch.where((true[pairs[:, 0]] > true[pairs[:, 1]])[:, None], pairs, pairs.flip(-1)).tolist()
    data = Comparisons(
        [seen.prompts[i] for i, _ in better],
        [seen.completions[i] for i, _ in better],
        [seen.completions[j] for _, j in better],
    )
    posterior = Laplace(seed=0).run(model, data)
    return held.accuracy(model, torch.as_tensor(posterior.resample().samples["weights"]).flatten(0, 1).mean(0))


def needed(curve: np.ndarray) -> float:
    """The first number of answers with the goal; inf if there is none."""
    reached = np.flatnonzero(curve >= GOAL)
    return float(EVERY * (reached[0] + 1)) if len(reached) else float("inf")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first", type=int, default=5, help="the first seed; the settings were chosen on 0 to 4")
    parser.add_argument("--comparisons", type=int, default=240)
    parser.add_argument("--temperature", type=float, default=0.1)
    parser.add_argument("--gap", type=float, default=0.7)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    pool, reward, embed = texts(Path("build/elicitation.jsonl")), rewards.Sentiment(), SentenceEmbedding()
    curves: dict[str, list[list[tuple[float, float]]]] = {name: [] for name in STRATEGIES}
    best, seconds, share = [], [], []
    for seed in range(options.first, options.first + options.seeds):
        seen, unseen = halves(pool, seed)
        held = HeldOut(unseen, reward, options.gap)
        share.append(float(held.clear.float().mean()))
        model = BradleyTerry(Standardised(embed, seen.prompts, seen.completions, components=16), scale=4.0)
        best.append(ceiling(model, seen, reward, held))
        judge = SimulatedJudge(reward, options.temperature, seed)
        for name, acquisition in STRATEGIES.items():
            loop = Elicitation(model, acquisition, seed=seed)
            start = time.perf_counter()
            answers = list(itertools.islice(loop.run(seen, judge), options.comparisons))
            seconds.append((time.perf_counter() - start) / len(answers))
            points = range(EVERY, len(answers) + 1, EVERY)
            curve = [held.accuracy(model, loop.weights(answers[:n], seen.example).mean(0)) for n in points]
            curves[name].append(curve)
            print(f"seed {seed}, {name}: {GOAL:.0%} after {needed(np.array(curve)[:, 0]):.0f}", flush=True)
    report(curves, best, options.gap, float(np.mean(share)), float(np.mean(seconds)))


def report(
    curves: dict[str, list[list[tuple[float, float]]]],
    best: list[tuple[float, float]],
    gap: float,
    share: float,
    seconds: float,
) -> None:
    every: dict[str, np.ndarray] = {name: np.array(curve) for name, curve in curves.items()}  # (seed, point, 2)
    at = [n for n in (20, 40, 60, 80, 120, 160, 200, 240) if n <= EVERY * next(iter(every.values())).shape[1]]

    def rows(title: str, which: int, cell: Callable[[np.ndarray], str]) -> None:
        print(f"\n{title}\n\n| answers | {' | '.join(map(str, at))} | all |\n|---|{'---|' * (len(at) + 1)}")
        for name, curve in every.items():
            cells = [cell(curve[:, n // EVERY - 1, which]) for n in at]
            print(f"| {name} | {' | '.join(cells)} | {np.mean(best, 0)[which]:.3f} |")

    def interval(values: np.ndarray) -> str:
        reach = student.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
        return f"{values.mean():.3f} ± {reach:.3f}"

    rows(
        f"Accuracy on held-out pairs that differ by {gap} or more ({share:.0%} of those that differ), 95%", 0, interval
    )
    rows("Accuracy on all held-out pairs that differ, 95%", 1, interval)
    print(f"\n| answers to {GOAL:.0%} (clear pairs) | of the mean curve | seed by seed | ratio to random |")
    print("|---|---|---|---|")
    first = needed(next(iter(every.values()))[..., 0].mean(0))
    for name, curve in every.items():
        count = needed(curve[..., 0].mean(0))
        by_seed = ", ".join(f"{needed(one):.0f}" for one in curve[..., 0])
        print(f"| {name} | {count:.0f} | {by_seed} | {count / first:.2f} |")
    print(f"\n{1000 * seconds:.0f} ms a question: the posterior, the choice of the pair, and the answer")


if __name__ == "__main__":
    main()
