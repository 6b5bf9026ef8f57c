"""How precisely engines know log Z of SmolLM2-135M under a sentiment reward, at equal model calls.

    python benchmarks/evidence.py [--runs 40] [--particles 32] [--beta 0.1]

Each run is an island of its own. Importance sampling and SMC push the same tokens through the network: one forward
pass a token for all particles. The learned twist's training is counted by itself: it is done once a prompt and a
reward. Variances are compared by the jackknife of their logarithms (Miller 1968), with intervals of 95%.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.special import logsumexp
from scipy.stats import t as student

from bayeslm.inference import SMC, ImportanceSampling, TwistLearning
from bayeslm.models import LanguageModel, TiltedLM, Twist, rewards
from bayeslm.posterior import Posterior

PROMPT = "My dinner at the restaurant was"


def log_evidence(posterior: Posterior) -> np.ndarray:
    """log Z-hat of each chain."""
    lw = posterior.log_weights[..., 0]
    return logsumexp(lw, axis=1) - np.log(lw.shape[1])


def log_variance(values: np.ndarray) -> tuple[float, float]:
    """Logarithm of the variance, and its standard error, by the jackknife."""
    n = len(values)
    without = np.array([np.log(np.delete(values, i).var(ddof=1)) for i in range(n)])
    pseudo = n * np.log(values.var(ddof=1)) - (n - 1) * without
    return pseudo.mean(), pseudo.std(ddof=1) / np.sqrt(n)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=40)
    parser.add_argument("--particles", type=int, default=32)
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--twist", help="a folder to read the twist from, or, where there is none, to keep it in")
    options = parser.parse_args()
    lm = LanguageModel.from_pretrained("smollm2", device=options.device)
    model = TiltedLM(lm, rewards.Sentiment(), options.beta, max_new_tokens=options.tokens)
    sizes: dict[str, Any] = {"num_particles": options.particles, "num_chains": options.runs, "progress": False}

    print(f"torch {torch.__version__}, {options.device}, {torch.get_num_threads()} threads, beta {options.beta},")
    print(f"{options.runs} runs of {options.particles} particles, {options.tokens} tokens")
    if options.twist and Path(options.twist).is_dir():
        twist = Twist.from_pretrained(options.twist, lm)
        print(f"the twist is from {options.twist}\n")
    else:
        twist = TwistLearning(seed=0, progress=False).run(model, [PROMPT])
        spent = twist.stats
        cost = f"{spent['model_calls']} model calls, {spent['tokens']} tokens, {spent['seconds']:.0f} s"
        print(f"training the twist: {cost}\n")
        if options.twist:
            twist.save_pretrained(options.twist)

    engines = {
        "importance sampling": ImportanceSampling(seed=1, **sizes),
        "SMC, learned twist, which also proposes": SMC(twist=twist, proposal="twist", top_k=64, seed=2, **sizes),
        "SMC, sentiment so far, which also proposes": SMC(twist="partial", proposal="twist", top_k=16, seed=3, **sizes),
        "SMC, learned twist": SMC(twist=twist, seed=4, **sizes),
        "SMC, sentiment so far": SMC(twist="partial", seed=5, **sizes),
    }
    print("| engine | tokens | seconds | log of mean Ẑ | variance of log Ẑ | to importance sampling's (95%) |")
    print("|---|---|---|---|---|---|")
    first = None
    for name, engine in engines.items():
        posterior = engine.run(model, [PROMPT])
        each = log_evidence(posterior)
        mean = logsumexp(each) - np.log(len(each))
        error = np.exp(each - mean).std(ddof=1) / np.sqrt(len(each))
        value, stderr = log_variance(each)
        first = first or (value, stderr)
        reach = student.ppf(0.975, 2 * len(each) - 2) * np.hypot(stderr, first[1])
        low, ratio, high = np.exp([value - first[0] - reach, value - first[0], value - first[0] + reach])
        against = "1" if name == "importance sampling" else f"{ratio:.2f}; {low:.2f} to {high:.2f}"
        print(
            f"| {name} | {posterior.stats['tokens']} | {posterior.stats['seconds']:.0f} "
            f"| {mean:.2f} ± {error:.2f} | {each.var(ddof=1):.4f} | {against} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
