"""Adaptive importance sampling and importance sampling at equal network tokens, learning included.

    python benchmarks/adaptive_importance.py [--replicates 20] [--particles 4096] [--chosen]
    python benchmarks/adaptive_importance.py --smollm2 [--replicates 20] [--particles 4096] [--beta 0.1] [--positive]

Each replicate of `AdaptiveImportance` is followed by one of `ImportanceSampling`, of as many draws as cost the same
tokens. Precision is 1 / variance over the replicates, of log Z and of E[r]; its ratios have 95% intervals by the
jackknife of logarithms. Means are shown beside the truth, or for SmolLM2 beside each other: an engine that misses a
part of the posterior in every replicate looks precise. SmolLM2's reward is VADER's negative sentiment, for which draws
of the prior are hardly effective, or its positive one (easy with a larger beta).

The settings of `AdaptiveImportance` were chosen on the problems of `--chosen`, and figures are given on the others.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from _figures import variance_ratio
from trust_region import PROMPT, Problem, llama, table

from bayeslm import Posterior, diagnostics
from bayeslm.inference import AdaptiveImportance, ImportanceSampling
from bayeslm.models import LanguageModel, TiltedLM, rewards

TEXT = "My dinner at the restaurant was"
TOKENS = 24
QUIET: dict[str, Any] = {"progress": False}


def enumerable(chosen: bool) -> Iterator[tuple[str, Problem]]:
    """Names and problems: of which the prior's draws are effective, hardly effective, or hardly ever."""
    prior, reward = (0, 100) if chosen else (5, 105)
    for beta in (0.5, 0.25, 2.0):
        yield f"table, spread 1, beta {beta}", Problem(table(prior, 1.0), reward, beta)
        for spread in (0.4, 2.0):
            yield f"Llama, spread {spread:g}, beta {beta}", Problem(llama(prior, spread), reward, beta)


def expected_likelihood(posterior: Posterior) -> float:
    """E[r / beta], by the weights as they are."""
    log_weights = posterior.log_weights[..., 0]
    weights = np.exp(log_weights - log_weights.max())
    return float((weights * posterior.log_likelihood["reward"][..., 0]).sum() / weights.sum())


def compare(
    name: str,
    model: Callable[..., Any],
    prompts: list[Any],
    options: argparse.Namespace,
    truth: float | None,
) -> None:
    adaptive, plain = [], []
    share, tokens, policies = [], [], []
    for seed in range(options.replicates):
        engine = AdaptiveImportance(num_particles=options.particles, num_steps=options.steps, seed=seed, **QUIET)
        one = engine.run(model, prompts)
        tokens.append(one.stats["tokens"])
        policies.append(one.stats["policies"])
        small = ImportanceSampling(64, seed=seed, **QUIET).run(model, prompts)
        num = round(64 * one.stats["tokens"] / small.stats["tokens"])
        other = ImportanceSampling(num, seed=seed, **QUIET).run(model, prompts)
        share.append(float(diagnostics.ess(other.log_weights)[0]) / num)
        adaptive.append((float(one.log_evidence[0]), expected_likelihood(one)))
        plain.append((float(other.log_evidence[0]), expected_likelihood(other)))
        if options.verbose:
            print(f"  {name}, {seed}: {adaptive[-1]}, {plain[-1]}, {tokens[-1]} tokens, {num} draws", flush=True)
    (log_z, reward), (log_z_plain, reward_plain) = np.array(adaptive).T, np.array(plain).T
    exact = "" if truth is None else f"{truth:.3f}"
    print(
        f"| {name} | {np.mean(share):.1%} | {np.mean(policies):.1f} | {np.mean(tokens):.0f} | {exact} "
        f"| {log_z.mean():.3f} ± {log_z.std(ddof=1):.3f} | {log_z_plain.mean():.3f} ± {log_z_plain.std(ddof=1):.3f} "
        f"| {variance_ratio(log_z_plain, log_z)} | {variance_ratio(reward_plain, reward)} |",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicates", type=int, default=20)
    parser.add_argument("--particles", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=96)
    parser.add_argument("--chosen", action="store_true")
    parser.add_argument("--smollm2", action="store_true")
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--positive", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--verbose", action="store_true", help="show each replicate")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, {options.replicates} replicates of {options.particles} draws\n")
    print(
        "| problem | prior's effective share | policies | tokens | log Z | adaptive: mean ± sd | importance: mean ± sd",
        end="",
    )
    print(" | precision of log Z, ratio (95%) | of E[r] |\n|---|---|---|---|---|---|---|---|---|")
    if options.smollm2:
        lm = LanguageModel.from_pretrained("smollm2", device=options.device, dtype=torch.float32)
        reward = rewards.Sentiment() if options.positive else -rewards.Sentiment()
        model = TiltedLM(lm, reward, options.beta, max_new_tokens=TOKENS)
        compare(
            f"SmolLM2, {'positive' if options.positive else 'negative'}, beta {options.beta}",
            model,
            [TEXT],
            options,
            None,
        )
        return
    for name, problem in enumerable(options.chosen):
        log_z = float((problem.log_p + problem.reward(problem.values[:, 0]).double() / problem.beta).logsumexp(0))
        compare(name, problem.model, [PROMPT], options, log_z)


if __name__ == "__main__":
    main()
