"""Count the files and calls of bayeslm between an engine's `run` and the network.

    python benchmarks/call_depth.py [--files]

`sys.setprofile` records each function of the project that is entered, on a tabular language model with one prompt,
for a Pyro program written out and for `TiltedLM` with a `Reward`:

- during one `ImportanceSampling.run` and one `SVI.run`,
- during one step of `SVI` in the middle of a training. A step begins and ends where the program evaluates its reward,
  so that the count does not depend on the names of the training loop.

The depth is the number of the project's frames on the stack below `run` and above the network's `forward`, at its
deepest; frames of PyTorch, Pyro and the standard library are not counted, nor are comprehensions.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pyro
import torch

import bayeslm.inference
import bayeslm.models
from bayeslm.inference import SVI, ImportanceSampling
from bayeslm.inference.training import Adam, ReverseKL
from bayeslm.models import LanguageModel, TiltedLM, rewards

ROOMS = {Path(room.__file__ or "").parent: room.__name__ for room in (bayeslm.inference, bayeslm.models, bayeslm)}
PROMPTS, TOKENS, PARTICLES = [[1, 2]], 4, 16


class Calls:
    """The project's functions that were entered, and the deepest stack between an engine's `run` and ``forward``."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        self.forward, self.on = forward.__code__, False
        self.entered: Counter[tuple[str, str]] = Counter()
        self.deepest: list[str] = []

    def switch(self) -> None:
        self.on = not self.on

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        if not self.on or event != "call" or (here := place(frame.f_code)) is None:
            return
        self.entered[here] += 1
        if frame.f_code is self.forward:
            stack, below = [], frame.f_back
            while below is not None and below.f_code not in ENGINES:
                stack += [": ".join(at)] if (at := place(below.f_code)) else []
                below = below.f_back
            self.deepest = max(self.deepest, stack[::-1], key=len)

    @property
    def files(self) -> list[str]:
        return sorted({file for file, _ in self.entered})


ENGINES = (ImportanceSampling.run.__code__, SVI.run.__code__)


@cache
def place(code: CodeType) -> tuple[str, str] | None:
    """The file and the name of a function of the project; None of another's, a comprehension or a module."""
    file = Path(code.co_filename)
    room = next((room for room in ROOMS if room in file.parents), None)
    if room is None or (code.co_name.startswith("<") and code.co_name != "<lambda>"):
        return None
    return f"{ROOMS[room]}/{file.relative_to(room)}".removeprefix("bayeslm."), code.co_qualname


def count() -> dict[tuple[str, str], Calls]:
    """Return the calls of each engine on each program."""
    lm = LanguageModel.tabular(["<eos>", *"abcdefg"], order=3, seed=0)
    importance = ImportanceSampling(num_particles=32, seed=0, progress=False)
    training = {"objective": ReverseKL(PARTICLES), "optimizer": Adam()}
    svi = SVI(num_steps=5, **training, num_samples=8, seed=0, progress=False)
    at_reward: list[Callable[[], None]] = []  # called each time that a batch of particles is rewarded

    def letters(completions: list[str], **columns: Any) -> list[float]:
        for call in at_reward if len(completions) == PARTICLES else []:  # of a step
            call()
        return [float(text.count("a")) for text in completions]

    def written_out(prompts: list[list[int]]) -> None:
        with pyro.plate("prompts", len(prompts)):
            x = pyro.sample("completion", lm(prompts, max_new_tokens=TOKENS))
            pyro.factor("reward", torch.tensor(letters(lm.decode(x).ravel().tolist())).reshape(x.shape[:-1]))

    found = {}
    tilted = TiltedLM(lm, rewards.Reward(letters), beta=1.0, max_new_tokens=TOKENS)
    for title, model in (("a program written out", written_out), ("TiltedLM with a Reward", tilted)):
        for engine in (importance, svi):
            engine.run(model, PROMPTS)  # imports inside functions are done after that
        for name, engine in (("ImportanceSampling.run", importance), ("SVI.run", svi), ("one step of SVI", svi)):
            calls = found[title, name] = Calls(type(lm.network).forward)
            if name == "one step of SVI":
                evaluations = iter(range(100))
                at_reward.append(lambda calls=calls, times=evaluations: next(times) in (1, 2) and calls.switch())
            else:
                calls.switch()
            sys.setprofile(calls)
            try:
                engine.run(model, PROMPTS)
            finally:
                sys.setprofile(None)
                at_reward.clear()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", action="store_true", help="list files, functions and the deepest stack")
    options = parser.parse_args()
    for (title, name), calls in count().items():
        print(f"{title}, {name}: {len(calls.files)} files, {len(calls.entered)} functions, ", end="")
        print(f"{len(calls.deepest)} calls deep")
        if options.files:
            for file in calls.files:
                functions = (f"{f} ({n})" for (where, f), n in sorted(calls.entered.items()) if where == file)
                print(f"    {file}: {', '.join(functions)}")
            print("  the deepest stack")
            print("\n".join(f"    {line}" for line in calls.deepest))


if __name__ == "__main__":
    main()
