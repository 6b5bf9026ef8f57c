"""Effective samples of MCMC, per 1,000 sweeps of a chain, per 1,000 tokens of the network, and per second.

    OMP_NUM_THREADS=1 python benchmarks/chains.py [--chosen] [--candidates 0 1 4 16] [--replicates 4] [--smollm2]

On enumerable problems (those of `trust_region.py`: tables of 6 words, random Llamas of 8 with logits of three scales,
texts of 5 tokens) the effective size is Var(r) / mean squared error of a chain's mean, both from the enumeration, and
so it has everything in it: the start, the warm-up and the mixing. Of the draws, and of the averages over all candidates
("recycled"). On SmolLM2 the truth is the mean of all runs together. Tokens and seconds are of the complete run.

``--candidates 0`` is the default. ``--chosen``: the problems on which the settings were chosen, else others.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from svi_trl import PROMPT
from trust_region import problems

from bayeslm.inference import MCMC
from bayeslm.models import LanguageModel, TiltedLM, rewards


def runs(model: Callable[..., Any], prompts: list[Any], settings: dict[str, Any], replicates: int) -> dict[str, Any]:
    """Rewards (replicate * chain, draw) of draws and of averages over candidates, with tokens and seconds of a run."""
    found: dict[str, list[Any]] = {"draws": [], "recycled": [], "tokens": [], "seconds": []}
    for seed in range(replicates):
        start = time.perf_counter()
        posterior = MCMC(**settings, seed=seed, progress=False).run(model, prompts)
        found["seconds"].append(time.perf_counter() - start)
        found["tokens"].append(posterior.stats["tokens"])
        reward = posterior.rewards["reward"]
        found["draws"].append(reward[..., 0])
        found["recycled"].append(posterior.stats.get("recycled_reward", reward)[..., 0])
    return {name: np.concatenate(x) if np.ndim(x[0]) else statistics.mean(x) for name, x in found.items()}


def row(label: str, found: dict[str, Any], truth: float, variance: float, chains: int, sweeps: int) -> str:
    """One line of the table."""
    cells = []
    for name in ("draws", "recycled"):
        size = variance / ((found[name].mean(1) - truth) ** 2).mean()  # effective draws of a chain
        cells += [size * 1000 / sweeps, size * chains * 1000 / found["tokens"], size * chains / found["seconds"]]
    return f"| {label} | " + " | ".join(f"{x:.3g}" for x in cells) + f" | {found['seconds']:.1f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chosen", action="store_true")
    parser.add_argument("--candidates", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--replicates", type=int, default=4)
    parser.add_argument("--sweeps", type=int, default=200)
    parser.add_argument("--warmup", type=int, default=100)
    parser.add_argument("--chains", type=int, default=16)
    parser.add_argument("--only", default="")
    parser.add_argument("--smollm2", action="store_true")
    parser.add_argument("--beta", type=float, default=0.2)
    parser.add_argument("--tokens", type=int, default=24)
    options = parser.parse_args()
    torch.set_num_threads(1)
    common = {"num_samples": options.sweeps, "num_chains": options.chains, "warmup": options.warmup}
    print("| problem, N | draws: 1,000 sweeps | 1,000 tokens | a second | recycled: sweeps | tokens | second | s |")
    print("|---|---|---|---|---|---|---|---|")

    def settings(n: int) -> dict[str, Any]:
        return common | {"num_candidates": n or None}

    if options.smollm2:
        lm = LanguageModel.from_pretrained("smollm2")
        model = TiltedLM(lm, rewards.Sentiment(), beta=options.beta, max_new_tokens=options.tokens)
        prompts = ["My dinner at the restaurant was"]
        each = {n: runs(model, prompts, settings(n), options.replicates) for n in options.candidates}
        values = np.concatenate([found["draws"].reshape(-1) for found in each.values()])
        for n, found in each.items():
            print(row(f"SmolLM2, {n}", found, values.mean(), values.var(), options.chains, options.sweeps), flush=True)
        return
    for name, problem, guide in problems(options.chosen):
        if guide is not None or options.only not in name:
            continue
        share = problem.log_posterior.exp()
        r = problem.reward(problem.values[:, 0]).double() / problem.beta
        truth = float((share * r).sum())
        variance = float((share * (r - truth) ** 2).sum())
        for n in options.candidates:
            found = runs(problem.model, [PROMPT], settings(n), options.replicates)
            print(row(f"{name}, {n}", found, truth, variance, options.chains, options.sweeps), flush=True)


if __name__ == "__main__":
    main()
