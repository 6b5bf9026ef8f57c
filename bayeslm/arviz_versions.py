"""One interface to both versions of ArviZ: 0.x, whose container is `InferenceData`, and 1.x, whose is `DataTree`.

Importing this module imports ArviZ, which takes seconds, so other modules import it inside functions.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from importlib import import_module
from typing import Any

import numpy as np
import xarray
from numpy.typing import NDArray

with warnings.catch_warnings():  # of 0.x once a day, that it will be another
    warnings.filterwarnings("ignore", message=r"\s*ArviZ is undergoing a major refactor", category=FutureWarning)
    az: Any = import_module("arviz")  # untyped: the two versions share few signatures
LEGACY = az.__version__.startswith("0.")
MIN_DRAWS = 4  # of a chain, for which ArviZ has R-hat and ESS


def container(groups: Mapping[str, xarray.Dataset], attrs: Mapping[str, str]) -> Any:
    """Return the groups in ArviZ's container: `InferenceData` (0.x) or `xarray.DataTree` (1.x)."""
    if LEGACY:
        return az.InferenceData(attrs=attrs, **groups)
    return xarray.DataTree.from_dict({"/": xarray.Dataset(attrs=attrs), **groups})


def psislw(log_weights: NDArray[Any]) -> tuple[NDArray[Any], float]:
    """Return Pareto-smoothed log weights and k̂ of one column of finite log weights, both (draw,)."""
    with np.errstate(all="ignore"):
        if LEGACY:
            smoothed, khat = az.psislw(log_weights)
        else:  # 1.x has moved the function and takes negated log weights
            smoothed, khat = import_module("arviz_stats.base").array_stats.psislw(-log_weights)
    return np.asarray(smoothed), float(khat)


def statistic(name: str, values: NDArray[Any], **options: str) -> NDArray[Any]:
    """Return ArviZ's "rhat" or "ess" of values (chain, draw, ...), shape (...); NaN for fewer than four draws."""
    if values.shape[1] < MIN_DRAWS:
        return np.full(values.shape[2:], np.nan)
    flat = values.reshape(*values.shape[:2], -1)
    data = xarray.Dataset({"x": (("chain", "draw", "quantity"), flat)})  # both versions take a data set
    with np.errstate(all="ignore"):
        return getattr(az, name)(data, **options)["x"].to_numpy().reshape(values.shape[2:])
