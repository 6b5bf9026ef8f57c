"""The samples and the seconds that SVI and TRL's trainers take to a known posterior.

    python benchmarks/svi_trl.py [--seeds 3] [--reuse]
    python benchmarks/svi_trl.py --alone 6554 11469 [--chosen]      # SVI without TRL, after so many samples

bayeslm's side has no setting at all: ``SVI(Budget(samples=...))``. Its defaults were chosen on the problems `CHOSEN`;
the comparison is on `PROBLEMS`, five others, one of which has steep logits.

Problems are enumerable: a small random Llama with 8 tokens that writes 5, and a reward whose beta is such that
importance sampling from the prior has an efficiency of 5%. After a training KL(q || posterior) is computed over all
completions. A budget is a training of its own: so many samples, with schedules that end with them. What counts is the
smallest budget at which the median KL of the seeds is at most 0.03, and its seconds; and the KL at the end, of TRL
after the largest budget, of bayeslm after a fifth of it.

TRL has Adam (PyTorch's fused kernel) with a gradient clipped at norm 1, learning rates to choose from, by the lowest KL
of the first seed at one budget, and two ways to spend samples, each with a learning rate of its own: batches of 64 or
256. Its second beta of Adam is 0.95, as SVI has it, or TRL's default, 0.999, whichever is lower in the same way. The
better way counts, for samples and for seconds apart. Its trainer is RLOO; GRPO is tried once. Budgets are found by
bisection, as if a larger one were never worse. Seconds are medians, those of the training loop, one thread each;
loading and the KL are not counted. `_trl_worker.py` says what TRL does; it lives in an environment of its own,
build/trl, made at the first run (1.5 GB). (TRL can take several steps with a lot of samples as well, by clipped ratios,
which is another loss; it is left at one.) Its trainings are kept in build/svi_trl.json; `--reuse` reads them there
instead of repeating them, seconds of another day with them.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pyro
import torch
from _peer import ROOT, Peer
from safetensors.torch import save_file
from scipy.optimize import brentq
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from bayeslm.inference import SVI
from bayeslm.inference.training import Budget, StepRecord
from bayeslm.models import LanguageModel
from bayeslm.models.lm import word_tokenizer
from bayeslm.models.rewards import factor

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
GOAL = 0.03  # nats
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
GRPO_RATE = 3e-3  # of the one training by GRPO
BUDGETS = [2**k * x for k in (9, 10, 11, 12, 13) for x in (4, 5, 6, 7)] + [2**16, 2**14 * 5, 2**15 * 3]  # to 98304


class Result(NamedTuple):
    kl: float
    seconds: float


Settings = tuple[Any, ...]
Train = Callable[[int, Settings, int], Result]  # of a budget, settings and a seed


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


def llama(seed: int, spread: float) -> LanguageModel:
    """A random Llama whose logits have a standard deviation of ``spread``."""
    torch.manual_seed(seed)
    config = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokens = {"vocab_size": len(WORDS), "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    network = LlamaForCausalLM(LlamaConfig(**config, **tokens, max_position_embeddings=64, initializer_range=0.3))
    torch.nn.init.normal_(network.lm_head.weight, std=spread / config["hidden_size"] ** 0.5)
    return LanguageModel(network, word_tokenizer(WORDS, WORDS[0]))


Made = tuple[Callable[[Tensor], Tensor], int, float]  # a reward, the seed of a prior, the spread of its logits
PROBLEMS: list[Made] = [(position, 0, 1.0), (pairs, 1, 1.0), (count, 2, 0.3), (pairs, 3, 1.0), (position, 4, 6.0)]
CHOSEN: list[Made] = [(position, 10, 1.0), (pairs, 11, 1.0), (count, 12, 0.3), (pairs, 13, 1.0), (position, 14, 6.0)]


class Problem:
    """A prior, a reward, and the posterior over all completions. ``spread``: of the prior's logits."""

    def __init__(self, reward: Callable[[Tensor], Tensor], seed: int, spread: float) -> None:
        self.name = f"{reward.__name__}, prior {seed} with logits of spread {spread}"
        self.lm = llama(seed, spread)
        distribution = self.lm([PROMPT], TOKENS)
        self.values = distribution.enumerate_support()
        self.reward = reward
        with torch.no_grad():
            log_p = distribution.log_prob(self.values)[:, 0].double()
        rewards = reward(self.values[:, 0]).double()
        self.beta = beta_of(log_p, rewards)
        self.log_posterior = (log_p + rewards / self.beta).log_softmax(0)

    def model(self, prompts: list[list[int]]) -> None:
        with pyro.plate("prompts", len(prompts)):
            x = pyro.sample("completion", self.lm(prompts, TOKENS))
            factor("reward", self.reward(x), self.beta)

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


def ours(problem: Problem, samples: int, settings: Settings, seed: int) -> Result:
    """SVI with no setting but the budget."""
    begun: list[float] = []

    def watch(record: StepRecord) -> None:
        begun.append(time.perf_counter())

    engine = SVI(
        Budget(samples=samples), callbacks=[watch], num_samples=1, num_prior_samples=0, seed=seed, progress=False
    )
    policy = engine.run(problem.model, [PROMPT]).policy
    return Result(problem.kl(policy), begun[-1] - begun[0])


class Theirs:
    """TRL's trainers, whose trainings are kept in a file."""

    def __init__(self, reuse: bool) -> None:
        self.path = ROOT / "build" / "svi_trl.json"
        self.kept: dict[str, list[float]] = json.loads(self.path.read_text()) if self.path.exists() else {}
        self.reusable = set(self.kept) if reuse else set()
        self.reused = 0

    @functools.cached_property
    def peer(self) -> Peer:
        return Peer("trl", REQUIREMENTS, "_trl_worker.py")

    def train(self, problem: Problem, folder: Path, samples: int, settings: Settings, seed: int) -> Result:
        """Settings: trainer, batch, learning rate, Adam's second beta."""
        trainer, batch, rate, beta2 = settings
        training = {
            "trainer": trainer,
            "learning_rate": rate,
            "beta2": beta2,
            "samples": samples,
            "batch": batch,
            "seed": seed,
        }
        training |= {"beta": problem.beta, "evaluate": [samples], "threads": 1}
        key = json.dumps({"versions": REQUIREMENTS, "problem": problem.name} | training, sort_keys=True)
        if key in self.reusable:
            self.reused += 1
        else:
            _, seconds, kl = self.peer.ask({"problem": str(folder)} | training)["curve"][-1]
            self.kept[key] = [kl, seconds]
            self.path.parent.mkdir(exist_ok=True)
            self.path.write_text(json.dumps(self.kept, indent=1))
        return Result(*self.kept[key])


class Side:
    """What one side needs for a problem.

    :param ways: to spend samples, each all settings to choose from.
    :param tuned_at: the budget at which the first seed chooses.
    """

    def __init__(self, name: str, train: Train, ways: list[list[Settings]], tuned_at: int, seeds: int) -> None:
        self.name, self.seeds = name, seeds
        self.train = functools.cache(train)

        def kl(settings: Settings) -> float:
            return self._seen(tuned_at, settings, 0).kl

        self.settings = [min(way, key=kl) for way in ways]
        self.best = min(self.settings, key=kl)

    def _seen(self, samples: int, settings: Settings, seed: int) -> Result:
        result = self.train(samples, settings, seed)
        print(
            f"  {self.name} {settings} {samples}: {result.kl:.4f}, {result.seconds:.1f} s", file=sys.stderr, flush=True
        )
        return result

    def results(self, samples: int, settings: Settings) -> list[Result]:
        return [self._seen(samples, settings, seed) for seed in range(self.seeds)]

    def reaches(self, samples: int, settings: Settings) -> bool:
        """Whether the median KL is at most `GOAL`; seeds that can no longer change it are not run."""
        reached = missed = 0
        for seed in range(self.seeds):
            found = self._seen(samples, settings, seed).kl <= GOAL
            reached, missed = reached + found, missed + (not found)
            if max(reached, missed) > self.seeds / 2:
                break
        return reached > missed

    def smallest(self, settings: Settings) -> int | None:
        """The smallest budget that reaches the goal; None if the largest does not."""
        low, high = 0, len(BUDGETS)
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self.reaches(BUDGETS[middle], settings) else (middle + 1, high)
        return BUDGETS[low] if low < len(BUDGETS) else None

    def reach(self) -> tuple[float, float]:
        """Samples and seconds to the goal, each of its better way; a row of the table for each way."""
        samples, seconds = math.inf, math.inf
        for settings in self.settings:
            budget = self.smallest(settings)
            if budget is None:
                print(f"| {self.name} | {shown(settings)} | over {BUDGETS[-1]} | – | – |", flush=True)
                continue
            results = self.results(budget, settings)
            print(row(self.name, settings, budget, results), flush=True)
            samples = min(samples, budget)
            seconds = min(seconds, statistics.median(result.seconds for result in results))
        return samples, seconds


def shown(settings: Settings) -> str:
    return ", ".join(map(str, settings))


def share(mine: float, other: float, end: float) -> str:
    """Of one side's cost in the other's, which if infinite is more than it was at the end."""
    if math.isinf(mine):
        return "–"
    return f"under {mine / end:.2f}" if math.isinf(other) else f"{mine / other:.2f}"


def row(name: str, settings: Settings, samples: int, results: list[Result]) -> str:
    kls, seconds = ([result[i] for result in results] for i in (0, 1))
    spread = f"{statistics.median(kls):.4f}; {min(kls):.4f} to {max(kls):.4f}"
    return f"| {name} | {shown(settings)} | {samples} | {statistics.median(seconds):.1f} | {spread} |"


def compare(problem: Problem, theirs: Theirs, folder: Path, seeds: int) -> str:
    """Print a problem's table; gives its row of the summary."""
    problem.save(folder)
    print(
        f"\n{problem.name}, beta {problem.beta:.3f}: KL(prior || posterior) {problem.kl(problem.lm):.2f}\n", flush=True
    )
    last = BUDGETS[-1]
    mine: list[list[Settings]] = [[()]]
    others = [[("rloo", batch, rate, beta2) for rate in RATES for beta2 in (0.95, 0.999)] for batch in (64, 256)]
    own = Side("bayeslm", functools.partial(ours, problem), mine, last // 5, seeds)
    trl = Side("TRL", functools.partial(theirs.train, problem, folder), others, last // 3, seeds)
    grpo = trl.train(last // 3, ("grpo", 64, GRPO_RATE, 0.999), 0)
    print("| side | settings | samples | seconds | KL to the posterior (median; min to max) |")
    print("|---|---|---|---|---|", flush=True)
    reached, ends = [], []
    for side, budget in ((own, last // 5), (trl, last)):
        reached.append(side.reach())
        results = side.results(budget, side.best)
        print(row(f"{side.name}, at the end", side.best, budget, results), flush=True)
        ends.append(statistics.median(result.kl for result in results))
        at_end = budget, statistics.median(result.seconds for result in results)  # TRL's, in the end
    print(f"\nGRPO after {last // 3} samples, batch 64, learning rate {GRPO_RATE}: KL {grpo.kl:.3f}", flush=True)
    shares = " | ".join(share(*pair) for pair in zip(*reached, at_end, strict=True))
    return f"| {problem.name} | {shares} | {ends[0]:.4f} | {ends[1]:.4f} |"


def alone(problems: list[Problem], budgets: list[int], seeds: int) -> None:
    """Print a table of SVI's KL and seconds."""
    print("| problem | KL(prior ‖ posterior) | samples | seconds | KL to the posterior (median; min to max) |")
    print("|---|---|---|---|---|", flush=True)
    for problem in problems:
        for samples in budgets:
            results = [ours(problem, samples, (), seed) for seed in range(seeds)]
            print(row(problem.name, (f"{problem.kl(problem.lm):.2f}",), samples, results), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="an odd number")
    parser.add_argument("--reuse", action="store_true", help="TRL's trainings that are kept are not repeated")
    parser.add_argument("--problems", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="some of the five")
    parser.add_argument("--chosen", action="store_true", help="the problems on which the defaults were chosen")
    parser.add_argument("--alone", type=int, nargs="+", metavar="SAMPLES", help="SVI without TRL, at these budgets")
    options = parser.parse_args()
    if options.seeds % 2 == 0:
        parser.error("--seeds must be odd: the median is one of them")
    torch.set_num_threads(1)
    theirs = Theirs(options.reuse)
    chosen = [Problem(*(CHOSEN if options.chosen else PROBLEMS)[i]) for i in options.problems]
    print(f"torch {torch.__version__}, one thread, {REQUIREMENTS[0]}, {options.seeds} seeds")
    if options.alone:
        alone(chosen, options.alone, options.seeds)
        return
    with tempfile.TemporaryDirectory() as folder:
        rows = [compare(problem, theirs, Path(folder) / str(i), options.seeds) for i, problem in enumerate(chosen)]
    print(
        f"\nbayeslm's share of what TRL takes to a KL of {GOAL}, and the KL at the end with a fifth of its samples:\n"
    )
    print("| problem | samples | seconds | KL of bayeslm | KL of TRL |")
    print("|---|---|---|---|---|")
    print("\n".join(rows))
    if theirs.reused:
        print(f"\n{theirs.reused} of TRL's trainings are of an earlier run.")


if __name__ == "__main__":
    main()
