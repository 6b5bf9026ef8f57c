"""The checkpoint of a fit: the weights, AdamW's moments and what has been computed, with checksums and no pickle.

folder/.lock                 held by the process that writes here
folder/state/                replaced as a whole
    checkpoint.json          format, the fit's description, losses
    tensors.safetensors      weights, moments, the state of the minibatches' generator, the best weights so far
    SHA256SUMS               of the two
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from hashlib import blake2b
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bayeslm.checksums import verify
from bayeslm.files import differences, read_header, reading, recover, replacing_folder, require_writable
from bayeslm.locking import locked

from .tensor_files import read_tensors, write_tensors

FORMAT = "bayeslm.fit/1"
HEADER, TENSORS, SUMS = "checkpoint.json", "tensors.safetensors", "SHA256SUMS"
MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # what AdamW remembers of a parameter


class FitState(NamedTuple):
    """What a fit has computed so far, beside weights and moments, which the optimizer holds."""

    losses: Sequence[float]
    held_out: Mapping[int, float]
    generator: Tensor
    best: list[Tensor] | None
    """The weights of the lowest loss held out, in the optimizer's order."""


class FitCheckpoint:
    """Where a fit is kept. Made by `opened`, which holds the folder's lock.

    :param description: of the fit, as JSON holds it: a checkpoint of another one is refused.
    """

    def __init__(self, folder: Path, description: dict[str, Any]) -> None:
        self._state = folder / "state"
        self._description = json.loads(json.dumps(description))

    @classmethod
    @contextlib.contextmanager
    def opened(cls, folder: str | PathLike[str], description: dict[str, Any]) -> Iterator[FitCheckpoint]:
        """Yield the checkpoint in a folder, which is made if there is none.

        :raises BlockingIOError: if another process writes there.
        :raises OSError: if the folder cannot be written.
        """
        path = Path(folder).absolute()
        path.mkdir(parents=True, exist_ok=True)
        require_writable(path)
        with locked(path / ".lock", f"{path} is written by another fit: end that first"):
            yield cls(path, description)

    def write(self, state: FitState, optimizer: torch.optim.Optimizer) -> None:
        """Replace the checkpoint."""
        tensors = {"generator": state.generator}
        for i, p in enumerate(_parameters(optimizer)):
            tensors[f"weight.{i}"] = p
            tensors |= {f"{name}.{i}": optimizer.state[p][name] for name in MOMENTS}
        tensors |= {f"best.{i}": x for i, x in enumerate(state.best or ())}
        held_out = [[step, loss] for step, loss in state.held_out.items()]
        header = {"format": FORMAT, "fit": self._description, "losses": list(state.losses), "held_out": held_out}
        with replacing_folder(self._state, lambda name: name in (HEADER, TENSORS, SUMS)) as folder:
            write_tensors(folder / TENSORS, tensors)
            (folder / HEADER).write_text(json.dumps(header), encoding="utf-8")

    def read(self, optimizer: torch.optim.Optimizer) -> FitState | None:
        """Give weights and moments the values of the checkpoint, and return the rest; None if there is none.

        :raises ValueError: if it is damaged, or another fit's, with what differs.
        """
        recover(self._state)
        if not self._state.is_dir():
            return None
        with reading(self._state):
            verify(self._state)
            header = read_header(self._state, HEADER, FORMAT, "checkpoint of a fit")
            tensors = read_tensors(self._state / TENSORS)
            if found := differences(header["fit"], self._description):
                raise ValueError(
                    f"{self._state} is the checkpoint of another fit: {'; '.join(found)}. Run the call that it was "
                    "made with, on the same weights, or choose another folder. (More steps need schedule='constant'.)"
                )
            parameters = _parameters(optimizer)
            moments = [{name: tensors[f"{name}.{i}"] for name in MOMENTS} for i in range(len(parameters))]
            weights = [tensors[f"weight.{i}"] for i in range(len(parameters))]
            best = [tensors[f"best.{i}"] for i in range(len(parameters))] if "best.0" in tensors else None
            for p, x, moment in zip(parameters, weights, moments, strict=True):
                if not x.shape == p.shape == moment["exp_avg"].shape == moment["exp_avg_sq"].shape:
                    raise ValueError(f"weights of the shape {tuple(x.shape)} are not this network's {tuple(p.shape)}")
            held_out = {int(step): float(loss) for step, loss in header["held_out"]}
            state = FitState([float(x) for x in header["losses"]], held_out, tensors["generator"], best)
        with torch.no_grad():
            for p, x, moment in zip(parameters, weights, moments, strict=True):
                p.copy_(x)
                optimizer.state[p] = {name: value if name == "step" else value.to(p) for name, value in moment.items()}
        return state


def digest_of_pairs(pairs: Sequence[Sequence[Sequence[int]]]) -> str:
    """Return a digest of token ids of prompts and completions."""
    return blake2b(json.dumps([list(map(list, pair)) for pair in pairs]).encode(), digest_size=16).hexdigest()


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]
