"""Whether the fields of a posterior fit together: their shapes, names and values."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from bayeslm.weights import Array

KINDS = ("enumerated", "exact", "weighted", "particles", "markov", "uncorrected")


class CheckedFields(Protocol):
    """The fields of a `bayeslm.Posterior` that are checked; those that are checked alike are found by name."""

    samples: dict[str, Array]
    log_weights: Array
    log_joint: Array
    log_likelihood: dict[str, Array]
    kind: str
    dims: dict[str, tuple[str, ...]]
    prompts: list[str]
    rewards: dict[str, Array]
    prompt_names: list[str]
    texts: dict[str, Array]
    sample_stats: dict[str, Array]
    prior: dict[str, Array]
    prior_rewards: dict[str, Array]
    roots: Array | None


def check_fields(posterior: CheckedFields) -> None:
    """Check the shapes, names and values of a posterior's fields against each other.

    :raises ValueError: if they contradict each other; with the name of a field.
    """
    if posterior.kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, not {posterior.kind!r}")
    rows, weights = len(posterior.prompts), posterior.log_weights
    if weights.ndim != 3 or weights.size == 0 or weights.shape[2] not in (1, rows):
        raise ValueError(
            f"log_weights must be (chain, draw, {rows}), or (chain, draw, 1) where prompts share a latent, "
            f"and not empty; got {weights.shape}"
        )
    if posterior.prompt_names and len(posterior.prompt_names) != rows:
        raise ValueError(f"prompt_names has {len(posterior.prompt_names)} names for {rows} prompts")
    leading, columns = weights.shape[:2], weights.shape[2]

    def expect(name: str, array: Array, shape: tuple[int, ...]) -> None:
        if array.shape != shape:
            raise ValueError(f"{name} must have shape {shape}, not {array.shape}")

    expect("log_joint", posterior.log_joint, weights.shape)
    terms = {f"log_likelihood[{name!r}]": x for name, x in posterior.log_likelihood.items()}
    rewards = {f"rewards[{name!r}]": x for name, x in posterior.rewards.items()}
    for name, array in (terms | rewards).items():
        if array.shape != (*leading, rows):  # a shared latent's own term has one column
            expect(name, array, weights.shape)
    for name, array in {"log_weights": weights, "log_joint": posterior.log_joint, **terms, **rewards}.items():
        if np.isnan(array).any() or np.isposinf(array).any():
            raise ValueError(f"{name} must be finite or -inf: found NaN or +inf")
    for name in (
        "log_evidence",
        "log_evidence_stderr",
        "log_evidence_lower",
        "log_evidence_upper",
        "log_evidence_high",
    ):
        if (array := getattr(posterior, name)) is not None:
            expect(name, array, (columns,))

    if (posterior.roots is None) == (posterior.kind == "particles"):
        raise ValueError(f"roots belong to particles and to them alone: kind is {posterior.kind!r}")
    if posterior.roots is not None:
        expect("roots", posterior.roots, weights.shape)
        inside = (posterior.roots >= 0) & (posterior.roots < leading[1])
        if posterior.roots.dtype.kind not in "iu" or not inside.all():
            raise ValueError(f"roots must be indices of a chain's particles, 0 to {leading[1] - 1}")

    for name, array in posterior.samples.items():
        dims = posterior.dims.get(name, ())
        if array.dtype.kind not in "biuf":
            raise ValueError(f"samples[{name!r}] must hold numbers, not {array.dtype}")
        if array.shape[:2] != leading or array.ndim != 2 + len(dims):
            raise ValueError(f"samples[{name!r}] must be {leading} + dims {dims}, not {array.shape}")
        if len(set(dims)) != len(dims) or {"chain", "draw"} & set(dims):
            raise ValueError(f"dims[{name!r}] must be different names other than chain and draw, not {dims}")
        if "prompt" in dims:
            axis = 2 + dims.index("prompt")
            expect(f"samples[{name!r}]", array, (*array.shape[:axis], rows, *array.shape[axis + 1 :]))
        elif columns > 1:
            raise ValueError(
                f'samples[{name!r}] has no axis "prompt", so prompts share it: log_weights must then have '
                f"one column for all prompts, not {columns}"
            )
    for name, array in posterior.sample_stats.items():
        if array.shape not in (leading, (*leading, 1), (*leading, rows)):
            raise ValueError(f"sample_stats[{name!r}] must be {leading}, or with one value a prompt, not {array.shape}")
    for group in ("pointwise", "predictive"):
        for name, array in getattr(posterior, group).items():
            dims = posterior.dims.get(name, ())
            if array.shape[:2] != leading or not 2 < array.ndim <= 2 + len(dims):
                raise ValueError(f"{group}[{name!r}] must be {leading} + dims {dims}, not {array.shape}")
    for group in ("texts", "lengths", "truncated"):
        for name, array in getattr(posterior, group).items():
            if name not in posterior.samples or not posterior.dims.get(name):
                raise ValueError(f"{group}[{name!r}] has no token ids in samples[{name!r}]")
            expect(f"{group}[{name!r}]", array, posterior.samples[name].shape[:-1])
    for group in ("token_log_ratio", "token_ends"):
        for name, array in getattr(posterior, group).items():
            if name not in posterior.texts:
                raise ValueError(f"{group}[{name!r}] has no texts[{name!r}]")
            expect(f"{group}[{name!r}]", array, posterior.samples[name].shape)
    if twice := posterior.rewards.keys() & posterior.samples.keys():
        raise ValueError(f"{min(twice)!r} names a reward and a sample: give one of them another name")
    for name, array in posterior.prior_rewards.items():
        if array.ndim != 3 or array.shape[2] not in (1, rows):
            raise ValueError(f"prior_rewards[{name!r}] must be (chain, draw, {rows}), not {array.shape}")
    for name, array in posterior.prior.items():
        if array.ndim < 2 or array.shape[:2] != next(iter(posterior.prior.values())).shape[:2]:
            raise ValueError(f"prior[{name!r}] is not (chain, draw, ...) like its others, but {array.shape}")
