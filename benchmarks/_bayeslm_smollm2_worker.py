"""bayeslm's side of `svi_smollm2.py`: one training a line of JSON, as in `_trl_smollm2_worker.py`."""

from __future__ import annotations

import functools
import time
from typing import Any

import torch
from _memory import peak, resident
from _peer import serve

from bayeslm.inference import SVI
from bayeslm.inference.training import Adam, AutoPolicy, Budget, LogVariance, ReverseKL, StepRecord
from bayeslm.models import LanguageModel, TiltedLM, rewards

OBJECTIVES = {"reverse-kl": ReverseKL, "log-variance": LogVariance}


def train(
    model: str,
    prompt: str,
    tokens: int,
    beta: float,
    method: str,
    steps: int,
    group: int,
    learning_rate: float,
    rank: int,
    adapter: str,
    seed: int,
    threads: int,
) -> dict[str, object]:
    torch.set_num_threads(threads)
    prior = LanguageModel.from_pretrained(model, dtype=torch.float32)
    loaded = resident(prior)
    ends: list[float] = []
    peaks: list[float] = []

    def watch(record: StepRecord) -> None:
        ends.append(time.perf_counter())
        peaks.append(peak())

    settings: dict[str, Any] = {"num_steps": Budget(samples=steps * group)}  # nothing else is set
    if method == "last-half":
        settings["guide"] = functools.partial(AutoPolicy, lora_layers=0.5)
    elif method != "default":
        settings = {
            "num_steps": steps,
            "optimizer": Adam(learning_rate),
            "objective": OBJECTIVES[method](group),
            "guide": functools.partial(AutoPolicy, lora_rank=rank),
        }
    engine = SVI(**settings, callbacks=[watch], num_samples=1, seed=seed, progress=False)
    program = TiltedLM(prior, rewards.Sentiment(), beta, max_new_tokens=tokens)
    engine.run(program, [prompt]).policy.save_pretrained(adapter)
    return {"ends": ends, "loaded": loaded, "peak": peaks[-1]}


if __name__ == "__main__":
    serve(train)
