"""Tokens a second of sampling SmolLM2-135M: `Autoregressive.sample` and `model.generate` of transformers, in turn.

    python benchmarks/sampling.py [--repeats 5] [--particles 8 32 96]

Same network, prompt, number of completions, length and distribution (temperature 1, the full vocabulary); each draws
its completions and no more (generate gives no log-probabilities; ours come with theirs). Medians over alternating runs.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from bayeslm.models import LanguageModel

PROMPTS = {
    "short": "My dinner at the restaurant was",
    "long": "The waiter had been standing beside our table for a while, and nobody could say what he was waiting for; "
    "the soup was cold, the candles had burned down, and the couple at the next table had begun to sing. "
    "When the bill came at last, my father looked at it for a long time. My dinner at the restaurant was",
}


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--particles", type=int, nargs="+", default=[8, 32, 96])
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    lm = LanguageModel.from_pretrained("smollm2", device=options.device)
    network, tokenizer = lm.network, lm.tokenizer
    # Neither stops at EOS, so that both do the same work.
    endless = LanguageModel(network, tokenizer, eos_token_ids=(), pad_token_id=lm.pad_token_id)
    network.generation_config.eos_token_id = None
    print(f"torch {torch.__version__}, {options.device}, {torch.get_num_threads()} threads, {options.tokens} tokens\n")
    print("| prompt | particles | generate, tokens/s | bayeslm, tokens/s | ratio (median; min to max) |")
    print("|---|---|---|---|---|")
    for name, prompt in PROMPTS.items():
        batch = tokenizer([prompt], return_tensors="pt").to(options.device)
        for particles in options.particles:

            def peer(batch=batch, particles=particles) -> object:
                return network.generate(
                    **batch,
                    do_sample=True,
                    top_k=0,
                    top_p=1.0,
                    temperature=1.0,
                    num_return_sequences=particles,
                    max_new_tokens=options.tokens,
                    pad_token_id=lm.pad_token_id,
                )

            def ours(endless=endless, prompt=prompt, particles=particles) -> object:
                return endless([prompt], max_new_tokens=options.tokens).expand((particles, 1)).sample()

            seconds(peer), seconds(ours)
            pairs = [(seconds(peer), seconds(ours)) for _ in range(options.repeats)]
            done = particles * options.tokens
            ratios = [a / b for a, b in pairs]
            print(
                f"| {name}, {batch['input_ids'].shape[1]} tokens | {particles} "
                f"| {done / statistics.median(a for a, _ in pairs):.0f} "
                f"| {done / statistics.median(b for _, b in pairs):.0f} "
                f"| {statistics.median(ratios):.2f}; {min(ratios):.2f} to {max(ratios):.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
