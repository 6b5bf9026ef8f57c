"""All that touches ArviZ, in both its versions: 0.x (InferenceData) and 1.x (DataTree).

Importing this module imports ArviZ, which takes seconds: the rest of the face imports it on use.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray

from bayeslm.weights import Array

if TYPE_CHECKING:
    from bayeslm.posterior import Posterior

az: Any = import_module("arviz")  # untyped: its two versions agree on little
LEGACY = az.__version__.startswith("0.")
Variables = dict[str, tuple[tuple[str, ...], Array]]  # name -> (dims, values)

ALIGNMENT = (
    "posterior, sample_stats, log_likelihood and texts hold the same equally weighted draws, resampled by "
    "weight from the group proposal (jointly over chains and draws, in order; each prompt on its own unless "
    "prompts share a latent). log_weight and lp in sample_stats are those of the draw picked: no weight is "
    "left to apply."
)


def to_arviz(posterior: Posterior, num_draws: int | None = None, seed: int = 0) -> Any:
    """ArviZ's container of the installed version: `InferenceData` (0.x) or `xarray.DataTree` (1.x).

    Groups, with dims (chain, draw, ...) and prompts as the coordinate "prompt":
      posterior       latents, deterministics, completions as token ids, "<site>_length"; equally weighted
      sample_stats    log_weight and lp (the log joint) of the same draws
      log_likelihood  every factor and observed site, of the same draws; one value for each observation
      posterior_predictive   observed sites drawn anew, where `bayeslm.inference.predict` has been run
      texts           the completions as strings, of the same draws (no numbers: apart from `posterior`)
      proposal        the raw draws with log_weight and lp, where weights differ
      prior, observed_data   where the posterior has them

    `num_draws` a chain and `seed` are as in `Posterior.resample`. A slash in a site's name becomes a dot.
    Raises ValueError if every weight of a prompt is zero.
    """
    groups, attrs = _datasets(posterior, num_draws, seed), _attrs(posterior)
    if LEGACY:
        return az.InferenceData(attrs=attrs, **groups)
    return xarray.DataTree.from_dict({"/": xarray.Dataset(attrs=attrs), **groups})


def to_netcdf(posterior: Posterior) -> bytes:
    """The container as a NetCDF file for `arviz.from_netcdf`, in memory: HDF5 crashes on a full disk."""
    groups = _datasets(posterior, None, 0)
    encoding = {
        f"/{group}": {name: {"zlib": True} for name, x in data.data_vars.items() if x.dtype != object}
        for group, data in groups.items()
    }
    tree = xarray.DataTree.from_dict({"/": xarray.Dataset(attrs=_attrs(posterior)), **groups})
    return bytes(tree.to_netcdf(engine="h5netcdf", encoding=encoding))


def psislw(log_weights: Array) -> tuple[Array, float]:
    """ArviZ's Pareto smoothing of one column of finite log weights: smoothed, and k̂."""
    with np.errstate(all="ignore"):
        if LEGACY:
            smoothed, khat = az.psislw(log_weights)
        else:  # another home, the other sign
            smoothed, khat = import_module("arviz_stats.base").array_stats.psislw(-log_weights)
    return np.asarray(smoothed), float(khat)


def statistic(name: str, values: Array, **options: str) -> Array:
    """ArviZ's "rhat" or "ess" of (chain, draw, ...), shape (...); by a data set, which both versions take."""
    flat = values.reshape(*values.shape[:2], -1)
    data = xarray.Dataset({"x": (("chain", "draw", "quantity"), flat)})
    with np.errstate(all="ignore"):
        return getattr(az, name)(data, **options)["x"].to_numpy().reshape(values.shape[2:])


def _attrs(posterior: Posterior) -> dict[str, str]:
    from bayeslm import __version__

    return {
        "engine": posterior.engine,
        "kind": posterior.kind,
        "inference_library": "bayeslm",
        "inference_library_version": __version__,
        "alignment": ALIGNMENT,
    }


def _datasets(posterior: Posterior, num_draws: int | None, seed: int) -> dict[str, xarray.Dataset]:
    from bayeslm.posterior import pick

    draws = pick(posterior, num_draws, seed)
    groups: dict[str, Variables] = {
        "posterior": _numbers(draws),
        "sample_stats": _stats(draws),
        "log_likelihood": _per_prompt(draws, draws.log_likelihood) | _observations(draws, draws.pointwise),
        "posterior_predictive": _observations(draws, draws.predictive),
        "texts": {name: (_sample_dims(draws, name)[:-1], _printable(x)) for name, x in draws.texts.items()},
        "prior": {name: (_prior_dims(posterior, name, x), x) for name, x in posterior.prior.items()},
        "observed_data": {name: (_observed_dims(posterior, name, x), x) for name, x in posterior.observed.items()},
    }
    if not np.all(posterior.log_weights == posterior.log_weights[0, 0]):  # (−inf − −inf would be NaN)
        groups["proposal"] = _numbers(posterior) | _stats(posterior)
    sizes = _sizes(groups)
    labels = _printable(np.array(posterior.prompt_labels, dtype=object))
    return {group: _dataset(variables, sizes, labels) for group, variables in groups.items() if variables}


def _sample_dims(posterior: Posterior, name: str) -> tuple[str, ...]:
    return ("chain", "draw", *posterior.dims.get(name, ()))


def _numbers(posterior: Posterior) -> Variables:
    lengths = {f"{name}_length": (_sample_dims(posterior, name)[:-1], n) for name, n in posterior.lengths.items()}
    return {name: (_sample_dims(posterior, name), x) for name, x in posterior.samples.items()} | lengths


def _stats(posterior: Posterior) -> Variables:
    return _per_prompt(posterior, {"log_weight": posterior.log_weights, "lp": posterior.log_joint})


def _per_prompt(posterior: Posterior, values: Mapping[str, Array]) -> Variables:
    """(chain, draw, prompt), without the last axis where all prompts share one value."""
    rows = len(posterior.prompts)
    return {
        name: (("chain", "draw", "prompt"), x) if x.shape[2] == rows else (("chain", "draw"), x[..., 0])
        for name, x in values.items()
    }


def _observations(posterior: Posterior, values: Mapping[str, Array]) -> Variables:
    return {name: (_sample_dims(posterior, name)[: x.ndim], x) for name, x in values.items()}


def _prior_dims(posterior: Posterior, name: str, value: Array) -> tuple[str, ...]:
    """Those of the sample of the same name; of "<site>_length" the site's; a factor's are the prompts."""
    site = name.removesuffix("_length")
    dims: tuple[str, ...] = ("chain", "draw", *(f"{name}_dim_{axis}" for axis in range(value.ndim - 2)))
    if name in posterior.samples:
        dims = _sample_dims(posterior, name)
    elif site in posterior.lengths:
        dims = _sample_dims(posterior, site)[:-1]
    elif value.shape[2:] == (len(posterior.prompts),):
        dims = ("chain", "draw", "prompt")
    return dims


def _observed_dims(posterior: Posterior, name: str, value: Array) -> tuple[str, ...]:
    if len(dims := posterior.dims.get(name, ())) == value.ndim:
        return dims
    own = [f"{name}_dim_{axis}" for axis in range(value.ndim)]
    return ("prompt", *own[1:]) if value.shape[:1] == (len(posterior.prompts),) else tuple(own)


def _sizes(groups: Mapping[str, Variables]) -> dict[str, set[int]]:
    """The sizes each dim has over all variables: completions of two sites may differ in length."""
    sizes: dict[str, set[int]] = {}
    for variables in groups.values():
        for dims, value in variables.values():
            for dim, size in zip(dims, value.shape, strict=True):
                sizes.setdefault(dim, set()).add(size)
    return sizes


def _dataset(variables: Variables, sizes: Mapping[str, set[int]], labels: Array) -> xarray.Dataset:
    """Every dim has a coordinate; a dim of several sizes is each variable's own, "<name>_token"."""

    def own(name: str, dim: str) -> str:
        return f"{name}_{dim}" if dim not in ("chain", "draw") and len(sizes[dim]) > 1 else dim

    arrays = {
        name.replace("/", "."): (
            [own(name, dim).replace("/", ".") for dim in dims],
            value.astype(np.int8) if value.dtype == bool else value,
        )
        for name, (dims, value) in variables.items()
    }
    lengths = {dim: n for dims, value in arrays.values() for dim, n in zip(dims, value.shape, strict=True)}
    coords = {dim: labels if dim == "prompt" else np.arange(n) for dim, n in lengths.items()}
    return xarray.Dataset(arrays, coords=coords)


def _printable(texts: Array) -> Array:
    """Strings that HDF5 can hold: no NUL, no lone surrogate."""
    clean = np.empty_like(texts)
    for index, text in np.ndenumerate(texts):
        clean[index] = text.replace("\0", "\N{SYMBOL FOR NULL}").encode("utf-8", "replace").decode()
    return clean
