"""The mean squared error of log Z on enumerable problems, of engines of particles at about equal tokens.

    OMP_NUM_THREADS=1 python benchmarks/particles.py [--runs 12] [--only "beta 0.5"] [--chosen]

The problems of `trust_region.py`: texts of 5 tokens. AnnealedSMC as it is, with four suffixes a move, and with long
steps of its ladder; importance sampling with as many draws as cost the tokens of the first. (SMC is in
`first_draws.py`.)
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace

import numpy as np
import torch
from trust_region import PROMPT, problems

from bayeslm.inference import AnnealedSMC, ImportanceSampling

TOKENS_A_DRAW = 4.5  # of the network, for one draw of 5 tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chosen", action="store_true")
    parser.add_argument("--runs", type=int, default=12)
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| problem | engine | mean squared error of log Z | tokens | seconds a run |\n|---|---|---|---|---|")
    for name, problem, guide in problems(options.chosen):
        if guide is not None or options.only not in name:
            continue
        rewards = problem.reward(problem.values[:, 0]).double() / problem.beta
        log_z = float((problem.log_prob(problem.lm) + rewards).logsumexp(0))

        engines = {
            "AnnealedSMC": AnnealedSMC(128, progress=False),
            "AnnealedSMC, four suffixes": AnnealedSMC(48, num_candidates=4, progress=False),
            "AnnealedSMC, cess=0.5": AnnealedSMC(256, cess=0.5, progress=False),
            "ImportanceSampling": None,
        }
        spent = 0.0
        for label, engine in engines.items():
            start = time.perf_counter()
            engine = engine or ImportanceSampling(int(spent / TOKENS_A_DRAW), progress=False)
            runs = [replace(engine, seed=seed).run(problem.model, [PROMPT]) for seed in range(options.runs)]
            seconds = (time.perf_counter() - start) / options.runs
            error = np.mean([(float(run.log_evidence[0]) - log_z) ** 2 for run in runs])
            tokens = float(np.mean([run.stats["tokens"] for run in runs]))
            spent = spent or tokens
            print(f"| {name} | {label} | {error:.3g} | {tokens:.0f} | {seconds:.2f} |", flush=True)


if __name__ == "__main__":
    main()
