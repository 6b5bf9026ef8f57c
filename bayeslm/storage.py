"""A posterior on disk: one folder, without pickle, complete or absent.

posterior.json   format, version, and all fields but arrays: kind, engine, dims, prompts, numbers in stats, ...; in the
                 place of an array its type, its shape, and the variable of posterior.nc that holds its values
posterior.nc     every array of numbers, at full precision, in a NetCDF file that `arviz.from_netcdf` opens:
                 the groups of `Posterior.to_arviz`, and the group "bayeslm" with the arrays that none of them has
                 (that group alone if no draw has positive weight)
texts.json       every array of strings, character by character (NetCDF has no NUL), and empty arrays
policy/          the trained policy, if there is one, as its `save_pretrained` writes it
SHA256SUMS       of all these files
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import xarray

from bayeslm.arviz import Variables, make_datasets
from bayeslm.checksums import verify
from bayeslm.files import atomic_folder, read_header, read_json, reading, require_memory
from bayeslm.version import __version__
from bayeslm.weights import Array

FORMAT = "bayeslm.posterior/3"
ARRAYS, TEXTS = "posterior.nc", "texts.json"
OWN_GROUP = "bayeslm"
MAX_TEXTS = 2**32  # bytes of texts.json
MAX_INFLATION = 2200  # deflate packs a byte into 1/1032 at most; twice, as a chunk is counted in addition
FILE = "$file"  # marks an array in posterior.json: {"$file": file, "name": in the file, "dtype": ..., "shape": ...}


def save(
    fields: Mapping[str, Any],
    policy: Any,
    groups: Mapping[str, Variables],
    prompt_labels: list[str],
    attrs: Mapping[str, str],
    directory: Path,
) -> Path:
    """Write the fields of a posterior into a new or empty directory.

    :param fields: arrays, mappings of them, and what JSON can hold.
    :param policy: the trained policy, or None.
    :param groups: of the ArviZ container, made of arrays of ``fields`` where possible: these are not written twice.
    :param attrs: of the ArviZ container.
    :returns: the absolute path.
    :raises FileExistsError: if the directory is a file or not empty.
    :raises TypeError: if a field cannot be written, or the policy has no method ``save_pretrained``.
    :raises OSError: if the disk refuses. After any error nothing is left on the disk.
    """
    if policy is not None and not hasattr(policy, "save_pretrained"):
        raise TypeError(
            f"the policy, a {type(policy).__name__}, has no method save_pretrained(folder): give it one, or "
            "save it yourself and dataclasses.replace(posterior, policy=None)"
        )
    packing = _Packing(groups)
    header = {"format": FORMAT, "version": __version__, "fields": packing.pack(dict(fields))}
    content = json.dumps(header, indent=1, default=_number)
    with atomic_folder(directory) as folder:
        (folder / "posterior.json").write_text(content, encoding="utf-8")
        (folder / TEXTS).write_text(json.dumps(packing.texts), encoding="utf-8")
        datasets = make_datasets(groups, prompt_labels) | {OWN_GROUP: xarray.Dataset(packing.own)}
        (folder / ARRAYS).write_bytes(_netcdf(datasets, attrs))
        if policy is not None:
            policy.save_pretrained(folder / "policy")
    return directory.absolute()


def load(directory: Path) -> dict[str, Any]:
    """Read the fields that `save` wrote, and ``policy_path``, where the policy is, or None.

    :raises FileNotFoundError: if the directory holds no posterior.
    :raises ValueError: if a version of bayeslm with another format wrote it, or a file is damaged; with its name.
    """
    header = read_header(directory, "posterior.json", FORMAT, "posterior")
    with reading(directory / "posterior.json"):
        fields = dict(header["fields"])
    with reading(directory / TEXTS) as path:
        texts = read_json(path, MAX_TEXTS)
        fields = _fill(fields, TEXTS, lambda mark: _read_texts(texts[mark["name"]], mark))
    with reading(directory / ARRAYS) as path, h5py.File(path) as file:
        fields = _fill(fields, ARRAYS, lambda mark: _read_array(file, mark))
    verify(directory)  # at the end, when it is known that no file is too large
    if "rewards" not in fields:
        fields = _with_rewards(fields)
    policy = directory / "policy"
    return fields | {"policy_path": policy if policy.is_dir() else None}


def _with_rewards(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a posterior of before there were rewards: its site "score" held r of the factor "reward"."""

    def moved(arrays: dict[str, Array]) -> tuple[dict[str, Array], dict[str, Array]]:
        score = arrays["score"]
        others = {name: array for name, array in arrays.items() if name != "score"}
        return others, {"reward": score[..., None] if score.ndim == 2 else score}

    for group, rewards in (("samples", "rewards"), ("prior", "prior_rewards")):
        if "score" in fields[group] and fields["dims"].get("score") in ([], ["prompt"]):
            fields[group], fields[rewards] = moved(fields[group])
    return fields


class _Packing:
    """Takes arrays out of fields: numbers into variables of a NetCDF file, strings into lists."""

    def __init__(self, groups: Mapping[str, Variables]) -> None:
        self.own: Variables = {}
        self.texts: dict[str, list[str]] = {}
        self._in_groups = {
            _memory(values): f"{group}/{variable}"
            for group, variables in groups.items()
            for variable, (_, values) in variables.items()
        }

    def pack(self, value: Any, name: str = "") -> Any:
        """Return the value with a mark in the place of each array."""
        if isinstance(value, np.ndarray):
            file, place = self._place(value, name)
            return {FILE: file, "name": place, "dtype": value.dtype.str, "shape": value.shape}
        if isinstance(value, dict):
            return {key: self.pack(inner, f"{name}.{key}" if name else str(key)) for key, inner in value.items()}
        return value

    def _place(self, array: Array, name: str) -> tuple[str, str]:
        """Return the file that holds the array and its name there; keep the array if no group has it."""
        variable = name.replace("/", ".")
        while variable in self.own or variable in self.texts:
            variable += "_"
        if array.dtype.kind in "biuf" and array.size:
            if (place := self._in_groups.get(_memory(array))) is not None:
                return ARRAYS, place
            shape = array.shape  # arrays share dims of the same size; two of one array have different names
            dims = tuple(f"size_{n}" + "_again" * shape[:axis].count(n) for axis, n in enumerate(shape))
            self.own[variable] = (dims, array.astype(np.int8) if array.dtype == bool else array)
            return ARRAYS, f"{OWN_GROUP}/{variable}"
        self.texts[variable] = array.ravel().tolist()
        if not all(isinstance(text, str) for text in self.texts[variable]):
            raise TypeError(f"{name} holds Python objects ({array.dtype}): only numbers and strings can be saved")
        return TEXTS, variable


def _memory(array: Array) -> tuple[Any, ...]:
    """Return what tells the numbers of an array from those of others: where they are, in whatever shape."""
    if not array.flags.c_contiguous:
        return ("view", id(array))
    return array.__array_interface__["data"][0], array.nbytes, array.dtype.str


def _fill(value: Any, file: str, read: Callable[[dict[str, Any]], Array]) -> Any:
    """Return the value with an array in the place of each mark that names the file."""
    if not isinstance(value, dict):
        return value
    if value.get(FILE) == file:
        return read(value).astype(value["dtype"], copy=False).reshape(value["shape"])
    return {key: _fill(inner, file, read) for key, inner in value.items()}


def _read_texts(texts: Any, mark: dict[str, Any]) -> Array:
    """Return a flat array of the texts that a mark stands for."""
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{mark['name']} is no list of strings")
    width = 4 * max([64, *map(len, texts)])  # bytes of an element
    if len(texts) != math.prod(mark["shape"]) or (texts and np.dtype(mark["dtype"]).itemsize > width):
        raise ValueError(f"{mark['name']} has {len(texts)} texts, not {mark['dtype']} {mark['shape']}")
    require_memory(width * len(texts), mark["name"])
    return np.array(texts, dtype=object)


def _read_array(file: Any, mark: dict[str, Any]) -> Array:
    """Return the numbers that a mark stands for, if they are in the file and as many as the mark says."""
    dataset, dtype = file, np.dtype(mark["dtype"])
    for part in mark["name"].split("/"):
        if not isinstance(dataset.get(part, getlink=True), h5py.HardLink):
            raise ValueError(f"{mark['name']} is not in the file itself")
        dataset = dataset[part]
    if not isinstance(dataset, h5py.Dataset) or dataset.is_virtual or dataset.external:
        raise ValueError(f"{mark['name']} is not in the file itself")
    if dtype.kind not in "biuf" or dataset.dtype.kind not in "biuf" or dataset.size != math.prod(mark["shape"]):
        raise ValueError(f"{mark['name']} is {dataset.dtype} {dataset.shape}, not {dtype} {mark['shape']}")
    size = math.prod(dataset.chunks or ()) * dataset.dtype.itemsize + dataset.nbytes
    if size > MAX_INFLATION * dataset.id.get_storage_size():
        raise ValueError(f"{mark['name']} would grow to {size} bytes")
    require_memory(dataset.size * max(dtype.itemsize, dataset.dtype.itemsize), mark["name"])
    return np.asarray(dataset[()])


def _netcdf(datasets: Mapping[str, xarray.Dataset], attrs: Mapping[str, str]) -> bytes:
    """Return the content of a NetCDF file, compressed and with checksums; in memory, as HDF5 crashes on a full disk."""
    encoding = {
        f"/{group}": {
            name: {"zlib": True, "fletcher32": True}
            for name, x in data.data_vars.items()
            if x.dtype.kind in "biuf" and x.ndim and x.size  # scalars, empty arrays and strings have no such filters
        }
        for group, data in datasets.items()
    }
    tree = xarray.DataTree.from_dict({"/": xarray.Dataset(attrs=attrs), **datasets})
    return bytes(tree.to_netcdf(engine="h5netcdf", encoding=encoding))


def _number(value: object) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"stats holds {value!r}: only numbers, strings, lists, dictionaries and arrays can be saved")
