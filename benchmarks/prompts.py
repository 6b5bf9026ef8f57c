"""Seconds of what is made of a posterior as its prompts grow, with the exponents of a fit: 1 is in proportion.

    python benchmarks/prompts.py [--prompts 50 100 200 400 800] [--particles 64]

Two posteriors of a table, one importance sampling's and one rejection sampling's. The report is what `bayeslm show`
prints.
"""

from __future__ import annotations

import argparse
import io
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from bayeslm import Posterior, diagnostics
from bayeslm.cli import tables
from bayeslm.inference import ImportanceSampling, RejectionSampling
from bayeslm.models import LanguageModel, TiltedLM, rewards


def seconds(function: Callable[[], Any]) -> float:
    """The least of three."""
    found = []
    for _ in range(3):
        start = time.perf_counter()
        function()
        found.append(time.perf_counter() - start)
    return min(found)


def save_and_load(posterior: Posterior) -> None:
    with tempfile.TemporaryDirectory() as folder:
        posterior.save(Path(folder) / "posterior")
        Posterior.load(Path(folder) / "posterior")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, nargs="+", default=[50, 100, 200, 400, 800])
    parser.add_argument("--particles", type=int, default=64)
    options = parser.parse_args()
    lm = LanguageModel.tabular(["<eos>", *"abcdefg"], order=2, seed=0)
    model = TiltedLM(lm, rewards.get("contains", phrase="a"), beta=0.5, max_new_tokens=4)
    engines = {
        "importance": ImportanceSampling(num_particles=options.particles, seed=0, progress=False),
        "rejection": RejectionSampling(num_samples=options.particles, seed=0, progress=False),
    }
    table: dict[str, list[float]] = {}
    for size in options.prompts:
        prompts = [" ".join("abcdefg"[int(digit)] for digit in f"{i:05o}"[-5:] if digit != "7") for i in range(size)]
        posteriors = {name: engine.run(model, prompts) for name, engine in engines.items()}
        posterior = posteriors["importance"]
        jobs: dict[str, Callable[[], Any]] = {
            "importance sampling": lambda prompts=prompts: engines["importance"].run(model, prompts),
            "summary": lambda posterior=posterior: diagnostics.summary(posterior),
            "report": lambda posteriors=posteriors: tables.show(posteriors, Console(file=io.StringIO())),
            "to_arviz": lambda posterior=posterior: posterior.to_arviz(),
            "save and load": lambda posterior=posterior: save_and_load(posterior),
        }
        for name, job in jobs.items():
            table.setdefault(name, []).append(seconds(job))
    print(f"| | {' | '.join(f'{size} prompts' for size in options.prompts)} | exponent |")
    print("|---" * (len(options.prompts) + 2) + "|")
    for name, row in table.items():
        exponent = np.polyfit(np.log(options.prompts), np.log(row), 1)[0]
        print(f"| {name} | {' | '.join(f'{x:.3g}' for x in row)} | {exponent:.2f} |")


if __name__ == "__main__":
    main()
