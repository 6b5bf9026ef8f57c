"""The command `bayeslm demo`: a posterior over completions, by three engines."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from .console import one_line_errors, out_console


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
    with one_line_errors(), contextlib.ExitStack() as held:
        from bayeslm.inference import SVI, ImportanceSampling, RejectionSampling
        from bayeslm.inference.training import Adam
        from bayeslm.models import TiltedLM, rewards

        from . import resume
        from .comparison import compare
        from .inputs import language_model

        out = out or next(path for path in _numbered("demo") if not path.exists())
        results = held.enter_context(resume.Results(out))
        results.begin({"demo": seed}, {}, {})
        prompts = ["My dinner at the restaurant was", "The weather this weekend will be"]
        model = TiltedLM(language_model("smollm2", None), rewards.Sentiment(), beta=0.2)
        engines = {
            "importance": ImportanceSampling(num_particles=160, seed=seed),
            "rejection": RejectionSampling(num_samples=24, max_proposals=1000, seed=seed + 1),
            "svi": SVI(
                num_steps=16,
                num_particles=8,
                optimizer=Adam(5e-4),  # 16 steps of 8 draws are too few for a trust region to find its rate
                num_samples=128,
                num_prior_samples=64,
                seed=seed + 2,
            ),
        }
        out_console.print(
            "prior SmolLM2-135M-Instruct · reward VADER sentiment in [-1, 1] · beta 0.2 · 24 tokens\n"
            "posterior p(x | prompt) exp(reward / beta) / Z, by " + ", ".join(engines),
        )
        compare(lambda engine: model, prompts, {}, engines, results)


def _numbered(name: str) -> Iterator[Path]:
    """Yield name, name-2, name-3, ..."""
    yield Path(name)
    yield from (Path(f"{name}-{i}") for i in itertools.count(2))
