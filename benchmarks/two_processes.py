"""Two processes of one thread each against one process of two threads: the same runs of SmolLM2-135M, on two cores.

    OMP_WAIT_POLICY=passive python benchmarks/two_processes.py importance [--prompts 1] [--pairs 5]
    OMP_WAIT_POLICY=passive python benchmarks/two_processes.py svi [--prompts 1] [--pairs 5] [--steps 4]

Completions of 24 tokens, VADER's sentiment as the reward, beta 0.2, float32. `importance` is `ImportanceSampling` with
64 draws of each prompt. `svi` is `SVI()` of so many steps with nothing else set but 16 draws of the policy at the end,
which takes 16 completions of each prompt a step and trains adapters of rank 16.

Both sides run the same program, started once: two processes by `torchrun`, and one by `python`. After a run of each
that is not timed they take turns, in alternating order, with the same seed in a pair; the side that waits asks for a
file every 5 ms. The seconds of a run are those of the engine's call, the longer ones of two processes: what is left out
are imports and the loading of the network, which two processes do at the same time. A ratio is that of a pair: the
median, and the range. The last line compares what was found: log Z, or the ELBO of all steps.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

PROMPTS = ["My dinner at the restaurant was", "The new phone is", "My first day at school was", "This film"]
TOKENS, BETA = 24, 0.2
DRAWS = 64  # of each prompt, of importance sampling
SIDES = {"one process of 2 threads": (1, 2), "two processes of 1 thread": (2, 1)}  # processes, and threads of each
PATIENCE = 280.0  # seconds for a run


def work(options: argparse.Namespace) -> None:
    """Do the runs that are asked for in a folder, one after another, in this process and its like."""
    import torch

    from bayeslm.inference import SVI, ImportanceSampling
    from bayeslm.models import LanguageModel, TiltedLM, rewards

    model = TiltedLM(LanguageModel.from_pretrained("smollm2"), rewards.Sentiment(), BETA, max_new_tokens=TOKENS)
    prompts, rank = PROMPTS[: options.prompts], os.environ.get("RANK", "0")
    for number in range(1 + options.pairs):
        asked = options.work / f"{number}"
        while not asked.exists():
            time.sleep(0.005)
        if options.engine == "importance":
            engine: Any = ImportanceSampling(DRAWS, seed=number, progress=False)
        else:
            engine = SVI(options.steps, num_samples=16, num_prior_samples=0, seed=number, progress=False)
        start = time.perf_counter()
        posterior = engine.run(model, prompts)
        seconds = time.perf_counter() - start
        found = posterior.log_evidence if options.engine == "importance" else posterior.stats["elbo"]
        answer = {"seconds": seconds, "found": float(np.mean(found)), "threads": torch.get_num_threads()}
        answer |= {"processes": posterior.stats.get("processes", 1), "version": torch.__version__}
        done = options.work / f"{number} of {rank}"
        done.with_suffix(".part").write_text(json.dumps(answer))
        done.with_suffix(".part").rename(done)


class Side:
    """The processes of one side, which wait for runs to do."""

    def __init__(self, processes: int, threads: int, arguments: list[str], folder: Path) -> None:
        self.processes, self.threads, self.folder = processes, threads, folder
        folder.mkdir()
        launcher = [sys.executable]
        if processes > 1:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = str(free.getsockname()[1])
            launcher += ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
            launcher += ["--master-addr", "127.0.0.1", "--master-port", port]
        variables = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONWARNINGS": "ignore"}
        self._process = subprocess.Popen([*launcher, __file__, *arguments, "--work", str(folder)], env=variables)

    def run(self, number: int) -> tuple[float, float]:
        """Return the seconds of a run, and what it found."""
        (self.folder / f"{number}").touch()
        answers = [self.folder / f"{number} of {rank}" for rank in range(self.processes)]
        ends = time.monotonic() + PATIENCE
        while not all(path.exists() for path in answers):
            if self._process.poll() is not None or time.monotonic() > ends:
                raise RuntimeError(f"{self.processes} processes: one has failed, or has not answered in {PATIENCE} s")
            time.sleep(0.005)
        found = [json.loads(path.read_text()) for path in answers]
        assert all(x["threads"] == self.threads and x["processes"] == self.processes for x in found), found
        seconds = max(x["seconds"] for x in found)
        print(f"run {number}, {self.processes} processes of {self.threads} threads: {seconds:.2f} s", file=sys.stderr)
        return seconds, found[0]["found"]

    def end(self) -> None:
        """Wait for the end of the processes, which comes after their last run; stop them if that was not done."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(20)
        self._process.terminate()
        self._process.wait()


@contextlib.contextmanager
def started(arguments: list[str]) -> Iterator[dict[str, Side]]:
    sides: dict[str, Side] = {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            for name, (processes, threads) in SIDES.items():
                sides[name] = Side(processes, threads, arguments, Path(folder) / str(processes))
            yield sides
        finally:
            for side in sides.values():
                side.end()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=["importance", "svi"])
    parser.add_argument("--prompts", type=int, default=1, choices=range(1, len(PROMPTS) + 1))
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work is not None:
        work(options)
        return
    with started(sys.argv[1:]) as sides:
        for side in sides.values():  # to warm up, one after the other
            side.run(0)
        results = np.zeros((options.pairs, 2, 2))  # (pair, side, seconds or what was found)
        for pair in range(options.pairs):
            for i in (0, 1) if pair % 2 == 0 else (1, 0):
                results[pair, i] = list(sides.values())[i].run(1 + pair)
    seconds = results[..., 0]
    print(f"| {options.engine}, prompts: {options.prompts} | seconds, the median (range) |\n|---|---|")
    for name, each in zip(sides, seconds.T, strict=True):
        print(f"| {name} | {_with_range(each)} |")
    print(f"| the first over the second, paired | {_with_range(seconds[:, 0] / seconds[:, 1])} |")
    means, errors = results[..., 1].mean(0), results[..., 1].std(0, ddof=1) / options.pairs**0.5
    each = " and ".join(f"{mean:.3f} ± {error:.3f}" for mean, error in zip(means, errors, strict=True))
    print(f"\n{'log Z' if options.engine == 'importance' else 'ELBO'}: {each}, means over {options.pairs} seeds")


def _with_range(values: np.ndarray) -> str:
    return f"{np.median(values):.2f} ({values.min():.2f} to {values.max():.2f})"


if __name__ == "__main__":
    main()
