"""SVI in a trust region, with no learning rate chosen, on posteriors that are known.

    python benchmarks/trust_region.py [--samples 1920] [--seeds 3] [--chosen]

Priors of 5 tokens: tables of 6 words that see two tokens back, with logits of spread 1 and 3; random Llamas of 8 words
with logits of spread 0.4, 2 and 6, of which all weights are trained, or adapters of rank 4. Rewards are a random score
of each token at each place, beta 0.5 and 0.15. KL(q || posterior) is computed over all completions. Tables cannot
depend on the place, so their best KL is not 0.

Compared, at equal numbers of samples: `SVI()` as it comes, which here is the log-variance divergence on lots of new
draws, each followed by 15 steps on those kept, in a `TrustRegion`; and ReverseKL on 8 particles with Adam at its
default rates. The region's settings were chosen on priors and rewards of other seeds (`--chosen`).
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import pyro
import torch
from svi_trl import TOKENS, WORDS, llama, table_of
from torch import Tensor

from bayeslm.inference import SVI
from bayeslm.inference.training import Adam, AutoPolicy, Budget, ReverseKL
from bayeslm.models import LanguageModel
from bayeslm.models.rewards import factor

PROMPT = [1, 2]


def table(seed: int, spread: float, order: int = 3) -> LanguageModel:
    lm = LanguageModel.tabular(WORDS[:6], order=order, seed=seed)
    with torch.no_grad():
        for weights in lm.network.parameters():
            weights.mul_(spread)
    return lm


class Problem:
    def __init__(self, lm: LanguageModel, seed: int, beta: float) -> None:
        self.lm, self.beta = lm, beta
        self.scores = table_of(seed, TOKENS, lm.vocab_size)
        self.values = lm([PROMPT], TOKENS).enumerate_support()
        self.log_p = self.log_prob(lm)
        self.log_posterior = (self.log_p + self.reward(self.values[:, 0]).double() / beta).log_softmax(0)

    def reward(self, x: Tensor) -> Tensor:
        return self.scores[torch.arange(TOKENS), x].sum(-1)

    def log_prob(self, lm: LanguageModel) -> Tensor:
        with torch.no_grad():
            return lm([PROMPT], TOKENS).log_prob(self.values)[:, 0].double()

    def kl(self, lm: LanguageModel) -> float:
        """KL(q || posterior) in nats, by enumeration."""
        log_q = self.log_prob(lm)
        return float((log_q.exp() * (log_q - self.log_posterior)).sum())

    def model(self, prompts: list[list[int]]) -> None:
        with pyro.plate("prompts", len(prompts)):
            x = pyro.sample("completion", self.lm(prompts, TOKENS))
            factor("reward", self.reward(x), self.beta)


def problems(chosen: bool) -> Iterator[tuple[str, Problem, Callable[..., Any] | None]]:
    """Names, problems, and guides; those on which the settings were chosen, or others."""
    prior, reward = (0, 100) if chosen else (5, 105)
    adapters = functools.partial(AutoPolicy, lora_rank=4)
    for beta in (0.5, 0.15):
        for spread in (1.0, 3.0):
            yield f"table, spread {spread:g}, beta {beta}", Problem(table(prior, spread), reward, beta), None
        for spread in (0.4, 2.0, 6.0):
            problem = Problem(llama(prior, spread), reward, beta)
            yield f"Llama, spread {spread:g}, beta {beta}", problem, None
            yield f"its adapters, spread {spread:g}, beta {beta}", problem, adapters


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1920)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--chosen", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    methods: dict[str, Callable[[], dict[str, Any]]] = {
        "Adam": lambda: {"num_steps": options.samples // 8, "objective": ReverseKL(8), "optimizer": Adam()},
        "SVI()": lambda: {"num_steps": Budget(samples=options.samples)},
    }
    print(f"| problem | prior's KL | {' | '.join(f'{name}: KL, seconds' for name in methods)} |")
    for name, problem, guide in problems(options.chosen):
        cells = []
        for settings in methods.values():
            found, start = [], time.perf_counter()
            for seed in range(options.seeds):
                engine = SVI(**settings(), guide=guide, num_samples=1, num_prior_samples=0, seed=seed, progress=False)
                found.append(problem.kl(engine.run(problem.model, [PROMPT]).policy))
            seconds = (time.perf_counter() - start) / options.seeds
            each = ", ".join(f"{x:.3g}" for x in sorted(found))
            cells.append(f"{statistics.median(found):.3g} ({each}), {seconds:.1f}")
        print(f"| {name} | {problem.kl(problem.lm):.2f} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
