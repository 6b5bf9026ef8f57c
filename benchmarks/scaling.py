"""Seconds and tokens of SMC as particles and tokens grow: both must grow in proportion.

    python benchmarks/scaling.py [--lm smollm2] [--particles 16 32 64 128] [--tokens 12 24 48]
    python benchmarks/scaling.py --lm table --particles 32 --tokens 16 32 64 128 256 512

Resampled wherever the ESS falls below half, the sentiment of the text so far being the twist. A token costs one
position of one forward pass; the prompt is read once. VADER reads the text so far anew at every token, so that its own
seconds grow with the square of the tokens: they are apart. ``--lm table`` is a table of words, whose forward pass costs
nothing, so that what is left is what this library does itself. Exponents are of a least-squares fit in the logarithms.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any
from unittest import mock

import numpy as np
import torch

from bayeslm.inference import SMC
from bayeslm.models import LanguageModel, TiltedLM, rewards

PROMPT = "My dinner at the restaurant was"
WORDS = [
    *PROMPT.split(),
    "good",
    "bad",
    "awful",
    "not",
    "very",
    "and",
    "nice",
    "horrible",
    "food",
    "service",
    "I",
    "love",
]


def language_model(name: str, device: str) -> LanguageModel:
    if name == "table":
        table = LanguageModel.tabular(["<eos>", *WORDS], order=2, seed=0)
        return LanguageModel(table.network, table.tokenizer, eos_token_ids=(), pad_token_id=0)
    pretrained = LanguageModel.from_pretrained(name, device=device)
    return LanguageModel(
        pretrained.network, pretrained.tokenizer, eos_token_ids=(), pad_token_id=pretrained.pad_token_id
    )


def run(lm: LanguageModel, particles: int, tokens: int) -> tuple[dict[str, Any], float]:
    """Return the statistics of a run, and the seconds of the reward in it."""
    spent, score = [0.0], rewards.Sentiment.score

    def timed(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return score(*args, **kwargs)
        finally:
            spent[0] += time.perf_counter() - start

    model = TiltedLM(lm, rewards.Sentiment(), 0.1, max_new_tokens=tokens)
    engine = SMC(num_chains=1, num_particles=particles, twist="partial", seed=0, progress=False)
    with mock.patch.object(rewards.Sentiment, "score", timed):
        return engine.run(model, [PROMPT]).stats, spent[0]


def exponent(sizes: list[int], seconds: list[float]) -> str:
    return f"{np.polyfit(np.log(sizes), np.log(seconds), 1)[0]:.2f}" if len(sizes) > 1 else "-"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lm", default="smollm2")
    parser.add_argument("--particles", type=int, nargs="+", default=[16, 32, 64, 128])
    parser.add_argument("--tokens", type=int, nargs="+", default=[12, 24, 48])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    lm = language_model(options.lm, options.device)
    run(lm, 2, 2)
    print(f"torch {torch.__version__}, {options.device}, {torch.get_num_threads()} threads\n")
    print("| particles | tokens | model calls | positions | resampled at | seconds | of the reward | tokens a second |")
    print("|---|---|---|---|---|---|---|---|")
    others: dict[tuple[int, int], float] = {}
    for particles in options.particles:
        for tokens in options.tokens:
            runs = [run(lm, particles, tokens) for _ in range(options.repeats)]
            seconds = statistics.median(stats["seconds"] for stats, _ in runs)
            reward = statistics.median(spent for _, spent in runs)
            others[particles, tokens] = statistics.median(stats["seconds"] - spent for stats, spent in runs)
            first = runs[0][0]
            print(
                f"| {particles} | {tokens} | {first['model_calls']} | {first['tokens']} "
                f"| {int(first['resampled'].sum())} tokens | {seconds:.2f} | {reward:.2f} "
                f"| {particles * tokens / seconds:.0f} |",
                flush=True,
            )
    print("\nExponents of seconds without the reward's:")
    for particles in options.particles:
        row = [others[particles, tokens] for tokens in options.tokens]
        print(f"{particles} particles, in tokens: {exponent(options.tokens, row)}")
    for tokens in options.tokens:
        row = [others[particles, tokens] for particles in options.particles]
        print(f"{tokens} tokens, in particles: {exponent(options.particles, row)}")


if __name__ == "__main__":
    main()
