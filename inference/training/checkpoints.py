"""Checkpoints of a training: atomic folders, refused where they are another run's, no pickle.

    run/.lock                 held by the process that writes here
    run/chain-0-step-200/     the state of chain 0 after 200 steps, or at its end
        checkpoint.json       format, version, the run's description, step, random numbers' states
        tensors.safetensors   parameters, Adam's moments, the state of objective and callbacks, the history

Each is written into a hidden folder next to its final name and renamed; only then is the one before it removed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

import bayeslm
from bayeslm.files import atomic_folder, differences, sweep
from bayeslm.inference.program import Program, check_counts, prompt_labels, to_numpy

from .callbacks import Callback
from .identity import has_unreadable, identify

FORMAT = "bayeslm.checkpoint/2"


@dataclass(frozen=True)
class Checkpointing:
    """Where and how often a training writes checkpoints. Each is a policy's parameters three times over.

    :param folder: made if there is none. The same call resumes what it holds.
    :param every: steps from one checkpoint to the next.
    :param version: a name for the version of your own code. A run is resumed by the same code alone; where the source
        of a function cannot be read (in an interactive session, say), this says that it is the same.
    :raises ValueError: if ``every`` is below 1.
    """

    folder: str | PathLike[str]
    every: int = 50
    version: str | None = None

    def __post_init__(self) -> None:
        check_counts(self, "every")


@dataclass
class Saved:
    """The state of a chain: ``tensors`` by name, ``values`` that JSON can hold."""

    chain: int
    tensors: dict[str, Tensor]
    values: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run, in a folder of their own; use it in a ``with`` block.

    :param settings: where and how often.
    :param description: of the run, as `describe_run` returns it: a checkpoint of another run is refused.
    :raises BlockingIOError: on entering, if another process writes there.
    :raises ValueError: on `newest`, if the folder holds another run's, with what differs.
    """

    def __init__(self, settings: Checkpointing, description: dict[str, Any]) -> None:
        self.folder = Path(settings.folder).absolute()
        self.every = settings.every
        self._settings = settings
        self._description = json.loads(json.dumps(description | {"code version": settings.version}))
        self._lock = FileLock(self.folder / ".lock")

    def __enter__(self) -> Checkpoints:
        with contextlib.suppress(OSError):  # a disk that refuses is reported when there is something to write
            self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise BlockingIOError(f"{self.folder} is written by another training: end that first") from None
        except OSError:  # what cannot be written needs no lock
            pass
        sweep(self.folder)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._lock.release()

    def newest(self, chain: int) -> Saved | None:
        """Return the state of a chain after its last checkpoint; None if it has none."""
        stands = sorted(self.folder.glob(f"chain-{chain}-step-*"), key=_step)
        for path in stands[:-1]:  # left by a kill
            shutil.rmtree(path, ignore_errors=True)
        return self._read(stands[-1]) if stands else None

    def write(self, saved: Saved) -> str | None:
        """Write a checkpoint, then remove the chain's ones before it.

        A disk that refuses is a warning and not the end of the training: the checkpoint before stays.

        :returns: the path of the last checkpoint.
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
            warnings.warn(f"no checkpoint: {error}; {kept}, and the training continues", stacklevel=2)
            return str(before[0]) if before else None
        for path in before:
            shutil.rmtree(path, ignore_errors=True)
        return str(target)

    def _read(self, path: Path) -> Saved:
        try:
            values = json.loads((path / "checkpoint.json").read_text(encoding="utf-8"))
            tensors = load_file(path / "tensors.safetensors")
        except (OSError, ValueError, SafetensorError) as error:
            raise ValueError(f"{path} is no checkpoint that can be read ({error}): remove it to start again") from error
        there = {"format": values.pop("format", None), "version": values.pop("version", None)} | values.pop("run", {})
        here = {"format": FORMAT, "version": bayeslm.__version__} | self._description
        if has_unreadable(here) and self._settings.version is None:
            raise ValueError(
                f"{path} may be a checkpoint of other code: the source of a function of this run cannot be read. If it "
                'is the same, say so by Checkpointing(folder, version="...")'
            )
        if there.get("code version") is None:
            here["code version"] = None  # it was begun without; the user says that it is the same
        if found := differences(there, here):
            more = "num_steps" in here and there.get("num_steps") != here["num_steps"]
            raise ValueError(
                f"{path} is a checkpoint of another run: {'; '.join(found)}. "
                + ("(More steps need schedule='constant', one chain, and no Tempering.) " if more else "")
                + "Run the call that it was made with, or choose another folder"
            )
        return Saved(values.pop("chain"), tensors, values)


def _step(path: Path) -> int:
    return int(path.name.rpartition("-")[2])


# -- the identity of a run -----------------------------------------------------------------------------------


def describe_run(engine: Any, program: Program, objective: Any) -> dict[str, Any]:
    """Return the identity of a run.

    It has the engine's settings, the objective, the program with its arguments and sites, the values of its factors at
    arbitrary latents, and the priors' weights.

    :param engine: a dataclass; those of its settings on which no step depends are left out.
    """
    settings = {field.name: getattr(engine, field.name) for field in dataclasses.fields(engine)}
    callbacks = [x for x in engine.callbacks if isinstance(x, Callback) and x.identity() is not None]
    priors = {site.name: site.fn.lm for site in program.completions}
    left_out = {*NOT_THE_RUN, *(["num_steps"] if not needs_num_steps(engine, callbacks) else [])}
    described = {
        name: identify(value, weights=name != "guide" or engine.makes_guides, known=priors.values())
        for name, value in (settings | {"objective": objective, "callbacks": callbacks}).items()
        if name not in left_out
    }
    for site in program.sites.values():
        described[f"site {site.name!r}"] = [site.kind, type(site.fn).__name__, list(site.shape)]
        if site.is_completion:
            ids, mask = site.fn.flat_prompts
            described[f"tokens of the prompts of {site.name!r}"] = (ids if mask is None else ids * mask).tolist()
            described[f"temperature of {site.name!r}"] = site.fn.temperature
        elif site.kind != "deterministic":
            terms = to_numpy(site.fn.log_prob(site.value))
            described[f"log p of {site.name!r} at arbitrary latents"] = [f"{x:.5g}" for x in terms.ravel()]
    described["prompts"] = prompt_labels(program)
    described["program"] = identify(program.model, known=priors.values())
    arguments = json.dumps(identify([program.args, program.kwargs]), sort_keys=True).encode()
    described["digest of the program's arguments"] = blake2b(arguments, digest_size=16).hexdigest()
    for name, lm in priors.items():
        described[f"weights of the prior of {name!r}"] = identify(lm)["weights"]
    return described


NOT_THE_RUN = ("num_samples", "num_prior_samples", "checkpoint", "progress")


def needs_num_steps(engine: Any, callbacks: Sequence[Callback]) -> bool:
    """Return whether a step depends on the number of steps (a chain begins where the one before ends)."""
    moves = any(callback.needs_num_steps for callback in callbacks)
    return engine.optimizer.schedule != "constant" or moves or engine.num_chains > 1
