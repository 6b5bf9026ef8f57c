"""Where the time of engines on SmolLM2-135M goes: the networks, or the machinery around them.

    python benchmarks/overhead.py

Networks: forward passes, heads, the draw from the logits, the backward pass and Adam. Reward: VADER. Resampling: the
choice of ancestors, and caches that follow. Machinery: all the rest (Pyro's traces, plates and parameter store,
prompts to ids and ids to texts, weights, results).
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch

from bayeslm.inference import MCMC, SMC, SVI, AnnealedSMC, ImportanceSampling, smc
from bayeslm.inference.sequential import Population
from bayeslm.inference.training import Adam
from bayeslm.models import LanguageModel, TiltedLM, rewards
from bayeslm.models.lm import CausalNetwork, decoding

PROMPTS = ["My dinner at the restaurant was", "The weather this weekend will be"]


class Stopwatches:
    """Seconds inside wrapped functions, the innermost alone counting."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._inside = False

    def wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._inside:
                return function(*args, **kwargs)
            self._inside, start = True, time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self._inside = False
                self.seconds[name] += time.perf_counter() - start

        return timed


def profile(run: Callable[[], Any]) -> dict[str, float]:
    watches = Stopwatches()
    parts = [
        (CausalNetwork, "hidden", "networks"),
        (CausalNetwork, "logits", "networks"),
        (CausalNetwork, "token_log_prob", "networks"),
        (decoding, "categorical", "networks"),
        (smc, "categorical", "networks"),
        (torch.Tensor, "backward", "networks"),
        (torch.optim.Adam, "step", "networks"),
        (rewards.Sentiment, "score", "reward"),
        (Population, "resample", "resampling"),
        (decoding.Decoder, "select", "resampling"),
    ]
    patches = [mock.patch.object(o, name, watches.wrap(kind, getattr(o, name))) for o, name, kind in parts]
    for patch in patches:
        patch.start()
    start = time.perf_counter()
    try:
        run()
    finally:
        total = time.perf_counter() - start
        for patch in patches:
            patch.stop()
    return {**watches.seconds, "machinery": total - sum(watches.seconds.values()), "total": total}


def main() -> None:
    model = TiltedLM(LanguageModel.from_pretrained("smollm2"), rewards.Sentiment(), beta=0.2)
    ImportanceSampling(num_particles=2, progress=False).run(model, PROMPTS)  # warm up
    engines = {
        "ImportanceSampling, 64 particles": ImportanceSampling(num_particles=64, seed=0, progress=False),
        "SMC, 64 particles, partial": SMC(64, 1, twist="partial", seed=0, progress=False),
        "the same, resampled at every token": SMC(64, 1, twist="partial", ess_threshold=1.0, seed=0, progress=False),
        "the same, 16 candidates a token": SMC(
            64, 1, twist="partial", proposal="twist", top_k=16, seed=0, progress=False
        ),
        "AnnealedSMC, 64 particles, 4 temperatures": AnnealedSMC(
            64, 1, ladder=(0.1, 0.3, 0.6, 1.0), seed=0, progress=False
        ),
        "MCMC, 16 chains, 8 sweeps": MCMC(
            num_samples=6, warmup=2, num_chains=16, initial_particles=16, seed=0, progress=False
        ),
        "SVI, 6 steps of 8 completions, LoRA": SVI(
            num_steps=6, num_particles=8, optimizer=Adam(), num_samples=8, seed=0, progress=False
        ),
    }
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, 2 prompts, 24 tokens\n")
    kinds = ("networks", "reward", "resampling", "machinery")
    print("| engine | seconds | " + " | ".join(kinds) + " |")
    print("|---|---" + "|---" * len(kinds) + "|")
    for name, engine in engines.items():
        spent = profile(lambda engine=engine: engine.run(model, PROMPTS))
        shares = " | ".join(f"{spent.get(kind, 0.0) / spent['total']:.1%}" for kind in kinds)
        print(f"| {name} | {spent['total']:.1f} | {shares} |", flush=True)


if __name__ == "__main__":
    main()
