"""A cluster in one machine: many processes with tiny networks, what they send, and whether results keep their law.

    python benchmarks/cluster.py [--processes 2 4 8 16] [--steps 10] [--draws 10240] [--objective reverse|kept|critic]

Of each number of processes, for several numbers of particles and prompts: the bytes that one process hands to
collectives in a step of SVI, sums of gradients and all else, and the same of `ImportanceSampling`, once. The law: the
mean over runs of Z-hat / Z of importance sampling, which is 1 for any number of particles, less 1, in standard
errors from how much the runs differ; the largest over prompts. (The standard error that one run states is no measure:
of 64 draws with these weights it is too small where the large weights are missing, with one process as with many.)
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

PROMPTS = ["a", "b", "c", "d", "a b", "b c", "c d", "d a"]
VOCABULARY, TOKENS = ["<eos>", "a", "b", "c", "d"], 3


def program() -> Any:
    from bayeslm.models import LanguageModel, TiltedLM

    def reward(prompts: list[str], completions: list[str]) -> list[float]:
        return [float(text.count("a")) - 0.5 * float("b" in text) for text in completions]

    lm = LanguageModel.tabular(VOCABULARY, order=3, seed=0)
    return TiltedLM(lm, reward, beta=0.7, max_new_tokens=TOKENS)


def work(cases: list[tuple[int, int]], steps: int, num_draws: int, objective: str) -> None:
    """Run the cases in this process, one of several; the first one prints what it found.

    :param num_draws: of importance sampling, in runs of so many particles.
    :param objective: of SVI, by name.
    """
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from support.counting import counted_bytes, counted_bytes_of_steps

    from bayeslm.inference import SVI, Exact, ImportanceSampling
    from bayeslm.inference.training import Adam, Critic, LogVariance, Replay, ReverseKL

    objectives: dict[str, Callable[[int], Any]] = {
        "reverse": ReverseKL,
        "kept": lambda num: LogVariance(num, Replay(8 * num, every=2), truncated=True),
        "critic": lambda num: ReverseKL(num, Critic()),
    }
    found = []
    for particles, prompts in cases:
        model, asked = program(), PROMPTS[:prompts]
        exact = Exact().run(model, asked).log_evidence
        engine = SVI(
            num_steps=steps,
            objective=objectives[objective](particles),
            optimizer=Adam(0.05, schedule="constant"),
            num_samples=particles,
            num_prior_samples=0,
            seed=0,
            progress=False,
        )
        with counted_bytes_of_steps() as sent:
            engine.run(model, asked)
        gradients, rest = sent.pop("all_reduce", 0) / steps, sent.total() / steps
        with counted_bytes() as sent:
            ImportanceSampling(num_particles=particles, seed=0, progress=False).run(model, asked)
        runs = num_draws // particles
        draws = [ImportanceSampling(particles, seed=seed, progress=False).run(model, asked) for seed in range(runs)]
        ratios = np.stack([np.exp(each.log_weights - exact).mean((0, 1)) for each in draws])  # (run, prompt)
        errors = (ratios.mean(0) - 1.0) / (ratios.std(0, ddof=1) / runs**0.5)
        largest = float(np.abs(errors).max())
        found.append([particles, prompts, gradients, rest, sent.total(), largest])
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(found))


def launch(processes: int, cases: list[tuple[int, int]], options: list[str]) -> list[list[float]]:
    """Return what the first of several processes has found."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    variables = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(processes)}
    variables |= {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", __file__, "--work", json.dumps(cases), *options]
    running = [
        subprocess.Popen(command, env=variables | {"RANK": str(rank)}, stdout=subprocess.PIPE, text=True)
        for rank in range(processes)
    ]
    outputs = [each.communicate()[0] for each in running]
    if any(each.returncode for each in running):
        raise RuntimeError(f"{processes} processes: one has failed")
    found: list[list[float]] = json.loads(outputs[0].splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--draws", type=int, default=10_240, help="of importance sampling, for the law")
    parser.add_argument("--objective", default="reverse", choices=["reverse", "kept", "critic"], help="of SVI")
    parser.add_argument("--work", type=json.loads)
    arguments = parser.parse_args()
    if arguments.work is not None:
        work(arguments.work, arguments.steps, arguments.draws, arguments.objective)
        return
    options = ["--steps", str(arguments.steps), "--draws", str(arguments.draws), "--objective", arguments.objective]
    print("| processes | particles | prompts | gradients a step, B | all else a step, B | a draw, B | Z, errors |")
    print("|---|---|---|---|---|---|---|")
    for processes in arguments.processes:
        for case in launch(processes, [(64, 2), (64, 8), (256, 8)], options):
            particles, prompts, gradients, rest, sent, error = case
            each = f"{sent / (particles * prompts / processes):.0f}"
            figures = f"{processes} | {particles:.0f} | {prompts:.0f} | {gradients:.0f} | {rest:.0f} | {each}"
            print(f"| {figures} | {error:.1f} |", flush=True)


if __name__ == "__main__":
    main()
