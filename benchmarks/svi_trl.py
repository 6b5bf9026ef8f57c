"""How near to a known posterior SVI brings a policy, and TRL's trainers, for the samples and the seconds they take.

    python benchmarks/svi_trl.py [--samples 6400 25600] [--factor 3] [--seeds 3]

Problems are enumerable: a small random Llama with 8 tokens that writes 5, and a reward whose beta is such that
importance sampling from the prior has an efficiency of 5%. bayeslm draws so many samples, TRL `factor` times as many;
after the last step KL(q || posterior) is computed over all completions. Both have Adam, a learning rate that falls
linearly to 0, and a gradient clipped at norm 1, start from the same weights, and are tuned with the first seed at the
fewest samples: the learning rate over the same three; TRL also its batch and its trainer (RLOO; GRPO once), bayeslm
its group. Seconds are those of the training loop, one thread each, in turn; loading and the KL are not counted.
`_trl_worker.py` says what TRL does; it lives in an environment of its own, build/trl, made at the first run (1.5 GB).

bayeslm minimises the log-variance divergence, on new samples in every eighth step and on replayed ones in between:
rewards and the prior are evaluated once a sample.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import pyro
import torch
from _peer import Peer
from safetensors.torch import save_file
from scipy.optimize import brentq
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from bayeslm.inference import SVI, LogVariance, Replay
from bayeslm.models import LanguageModel
from bayeslm.models.pretrained import word_tokenizer

REQUIREMENTS = [
    "trl==1.16.0",
    "accelerate==1.15.0",
    "datasets==5.2.0",
    "peft",
    "vaderSentiment",
    "torch",
    "transformers",
]
WORDS = ("<eos>", "a", "b", "c", "d", "e", "f", "g")
TOKENS = 5
PROMPT = [1, 2, 3]
RATES = (1e-3, 3e-3, 1e-2)
EVERY = 8


class Result(NamedTuple):
    kl: float
    seconds: float


def table_of(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def position(x: Tensor) -> Tensor:
    """A score a place and token."""
    return table_of(100, TOKENS, len(WORDS))[torch.arange(TOKENS), x].sum(-1)


def pairs(x: Tensor) -> Tensor:
    """A score a pair of neighbours."""
    return table_of(101, len(WORDS), len(WORDS))[x[..., :-1], x[..., 1:]].sum(-1)


def count(x: Tensor) -> Tensor:
    """Two of one token and one of another, wherever they stand."""
    return -((x == 3).sum(-1) - 2.0).abs() - ((x == 5).sum(-1) - 1.0).abs()


class Problem:
    """A prior, a reward, and the posterior over all completions. ``spread``: of the prior's logits."""

    def __init__(self, reward: Callable[[Tensor], Tensor], seed: int, spread: float) -> None:
        self.name = f"{reward.__name__}, logits of spread {spread}"
        torch.manual_seed(seed)
        config = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        tokens = {"vocab_size": len(WORDS), "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
        network = LlamaForCausalLM(LlamaConfig(**config, **tokens, max_position_embeddings=64, initializer_range=0.3))
        torch.nn.init.normal_(network.lm_head.weight, std=spread / config["hidden_size"] ** 0.5)
        self.lm = LanguageModel(network, word_tokenizer(WORDS, WORDS[0]))
        law = self.lm([PROMPT], TOKENS)
        self.values = law.enumerate_support()
        self.reward = reward
        with torch.no_grad():
            log_p = law.log_prob(self.values)[:, 0].double()
        rewards = reward(self.values[:, 0]).double()
        self.beta = beta_of(log_p, rewards)
        self.log_posterior = (log_p + rewards / self.beta).log_softmax(0)

    def model(self, prompts: list[list[int]]) -> None:
        with pyro.plate("prompts", len(prompts)):
            x = pyro.sample("completion", self.lm(prompts, TOKENS))
            pyro.factor("reward", self.reward(x) / self.beta)

    def kl(self, policy: LanguageModel) -> float:
        """KL(q || posterior) in nats, by enumeration."""
        with torch.no_grad():
            log_q = policy([PROMPT], TOKENS).log_prob(self.values)[:, 0].double()
        return float((log_q.exp() * (log_q - self.log_posterior)).sum())

    def save(self, folder: Path) -> None:
        """As `_trl_worker.py` reads it."""
        self.lm.save_pretrained(folder)
        tensors = {
            "prompt": torch.tensor([PROMPT]),
            "values": self.values[:, 0],
            "reward": self.reward(self.values[:, 0])[None],
            "log_posterior": self.log_posterior[None],
        }
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "problem.safetensors")


def beta_of(log_p: Tensor, reward: Tensor) -> float:
    """The beta at which importance sampling from the prior has an efficiency, 1 / E_p[w^2] at E_p[w] = 1, of 5%."""

    def excess(beta: float) -> float:
        log_w = reward / beta
        return float(2 * (log_p + log_w).logsumexp(0) - (log_p + 2 * log_w).logsumexp(0)) - math.log(0.05)

    return float(brentq(excess, 0.05, 20.0))


def ours(problem: Problem, samples: int, rate: float, group: int, seed: int) -> Result:
    """The log-variance divergence with replay."""
    steps = EVERY * samples // group
    ends: list[float] = []

    def watch(done: int, policy: LanguageModel) -> None:
        if done in (0, steps):
            ends.append(time.perf_counter())

    engine = SVI(
        num_steps=steps,
        learning_rate=rate,
        objective=LogVariance(group, Replay(samples, EVERY)),
        on_step=watch,
        num_samples=1,
        seed=seed,
        progress=False,
    )
    policy = engine.run(problem.model, [PROMPT]).policy
    return Result(problem.kl(policy), ends[1] - ends[0])


def theirs(
    peer: Peer, problem: dict[str, Any], samples: int, trainer: str, rate: float, batch: int, seed: int
) -> Result:
    """A trainer of TRL."""
    training = {"trainer": trainer, "learning_rate": rate, "samples": samples, "batch": batch, "evaluate": [samples]}
    answer = peer.ask(problem | training | {"seed": seed, "threads": 1})
    _, seconds, kl = answer["curve"][-1]
    return Result(kl, seconds)


def best(run: Callable[..., Result], grid: Iterable[tuple[Any, ...]], name: str) -> tuple[Any, ...]:
    """The settings of the lowest KL."""
    found = {settings: run(*settings, 0) for settings in grid}
    for settings, result in found.items():
        print(f"  {name} {settings}: KL {result.kl:.4f}, {result.seconds:.1f} s", file=sys.stderr, flush=True)
    return min(found, key=lambda settings: found[settings].kl)


def row(name: str, settings: tuple[Any, ...], samples: int, results: list[Result]) -> str:
    kls, seconds = ([result[i] for result in results] for i in (0, 1))
    return (
        f"| {name} | {', '.join(map(str, settings))} | {samples} | {statistics.median(seconds):.1f} "
        f"| {statistics.median(kls):.4f}; {min(kls):.4f} to {max(kls):.4f} |"
    )


def compare(problem: Problem, peer: Peer, folder: Path, budgets: list[int], factor: int, seeds: int) -> None:
    problem.save(folder)
    saved = {"problem": str(folder), "beta": problem.beta}
    print(f"\n{problem.name}, beta {problem.beta:.3f}: KL(prior || posterior) {problem.kl(problem.lm):.2f}\n")
    print("| trainer | settings | samples | seconds | KL to the posterior (median; min to max) |")
    print("|---|---|---|---|---|", flush=True)
    first = min(budgets)

    def mine(rate: float, group: int, seed: int, samples: int = first) -> Result:
        return ours(problem, samples, rate, group, seed)

    def trl(trainer: str, rate: float, batch: int, seed: int, samples: int = factor * first) -> Result:
        return theirs(peer, saved, samples, trainer, rate, batch, seed)

    own = best(mine, itertools.product(RATES, (128, 256)), "bayeslm")
    other = best(trl, [*itertools.product(["rloo"], RATES, (64, 256)), ("grpo", RATES[1], 64)], "TRL")
    for samples in budgets:
        print(row("bayeslm", own, samples, [mine(*own, seed, samples) for seed in range(seeds)]), flush=True)
        more = factor * samples
        print(row(f"TRL, {other[0]}", other[1:], more, [trl(*other, s, more) for s in range(seeds)]), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, nargs="+", default=[6400, 25600], help="that bayeslm draws")
    parser.add_argument("--factor", type=int, default=3, help="TRL draws so many times as many")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    if any(samples % 256 for samples in options.samples):
        parser.error("--samples must be multiples of 256, the largest batch")
    torch.set_num_threads(1)
    peer = Peer("trl", REQUIREMENTS, "_trl_worker.py")
    problems = [Problem(position, 0, 1.0), Problem(pairs, 1, 1.0), Problem(count, 2, 0.3)]
    print(f"torch {torch.__version__}, one thread, {REQUIREMENTS[0]}, {options.seeds} seeds")
    with tempfile.TemporaryDirectory() as folder:
        for i, problem in enumerate(problems):
            compare(problem, peer, Path(folder) / str(i), options.samples, options.factor, options.seeds)


if __name__ == "__main__":
    main()
