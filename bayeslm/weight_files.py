"""Checks of a folder of weights that somebody else wrote, before anything is allocated or imported for it.

A config is a claim: of sizes, which the files beside it must bear out, and of code, which is never run.
"""

from __future__ import annotations

import json
import math
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from bayeslm.files import MAX_JSON, read_json, reason_of, require_memory, require_size

PICKLE = b"\x80\x02"  # the first bytes of a file of torch.save before torch 1.6
MAX_HEADER = 2**27  # bytes of the header of a file of safetensors
REPEATED = re.compile(r"^(?!.*(size|dim|capacity)).*(layer|block|expert|head|group|stage|codebook|depth)")
"""Names of numbers of modules, which are made in loops; a size of one is compared with the weights."""
OBJECTS = re.compile(r"config|tokenizer|vocab|map|index|tokens|bayeslm")
"""Names of JSON files that hold an object each; of others, such as a list of modules, nothing is known."""
KERNELS = ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")


class Stored(NamedTuple):
    """The tensors in a folder's files: their number, the elements of all, and the largest size of an axis."""

    tensors: int
    elements: int
    largest: int


def check_folder(folder: Path, make: Callable[[], Any]) -> None:
    """Check that a model's config does not ask for more than the folder's weights, or for code.

    :param make: makes the network of the folder's config without memory for its tensors.
    :raises ValueError: if it does, or a file of settings is damaged or far too large; with its path.
    """
    if (folder / "adapter_config.json").is_file():  # transformers would load it by itself
        raise ValueError(f"{folder} holds an adapter, and no model of its own: merge it into its base, and load that")
    if not (folder / "config.json").exists():
        return
    check_json(folder)
    config = read_json(folder / "config.json")
    for key, value in _entries(config):
        if isinstance(value, int) and abs(value) >= 2**63:
            raise ValueError(f"{folder / 'config.json'}: {key} {value:.3g} is more than 64 bits hold")
        if key in KERNELS and isinstance(value, str) and re.search(r"[/:@]", value):
            raise ValueError(f"{folder / 'config.json'}: {key} {value!r} is code of somebody else, which is not run")
    stored = stored_tensors(folder, "*.safetensors") or stored_tensors(folder, "pytorch_model*.bin")
    if stored is None:
        return
    counts = 64 + 4 * max(stored.tensors, stored.largest)
    for key, value in _entries(config):
        if isinstance(value, int) and REPEATED.search(key) and value > counts:
            raise ValueError(
                f"{folder / 'config.json'}: {key} {value} does not fit the {stored.tensors} tensors in the folder"
            )
    kept, rest = _sizes(folder / "config.json", make)
    require_memory(rest, f"a model of {folder / 'config.json'}")
    if kept > (16 if config.get("quantization_config") else 2) * stored.elements + 2**16:
        raise ValueError(
            f"{folder / 'config.json'} describes a model of {kept} weights, but the files beside it hold "
            f"{stored.elements}: a size in it is wrong"
        )


def check_json(folder: Path) -> None:
    """Check the JSON files of a folder, which transformers and PEFT read without saying which one is damaged.

    :raises ValueError: if one is damaged, holds no object, or is far too large; or a device or a pipe is among the
        folder's files, which could be read for ever; with its path.
    """
    for path in folder.iterdir():
        if path.exists() and not path.is_file() and not path.is_dir():
            raise ValueError(f"{path} is no file: a device or a pipe is in its place")
    for path in folder.glob("*.json"):
        require_size(path, MAX_JSON)
        if path.stat().st_size < 2**20:
            value = read_json(path)
            if not isinstance(value, dict) and OBJECTS.search(path.name):
                raise ValueError(f"{path} is damaged: it holds no object")


def _sizes(path: Path, make: Callable[[], Any]) -> tuple[int, int]:
    """Return the number of a network's weights, and the bytes of its other tensors; zeros if it cannot be made."""
    try:
        network = make()
    except Exception as error:
        if "overflow" in str(error).lower():  # a size beyond 64 bits
            raise ValueError(f"{path} describes no model: {reason_of(error)}") from error
        return 0, 0  # loading raises the same error, or a better one
    rest = sum(x.numel() * x.element_size() for x in network.buffers())
    return sum(p.numel() for p in network.parameters()), rest


def stored_tensors(folder: Path, pattern: str) -> Stored | None:
    """Return what the weights' files of a folder hold, by their headers; None if there is no file.

    :raises ValueError: if a file is damaged, or would grow when it is read; with its path.
    """
    shapes: list[list[int]] = []
    files = sorted(folder.glob(pattern))
    for path in files:
        size = path.stat().st_size
        require_memory(size, str(path))
        shapes += _shapes(path, size) if path.suffix == ".safetensors" else [[_unpacked(path, size)]]
    if not files:
        return None
    return Stored(len(shapes), sum(map(math.prod, shapes)), max((max(s, default=1) for s in shapes), default=0))


def _shapes(path: Path, size: int) -> list[list[int]]:
    """Return the shapes of the tensors in a file of safetensors."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(MAX_HEADER, size - 8):
            raise ValueError(f"{path} is damaged: a header of {length} bytes in a file of {size}")
        try:
            header = json.loads(file.read(length))
            tensors = [tensor for name, tensor in header.items() if name != "__metadata__"]
            shapes = [[int(n) for n in tensor["shape"]] for tensor in tensors]
            end = 8 + length + max((int(tensor["data_offsets"][1]) for tensor in tensors), default=0)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path} is damaged: its header cannot be read") from error
    if any(n < 0 for shape in shapes for n in shape) or sum(map(math.prod, shapes)) > 2 * size:  # 4 bits an element
        raise ValueError(f"{path} is damaged: its header names more than the file holds")
    if end != size:
        raise ValueError(f"{path} is damaged: by its header it has {end} bytes, and it has {size}")
    return shapes


def _unpacked(path: Path, size: int) -> int:
    """Return the size of a file of `torch.save` after unpacking, at least one byte an element."""
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(member.file_size for member in archive.infolist())
    except zipfile.BadZipFile as error:
        with path.open("rb") as file:
            if file.read(2) == PICKLE:  # the format before torch 1.6, which is not packed
                return size
        raise ValueError(f"{path} is damaged: it is no file of torch.save") from error
    if unpacked > 2 * size:
        raise ValueError(f"{path} is damaged: its {size} bytes would grow to {unpacked}")
    return unpacked


def _entries(config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the entries of a config and of the configs inside it."""
    for key, value in config.items():
        yield key, value
        if isinstance(value, dict):
            yield from _entries(value)
