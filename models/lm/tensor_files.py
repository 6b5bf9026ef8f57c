"""Files of tensors."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from bayeslm.weight_files import stored_tensors


def read_tensors(path: Path, device: str = "cpu") -> dict[str, Tensor]:
    """Return the tensors in a file of safetensors by name.

    :raises FileNotFoundError: if there is no such file.
    :raises ValueError: if it is damaged, or larger than the memory; with its path.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    stored_tensors(path.parent, path.name)
    try:
        return load_file(path, device=device)
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
