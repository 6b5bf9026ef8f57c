"""Seconds and tokens of SMC on SmolLM2-135M as particles and tokens grow: both must grow in proportion.

    python benchmarks/scaling.py [--particles 16 32 64 128] [--tokens 12 24 48]

Resampled wherever the ESS falls below half, the sentiment of the text so far being the twist. A token costs one
position of one forward pass; the prompt is read once.
"""

from __future__ import annotations

import argparse
import statistics

import torch

from bayeslm.inference import SMC
from bayeslm.models import LanguageModel, TiltedLM, rewards

PROMPT = "My dinner at the restaurant was"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--particles", type=int, nargs="+", default=[16, 32, 64, 128])
    parser.add_argument("--tokens", type=int, nargs="+", default=[12, 24, 48])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    pretrained = LanguageModel.from_pretrained("smollm2", device=options.device)
    lm = LanguageModel(pretrained.network, pretrained.tokenizer, eos_token_ids=(), pad_token_id=pretrained.pad_token_id)
    print(f"torch {torch.__version__}, {options.device}, {torch.get_num_threads()} threads\n")
    print("| particles | tokens | model calls | positions | resampled at | seconds (median) | tokens a second |")
    print("|---|---|---|---|---|---|---|")
    for particles in options.particles:
        for tokens in options.tokens:
            model = TiltedLM(lm, rewards.Sentiment(), 0.1, max_new_tokens=tokens)
            engine = SMC(num_chains=1, num_particles=particles, twist="partial", seed=0, progress=False)
            runs = [engine.run(model, [PROMPT]).stats for _ in range(options.repeats)]
            seconds = statistics.median(stats["seconds"] for stats in runs)
            first = runs[0]
            print(
                f"| {particles} | {tokens} | {first['model_calls']} | {first['tokens']} "
                f"| {int(first['resampled'].sum())} tokens | {seconds:.2f} | {particles * tokens / seconds:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
