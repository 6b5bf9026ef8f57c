"""Engines, objectives, twists and settings from the options of the command line."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
from pathlib import Path
from typing import Any

from .console import err_console

OPTIONS = {"num_samples": "samples", "num_steps": "steps", "warmup": "steps", "num_chains": "chains", "seed": "seed"}
OPTIONS |= {"target_ess": "target-ess", "max_seconds": "seconds"}


def make_engine(name: str, *, seed: int, twist: Any, **sizes: Any) -> Any:
    """Make an engine by name.

    :param twist: of the engine, or None.
    :param sizes: the options by name; each sets the field of the same meaning, and None leaves the default.
    :raises ValueError: if there is no such engine, or a setting is invalid.
    """
    from bayeslm.inference import ENGINES
    from bayeslm.inference.training import Adam, AutoPolicy, KLTarget, NearPosterior, TensorBoard

    if name not in ENGINES:
        near = difflib.get_close_matches(name, ENGINES, n=1, cutoff=0.4)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(f"--engine {name} is unknown{hint}: choose one of {', '.join(ENGINES)}")
    fields = {field.name for field in dataclasses.fields(ENGINES[name])}
    particles = {"rejection": "max_proposals", "bestofn": "n", "mcmc": "initial_particles"}.get(name, "num_particles")
    meant: dict[str, Any] = {
        particles: sizes["particles"],
        "num_samples": sizes["samples"],
        "num_steps": sizes["steps"],
        "warmup": sizes["steps"],
        "num_chains": sizes["chains"],
        "target_ess": sizes["target_ess"],
        "max_seconds": sizes["seconds"],
        "twist": twist,
        "top_k": sizes["top_k"],
        "proposal": "twist" if name == "smc" and twist is not None and sizes["top_k"] is not None else None,
        "seed": seed,
    }
    if name == "svi":
        meant |= {
            "objective": make_objective(sizes["objective"], sizes["particles"]),
            "checkpoint": _checkpointing(sizes["checkpoint"], sizes["checkpoint_minutes"]),
            "optimizer": None if sizes["learning_rate"] is None else Adam(sizes["learning_rate"]),
        }
        callbacks = {"kl_target": KLTarget, "stop_kl": NearPosterior, "tensorboard": TensorBoard}
        meant["callbacks"] = [make(sizes[option]) for option, make in callbacks.items() if sizes[option] is not None]
        if (rank := sizes["lora_rank"]) is not None:
            meant["guide"] = functools.partial(AutoPolicy, lora_rank=rank or None)  # None trains every weight
    used = {field: value for field, value in meant.items() if field in fields and value is not None}
    try:
        return ENGINES[name](**used)
    except (TypeError, ValueError) as error:
        options = {particles: "particles", **OPTIONS}
        option = next((option for field, option in options.items() if f": {field} must be" in str(error)), None)
        raise ValueError(f"--{option}: {error}" if option else str(error)) from None


def _checkpointing(folder: Path | None, minutes: float | None) -> Any:
    from bayeslm.inference.training import Checkpointing

    if minutes is None:
        return folder
    if folder is None:
        raise ValueError("--checkpoint-minutes needs the folder --checkpoint")
    return Checkpointing(folder, minutes=minutes)


def make_objective(name: str | None, particles: int | None) -> Any:
    """Make an objective of SVI by name; None, the default of the engine, for None."""
    from bayeslm.inference.training import FDivergence, ForwardKL, LogVariance, Renyi, Replay, ReverseKL

    makers: dict[str, Any] = {
        "elbo": ReverseKL,
        "log-variance": LogVariance,
        "log-variance-replay": lambda n: LogVariance(n, Replay()),
        "forward-kl": ForwardKL,
        "jensen-shannon": lambda n: FDivergence("jensen-shannon", n),
        "total-variation": lambda n: FDivergence("total-variation", n),
        "iwelbo": lambda n: Renyi(0.0, n),
    }
    if name is None:
        return None
    if name not in makers:
        raise ValueError(f"--objective {name} is unknown: choose one of {', '.join(makers)}")
    return makers[name](particles or 8)


def make_twist(
    name: str, lm: Any, model: Any, prompts: list[str], columns: dict[str, list[Any]], seed: int, out: Path | None
) -> Any:
    """Train a twist and save it, or load one from a folder."""
    from bayeslm.inference.sequential import TwistLearning
    from bayeslm.models import Twist

    if name not in ("learned", "learned-partial"):
        if not Path(name).is_dir():
            raise ValueError(
                f"--twist {name} is unknown: give partial, prefix, learned, learned-partial or the folder of a twist"
            )
        return Twist.from_pretrained(name, lm)
    if out is not None and (out / "twist").is_dir():
        err_console.print(f"twist: already in {out / 'twist'}")
        return Twist.from_pretrained(out / "twist", lm)
    twist = TwistLearning(reads_reward=name == "learned-partial", seed=seed).run(model, prompts, **columns)
    if out is not None:
        try:
            twist.save_pretrained(out / "twist")
            err_console.print(f"twist: saved in {out / 'twist'}, for --twist")
        except OSError as error:
            err_console.print(f"{error}; the run goes on with the twist", style="yellow")
    return twist


def read_settings(text: str) -> dict[str, Any]:
    """Return the settings of a reward from JSON.

    :raises ValueError: if the text is not a JSON object.
    """
    try:
        settings = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"--reward-settings is not JSON: {error}") from None
    if not isinstance(settings, dict):
        raise ValueError(f'--reward-settings must be a JSON object, such as {{"target": 20}}, not {text}')
    return settings
