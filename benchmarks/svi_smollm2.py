"""SVI and TRL's RLOO on SmolLM2-135M-Instruct: seconds a step, peak memory, and the frontier of reward and KL.

    python benchmarks/svi_smollm2.py [--steps 40] [--draws 512] [--plot frontier.png]
    python benchmarks/svi_smollm2.py --steps 24 --objectives default --no-trl --seeds 3    # SVI with no setting, alone
    python benchmarks/svi_smollm2.py --quick         # some minutes, to see that it runs
    python benchmarks/svi_smollm2.py --tune          # which settings of TRL are fastest

Completions of 24 tokens of one prompt, VADER's sentiment as the reward, beta 0.2, float32. Both sides train LoRA
adapters of rank 16 on all linear layers but the head, with 16 completions a step, Adam, a learning rate that falls
linearly to 0 and gradients clipped at norm 1; but for the method "default", which is SVI with as many samples and
nothing else set, and "last-half", which has adapters on the last half of the layers. Every training is a process of its
own, one after the other, the two sides in alternating order; TRL's have an environment of their own, build/trl, made at
the first run (1.5 GB).
`_trl_smollm2_worker.py` says what TRL does, in those of its settings that end a training soonest (`--tune`: compiling
makes its steps some 7% shorter, but the first as long as eight). Seconds are from one step's end to the next's.

Every trained adapter is then judged in one way, whoever trained it: draws of the policy give E[r], KL(q || p) and the
objective J(q) = E[r] - beta KL(q || p), of which no q has more than beta log Z. As log Z is known from draws of the
prior, KL(q || posterior) = log Z - J(q) / beta. The frontier, the most reward at a KL, is that of the posteriors of
other betas, from the same draws of the prior.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import tempfile
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import svi_trl
import torch
from _figures import Estimate, log_mean
from _peer import Peer
from torch import Tensor

from bayeslm.models import LanguageModel, rewards

REQUIREMENTS = svi_trl.REQUIREMENTS
PROMPT = "My dinner at the restaurant was"
TOKENS, GROUP, RANK, BETA = 24, 16, 16, 0.2
# Layers were tried on completions of these prompts, and judged on PROMPT and the demo's.
CHOSEN_ON = ["The new phone that I bought is", "My first day at the new school was"]
WARM_UP = 2  # steps that are not timed
METHODS = {
    "default": "bayeslm, SVI()",
    "last-half": "bayeslm, SVI(), adapters on the last half of the layers",
    "reverse-kl": "bayeslm, ReverseKL",
    "log-variance": "bayeslm, LogVariance",
    "trl": "TRL, RLOO",
}
WITHOUT_RATE = ("default", "last-half")
TUNING: list[dict[str, Any]] = [
    {},
    {"optim": "adamw_torch"},
    {"attn_implementation": "eager"},
    {"cache_implementation": "static"},
    {"use_transformers_continuous_batching": True},
    {"torch_compile": True},
]


@dataclass
class Training:
    method: str
    rate: float
    adapter: Path
    seconds: list[float] = field(default_factory=list)  # of the steps after WARM_UP
    total: float = 0.0  # seconds from the beginning of the first step to the end of the last
    loaded: float = 0.0
    peak: float = 0.0


class Draws:
    """Completions of a policy q with their reward, log q and log p, each (draw,)."""

    def __init__(self, policy: LanguageModel, prior: LanguageModel, number: int) -> None:
        with torch.no_grad():
            distribution = policy([PROMPT], TOKENS).expand((number, 1))
            x = distribution.sample()
            log_q, log_p = distribution.log_prob(x), prior([PROMPT], TOKENS).log_prob(x)
        self.reward = self._column(rewards.Sentiment()([PROMPT], prior.decode(x)))
        self.log_ratio = self._column(log_q - log_p)

    @staticmethod
    def _column(x: Tensor) -> np.ndarray:
        return x[:, 0].double().numpy()

    @property
    def objective(self) -> Estimate:
        return mean(self.reward - BETA * self.log_ratio)


def mean(values: np.ndarray) -> Estimate:
    return float(values.mean()), float(values.std(ddof=1)) / math.sqrt(len(values))


def shown(estimate: Estimate) -> str:
    return f"{estimate[0]:.3f} ± {estimate[1]:.3f}"


class Bench:
    """The model's folder, its prior, and how both sides are asked to train."""

    def __init__(self, steps: int, threads: int, folder: Path) -> None:
        self.prior = LanguageModel.from_pretrained("smollm2", dtype=torch.float32)
        self.folder = folder
        self.request: dict[str, Any] = {
            "model": self.prior.config._name_or_path,
            "prompt": PROMPT,
            "tokens": TOKENS,
            "beta": BETA,
            "steps": steps,
            "group": GROUP,
            "rank": RANK,
            "threads": threads,
        }
        self.ids = self.prior([PROMPT], TOKENS).prompt_ids[0].tolist()

    def train(self, method: str, rate: float, seed: int, settings: dict[str, Any] | None = None) -> Training:
        training = Training(method, rate, self.folder / f"{method}-{rate:g}-{seed}")
        request = self.request | {"learning_rate": rate, "adapter": str(training.adapter), "seed": seed}
        if method == "trl":
            peer = Peer("trl", REQUIREMENTS, "_trl_smollm2_worker.py")
            request |= {"ids": self.ids, "settings": settings or {}}
        else:
            peer = Peer("bayeslm", None, "_bayeslm_smollm2_worker.py")
            request |= {"method": method}
        answer = peer.ask(request)
        peer.close()
        training.seconds = np.diff(answer["ends"]).tolist()[WARM_UP:]
        training.total = answer["ends"][-1] - answer["ends"][0]
        training.loaded, training.peak = answer["loaded"], answer["peak"]
        note(f"{METHODS[method]}, {rate:g}: {statistics.median(training.seconds):.2f} s a step")
        return training


def note(text: str) -> None:
    print(f"  {text}", file=sys.stderr, flush=True)


def costs(trainings: dict[str, list[Training]]) -> None:
    """Seconds a step and memory, and their ratios to TRL's."""
    print("\n| trainer | seconds a step (median; quarters) | to TRL's | peak, MB | above the loaded model | to TRL's |")
    print("|---|---|---|---|---|---|")
    figures = {}
    for method, runs in trainings.items():
        seconds = [second for run in runs for second in run.seconds]
        peak, growth = max(run.peak for run in runs), max(run.peak - run.loaded for run in runs)
        figures[method] = (*np.quantile(seconds, (0.5, 0.25, 0.75)), peak, growth)
    for method, (second, low, high, peak, growth) in figures.items():
        to = figures.get("trl", (math.nan,) * 5)
        print(
            f"| {METHODS[method]} | {second:.2f}; {low:.2f} to {high:.2f} | {second / to[0]:.2f} | {peak:.0f} "
            f"| {growth:.0f} | {growth / to[4]:.2f} |"
        )


def judge(bench: Bench, trainings: list[Training], number: int) -> tuple[list[Draws], Draws]:
    """Draws of each policy, and of the prior; a table of them."""
    packed = bench.prior.packed()
    torch.manual_seed(0)
    prior = Draws(packed, packed, 2 * number)
    log_z = log_mean(prior.reward / BETA)
    print(f"\nlog Z {shown(log_z)}, so that the objective is at most {BETA * log_z[0]:.3f}\n")
    print("| trainer | learning rate | E[r] | KL(q ‖ p) | objective | KL(q ‖ posterior) |")
    print("|---|---|---|---|---|---|")
    found = []
    for training, draws in [(None, prior), *((training, None) for training in trainings)]:
        if draws is None:
            policy = LanguageModel.from_pretrained(training.adapter, base=bench.prior).packed()
            draws = Draws(policy, packed, number)
            found.append(draws)
        name = "(the prior) | " if training is None else f"{METHODS[training.method]} | {training.rate:g}"
        objective = draws.objective
        gap = log_z[0] - objective[0] / BETA, math.hypot(log_z[1], objective[1] / BETA)
        columns = [shown(estimate) for estimate in (mean(draws.reward), mean(draws.log_ratio), objective, gap)]
        print(f"| {name} | " + " | ".join(columns) + " |", flush=True)
    over_seeds(trainings, found)
    return found, prior


def over_seeds(trainings: list[Training], found: list[Draws]) -> None:
    """Means over the seeds of each method and rate, with the standard errors that seeds differ by."""
    groups: dict[tuple[str, float], list[Draws]] = {}
    for training, draws in zip(trainings, found, strict=True):
        groups.setdefault((training.method, training.rate), []).append(draws)
    if max(map(len, groups.values())) == 1:
        return
    print("\n| trainer | learning rate | seeds | E[r] | KL(q ‖ p) | objective |")
    print("|---|---|---|---|---|---|")
    for (method, rate), seeds in groups.items():
        numbers = [[mean(d.reward)[0], mean(d.log_ratio)[0], d.objective[0]] for d in seeds]
        columns = [shown(mean(np.array(column))) for column in zip(*numbers, strict=True)]
        print(f"| {METHODS[method]} | {rate:g} | {len(seeds)} | " + " | ".join(columns) + " |")


def frontier(prior: Draws, betas: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """KL(posterior || p) and E[r] of the posteriors of other betas, by self-normalised weights of the prior's draws."""
    log_w = prior.reward / betas[:, None]
    log_z = np.array([log_mean(row)[0] for row in log_w])
    weights = np.exp(log_w - log_z[:, None]) / len(prior.reward)
    reward = weights @ prior.reward
    return reward / betas - log_z, reward


def plot(path: str, trainings: list[Training], found: list[Draws], prior: Draws) -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 5), layout="constrained")
    axes.plot(*frontier(prior, np.geomspace(0.1, 20.0, 100)), color="black", label="the frontier: posteriors")
    kl, reward = frontier(prior, np.array([BETA]))
    axes.plot(kl, reward, "*", color="black", markersize=12, label=f"the posterior of beta {BETA:g}")
    for method, marker in zip(METHODS, "^vosD", strict=True):
        chosen = [i for i, training in enumerate(trainings) if training.method == method]
        if not chosen:
            continue
        x, y = ([mean(getattr(found[i], of)) for i in chosen] for of in ("log_ratio", "reward"))
        points = axes.errorbar(
            [v for v, _ in x], [v for v, _ in y], xerr=[e for _, e in x], yerr=[e for _, e in y], fmt=marker
        )
        points.set_label(METHODS[method])
        for i, (u, _), (v, _) in zip(chosen, x, y, strict=True):
            axes.annotate(f"{trainings[i].rate:g}", (u, v), xytext=(6, -10), textcoords="offset points", fontsize=8)
    axes.set(xlabel="KL(q ‖ p), nats", ylabel="E[r]", title="SmolLM2-135M, VADER's sentiment; labels: learning rates")
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=150)


def tune(bench: Bench, repeats: int) -> None:
    """The settings of TRL, in turn."""
    runs = [[bench.train("trl", 1e-3, repeat, settings) for settings in TUNING] for repeat in range(repeats)]
    print("| settings of TRL | seconds a step (median; quarters) | all steps, with the first | peak, MB |")
    print("|---|---|---|---|")
    for settings, own in zip(TUNING, zip(*runs, strict=True), strict=True):
        names = ", ".join(f"{key}={value}" for key, value in settings.items()) or "as in the comparison"
        middle, low, high = np.quantile([second for run in own for second in run.seconds], (0.5, 0.25, 0.75))
        total, peak = statistics.median(run.total for run in own), max(run.peak for run in own)
        print(f"| {names} | {middle:.2f}; {low:.2f} to {high:.2f} | {total:.0f} | {peak:.0f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rates", type=float, nargs="+", default=[3e-4, 1e-3, 3e-3])
    parser.add_argument(
        "--objectives",
        nargs="+",
        choices=list(METHODS)[:-1],
        default=["default"],
        help="ours; default is SVI(Budget(samples=...)), which no rate applies to",
    )
    parser.add_argument("--no-trl", action="store_true", help="bayeslm alone")
    parser.add_argument("--draws", type=int, default=512, help="of each policy; twice as many of the prior")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--plot", metavar="FILE")
    parser.add_argument("--quick", action="store_true", help="5 steps, one learning rate, 64 draws")
    parser.add_argument("--tune", action="store_true", help="time TRL's settings instead")
    options = parser.parse_args()
    if options.quick:
        options.steps, options.rates, options.draws = 5, [1e-3], 64
    if options.steps <= WARM_UP:
        parser.error(f"--steps must be more than {WARM_UP}, which are not timed")
    torch.set_num_threads(options.threads)
    names = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft"))
    print(f"{names}, {REQUIREMENTS[0]}, {options.threads} threads, {options.steps} steps of {GROUP}, float32\n")
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(options.steps, options.threads, Path(folder))
        if options.tune:
            tune(bench, options.seeds)
            return
        trainings: list[Training] = []
        methods = [*options.objectives, *([] if options.no_trl else ["trl"])]
        jobs = [(rate, seed) for seed in range(options.seeds) for rate in options.rates]
        for i, (rate, seed) in enumerate(jobs):
            order = methods if i % 2 == 0 else reversed(methods)
            trainings += [
                bench.train(method, 0.0 if method in WITHOUT_RATE else rate, seed)
                for method in order
                if method not in WITHOUT_RATE or rate == options.rates[0]
            ]
        costs({method: [t for t in trainings if t.method == method] for method in methods})
        trainings.sort(key=lambda training: (methods.index(training.method), training.rate))
        found, prior = judge(bench, trainings, options.draws)
        if options.plot:
            plot(options.plot, trainings, found, prior)


if __name__ == "__main__":
    main()
