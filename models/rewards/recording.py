"""Rewards as evidence of a Pyro program, with r itself on record."""

from __future__ import annotations

import math
from typing import Any

import pyro
import torch
from torch import Tensor

SUFFIX = "/r"  # of the deterministic site that holds r


def factor(name: str, r: Any, beta: Any) -> None:
    """Multiply the program's joint density by exp(r / beta), and record r.

    A program says this in the place of ``pyro.factor(name, r / beta)``, from which r cannot be told. Engines return r
    as ``Posterior.rewards[name]`` and r / beta as ``Posterior.log_likelihood[name]``. For Pyro itself the program has
    the factor ``name`` and the deterministic site ``name + "/r"``.

    :param r: a tensor of the plates' shape, or what `torch.as_tensor` makes one of; finite or -inf.
    :param beta: the KL coefficient, a number or a tensor (where it is a latent).
    :raises ValueError: if beta is not positive and finite.
    """
    is_valid = bool(((beta > 0) & beta.isfinite()).all()) if isinstance(beta, Tensor) else 0 < beta < math.inf
    if not is_valid:
        raise ValueError(f"rewards.factor({name!r}, ...): beta must be positive and finite, not {beta}")
    r = record(name, r)
    pyro.factor(name, r / beta)


def record(name: str, r: Any) -> Tensor:
    """Record r under the name of a factor, where the factor is not exp(r / beta) alone; return it as a tensor.

    Inside plates other than the prompts', `Posterior.rewards` has the sum over them.

    :param r: as for `factor`.
    """
    r = torch.as_tensor(r)
    r = r if r.is_floating_point() else r.float()
    pyro.deterministic(name + SUFFIX, r, event_dim=0)
    return r


def reward_name(site: str) -> str | None:
    """Return the name of the reward that a deterministic site holds, or None if it holds none."""
    return site.removesuffix(SUFFIX) if site.endswith(SUFFIX) else None
