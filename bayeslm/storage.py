"""A posterior on disk: one directory, no pickle.

    posterior.json   engine, kind, dims, prompts, stats
    texts.json       completions as strings
    arrays.npz       every array, at full precision
    posterior.nc     the same for ArviZ, by `Posterior.to_arviz` (left out where no draw has positive weight)
    policy/          the trained policy, by its own `save_pretrained`

It is written beside its place and renamed into it whole, so that a directory of that name is complete or
absent.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bayeslm.files import read_header, whole
from bayeslm.posterior import Posterior

Array = NDArray[Any]

FORMAT = "bayeslm.posterior/1"
SINGLE = (
    "log_weights",
    "log_joint",
    "log_evidence",
    "log_evidence_stderr",
    "log_evidence_lower",
    "log_evidence_upper",
    "roots",
)
GROUPS = ("samples", "log_likelihood", "pointwise", "predictive", "lengths", "prior", "observed", "stats")


def save(posterior: Posterior, directory: Path) -> Path:
    """Write `posterior` to `directory`, which must be new or empty; returns it.

    Raises FileExistsError if it is neither, TypeError if `stats` holds what JSON cannot or the policy cannot save
    itself, OSError if the disk refuses; nothing is left behind then.
    """
    if posterior.policy is not None and not hasattr(posterior.policy, "save_pretrained"):
        raise TypeError(
            f"the policy, a {type(posterior.policy).__name__}, has no method save_pretrained(folder): give it one, or "
            "save it yourself and dataclasses.replace(posterior, policy=None)"
        )
    directory = directory.absolute()
    with whole(directory) as unfinished:
        _write(posterior, unfinished)
    return directory


def load(directory: Path) -> Posterior:
    """Read what `save` wrote; the policy stays on disk, at `policy_path`.

    Raises FileNotFoundError if `directory` holds no posterior, ValueError if another version of bayeslm wrote
    it.
    """
    meta = read_header(directory, "posterior.json", FORMAT, "posterior")
    texts = json.loads((directory / "texts.json").read_text(encoding="utf-8"))
    with np.load(directory / "arrays.npz", allow_pickle=False) as archive:
        arrays = {key: archive[key] for key in archive.files}
    groups: dict[str, dict[str, Any]] = {group: {} for group in GROUPS}
    for key in meta["order"]:
        group, _, name = key.partition("/")
        groups[group][name] = arrays[key]
    groups["stats"] = {name: groups["stats"].get(name, meta["stats"].get(name)) for name in meta["stat_names"]}
    fields: dict[str, Any] = groups | {name: arrays.get(name) for name in SINGLE}
    policy = directory / "policy"
    return Posterior(
        **fields,
        texts={name: _strings(**value) for name, value in texts.items()},
        kind=meta["kind"],
        conditional=meta.get("conditional", False),  # posteriors saved by 0.1.0 have none
        engine=meta["engine"],
        dims={name: tuple(dims) for name, dims in meta["dims"].items()},
        prompts=meta["prompts"],
        policy_path=policy if policy.is_dir() else None,
    )


def _write(posterior: Posterior, directory: Path) -> None:
    from bayeslm import __version__
    from bayeslm.arviz import to_netcdf

    single = {name: getattr(posterior, name) for name in SINGLE}
    grouped = {
        f"{group}/{name}": value
        for group in GROUPS
        for name, value in getattr(posterior, group).items()
        if isinstance(value, np.ndarray)
    }
    if mixed := [name for name, value in grouped.items() if value.dtype.hasobject]:
        raise TypeError(f"{mixed[0]} is an array of Python objects: only numbers and strings can be saved")
    arrays = {name: value for name, value in (single | grouped).items() if value is not None}
    np.savez_compressed(directory / "arrays.npz", **arrays)
    plain = {name: value for name, value in posterior.stats.items() if not isinstance(value, np.ndarray)}
    meta = {
        "format": FORMAT,
        "version": __version__,
        "engine": posterior.engine,
        "kind": posterior.kind,
        "conditional": posterior.conditional,
        "dims": posterior.dims,
        "prompts": posterior.prompts,
        "order": list(grouped),
        "stats": plain,
        "stat_names": list(posterior.stats),
    }
    (directory / "posterior.json").write_text(json.dumps(meta, indent=1, default=_number), encoding="utf-8")
    texts = {name: {"shape": x.shape, "strings": x.ravel().tolist()} for name, x in posterior.texts.items()}
    (directory / "texts.json").write_text(json.dumps(texts), encoding="utf-8")
    try:
        (directory / "posterior.nc").write_bytes(to_netcdf(posterior))
    except ValueError as error:
        warnings.warn(f"saved without posterior.nc: {error}", stacklevel=4)
    if posterior.policy is not None:
        posterior.policy.save_pretrained(directory / "policy")


def _number(value: object) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"stats holds {value!r}: only numbers, strings, lists, dictionaries and whole arrays can be saved")


def _strings(shape: list[int], strings: list[str]) -> Array:
    array = np.empty(len(strings), dtype=object)
    array[:] = strings
    return array.reshape(shape)
