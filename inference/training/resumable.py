"""Whether a checkpoint's state is one that its training can have written, before anything of it is put back.

Checksums find damage; who edits a checkpoint can compute them anew. So types, ranges, names and shapes are held against
the run, and entries against each other. A value that the training could have had is not told from the one it had.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bayeslm.models.lm import own_part
from bayeslm.validation import Finite, Natural, NonNegative, Positive, validated

from .state import State, within

MOMENTS = {"exp_avg", "exp_avg_sq", "step"}  # of Adam, of each parameter
A_STEP = ("elbo", "gradient_norm", "inverse_temperature")  # figures that every step notes
SOME = ("moved", "learning_rate", "kl", "log_likelihood", "reward", "log_evidence", "prompts")  # that every step may
ANY = -1  # of the sizes of an axis


@validated
@dataclass(frozen=True)
class Used:
    """The work of a run until its checkpoint."""

    seconds: NonNegative
    model_calls: Natural
    tokens: Natural
    mismatch: tuple[NonNegative, NonNegative, NonNegative] | None
    drawn: Mapping[str, Any] | None

    def __post_init__(self) -> None:
        DrawnNumbers(**(self.drawn or {}))


@validated
@dataclass(frozen=True)
class DrawnNumbers:
    """What `Usage` has of a sampler's draws."""

    draws: Natural = 0
    stale: Natural = 0
    tokens: Natural = 0
    largest: NonNegative = 0.0
    total: NonNegative = 0.0
    log_weights: Finite = 0.0
    log_squares: Finite = 0.0
    warned: bool = False


@validated
@dataclass(frozen=True)
class BestNumbers:
    """The numbers of `Best`."""

    step: Natural
    elbo: float | None
    since: Natural


@validated
@dataclass(frozen=True)
class Values:
    """The entries of a checkpoint's header that are a chain's state."""

    step: Natural
    samples: Natural
    train_seconds: NonNegative
    ended: bool
    gamma: Positive
    used: Mapping[str, Any]
    best: Mapping[str, Any]
    numpy: Sequence[Any]
    random: Sequence[Any]

    def __post_init__(self) -> None:
        Used(**self.used)
        best = BestNumbers(**self.best)
        if max(best.step, best.since) > self.step or (best.elbo is None) != (best.step == 0):
            raise ValueError(f"the best of {self.step} steps is step {best.step} of ELBO {best.elbo}")


def check_values(values: Mapping[str, Any], *, can_end: bool) -> None:
    """Check the values of a checkpoint.

    :param can_end: whether the training has callbacks, which alone end it early and move the inverse temperature.
    :raises TypeError: if one is of another type, missing, or unknown.
    :raises ValueError: if one is out of range, or contradicts another.
    """
    checked = Values(**values)
    if not can_end and (checked.ended or checked.gamma != 1.0):
        raise ValueError(
            f"no callback of this run can have ended it (ended is {checked.ended}), or have moved its inverse "
            f"temperature to {checked.gamma}"
        )


def check_tensors(tensors: State, params: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
    """Check the parameters, Adam's moments and the figures in a checkpoint.

    :param params: all that this run's guide has, by name.
    :param values: of the checkpoint, checked.
    :raises ValueError: if one does not fit; with its name.
    """
    kept = within("param", tensors)
    if missing := sorted(kept.keys() - params.keys()):
        raise ValueError(f"the checkpoint is of another guide: this one has no parameter {missing[0]!r}")
    for name, x in kept.items():
        if params[name].shape != x.shape:
            raise ValueError(f"the checkpoint is of another guide: {name!r} has the shape {tuple(x.shape)} there")
        check_tensor(name, x, x.shape, like=params[name])
    for name, x in within("best", tensors).items():
        if name not in kept:
            raise ValueError(f"the best step has the parameter {name!r}, and the last one has not")
        check_tensor(f"best.{name}", x, kept[name].shape, like=params[name])
    found: dict[str, set[str]] = {}
    for entry, x in within("adam", tensors).items():
        key, _, name = entry.partition(".")
        if name:  # without one it is the optimizer's own
            found.setdefault(name, set()).add(key)
            if name not in kept:
                raise ValueError(f"Adam has moments of {name!r}, which is no parameter")
            check_tensor(f"adam.{entry}", x, () if key == "step" else kept[name].shape)
    if wrong := next((name for name, keys in found.items() if keys != MOMENTS), None):
        raise ValueError(f"Adam's moments of {wrong!r} are {', '.join(sorted(found[wrong]))}")
    _check_history(within("history", tensors), values["step"], values["best"]["elbo"])
    places = {"param", "best", "adam", "history", "objective", "callbacks", "rng"}
    if unknown := [name for name in tensors if name.partition(".")[0] not in places]:
        raise ValueError(f"the tensor {unknown[0]!r} is none of a checkpoint")


def _check_history(history: State, steps: int, best: float | None) -> None:
    for name, x in history.items():
        if name in SOME and (not x.dim() or len(x) != steps or (name != "prompts" and not x.is_floating_point())):
            raise ValueError(f"history.{name} cannot be {x.dtype} of the shape {tuple(x.shape)} after {steps} steps")
        if not x.dim():
            raise ValueError(f"history.{name} has no steps")
    for name in A_STEP if steps else ():
        check_tensor(f"history.{name}", history.get(name), (steps, *(ANY,) * (name == "elbo")), finite=False)
    if best is not None:
        means = history["elbo"].double().mean(-1)
        if not float(means.min()) - 1e-6 <= best <= float(means.max()) + 1e-6:
            raise ValueError(f"the best part of the training has the mean ELBO {best:.6g}, and no step has")


def check_first(history: Mapping[str, Sequence[Any]], noted: Collection[str], steps: int) -> None:
    """Check the figures of all steps after the first step that follows a checkpoint.

    :param history: by name, each step's.
    :param noted: the names of those that this step has noted.
    :raises ValueError: if steps before had others; with a name.
    """
    for name in noted:
        *before, last = history[name]
        if len(history[name]) != steps or any(x.shape != last.shape or x.dtype != last.dtype for x in before):
            raise ValueError(f"history.{name} is not what {steps - 1} steps of this training note")


def check_tensor(
    name: str,
    x: Tensor | None,
    shape: Sequence[int],
    *,
    like: Tensor | None = None,
    whole: bool = False,
    finite: bool = True,
) -> None:
    """Check a tensor of a checkpoint.

    :param shape: what it must have; `ANY` for any size.
    :param like: has its dtype; None for any floating one.
    :param whole: whether it holds integers of 64 bits.
    :param finite: whether its numbers must be; they are never NaN.
    :raises ValueError: if it does not fit.
    """
    if x is None:
        raise ValueError(f"{name} is missing")
    fits = x.dim() == len(shape) and all(m in (ANY, n) for n, m in zip(x.shape, shape, strict=True))
    of_dtype = x.dtype == torch.int64 if whole else x.is_floating_point() if like is None else x.dtype == like.dtype
    if not fits or not of_dtype:
        raise ValueError(f"{name} cannot be {x.dtype} of the shape {tuple(x.shape)}")
    was_finite = like is None or bool(own_part(like).isfinite().all())
    if not whole and was_finite and bool((~x.isfinite() if finite else x.isnan()).any()):
        raise ValueError(f"{name} holds numbers that are {'not finite' if finite else 'NaN'}")


def check_indices(name: str, x: Tensor | None, size: int) -> None:
    """Check a tensor of indices below ``size``.

    :raises ValueError: if it does not fit.
    """
    check_tensor(name, x, (ANY,), whole=True)
    assert x is not None
    if len(x) and not 0 <= int(x.min()) <= int(x.max()) < size:
        raise ValueError(f"{name} holds indices outside 0 to {size - 1}")


@contextlib.contextmanager
def resuming(path: object) -> Iterator[None]:
    """Raise what is wrong with a checkpoint as a `ValueError` with its path.

    :param path: of the checkpoint.
    """
    try:
        yield
    except (ValueError, TypeError, LookupError, RuntimeError, ArithmeticError, AttributeError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise ValueError(
            f"{path} cannot be resumed: {reason[:300]}. Put a good copy in its place, or remove it to start again"
        ) from error
