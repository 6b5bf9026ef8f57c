"""What several processes must agree on before they divide a run: the engine, its settings, the program, the models."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Mapping
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bayeslm.models.lm import is_sharded, refuse_sharded
from bayeslm.posterior import Posterior

from .description import describe
from .messages import digest_of
from .particles import to_numpy
from .program import Program
from .ranks import Ranks

DEEPEST = 4  # settings of settings
PER_RANK = ("seed", "progress", "checkpoint", "callbacks")  # compared before, or rank 0's alone


def check_together(together: Ranks, program: Program, engine: Any, *but: str, **divided: int) -> None:
    """Check, at the start of a run, that all processes do the same, and that there is something for each of them.

    :param together: the processes.
    :param engine: a dataclass of settings.
    :param but: settings that may differ, as the first process's will be those of all.
    :param divided: the numbers of what is divided, by their names in the engine's settings.
    :raises RankError: on every process, if they differ; with what differs.
    :raises ValueError: on every process, if there are more of them than something has members.
    """
    together.check_same("the run", _described(program, engine, but))
    for name, number in divided.items():
        if number < together.size:
            raise ValueError(
                f"{type(engine).__name__}: {name} is {number} in all, to divide among {together.size} processes: "
                f"launch at most {number}, or raise {name}"
            )


def _described(program: Program, engine: Any, but: Collection[str]) -> dict[str, str]:
    """Return the run as texts by name."""
    names = [x.name for x in dataclasses.fields(engine) if x.name not in (*PER_RANK, *but)]
    settings = {name: getattr(engine, name) for name in names}
    found = {"engine": type(engine).__name__} | {f"the setting {name}": _text(x) for name, x in settings.items()}
    found["program"] = json.dumps(describe(program), sort_keys=True, default=str)
    for site in program.sites.values():
        found[f"site {site.name!r}"] = f"{site.kind}, {type(site.fn).__name__}, {list(site.shape)}"
        if site.is_completion:
            ids, mask = site.fn.flat_prompts
            found[f"prompts of {site.name!r}"] = _text((ids if mask is None else ids * mask).cpu().tolist())
            found[f"temperature of {site.name!r}"] = _text(site.fn.temperature)
            found[f"weights of {site.name!r}"] = _weights(site.fn.lm.network)
        elif site.kind != "deterministic":
            terms = to_numpy(site.fn.log_prob(site.value)).ravel()
            found[f"log p of {site.name!r} at arbitrary latents"] = ", ".join(f"{x:.5g}" for x in terms)
    return found


def _weights(network: torch.nn.Module) -> str:
    """Return a digest of a network's weights that each process has; of those in parts it is of their shapes."""
    refuse_sharded(network.named_parameters())
    state = network.state_dict()
    shapes = {name: (list(x.shape), str(x.dtype)) for name, x in state.items() if is_sharded(x)}
    digest = digest_of({name: x for name, x in state.items() if name not in shapes})
    return f"{digest} and parts of {shapes}" if shapes else digest


def _text(value: Any, deep: int = 0) -> str:
    """Return a setting as a text that is the same in every process; of what is nested deep its type alone."""
    if value is None or isinstance(value, bool | int | float | str):
        return repr(value)
    if isinstance(value, torch.nn.Module):
        return f"{type(value).__name__} with weights {_weights(value)}"
    if isinstance(value, Tensor):
        return f"a tensor {digest_of({'': value})}"
    if isinstance(value, np.ndarray):
        return f"an array {list(value.shape)} {blake2b(value.tobytes(), digest_size=8).hexdigest()}"
    if isinstance(value, Posterior):
        return f"draws of {value.engine} {_text(value.log_joint)}"
    if isinstance(value, Mapping) and deep <= DEEPEST:
        return f"{{{', '.join(f'{key}: {_text(x, deep + 1)}' for key, x in value.items())}}}"
    if isinstance(value, list | tuple) and deep <= DEEPEST:
        return f"[{', '.join(_text(x, deep + 1) for x in value)}]"
    if isinstance(value, type) or deep > DEEPEST or not hasattr(value, "__dict__"):
        return getattr(value, "__qualname__", type(value).__qualname__)
    named = getattr(value, "__qualname__", type(value).__qualname__)
    return f"{named}({', '.join(f'{key}={_text(x, deep + 1)}' for key, x in vars(value).items() if key[0] != '_')})"
