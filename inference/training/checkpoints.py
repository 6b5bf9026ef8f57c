"""Checkpoints of a training: whole or not there, refused where they are another run's, no pickle.

    run/.lock                 held by the process that writes here
    run/chain-0-step-200/     where chain 0 stands, or ended
        checkpoint.json       format, version, the run's description, step, random numbers' states
        tensors.safetensors   parameters, Adam's moments, what the objective remembers, the history

Each is written into a hidden folder beside its place and renamed; only then is the one before it removed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from pathlib import Path
from types import CellType, CodeType, FunctionType, TracebackType
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

import bayeslm
from bayeslm.files import atomic_folder, differences, lock
from bayeslm.inference.program import Program, prompt_labels, to_numpy
from bayeslm.models import Autoregressive, LanguageModel, TiltedLM
from bayeslm.models.rewards import Reward

FORMAT = "bayeslm.checkpoint/1"


@dataclass
class Saved:
    """Where a chain stands: ``tensors`` by name, ``values`` that JSON can hold."""

    chain: int
    tensors: dict[str, Tensor]
    values: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run, in a folder of their own; use it in a ``with`` block.

    :param folder: made if it is not there.
    :param description: of the run, as `describe_run` gives it: one of another is refused.
    :raises BlockingIOError: on entering, if another process writes there.
    :raises ValueError: on `newest`, if the folder holds another run's, with what differs.
    """

    def __init__(self, folder: Path, description: dict[str, Any]) -> None:
        self.folder = folder.absolute()
        self._description = json.loads(json.dumps(description))
        self._held = contextlib.ExitStack()

    def __enter__(self) -> Checkpoints:
        with contextlib.suppress(OSError):  # a disk that refuses is told of when there is something to write
            self.folder.mkdir(parents=True, exist_ok=True)
        self._held.enter_context(lock(self.folder / ".lock", f"{self.folder} is written by another training"))
        for unfinished in self.folder.glob(".chain-*"):  # of a run that was killed while it wrote
            shutil.rmtree(unfinished, ignore_errors=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._held.close()

    def newest(self, chain: int) -> Saved | None:
        """Where a chain stands, or ended; None if it has not begun."""
        stands = sorted(self.folder.glob(f"chain-{chain}-step-*"), key=_step)
        for path in stands[:-1]:  # left by a kill
            shutil.rmtree(path, ignore_errors=True)
        return self._read(stands[-1]) if stands else None

    def write(self, saved: Saved) -> str | None:
        """Write a checkpoint, then remove the chain's ones before it.

        A disk that refuses is a warning and not the end of the training: the checkpoint before stays. Gives its path.
        """
        target = self.folder / f"chain-{saved.chain}-step-{saved.values['step']}"
        if target.exists():
            return str(target)
        before = list(self.folder.glob(f"chain-{saved.chain}-step-*"))
        header = {"format": FORMAT, "version": bayeslm.__version__, "run": self._description, "chain": saved.chain}
        try:
            with atomic_folder(target) as unfinished:
                save_file(
                    {key: x.detach().cpu().contiguous() for key, x in saved.tensors.items()},
                    unfinished / "tensors.safetensors",
                )
                (unfinished / "checkpoint.json").write_text(json.dumps(header | saved.values), encoding="utf-8")
        except (OSError, SafetensorError) as error:
            kept = f"{before[0]} is kept" if before else "there is none yet"
            warnings.warn(f"no checkpoint {target}: {error}; {kept}, and the training goes on", stacklevel=2)
            return str(before[0]) if before else None
        for path in before:
            shutil.rmtree(path, ignore_errors=True)
        return str(target)

    def _read(self, path: Path) -> Saved:
        try:
            values = json.loads((path / "checkpoint.json").read_text(encoding="utf-8"))
            tensors = load_file(path / "tensors.safetensors")
        except (OSError, ValueError, SafetensorError) as error:
            raise ValueError(f"{path} is no checkpoint that can be read ({error}): remove it to begin anew") from error
        there = {"format": values.pop("format", None), "version": values.pop("version", None)} | values.pop("run", {})
        here = {"format": FORMAT, "version": bayeslm.__version__} | self._description
        if found := differences(there, here):
            more = "num_steps" in here and there.get("num_steps") != here["num_steps"]
            raise ValueError(
                f"{path} is a checkpoint of another run: {'; '.join(found)}. "
                + ("(More steps are for schedule='constant', one chain, and no Tempering.) " if more else "")
                + "Run what it was made with, or choose another folder"
            )
        return Saved(values.pop("chain"), tensors, values)


def _step(path: Path) -> int:
    return int(path.name.rpartition("-")[2])


# -- what a run is -------------------------------------------------------------------------------------------


def describe_run(engine: Any, program: Program, objective: Any) -> dict[str, Any]:
    """An engine's settings, the objective it uses, a program's sites and what its factors say of arbitrary values, and
    the priors' weights."""
    settings = {field.name: getattr(engine, field.name) for field in dataclasses.fields(engine)}
    settings["objective"] = objective
    left_out = {*NOT_THE_RUN, *(() if engine.has_an_end else ("num_steps",))}
    described = {name: describe(value) for name, value in settings.items() if name not in left_out}
    for site in program.sites.values():
        described[f"site {site.name!r}"] = [site.kind, type(site.fn).__name__, list(site.shape)]
        if isinstance(site.fn, Autoregressive):
            ids, mask = site.fn.flat_prompts
            described[f"tokens of the prompts of {site.name!r}"] = (ids if mask is None else ids * mask).tolist()
            described[f"temperature of {site.name!r}"] = site.fn.temperature
        elif site.kind != "deterministic":
            terms = to_numpy(site.fn.log_prob(site.value))
            described[f"log p of {site.name!r} at the first look"] = [f"{x:.5g}" for x in terms.ravel()]
    described["prompts"] = prompt_labels(program)
    described["program"] = describe(program.model)
    arguments = json.dumps(describe([program.args, program.kwargs])).encode()
    described["digest of the program's arguments"] = blake2b(arguments, digest_size=16).hexdigest()
    for name, lm in {site.name: site.fn.lm for site in program.completions}.items():
        described[f"weights of the prior of {name!r}"] = digest(lm)
    return described


NOT_THE_RUN = (
    "num_samples",
    "num_prior_samples",
    "checkpoint",
    "checkpoint_every",
    "log",
    "on_step",
    "progress",
    "batch_size",
)


def describe(value: Any) -> Any:
    """A setting as JSON: objects by their type and their own plain settings."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [describe(x) for x in value]
    if isinstance(value, Mapping):
        return {str(key): describe(x) for key, x in value.items()}
    if isinstance(value, np.ndarray | Tensor):
        values = to_numpy(value) if isinstance(value, Tensor) else value
        held = repr(values.tolist()).encode() if values.dtype.hasobject else values.tobytes()  # objects' are addresses
        return {"shape": list(value.shape), "digest": blake2b(held, digest_size=16).hexdigest()}
    if isinstance(value, LanguageModel):
        return {"type": type(value).__qualname__, "weights": digest(value)}
    if isinstance(value, partial):
        return {"partial": describe(value.func), "args": describe(value.args), "keywords": describe(value.keywords)}
    if isinstance(value, FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or () if cell != CellType()]
        told = [x for x in (*cells, *(value.__defaults__ or ())) if isinstance(x, bool | int | float | str)]
        return {"function": value.__qualname__, "code": _code(value.__code__), "with": told}
    kind = getattr(value, "__qualname__", None)
    if isinstance(kind, str):  # a class, or a function of another language
        return kind
    inside = {key.lstrip("_"): x for key, x in getattr(value, "__dict__", {}).items()}
    plain = {k: x for k, x in inside.items() if _is_told(x) or k in ("source", "baseline")}
    return {"type": type(value).__qualname__} | {key: describe(x) for key, x in plain.items()}


def _code(code: CodeType) -> str:
    """A digest of what a function does, wherever in its file it stands."""
    inner = [_code(x) if isinstance(x, CodeType) else repr(x) for x in code.co_consts]
    return blake2b(repr((code.co_code, code.co_names, inner)).encode(), digest_size=8).hexdigest()


def _is_told(value: Any) -> bool:
    """Whether it is plain, or functions, rewards, ready programs; one or many."""
    if isinstance(value, Mapping):  # of numbers: what an object remembers rather than what it is
        return len(value) > 0 and not any(map(_is_plain, value.values())) and all(map(_is_told, value.values()))
    if isinstance(value, list | tuple):
        return all(map(_is_told, value))
    return isinstance(value, FunctionType | partial | Reward | TiltedLM) or _is_plain(value)


def _is_plain(value: Any) -> bool:
    """Whether it is numbers or text, one or many."""
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return isinstance(value, bool | int | float | str | np.ndarray | Tensor)


def digest(module: torch.nn.Module) -> str:
    """Of the names, shapes and values of all parameters and buffers."""
    found = blake2b(digest_size=16)
    for name, x in sorted(module.state_dict().items()):
        found.update(f"{name} {tuple(x.shape)} {x.dtype}".encode())
        found.update(x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()
