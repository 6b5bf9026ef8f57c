"""Every engine on problems whose answer is known, at about the same number of tokens: which one, when.

    python benchmarks/engines.py [--repeats 20] [--particles 256]

Completions of at most 5 tokens over 8 words, two prompts, a random trigram model as the prior. Two rewards: "words"
adds a value a word, so that a text shows its worth while it is written; "sum" pays 1 if the sum of the word numbers is
divisible by 7, which only the end shows. Each at a mild and at a sharp beta; the share of importance sampling's
particles that count (ESS) says how hard a problem is. The errors are root mean squares over repeats and prompts against
`Exact`: of log Z, in nats, and of the expected reward, in standard deviations of the reward under the posterior. Tokens
are positions pushed through the network; they and the seconds include training.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import torch

from bayeslm import Posterior, diagnostics
from bayeslm.inference import (
    MCMC,
    SMC,
    SVI,
    AnnealedSMC,
    BestOfN,
    EvidenceError,
    Exact,
    ImportanceSampling,
    RejectionSampling,
)
from bayeslm.inference.sequential import TwistLearning
from bayeslm.models import LanguageModel
from bayeslm.models.rewards import factor

PROMPTS = [[2, 3, 4], [5, 6]]
TOKENS = 5
VALUES = torch.tensor([0.0, 0.9, -0.4, 0.3, -1.0, 0.6, -0.2, 0.1])  # of the words; the first ends a text
Run = Callable[[Any, int], tuple[Posterior, int]]


def words(x: torch.Tensor) -> torch.Tensor:
    return VALUES[x].sum(-1)


def total(x: torch.Tensor) -> torch.Tensor:
    return (x.sum(-1) % 7 == 0).float()


PROBLEMS = {"words": (words, (1.0, 0.4)), "sum": (total, (0.5, 0.1))}


def program(lm: LanguageModel, reward: Callable[[torch.Tensor], torch.Tensor], beta: float) -> Callable[..., None]:
    def model(prompts: list[list[int]]) -> None:
        with pyro.plate("prompts", len(prompts)):
            x = pyro.sample("completion", lm(prompts, max_new_tokens=TOKENS))
            factor("reward", reward(x), beta)

    return model


def engines(n: int, bound: float) -> dict[str, Run]:
    """Each takes a program and a seed, and gives a posterior and the tokens it took; n particles, or as many tokens."""
    quiet: dict[str, Any] = {"progress": False}

    def once(make: Callable[[int], Any]) -> Run:
        def run(model: Any, seed: int) -> tuple[Posterior, int]:
            posterior = make(seed).run(model, PROMPTS)
            return posterior, posterior.stats["tokens"]

        return run

    def learned(model: Any, seed: int) -> tuple[Posterior, int]:
        twist = TwistLearning(num_particles=n // 2, seed=seed, **quiet).run(model, PROMPTS)
        posterior = SMC(n // 2, 1, twist=twist, proposal="twist", seed=seed, **quiet).run(model, PROMPTS)
        return posterior, twist.stats["tokens"] + posterior.stats["tokens"]

    return {
        "ImportanceSampling": once(lambda seed: ImportanceSampling(n, seed=seed, **quiet)),
        "RejectionSampling": once(
            lambda seed: RejectionSampling(n, max_proposals=n, log_bound=bound, seed=seed, **quiet)
        ),
        "BestOfN, n = 8": once(lambda seed: BestOfN(8, num_samples=n // 8, seed=seed, **quiet)),
        "SMC, text so far": once(lambda seed: SMC(n, 1, twist="partial", seed=seed, **quiet)),
        "SMC, text so far, proposing": once(
            lambda seed: SMC(n, 1, twist="partial", proposal="twist", seed=seed, **quiet)
        ),
        "SMC, learned twist, proposing": learned,
        "AnnealedSMC": once(lambda seed: AnnealedSMC(max(16, n // 8), 1, cess=0.8, seed=seed, **quiet)),
        "MCMC, 16 chains": once(
            lambda seed: MCMC(n // 16, warmup=n // 64, initial_particles=n // 4, seed=seed, **quiet)
        ),
        "SVI, weighted draws": once(lambda seed: SVI(num_steps=40, num_samples=n, seed=seed, **quiet)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--particles", type=int, default=256)
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # budgets that are spent, weights that are few: the errors say it
    lm = LanguageModel.tabular(["<eos>", *"abcdefg"], order=3, seed=0)
    for name, (reward, betas) in PROBLEMS.items():
        for beta in betas:
            model = program(lm, reward, beta)
            exact = Exact().run(model, PROMPTS)
            truth = diagnostics.expectation(exact, exact.rewards["reward"])[0]
            spread = np.sqrt(diagnostics.expectation(exact, exact.rewards["reward"] ** 2)[0] - truth**2)
            bound = float(exact.log_likelihood["reward"].max())
            plain = ImportanceSampling(20_000, seed=0, progress=False).run(model, PROMPTS)
            share = ", ".join(f"{x:.1%}" for x in diagnostics.ess(plain.log_weights) / 20_000)
            print(f"\n{name}, beta {beta}: ESS {share}\n")
            print("| engine | tokens | seconds | error of log Z | error of the expected reward |")
            print("|---|---|---|---|---|")
            for label, run in engines(options.particles, bound).items():
                evidence, rewards, tokens, seconds = [], [], [], []
                for seed in range(options.repeats):
                    start = time.perf_counter()
                    try:
                        posterior, spent = run(model, seed)
                    except EvidenceError:  # not a single draw
                        continue
                    evidence.append(posterior.log_evidence - exact.log_evidence)
                    mean = diagnostics.expectation(posterior, posterior.rewards["reward"])[0]
                    rewards.append((mean - truth) / spread)
                    tokens.append(spent)
                    seconds.append(time.perf_counter() - start)
                if len(rewards) < options.repeats:
                    print(f"| {label} | no draw in {options.repeats - len(rewards)} of {options.repeats} runs | | | |")
                    continue
                of_z = f"{np.sqrt(np.square(evidence).mean()):.3f}" if np.isfinite(evidence).all() else "–"
                print(
                    f"| {label} | {np.mean(tokens):.0f} | {np.mean(seconds):.2f} | {of_z} "
                    f"| {np.sqrt(np.square(rewards).mean()):.3f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
