"""The command `bayeslm demo`: a posterior over completions, by three engines."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from .console import one_line_errors, out_console

PROMPTS = ["My dinner at the restaurant was", "The weather this weekend will be"]
ENGINES: dict[str, dict[str, Any]] = {
    "importance": {"num_particles": 160},
    "rejection": {"num_samples": 24, "max_proposals": 1000},
    "svi": {
        "num_steps": 16,
        "num_particles": 8,
        "optimizer": "Adam(5e-4)",  # 16 steps of 8 draws are too few for a trust region to find its rate
        "num_samples": 128,
        "num_prior_samples": 64,
    },
}


def demo(
    out: Annotated[
        Path | None, typer.Option(help="A new folder for the results. Default: demo, or demo-2, demo-3, ...")
    ] = None,
    seed: Annotated[int, typer.Option(help="Makes the run reproducible.")] = 0,
) -> None:
    """Infer SmolLM2-135M's posterior under a sentiment reward, by three engines that agree.

    The engines are importance sampling, rejection sampling (exact draws) and SVI, which trains a LoRA policy. Compare
    their log Z and rewards. Takes some minutes on two cores.
    """
    with one_line_errors():
        from .execution import execute
        from .settings import RunSettings

        out = out or next(path for path in _numbered("demo") if not path.exists())
        engines = {name: {"seed": seed + i} | own for i, (name, own) in enumerate(ENGINES.items())}
        out_console.print(
            "prior SmolLM2-135M-Instruct · reward VADER sentiment in [-1, 1] · beta 0.2 · 24 tokens\n"
            "posterior p(x | prompt) exp(reward / beta) / Z, by " + ", ".join(engines),
        )
        settings = RunSettings(PROMPTS, reward="sentiment", beta=0.2, engines=engines, out=str(out))
        execute(settings, lambda name, option: name)


def _numbered(name: str) -> Iterator[Path]:
    """Yield name, name-2, name-3, ..."""
    yield Path(name)
    yield from (Path(f"{name}-{i}") for i in itertools.count(2))
