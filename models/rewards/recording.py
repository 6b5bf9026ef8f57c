"""Rewards as evidence of a Pyro program, with r itself on record."""

from __future__ import annotations

import sys
from typing import Any

import pyro
import torch
from pyro.distributions import Delta, Unit, is_validation_enabled
from torch import Tensor

from bayeslm.validation import validated

SUFFIX = "/r"  # of the deterministic site that holds r


@validated
def factor(name: str, r: Any, beta: Any) -> None:
    """Multiply the program's joint density by exp(r / beta), and record r.

    A program says this in the place of ``pyro.factor(name, r / beta)``, from which r cannot be told. Engines return r
    as ``Posterior.rewards[name]`` and r / beta as ``Posterior.log_likelihood[name]``. For Pyro itself the program has
    the factor ``name`` and the deterministic site ``name + "/r"``.

    :param r: a tensor of the plates' shape, or what `torch.as_tensor` makes one of; finite or -inf.
    :param beta: the KL coefficient: a number, a tensor (where it is a latent), or what `torch.as_tensor` makes one of.
    :raises ValueError: if beta is not positive and finite, or r is NaN or +inf. In a run of an engine the engine itself
        refuses such an r, with the text that has it.
    """
    r = _as_tensor(f"rewards.factor({name!r}, ...): r", r)
    if not isinstance(beta, int | float):
        beta = _as_tensor(f"rewards.factor({name!r}, ...): beta", beta).to(r.device)
    if not _is_valid_beta(beta):
        raise ValueError(f"rewards.factor({name!r}, ...): beta must be positive and finite, not {beta}")
    if _is_checked_here() and (bad := r[r.isnan() | r.isposinf()]).numel():
        raise ValueError(f"rewards.factor({name!r}, ...): r must be finite or -inf, not {bad[0].item()}")
    try:
        log_factor = record(name, r) / beta
    except RuntimeError:
        shapes = tuple(r.shape), tuple(torch.as_tensor(beta).shape)
        raise ValueError(f"rewards.factor({name!r}, ...): r and beta have shapes that do not fit: {shapes}") from None
    if _is_checked_here() and log_factor.isnan().any():
        raise ValueError(f"rewards.factor({name!r}, ...): beta is too small for r, {beta}: r / beta is not a number")
    pyro.factor(name, log_factor)


def _is_checked_here() -> bool:
    """Whether Pyro checks factors, and no engine has put that off until it knows the text.

    `Unit._validate_args` alone does not tell: `torch.compile` turns it off for all distributions of the process.
    """
    return is_validation_enabled() and "_validate_args" not in vars(Unit)


def _is_valid_beta(beta: float | Tensor) -> bool:
    return bool(((beta > 0) & beta.isfinite()).all()) if isinstance(beta, Tensor) else 0 < beta <= sys.float_info.max


def _as_tensor(argument: str, value: Any) -> Tensor:
    """Return a value as a tensor.

    :param argument: what an error calls it.
    :raises ValueError: if `torch.as_tensor` makes none of it.
    """
    try:
        tensor = torch.as_tensor(value)
        if tensor.is_complex():
            raise TypeError("complex numbers")
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise ValueError(f"{argument} must be real numbers, not {value!r:.50}") from error
    return tensor


@validated
def record(name: str, r: Any) -> Tensor:
    """Record r under the name of a factor, where the factor is not exp(r / beta) alone; return it as a tensor.

    Inside plates other than the prompts', `Posterior.rewards` has the sum over them.

    :param r: as for `factor`.
    """
    r = _as_tensor(f"rewards.record({name!r}, ...): r", r)
    r = r if r.is_floating_point() else r.float()
    # as `pyro.deterministic` does, without its look at the values, for which the host would wait
    point = Delta(r, validate_args=False).mask(False)
    pyro.sample(name + SUFFIX, point, obs=r, infer={"_deterministic": True})
    return r


@validated
def reward_name(site: str) -> str | None:
    """Return the name of the reward that a deterministic site holds, or None if it holds none."""
    return site.removesuffix(SUFFIX) if site.endswith(SUFFIX) else None
