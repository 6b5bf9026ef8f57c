"""Values in the place of a program's latents: the assignments of `handlers.Assign` for values that are known."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from bayeslm.models.lm import Autoregressive

from .handlers import Assign, Assignment
from .particles import Particles, run_particles
from .program import Program


def score_values(
    program: Program,
    values: Mapping[str, Tensor],
    token_log_prob: Mapping[str, Tensor] | None = None,
    *,
    guide: Callable[..., Any] | None = None,
    batch_size: int | None = None,
    vectorize: bool = True,
    report: Callable[[int], None] = lambda num: None,
) -> Particles:
    """Run and score the program at the values of its latents, in batches of bounded memory.

    :param values: all latents by site, (particle, *batch, *event).
    :param token_log_prob: log p of the tokens of completions where it is known, see `assign_values`.
    :param guide: the proposal, scored at the same values; None for the prior.
    :param batch_size: particles in one batch; None for as many as bounded memory allows.
    :param vectorize: see `run_particles`.
    :param report: called after each batch with its number of particles.
    """
    known, parts = token_log_prob or {}, []
    for rows in torch.arange(len(next(iter(values.values())))).split(batch_size or program.particles_a_run):
        some, scores = ({name: x[rows.to(x.device)] for name, x in of.items()} for of in (values, known))
        with assign_values(program, some, scores):
            parts.append(run_particles(program, guide, len(rows), vectorize=vectorize))
        report(len(rows))
    return Particles.concatenate(parts)


def assign_values(
    program: Program, values: Mapping[str, Tensor], token_log_prob: Mapping[str, Tensor] | None = None
) -> Assign:
    """Return the handler that puts values in the place of a program's latents.

    :param values: by site, (particle, *batch, *event); sites that are not among them are sampled.
    :param token_log_prob: by site, log p of the tokens of completions where it is known, (particle, *batch, token).
        It is used where the site has the prompts it had when the program was inspected, so that the values of other
        latents cannot have changed its distribution.
    """
    known = token_log_prob or {}

    def assignment(name: str, value: Tensor) -> Callable[[Any], Assignment]:
        value = program.under_plate(name, value)
        score = program.under_plate(name, known[name]) if name in known else None
        inspected = program.sites[name].fn
        return lambda fn: (value, score if score is not None and same_distribution(fn, inspected) else None)

    return Assign({name: assignment(name, value) for name, value in values.items()})


def same_distribution(fn: Any, other: Any) -> bool:
    """Whether two distributions of completions are equal: one network, the same settings, the same prompts."""
    return isinstance(fn, Autoregressive) and isinstance(other, Autoregressive) and fn.is_same(other)
