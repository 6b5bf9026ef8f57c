"""Calibration: how often the truth is within 1, 2 and 3 of the errors that are stated, for every engine.

    python benchmarks/calibration.py [--replicates 200] [--slow 40] [--seconds N] [--engines NAME ...]
                                     [--problems NAME ...] [--out runs/calibration.jsonl]

Twelve problems whose posteriors are enumerated. A replicate is one run of an engine on one prompt (on all, where they
share a latent); replicates of a problem are the same prompt several times in one run, which engines infer independently
(of SVI they share the training). Figures: log Z, E[r], KL(posterior || prior) and the entropy, each with its error; all
split by whether `bayeslm.reliability.problems` finds nothing ("fine") or warns; and the share of `log_evidence_high`
above the truth. Engines whose replicate takes half a second or more have ``--slow`` replicates.

Every batch is appended to ``--out`` at once: the same call goes on where it was stopped, and one with more replicates
adds to it. ``--seconds`` ends the runs after so long. The tables are printed at the end, from all that the file holds.
"""

from __future__ import annotations

import argparse
import json
import math
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from scipy.stats import beta as beta_distribution
from torch import Tensor

from bayeslm import Posterior, diagnostics
from bayeslm.inference import MCMC, SMC, SVI, AnnealedSMC, BestOfN, Exact, ImportanceSampling, RejectionSampling
from bayeslm.models import LanguageModel
from bayeslm.models.rewards import factor
from bayeslm.reliability import problems

WORDS = ("<eos>", "a", "b", "c", "d", "e", "f", "g")
TOKENS, PROMPT, BATCH = 4, [1, 2], 20
FIGURES = ("log Z", "reward", "KL to prior", "entropy")
LM = LanguageModel.tabular(WORDS, order=3, seed=0)
POLICY = LanguageModel.tabular(WORDS, order=3, seed=0)  # as the prior, with flatter logits
with torch.no_grad():
    for parameter in POLICY.parameters():
        parameter *= 0.6
GENERATOR = np.random.default_rng(7)
TABLE = torch.as_tensor(0.5 * GENERATOR.normal(size=(TOKENS, 8)), dtype=torch.float32)
TAIL = torch.as_tensor(GENERATOR.exponential(size=8**TOKENS), dtype=torch.float32)


class Program:
    """A reward of a text's tokens (*, token) and beta, with the reward's highest value as its bound."""

    def __init__(self, reward: Callable[[Tensor], Tensor], beta: float, highest: float = math.inf) -> None:
        self.reward, self.beta, self.log_bound = reward, beta, highest / beta

    def __call__(self, prompts: list[Any]) -> None:
        with pyro.plate("prompts", len(prompts)):
            x = pyro.sample("completion", LM(prompts, max_new_tokens=TOKENS))
            factor("reward", self.reward(x), self.beta)


def shared(prompts: list[Any]) -> None:
    """A mood that all prompts share."""
    mood = pyro.sample("mood", dist.Bernoulli(0.3))
    with pyro.plate("prompts", len(prompts)):
        x = pyro.sample("completion", LM(prompts, max_new_tokens=2))
        pyro.factor("reward", (0.5 + mood) * (x == 3).sum(-1))


def topical(prompts: list[Any]) -> None:
    """A topic of each prompt, and its observed mark."""
    with pyro.plate("prompts", len(prompts)):
        topic = pyro.sample("topic", dist.Categorical(torch.tensor([0.9, 0.1])))
        x = pyro.sample("completion", LM(prompts, max_new_tokens=3))
        pyro.factor("reward", 1.5 * (x == 2 + topic[..., None]).sum(-1) + 2.0 * topic)


def scores(x: Tensor) -> Tensor:
    return TABLE[torch.arange(x.shape[-1]), x].sum(-1)


def successes(*tokens: int) -> Callable[[Tensor], Tensor]:
    """1 for texts that begin with these tokens, else 0."""
    return lambda x: (x[..., : len(tokens)] == torch.tensor(tokens)).all(-1).float()


def bimodal(x: Tensor) -> Tensor:
    """Two words, each good alone, and a third that is better only where all four tokens are it."""
    return torch.maximum((x == 2).sum(-1) * 0.5, 4.0 * (x == 5).all(-1))


PROBLEMS: dict[str, Any] = {
    "smooth": Program(scores, 1.0, float(TABLE.amax(1).sum())),
    "steep": Program(scores, 0.2, float(TABLE.amax(1).sum())),
    "ties": Program(lambda x: (x == 2).sum(-1).float(), 0.7, 4.0),
    "sparse": Program(successes(7, 7, 7), 0.15, 1.0),
    "often": Program(successes(3), 0.3, 1.0),
    "bimodal": Program(bimodal, 0.5, 4.0),
    "heavy tail": Program(lambda x: TAIL[(x.clamp(0, 7) * 8 ** torch.arange(TOKENS)).sum(-1)], 1.6),
    "saturating": Program(lambda x: torch.sigmoid(4.0 * scores(x)), 0.3, 1.0),
    "constraint": Program(lambda x: torch.where((x == 1).any(-1), scores(x), -torch.inf), 0.7),
    "constant": Program(lambda x: torch.ones(x.shape[:-1]), 0.5),
    "shared latent": shared,
    "topic": topical,
}
QUIET: dict[str, Any] = {"progress": False}
ENGINES: dict[str, Callable[[int], Any]] = {
    "importance, 64": lambda seed: ImportanceSampling(64, seed=seed, **QUIET),
    "importance, 256": lambda seed: ImportanceSampling(256, seed=seed, **QUIET),
    "importance, 1024": lambda seed: ImportanceSampling(1024, seed=seed, **QUIET),
    "importance, policy": lambda seed: ImportanceSampling(256, guide=POLICY, seed=seed, **QUIET),
    "rejection": lambda seed: RejectionSampling(100, max_proposals=20_000, seed=seed, **QUIET),
    "best of 4": lambda seed: BestOfN(4, 64, seed=seed, **QUIET),
    "smc": lambda seed: SMC(64, 4, seed=seed, **QUIET),
    "smc, partial": lambda seed: SMC(64, 4, twist="partial", seed=seed, **QUIET),
    "annealed": lambda seed: AnnealedSMC(64, 4, seed=seed, **QUIET),
    "mcmc": lambda seed: MCMC(100, 4, warmup=50, seed=seed, **QUIET),
    "svi": lambda seed: SVI(num_steps=40, num_samples=256, seed=seed, **QUIET),
}


def figures(posterior: Posterior) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return estimates with their errors, of what this kind of posterior has."""
    found = {"log Z": (posterior.log_evidence, posterior.log_evidence_stderr)}
    if posterior.kind == "uncorrected":
        return found
    rewards = posterior.measured
    if posterior.log_weights.shape[2] < rewards.shape[2]:
        rewards = rewards.sum(2, keepdims=True)
    found["reward"] = diagnostics.expectation(posterior, rewards)
    found["KL to prior"], found["entropy"] = diagnostics.kl_to_prior(posterior), diagnostics.entropy(posterior)
    return {name: pair for name, pair in found.items() if not np.isnan(pair[0]).all()}


def one_batch(problem: str, engine: str, seed: int, truth: dict[str, float], log_z: float) -> dict[str, Any]:
    """Return a record of one run: z-scores of each figure, what is fine, and whether the upper limit is above log Z."""
    prompts = [PROMPT] * (2 if problem == "shared latent" else BATCH)
    start = time.perf_counter()
    record: dict[str, Any] = {"problem": problem, "engine": engine, "seed": seed}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pyro.clear_param_store()
            posterior = ENGINES[engine](seed).run(PROBLEMS[problem], prompts)
    except (ValueError, RuntimeError) as error:  # no draw meets the constraint, no bound, a reward of -inf in training
        return record | {"refused": f"{type(error).__name__}: {str(error)[:80]}"}
    count = posterior.log_weights.shape[2]
    record |= {"count": count, "seconds": (time.perf_counter() - start) / count}
    record["fine"] = [not sentences for sentences in problems(posterior)]
    record["z"] = {}
    for name, (estimate, error) in figures(posterior).items():
        gap = np.abs(estimate - truth[name])
        exact = gap < 1e-4 * max(1.0, abs(truth[name]))  # float32; errors are 0 where all weights are equal
        with np.errstate(divide="ignore", invalid="ignore"):
            z = np.where(exact, 0.0, gap / np.where(np.isfinite(error), error, np.nan))
        record["z"][name] = [round(float(value), 3) if np.isfinite(value) else str(value) for value in z]
    if posterior.log_evidence_high is not None:
        record["high"] = [bool(value >= log_z - 1e-4) for value in posterior.log_evidence_high]
    return record


def run(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Run what the file lacks, and return all its records."""
    out = Path(arguments.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    records = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    done: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for record in records:
        done[record["problem"], record["engine"]].append(record)
    stop = time.perf_counter() + arguments.seconds
    for problem in arguments.problems:
        prompts = [PROMPT] * (2 if problem == "shared latent" else 1)
        exact = Exact(num_prior_samples=1, seed=0).run(PROBLEMS[problem], prompts)
        truth = {name: float(estimate[0]) for name, (estimate, _) in figures(exact).items()}
        for engine in arguments.engines:
            cell = done[problem, engine]
            while time.perf_counter() < stop:
                seconds = np.mean([r["seconds"] for r in cell if "seconds" in r] or [0.0])
                wanted = arguments.slow if seconds >= 0.5 else arguments.replicates
                if sum(r.get("count", 0) for r in cell) >= wanted or any("refused" in r for r in cell[-1:]):
                    break
                cell.append(one_batch(problem, engine, len(cell), truth, float(exact.log_evidence[0])))
                records.append(cell[-1])
                with out.open("a") as file:
                    file.write(json.dumps(cell[-1]) + "\n")
            total = sum(r.get("count", 0) for r in cell)
            print(f"{problem}, {engine}: {total} replicates", cell[-1].get("refused", "") if cell else "", flush=True)
    return records


def interval(hits: int, total: int) -> tuple[float, float]:
    """The Clopper-Pearson interval (95%) of a share."""
    low = beta_distribution.ppf(0.025, hits, total - hits + 1) if hits else 0.0
    high = beta_distribution.ppf(0.975, hits + 1, total - hits) if hits < total else 1.0
    return float(low), float(high)


def within(values: Iterable[float], limits: Iterable[int] = (1, 2, 3)) -> str:
    """Shares within 1, 2, 3 errors; the interval of the second; the number."""
    z = np.array([float(value) for value in values])
    if not len(z):
        return "–"
    shares = [int((z <= limit).sum()) for limit in limits]  # an unknown error (NaN) covers nothing
    low, high = interval(shares[1], len(z))
    return f"{' '.join(f'{n / len(z):.2f}' for n in shares)} [{low:.2f}, {high:.2f}] of {len(z)}"


def tables(records: list[dict[str, Any]]) -> None:
    """Print coverage by engine, the cells below 0.9 where diagnostics are fine, and that of the upper limits."""
    cells: dict[tuple[str, str, str, bool], list[float]] = defaultdict(list)
    limits: dict[str, list[bool]] = defaultdict(list)
    for record in records:
        for name, z in record.get("z", {}).items():
            for value, fine in zip(z, record["fine"], strict=True):
                if not math.isnan(float(value)) or fine:
                    cells[record["problem"], record["engine"], name, fine].append(float(value))
        limits[record["problem"]] += record.get("high", [])
    print("\n| engine | figure | fine: within 1, 2, 3 errors [95% interval of 2] | warned |\n|---|---|---|---|")
    for engine in ENGINES:
        for name in FIGURES:
            fine, warned = (
                [z for (_, e, f, ok), zs in cells.items() if (e, f, ok) == (engine, name, good) for z in zs]
                for good in (True, False)
            )
            if fine or warned:
                print(f"| {engine} | {name} | {within(fine)} | {within(warned)} |")
    print("\nFine, and two errors cover less than 0.9:")
    print("\n| problem | engine | figure | fine | warned |\n|---|---|---|---|---|")
    for (problem, engine, name, good), zs in cells.items():
        if good and np.mean(np.array(zs) <= 2) < 0.9:
            others = cells.get((problem, engine, name, False), [])
            print(f"| {problem} | {engine} | {name} | {within(zs)} | {within(others)} |")
    print("\n| problem | log_evidence_high above log Z [95% interval] |\n|---|---|")
    for problem, above in limits.items():
        if above:
            low, high = interval(sum(above), len(above))
            print(f"| {problem} | {np.mean(above):.3f} [{low:.3f}, {high:.3f}] of {len(above)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicates", type=int, default=200)
    parser.add_argument("--slow", type=int, default=40)
    parser.add_argument("--seconds", type=float, default=math.inf)
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=list(ENGINES))
    parser.add_argument("--problems", nargs="+", default=list(PROBLEMS), choices=list(PROBLEMS))
    parser.add_argument("--out", default="runs/calibration.jsonl")
    tables(run(parser.parse_args()))


if __name__ == "__main__":
    main()
