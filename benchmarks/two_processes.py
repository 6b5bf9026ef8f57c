"""Two processes of one thread each against one process of two threads: the same runs of SmolLM2-135M, on two cores.

    OMP_WAIT_POLICY=passive python benchmarks/two_processes.py importance [--prompts 1] [--pairs 6]
    OMP_WAIT_POLICY=passive python benchmarks/two_processes.py svi [--prompts 1] [--pairs 6]

Completions of 24 tokens, VADER's sentiment as the reward, beta 0.2, float32. `importance` is runs of importance
sampling with 64 draws of each prompt. `svi` is steps of `SVI()` with nothing set, which takes 16 completions of each
prompt a step and trains adapters of rank 16; it is stopped after the steps that are measured.

Both sides run the same program, started once: two processes by `torchrun`, and one by `python`. After a run or step of
each that is not timed they take turns, in alternating order; the side that waits asks for a file every 5 ms. Seconds
are those of the first process, which ends a run or a step with the other. What is left out are imports and the loading
of the network, which two processes do at the same time. A ratio is that of a pair: the median, and the range. The last
line compares what was found: log Z, or the ELBO.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

PROMPTS = ["My dinner at the restaurant was", "The new phone is", "My first day at school was", "This film"]
TOKENS, BETA = 24, 0.2
DRAWS = 64  # of each prompt, of importance sampling
SIDES = {"one process of 2 threads": (1, 2), "two processes of 1 thread": (2, 1)}  # processes, and threads of each
PATIENCE = 280.0  # seconds for a run or a step


class Turns:
    """The runs or steps that a process does, each when it is asked for by a file in a folder; it answers by another."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._start, self._number = folder, 0.0, -1

    def next(self) -> int:
        """Wait until the next run is asked for, and return its number."""
        self._number += 1
        while not (self._folder / f"{self._number}").exists():
            time.sleep(0.005)
        self._start = time.perf_counter()
        return self._number

    def done(self, found: float, processes: int) -> None:
        """Say that the run is done, and what it found."""
        import torch

        answer = {"seconds": time.perf_counter() - self._start, "found": found, "processes": processes}
        answer |= {"threads": torch.get_num_threads()}
        path = self._folder / f"{self._number} done"
        path.with_suffix(".part").write_text(json.dumps(answer))
        path.with_suffix(".part").rename(path)


def work(engine: str, prompts: list[str], folder: Path) -> None:
    """Do what is asked for in a folder, in this process and its like, until they are stopped."""
    from bayeslm.inference import SVI, ImportanceSampling
    from bayeslm.inference.training import StepRecord
    from bayeslm.models import LanguageModel, TiltedLM, rewards

    model = TiltedLM(LanguageModel.from_pretrained("smollm2"), rewards.Sentiment(), BETA, max_new_tokens=TOKENS)
    rank, turns = os.environ.get("RANK", "0"), Turns(folder)
    processes = int(os.environ.get("WORLD_SIZE", "1"))

    def turn(record: StepRecord) -> None:  # of the first process; the other waits for it
        if record.step > 0:
            turns.done(record.figures["elbo"], processes)
        turns.next()

    if engine == "svi":
        SVI(callbacks=[turn], seed=0, progress=False).run(model, prompts)
    for number in itertools.count():
        if rank == "0":
            turns.next()
        posterior = ImportanceSampling(DRAWS, seed=number, progress=False).run(model, prompts)
        if rank == "0":
            turns.done(float(posterior.log_evidence.mean()), posterior.stats.get("processes", 1))


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
        command = [*launcher, __file__, *arguments, "--work", str(folder)]
        with (folder / "errors").open("w") as errors:
            self._process = subprocess.Popen(command, env=variables, stderr=errors)

    def run(self, number: int) -> tuple[float, float]:
        """Return the seconds of a run, and what it found."""
        (self.folder / f"{number}").touch()
        answer, ends = self.folder / f"{number} done", time.monotonic() + PATIENCE
        while not answer.exists():
            if self._process.poll() is not None or time.monotonic() > ends:
                errors = (self.folder / "errors").read_text()[-3000:]
                raise RuntimeError(
                    f"{self.processes} processes: no answer in {PATIENCE} s, or one has failed: {errors}"
                )
            time.sleep(0.005)
        found = json.loads(answer.read_text())
        if (found["processes"], found["threads"]) != (self.processes, self.threads):
            raise RuntimeError(f"wanted are {self.processes} processes of {self.threads} threads, got {found}")
        print(f"<!-- {self.processes} of {self.threads} threads: {found['seconds']:.2f} s -->", flush=True)
        return found["seconds"], found["found"]

    def end(self) -> None:
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
    parser.add_argument("--pairs", type=int, default=6)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work is not None:
        work(options.engine, PROMPTS[: options.prompts], options.work)
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
    print(f"\n{'log Z' if options.engine == 'importance' else 'ELBO'}: {each}, means over the pairs")


def _with_range(values: np.ndarray) -> str:
    return f"{np.median(values):.2f} ({values.min():.2f} to {values.max():.2f})"


if __name__ == "__main__":
    main()
