"""How precisely engines know log Z of SmolLM2-135M under a sentiment reward, at equal model calls.

    python benchmarks/evidence.py [--runs 40] [--particles 32] [--beta 0.1] [--draws 2048]

Each run is a chain of its own. Importance sampling and SMC push the same tokens through the network: one forward
pass a token for all particles. Two twists are learned: from the prior's hidden states alone, and from these with the
sentiment of the text so far. Their training is counted by itself: it is done once a prompt and a reward. Variances are
compared by the jackknife of their logarithms (Miller 1968), with intervals of 95%. SMC resamples where the ESS falls
below 0.7 of the particles.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from _figures import log_mean, variance_ratio

from bayeslm import diagnostics
from bayeslm.inference import SMC, ImportanceSampling
from bayeslm.inference.sequential import TwistLearning
from bayeslm.models import LanguageModel, TiltedLM, Twist, rewards

PROMPT = "My dinner at the restaurant was"


def learned(model: TiltedLM, reads_reward: bool, draws: int, folder: Path | None) -> Twist:
    """A twist of the folder, or one that is learned now and kept there."""
    if folder is not None and folder.is_dir():
        twist = Twist.from_pretrained(folder, model.prior)
    else:
        learning = TwistLearning(reads_reward=reads_reward, num_particles=draws, seed=0, progress=False)
        twist = learning.run(model, [PROMPT])
        if folder is not None:
            twist.save_pretrained(folder)
    spent = twist.stats
    print(
        f"learning a twist from {spent['draws']} draws{', which reads the sentiment so far' if reads_reward else ''}: "
        f"{spent['model_calls']} model calls, {spent['tokens']} tokens, {spent['seconds']:.0f} s",
        flush=True,
    )
    return twist


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=40)
    parser.add_argument("--particles", type=int, default=32)
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--draws", type=int, default=2048, help="of the prior, that a twist is learned from")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--twists", type=Path, help="a folder to read the twists from, or, where there are none, to keep them in"
    )
    options = parser.parse_args()
    lm = LanguageModel.from_pretrained("smollm2", device=options.device).packed()
    model = TiltedLM(lm, rewards.Sentiment(), options.beta, max_new_tokens=options.tokens)
    sizes: dict[str, Any] = {"num_particles": options.particles, "num_chains": options.runs, "progress": False}
    smc: dict[str, Any] = {"proposal": "twist", "ess_threshold": 0.7, **sizes}

    print(f"torch {torch.__version__}, {options.device}, {torch.get_num_threads()} threads, beta {options.beta},")
    print(f"{options.runs} runs of {options.particles} particles, {options.tokens} tokens")
    alone, informed = (
        learned(model, reads, options.draws, options.twists and options.twists / name)
        for reads, name in ((False, "hidden"), (True, "informed"))
    )
    engines = {
        "importance sampling": ImportanceSampling(seed=1, **sizes),
        "SMC, learned twist, top 1024": SMC(twist=alone, top_k=1024, seed=2, **smc),
        "SMC, learned twist that reads the sentiment so far, top 64": SMC(twist=informed, top_k=64, seed=3, **smc),
        "SMC, sentiment so far, top 16": SMC(twist="partial", top_k=16, seed=4, **smc),
    }
    print("\n| engine | tokens | seconds | log of mean Ẑ | variance of log Ẑ | to importance sampling's (95%) |")
    print("|---|---|---|---|---|---|")
    first = None
    for name, engine in engines.items():
        posterior = engine.run(model, [PROMPT])
        each = diagnostics.chain_log_evidence(posterior.log_weights)[:, 0]
        mean, error = log_mean(each)
        ratio = "1" if first is None else variance_ratio(each, first)
        first = each if first is None else first
        print(
            f"| {name} | {posterior.stats['tokens']} | {posterior.stats['seconds']:.0f} "
            f"| {mean:.2f} ± {error:.2f} | {each.var(ddof=1):.4f} | {ratio} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
