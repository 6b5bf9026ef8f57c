"""Several runs of one engine as one: the fields of `bayeslm.Posterior.concatenate`."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any

import numpy as np

from bayeslm.posterior_draws import PosteriorDraws
from bayeslm.weights import (
    Array,
    Estimate,
    chain_log_evidence,
    conditional_log_evidence,
    log_evidence,
    quality,
)

ALIKE = ("kind", "engine", "prompts", "prompt_names", "dims", "conditional")
NOT_DRAWS = ("prior", "prior_rewards", "observed")  # mappings of other arrays than (chain, draw, ...)
COUNTS = ("tokens", "model_calls", "proposals", "processes")


def concatenate(posteriors: Sequence[PosteriorDraws]) -> dict[str, Any]:
    """Return the fields of the posterior of several runs; see `bayeslm.Posterior.concatenate`."""
    if not posteriors:
        raise ValueError("concatenate: no posteriors: give at least one")
    first = posteriors[0]
    for name in ALIKE:
        for other in posteriors:
            if getattr(other, name) != getattr(first, name):
                raise ValueError(
                    f"concatenate: {name} is {getattr(first, name)!r} of one run and {getattr(other, name)!r} of "
                    "another: only runs of one engine on one program and prompts are one posterior"
                )
    programs = [_settings(posterior) for posterior in posteriors]
    for own in programs:
        if different := {name for name in own.keys() & programs[0].keys() if own[name] != programs[0][name]}:
            name = min(different)
            raise ValueError(
                f"concatenate: {name} of the program is {programs[0][name]!r:.60} of one run and {own[name]!r:.60} of "
                "another: only runs of one engine on one program and prompts are one posterior"
            )
    if len(posteriors) == 1:
        return dict(vars(first))
    if first.kind == "enumerated":
        raise ValueError(
            "concatenate: posteriors must be of draws: an enumeration has every value once already, so one is complete"
        )
    for i, other in enumerate(posteriors):
        if any(_same(other.log_joint, one.log_joint) and _same_draws(other, one) for one in posteriors[:i]):
            raise ValueError(f"concatenate: run {i} has the draws of another run: give each a seed of its own, or none")
    sizes = {posterior.log_weights.shape[1] for posterior in posteriors}
    if len(sizes) > 1 and (first.kind in ("particles", "markov") or first.conditional):
        raise ValueError(
            f"concatenate: chains have {sorted(sizes)} draws: dependent draws of chains of different lengths are not "
            "one posterior"
        )

    def joined(arrays: Sequence[Array]) -> Array:
        return np.concatenate(arrays) if len(sizes) == 1 else _in_one_chain(arrays)

    def each(name: str, join: Callable[[Sequence[Array]], Array] = joined) -> dict[str, Array]:
        columns = [getattr(posterior, name) for posterior in posteriors]
        return {key: join([x[key] for x in columns]) for key in columns[0] if all(key in x for x in columns)}

    weights = joined([posterior.log_weights for posterior in posteriors])
    roots = None if first.roots is None else np.concatenate([_roots(posterior) for posterior in posteriors])
    evidence = _evidence(posteriors, weights, roots)
    bound = chain_log_evidence(weights).mean(0)
    has_bound = first.kind in ("weighted", "particles")
    highs = [x.log_evidence_high for x in posteriors]
    policies = {id(x.policy) for x in posteriors}
    mappings = [x.name for x in fields(first) if x.type == "dict[str, Array]"]
    draws = [name for name in mappings if name not in NOT_DRAWS]
    return (
        dict(vars(first))
        | {name: each(name) for name in draws}
        | {
            "log_weights": weights,
            "log_joint": joined([posterior.log_joint for posterior in posteriors]),
            "log_evidence": evidence[0],
            "log_evidence_stderr": evidence[1],
            "log_evidence_lower": bound if has_bound and not first.conditional else None,
            "log_evidence_upper": bound if has_bound and first.conditional else None,
            # each is right with 95%, and so is the highest of them
            "log_evidence_high": None if any(x is None for x in highs) else np.max(np.array(highs), axis=0),
            "roots": roots,
            "prior": each("prior", _in_one_chain),
            "prior_rewards": each("prior_rewards", _in_one_chain),
            "stats": _stats(posteriors, weights, alike=len(sizes) == 1),
            "policy": first.policy if len(policies) == 1 else None,
            "policy_path": first.policy_path if len({x.policy_path for x in posteriors}) == 1 else None,
        }
    )


def _settings(posterior: PosteriorDraws) -> dict[str, Any]:
    """Return the numbers of a program's description, and its reward; names of models may be folders of one machine."""
    program = posterior.stats.get("program")
    if not isinstance(program, dict):
        return {}
    found: dict[str, Any] = {name: x for name, x in program.items() if isinstance(x, int | float)}
    if isinstance(program.get("reward"), str):
        found["reward"] = re.sub(r" at 0x[0-9a-f]+", "", program["reward"])
    return found


def _roots(posterior: PosteriorDraws) -> Array:
    assert posterior.roots is not None  # particles have them
    return posterior.roots


def _in_one_chain(arrays: Sequence[Array]) -> Array:
    """Join independent draws, (1, draw, ...)."""
    return np.concatenate([x.reshape(1, -1, *x.shape[2:]) for x in arrays], axis=1)


def _evidence(posteriors: Sequence[PosteriorDraws], weights: Array, roots: Array | None) -> Estimate:
    """Return log Z of all runs, and its standard error."""
    first = posteriors[0]
    if first.conditional:
        return conditional_log_evidence(weights)
    if first.kind in ("weighted", "particles"):
        return log_evidence(weights, roots)
    # The weights say nothing: the mean of the runs' estimates, by the numbers of their proposals or draws.
    each = np.array([x.log_evidence for x in posteriors])
    errors = np.array([x.log_evidence_stderr for x in posteriors])
    sizes = np.array([x.stats.get("proposals", x.log_weights[..., 0].size) for x in posteriors], dtype=float)
    highest = each.max(0)
    parts = (sizes / sizes.sum())[:, None] * np.exp(each - np.where(np.isfinite(highest), highest, 0.0))
    total = parts.sum(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        known = np.where(parts > 0, parts * errors, 0.0)
        return np.log(total) + highest, np.sqrt(np.square(known).sum(0)) / total


def _stats(posteriors: Sequence[PosteriorDraws], weights: Array, *, alike: bool) -> dict[str, Any]:
    """Return the statistics of all runs: sums of counts, figures of chains joined, and what is the same in all."""
    stats = [posterior.stats for posterior in posteriors]
    chains, kind = [len(posterior.log_weights) for posterior in posteriors], posteriors[0].kind
    found: dict[str, Any] = {"runs": len(posteriors)}
    for key in [key for key in stats[0] if all(key in x for x in stats)]:
        values = [x[key] for x in stats]
        if kind == "particles" and key in STEPS:
            values = [STEPS[key](x, max(map(len, (y[0] for y in values)))) for x in values]
        of_chains = alike and all(_is_of_chains(x, n, kind) for x, n in zip(values, chains, strict=True))
        if key in COUNTS:
            found[key] = sum(values)
        elif key == "seconds":
            found[key] = max(values)
        elif key == "interrupted":
            found[key] = any(values)
        elif of_chains and len({x.shape[1:] for x in values}) == 1:
            found[key] = np.concatenate(values)
        elif all(_same(value, values[0]) for value in values):
            found[key] = values[0]
    return found | (quality(weights) if kind == "weighted" else {})


def _is_of_chains(value: Any, chains: int, kind: str) -> bool:
    """Return whether a figure is (chain, step, ...); what Markov chains have adapted to is (temperature, prompt)."""
    return isinstance(value, np.ndarray) and value.ndim > 1 + (kind == "markov") and len(value) == chains


def _continued(values: Array, steps: int) -> Array:
    """Return figures (chain, step, ...) with so many steps, the last one repeated."""
    return np.concatenate([values, np.repeat(values[:, -1:], steps - values.shape[1], axis=1)], axis=1)


def _not_resampled(values: Array, steps: int) -> Array:
    return np.concatenate([values, np.zeros_like(_continued(values, steps)[:, values.shape[1] :])], axis=1)


def _in_place(values: Array, steps: int) -> Array:
    """Return ancestors (chain, step, draw, prompt) with so many steps, each particle its own in those that are new."""
    more = _not_resampled(values, steps)
    more[:, values.shape[1] :] = np.arange(values.shape[2])[:, None]
    return more


# figures of particles, whose runs have different numbers of steps where their ladders adapt
STEPS: dict[str, Callable[[Array, int], Array]] = {
    "ess_by_step": _continued,
    "inverse_temperatures": _continued,
    "resampled": _not_resampled,
    "ancestors": _in_place,
}


def _same_draws(one: PosteriorDraws, other: PosteriorDraws) -> bool:
    return all(_same(x, other.samples.get(name)) for name, x in one.samples.items())


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, np.ndarray) or isinstance(other, np.ndarray):
        return np.array_equal(np.asarray(one), np.asarray(other))
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    return bool(one == other)
