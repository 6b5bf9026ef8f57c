"""Training while another engine draws: what old draws cost, and what time they save.

    OMP_NUM_THREADS=1 python benchmarks/ahead.py [--seeds 5] [--steps 100 300] [--seconds 0.1]

A prior of 4 words and 3 tokens, a reward of each token at each place, beta 0.5, two prompts, 40 completions of each: KL
of policy and posterior is a sum over all of them. The objective is `LogVariance` on 8 draws, by Adam, with the
draws of the present policy or those asked for 1, 2 or 4 steps before (`Ahead`). The engine is a copy of the policy's
weights in a thread of its own.

For the seconds the engine waits so long for each request, and a step (its reward) takes as long. Both sleep: this
shows that they overlap, and not how fast either is. Figures are means over seeds, with standard errors.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor

from bayeslm.inference import SVI
from bayeslm.inference.training import Adam, Ahead, LogVariance
from bayeslm.models import LanguageModel
from bayeslm.models.rewards import factor
from bayeslm.models.samplers import Drawn, DrawRequest, Draws

PROMPTS, TOKENS, BETA = [[1], [2, 3]], 3, 0.5
LAGS = (0, 1, 2, 4)


class Elsewhere:
    """An engine that takes over the weights of a request, and so many seconds to draw by them."""

    name = "the engine"

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds

    def draw(self, request: DrawRequest) -> Draws:
        return self.prepare(request)()

    def prepare(self, request: DrawRequest) -> Callable[[], Draws]:
        network = copy.deepcopy(request.weights.network)

        def draw() -> Draws:
            time.sleep(self.seconds)
            random = torch.Generator().manual_seed(request.seed)
            asked = zip(request.prompts, request.counts, strict=True)
            return Draws([_some(network, prompt, n, request, random) for prompt, n in asked], request.weights.version)

        return draw


@torch.no_grad()
def _some(network: Any, prompt: list[int], n: int, request: DrawRequest, random: torch.Generator) -> list[Drawn]:
    ids, log_s = torch.tensor([prompt] * n), torch.zeros((n, 0))
    for _ in range(request.max_new_tokens):
        log_p = (network(input_ids=ids).logits[:, -1].float() / request.temperature).log_softmax(-1)
        token = torch.multinomial(log_p.exp(), 1, generator=random)
        ids, log_s = torch.cat([ids, token], 1), torch.cat([log_s, log_p.gather(1, token)], 1)
    texts = ids[:, len(prompt) :].tolist()
    lengths = [next((t + 1 for t, x in enumerate(text) if x in request.eos_token_ids), len(text)) for text in texts]
    return [Drawn(text[:k], s[:k]) for text, s, k in zip(texts, log_s.tolist(), lengths, strict=True)]


class Problem:
    def __init__(self, seed: int, seconds: float = 0.0) -> None:
        self.lm = LanguageModel.tabular(["<eos>", "a", "b", "c"], order=4, seed=seed)
        self.scores = torch.randn(TOKENS, 4, generator=torch.Generator().manual_seed(seed))
        self.seconds = seconds
        self.values = self.lm(PROMPTS, TOKENS).enumerate_support()
        reward = self.scores[torch.arange(TOKENS), self.values].sum(-1).double()
        self.log_posterior = (self.log_prob(self.lm) + reward / BETA).log_softmax(0)

    def log_prob(self, lm: LanguageModel) -> Tensor:
        with torch.no_grad():
            return lm(PROMPTS, TOKENS).log_prob(self.values).double()

    def kl(self, policy: LanguageModel) -> float:
        """KL(q || posterior) in nats, the mean over prompts."""
        log_q = self.log_prob(policy)
        return float((log_q.exp() * (log_q - self.log_posterior)).sum(0).mean())

    def model(self, prompts: list[list[int]]) -> None:
        with pyro.plate("prompts", len(prompts)):
            x = pyro.sample("completion", self.lm(prompts, TOKENS))
            time.sleep(self.seconds)
            factor("reward", self.scores[torch.arange(TOKENS), x].sum(-1), BETA)

    def train(self, lag: int, steps: int, seed: int) -> LanguageModel:
        self.lm.sampler = Elsewhere(self.seconds)
        objective = LogVariance(8, Ahead(lag)) if lag else LogVariance(8)
        engine = SVI(
            steps,
            objective=objective,
            optimizer=Adam(0.05),
            num_samples=1,
            num_prior_samples=0,
            seed=seed,
            progress=False,
        )
        posterior = engine.run(self.model, PROMPTS)
        self.lm.sampler = None
        return posterior.policy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, nargs="+", default=[100, 300])
    parser.add_argument("--seconds", type=float, default=0.1, help="of an engine's request, and of a step")
    options = parser.parse_args()
    print("| steps | draws of | KL(q ‖ posterior), nats | less that of the present policy's draws, paired |")
    print("|---|---|---|---|")
    for steps in options.steps:
        found = {lag: [] for lag in LAGS}
        for seed in range(options.seeds):
            problem = Problem(seed)
            for lag in LAGS:
                found[lag].append(problem.kl(problem.train(lag, steps, seed)))
        for lag in LAGS:
            off = np.subtract(found[lag], found[0])
            who = "the present policy" if lag == 0 else f"{lag} before"
            print(f"| {steps} | {who} | {_with_error(found[lag])} | {_with_error(off) if lag else ''} |")
    each = f"{options.seconds} s to draw and {options.seconds} s to learn"
    print(f"\n| draws of | seconds a step, which takes {each} |\n|---|---|")
    for lag in LAGS[:3]:
        problem, number = Problem(0, options.seconds), 20
        start = time.perf_counter()
        problem.train(lag, number, 0)
        print(f"| {lag or 'the present policy'} | {(time.perf_counter() - start) / number:.3f} |")


def _with_error(values: Any) -> str:
    return f"{statistics.fmean(values):.4f} ± {statistics.stdev(values) / len(values) ** 0.5:.4f}"


if __name__ == "__main__":
    main()
