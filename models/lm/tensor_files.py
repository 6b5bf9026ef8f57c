"""Files of tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from bayeslm.validation import validated
from bayeslm.weight_files import stored_tensors


@validated
def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors into a file of safetensors, with their digest."""
    tensors = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
    save_file(tensors, path, metadata={"sha256": _digest(tensors)})


@validated
def read_tensors(path: Path, device: str = "cpu") -> dict[str, Tensor]:
    """Return the tensors in a file of safetensors by name; by their digest, if the file has one.

    :raises FileNotFoundError: if there is no such file.
    :raises ValueError: if it is damaged, or larger than the memory; with its path.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    stored_tensors(path.parent, path.name)
    try:
        tensors = load_file(path, device=device)
        with safe_open(path, "pt") as file:
            digest = (file.metadata() or {}).get("sha256")
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if digest is not None and digest != _digest(tensors):
        raise ValueError(f"{path} is damaged: its tensors are not what was written (their digest in it differs)")
    return tensors


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, x in sorted(tensors.items()):
        digest.update(f"{name} {x.dtype} {tuple(x.shape)}\n".encode())
        digest.update(x.cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
