"""What the twist that SMC learns by default saves: errors of log Z beside importance sampling, at equal tokens.

    OMP_NUM_THREADS=1 python benchmarks/first_draws.py [--runs 100] [--particles 256] [--chosen] [--only count]

Problems are enumerable, texts of 5 tokens. The share of draws and the least number of them were chosen on the five
problems `CHOSEN` of `svi_trl.py` (`--chosen`). The figures are on its five others, and on those of `trust_region.py`
whose prior has an effective share of draws of 1% at least (below it importance sampling has no answer to compare with);
and with a constant reward and one of 0 or 1 that depends on the last token alone.

Compared: `SMC(particles)`, four chains, its first quarter of draws included; the same with ``twist=None``; importance
sampling of as many draws. A row has the root mean squared error of log Z of each, and the ratio of the first's mean
squared error to the last's with an interval of 95%, by resampling the runs; the share of runs in which the twist was
used; and the seconds and tokens of a run of each.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pyro
import svi_trl
import torch
import trust_region
from torch import Tensor

from bayeslm.inference import SMC, ImportanceSampling
from bayeslm.models import LanguageModel
from bayeslm.models.rewards import factor

CHAINS = 4
LEAST_SHARE = 0.01  # of effective draws of the prior


class Case(NamedTuple):
    name: str
    model: Any
    prompt: list[int]
    log_p: Tensor
    log_likelihood: Tensor

    @property
    def log_z(self) -> float:
        return float((self.log_p + self.log_likelihood).logsumexp(0))

    @property
    def share(self) -> float:
        """Of effective draws of the prior."""
        return float((2 * self.log_z - (self.log_p + 2 * self.log_likelihood).logsumexp(0)).exp())


def case_of(name: str, problem: Any, prompt: list[int]) -> Case:
    with torch.no_grad():
        log_p = problem.lm([prompt], svi_trl.TOKENS).log_prob(problem.values)[:, 0].double()
    return Case(name, problem.model, prompt, log_p, problem.reward(problem.values[:, 0]).double() / problem.beta)


class Simple:
    """A reward of the whole text on a random Llama."""

    def __init__(self, lm: LanguageModel, reward: Any, beta: float) -> None:
        self.lm, self.reward, self.beta = lm, reward, beta
        self.values = lm([svi_trl.PROMPT], svi_trl.TOKENS).enumerate_support()

    def model(self, prompts: list[list[int]]) -> None:
        with pyro.plate("prompts", len(prompts)):
            x = pyro.sample("completion", self.lm(prompts, svi_trl.TOKENS))
            factor("reward", self.reward(x), self.beta)


def cases(chosen: bool) -> Iterator[Case]:
    for made in svi_trl.CHOSEN if chosen else svi_trl.PROBLEMS:
        problem = svi_trl.Problem(*made)
        yield case_of(problem.name, problem, svi_trl.PROMPT)
    if chosen:
        return
    for name, problem, guide in trust_region.problems(False):
        if guide is None and (found := case_of(name, problem, trust_region.PROMPT)).share >= LEAST_SHARE:
            yield found
    lm = svi_trl.llama(20, 1.0)
    yield case_of("a constant", Simple(lm, lambda x: torch.ones(x.shape[:-1]), 0.2), svi_trl.PROMPT)
    yield case_of("0 or 1 by the last token", Simple(lm, lambda x: (x[..., -1] == 3) * 1.0, 0.2), svi_trl.PROMPT)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--particles", type=int, default=256, help="of each of the four chains")
    parser.add_argument("--chosen", action="store_true", help="the problems on which settings were chosen")
    parser.add_argument("--only", default="", help="problems with this in their names")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    n, quiet = options.particles, {"progress": False}
    engines: dict[str, Any] = {
        "SMC()": SMC(n, CHAINS, **quiet),
        "twist=None": SMC(n, CHAINS, twist=None, **quiet),
        "importance sampling": ImportanceSampling(n * CHAINS, **quiet),
    }
    print(f"{n * CHAINS} particles, {options.runs} runs; the constant's errors are those of rounding\n")
    columns = "its mean square / importance sampling's | twist used | seconds | tokens"
    print(f"| problem | prior's share | {' | '.join(f'error of {name}' for name in engines)} | {columns} |")
    print("|---" * (6 + len(engines)) + "|")
    for case in cases(options.chosen):
        if options.only not in case.name:
            continue
        errors, seconds, tokens, used = {}, {}, {}, 0
        for name, engine in engines.items():
            found, begun, count = [], time.perf_counter(), 0
            for seed in range(options.runs):
                run = replace(engine, seed=seed).run(case.model, [case.prompt])
                found.append(float(run.log_evidence[0]) - case.log_z)
                count += run.stats["tokens"]
                used += max(run.stats.get("twist_gain", {}).values(), default=0.0) > 0.05
            errors[name] = np.array(found)
            seconds[name] = (time.perf_counter() - begun) / options.runs
            tokens[name] = count / options.runs
        first, _, last = errors.values()
        print(
            f"| {case.name} | {case.share:.1%} | {' | '.join(f'{rms(x):.4f}' for x in errors.values())} | "
            f"{ratio(first, last)} | {used / options.runs:.2f} | {'; '.join(f'{x:.2f}' for x in seconds.values())} | "
            f"{'; '.join(f'{x:.0f}' for x in tokens.values())} |",
            flush=True,
        )


def rms(errors: np.ndarray) -> float:
    return float(np.sqrt(np.mean(errors**2)))


def ratio(one: np.ndarray, other: np.ndarray) -> str:
    """Return the ratio of mean squares, and its interval by the bootstrap."""
    if rms(other) < 1e-5:
        return "–"
    generator = np.random.default_rng(0)
    some = [[x[generator.integers(len(x), size=len(x))] for x in (one, other)] for _ in range(2000)]
    low, high = np.quantile([(rms(x) / rms(y)) ** 2 for x, y in some], [0.025, 0.975])
    return f"{(rms(one) / rms(other)) ** 2:.2f} ({low:.2f} to {high:.2f})"


if __name__ == "__main__":
    main()
