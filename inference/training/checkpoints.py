"""Checkpoints of a training: atomic folders with checksums, refused where they are another run's, no pickle.

    run/.lock                 held by the process that writes here
    run/chain-0-step-200/     the state of chain 0 after 200 steps, or at its end
        checkpoint.json       format, version, the run's description, chain, step, random numbers' states, and the
                              digest of the tensors, which belong to no other header
        tensors.safetensors   parameters, Adam's moments, the state of objective and callbacks, the history
        SHA256SUMS            of the two

Each is written into a hidden folder next to its final name, renamed and verified; only then is the one before it
removed. If the newest is damaged, the one before it is resumed where a kill has left that. Other names are the user's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import shutil
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any
from uuid import uuid4

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

import bayeslm
from bayeslm.checksums import digest_of, verify
from bayeslm.files import atomic_folder, differences, read_header, require_memory, require_writable, sweep
from bayeslm.inference.program import Program, prompt_texts, to_numpy
from bayeslm.locking import locked
from bayeslm.models.lm import read_tensors
from bayeslm.validation import Count, Positive, validated

from .callbacks import Callback
from .identity import has_unreadable, identify
from .resumable import resuming

FORMAT = "bayeslm.checkpoint/4"
HEADER, TENSORS = "checkpoint.json", "tensors.safetensors"
NOT_THE_STATE = ("format", "version", "run", "chain", "tensors")  # of the header
CHECKPOINT = re.compile(r"chain-\d+-step-(0|[1-9]\d*)")


@validated
@dataclass(frozen=True)
class Checkpointing:
    """Where and how often a training writes checkpoints. Each is a policy's parameters three times over.

    :param folder: made if there is none. The same call resumes what it holds.
    :param every: steps from one checkpoint to the next, at most.
    :param version: a name for the version of your own code. A run is resumed by the same code alone; where the source
        of a function cannot be read (in an interactive session, say), this says that it is the same.
    :param minutes: from one checkpoint to the next, at most, whatever the steps; None: by steps alone.
    :raises ValueError: if ``every`` is below 1, or ``minutes`` is not positive.
    """

    folder: str | PathLike[str]
    every: Count = 50
    version: str | None = None
    minutes: Positive | None = 5.0


@dataclass
class Saved:
    """The state of a chain: ``tensors`` by name, ``values`` that JSON can hold, ``path`` where it was read."""

    chain: int
    tensors: dict[str, Tensor]
    values: dict[str, Any]
    path: Path | None = None


@validated
class Checkpoints:
    """The checkpoints of one run, in a folder of their own; use it in a ``with`` block.

    :param settings: where and how often.
    :param description: of the run, as `describe_run` returns it: a checkpoint of another run is refused.
    :raises BlockingIOError: on entering, if another process writes there.
    :raises ValueError: on `newest`, if the folder holds another run's, with what differs, or damaged ones alone.
    """

    def __init__(self, settings: Checkpointing, description: dict[str, Any]) -> None:
        self.folder = Path(settings.folder).absolute()
        self._settings = settings
        self._description = json.loads(json.dumps(description | {"code version": settings.version}))
        self._held = contextlib.ExitStack()
        self._good: dict[int, Path] = {}  # the last checkpoint of each chain, verified
        self._tried = time.monotonic()  # when the last one was written, or refused by the disk

    def __enter__(self) -> Checkpoints:
        with contextlib.suppress(OSError):  # a disk that refuses is reported when there is something to write
            self.folder.mkdir(parents=True, exist_ok=True)
        held = f"{self.folder} is written by another training: end that first"
        self._held.enter_context(locked(self.folder / ".lock", held))
        sweep(self.folder)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._held.close()

    def require_writable(self) -> None:
        """Check that checkpoints can be written here; a full disk may have room later, and is warned of then.

        :raises PermissionError: if the folder is read-only.
        """
        require_writable(self.folder)

    def due(self, step: int) -> bool:
        """Return whether a checkpoint is to be written after a step."""
        minutes = self._settings.minutes
        is_late = minutes is not None and time.monotonic() - self._tried >= 60 * minutes
        return is_late or step % self._settings.every == 0

    def newest(self, chain: int) -> Saved | None:
        """Return the state of a chain after its last checkpoint; None if it has none.

        A damaged one is a warning and left where it is, and the one before it is read.
        """
        found = self._folders(chain)
        damaged: list[str] = []
        for step, path in reversed(found):
            try:
                saved = self._read(path, chain, step)
            except _DamagedError as error:
                damaged.append(str(error))
                continue
            for text in damaged:
                warnings.warn(f"{text}; resuming from {path.name} instead", stacklevel=3)
            self._good[chain] = path
            for before, older in found:  # left by a kill; copies of the user's are not of their names
                with contextlib.suppress(ValueError):
                    if before < step and self._read(older, chain, before):
                        shutil.rmtree(older, ignore_errors=True)
            return saved
        if damaged:
            raise ValueError(f"{'; '.join(damaged)}. Put a good copy in its place, or remove it to start again")
        return None

    def write(self, saved: Saved) -> str | None:
        """Write a checkpoint and verify it, then remove the chain's ones before it.

        A disk that refuses is a warning and not the end of the training: the checkpoint before stays.

        :returns: the path of the last checkpoint.
        """
        self._tried = time.monotonic()
        target = self.folder / f"chain-{saved.chain}-step-{saved.values['step']}"
        before = self._good.get(saved.chain)
        if target == before:
            return str(target)
        header = {"format": FORMAT, "version": bayeslm.__version__, "run": self._description, "chain": saved.chain}
        try:
            if target.exists():  # a damaged one, which was passed over
                target.rename(target.with_name(f"{target.name}.damaged-{uuid4().hex[:8]}"))
            with atomic_folder(target) as unfinished:
                save_file(
                    {key: x.detach().cpu().contiguous() for key, x in saved.tensors.items()},
                    unfinished / TENSORS,
                )
                header["tensors"] = digest_of(unfinished / TENSORS)
                (unfinished / HEADER).write_text(json.dumps(header | saved.values), encoding="utf-8")
            verify(target)
        except (OSError, ValueError, SafetensorError) as error:
            kept = f"{before} is kept" if before else "there is none yet"
            warnings.warn(f"no checkpoint: {error}; {kept}, and the training continues", stacklevel=2)
            return str(before) if before else None
        self._good[saved.chain] = target
        if before is not None:
            shutil.rmtree(before, ignore_errors=True)
        return str(target)

    def _folders(self, chain: int) -> list[tuple[int, Path]]:
        """Return the steps and folders of a chain's checkpoints, by step; other names are the user's."""
        named = [(CHECKPOINT.fullmatch(path.name), path) for path in self.folder.glob(f"chain-{chain}-step-*")]
        return sorted((int(match[1]), path) for match, path in named if match and path.is_dir())

    def _read(self, path: Path, chain: int, step: int) -> Saved:
        """Return a checkpoint.

        :raises _DamagedError: if it is not what was written there.
        :raises ValueError: if it is another run's.
        """
        try:
            require_memory(sum(file.stat().st_size for file in path.iterdir()), f"reading {path}")
            verify(path)
        except (OSError, ValueError) as error:
            raise _DamagedError(f"{path} is no checkpoint that can be read: {error}") from error
        with resuming(path):
            values = read_header(path, HEADER, FORMAT, "checkpoint")
            named = {name: values[name] for name in (*NOT_THE_STATE, "step")}
            if not isinstance(named["run"], dict):
                raise TypeError(f"its entry 'run' is {named['run']!r:.60}")
        if (values["chain"], values["step"]) != (chain, step):
            was = f"chain-{values['chain']}-step-{values['step']}"
            raise _DamagedError(f"{path} is no checkpoint of its name: it is a copy of {was}")
        if values["tensors"] != digest_of(path / TENSORS):
            raise _DamagedError(f"{path} is no checkpoint: {HEADER} belongs to other tensors than {TENSORS}")
        self._refuse_others(path, {"version": values["version"]} | values["run"])
        state = {k: x for k, x in values.items() if k not in NOT_THE_STATE}
        return Saved(chain, read_tensors(path / TENSORS), state, path)

    def _refuse_others(self, path: Path, there: dict[str, Any]) -> None:
        """Check that a checkpoint's description is this run's.

        :raises ValueError: if it is not, or that is not known.
        """
        here = {"version": bayeslm.__version__} | self._description
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
                + ("(More steps need schedule='constant' of Adam, one chain, and no Tempering.) " if more else "")
                + "Run the call that it was made with, or choose another folder. An object that only counts or keeps "
                "what it has computed says what else it is by a method identity()"
            )


class _DamagedError(ValueError):
    """A checkpoint that is not what was written there."""


# -- the identity of a run -----------------------------------------------------------------------------------


@validated
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
    described["prompts"] = prompt_texts(program)
    described["program"] = identify(program.model, known=priors.values())
    arguments = json.dumps(identify([program.args, program.kwargs]), sort_keys=True).encode()
    described["digest of the program's arguments"] = blake2b(arguments, digest_size=16).hexdigest()
    for name, lm in priors.items():
        described[f"prior of {name!r}"] = identify(lm)
    return described


NOT_THE_RUN = ("num_samples", "num_prior_samples", "checkpoint", "progress")


def needs_num_steps(engine: Any, callbacks: Sequence[Callback]) -> bool:
    """Return whether a step depends on the number of steps (a chain begins where the one before ends)."""
    moves = any(callback.needs_num_steps for callback in callbacks)
    return not engine.optimizer.can_be_extended or moves or engine.num_chains > 1
