"""The memory of a training's parts, as values: what a part remembers it gets from the run and hands back to it.

Objectives, baselines, sources and callbacks hold settings alone. So one of them may serve many runs at once, and a
checkpoint of a run is complete without them.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from bayeslm.models.lm import in_parts_like

State = Mapping[str, Tensor]
"""Tensors by name, none of which is ever changed in place: an update makes a new mapping with new tensors."""

EMPTY: State = MappingProxyType({})
"""The memory of what has made no step yet."""


def under(prefix: str, state: State) -> dict[str, Tensor]:
    """Return a part's state as an entry of the state around it: every name begins with ``prefix`` and a dot."""
    return {f"{prefix}.{name}": value for name, value in state.items()}


def within(prefix: str, state: State) -> dict[str, Tensor]:
    """Return the state that `under` has put under a prefix."""
    start = f"{prefix}."
    return {name.removeprefix(start): value for name, value in state.items() if name.startswith(start)}


def copies(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return copies of parameters, to `assign` later."""
    return {name: p.detach().clone() for name, p in params.items()}


@torch.no_grad()
def assign(values: State, params: Mapping[str, Tensor]) -> None:
    """Give parameters their values, by name, in place."""
    for name, value in values.items():
        params[name].copy_(in_parts_like(value, params[name]))
