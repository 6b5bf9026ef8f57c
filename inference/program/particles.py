"""Particles: runs of a program with their log-densities, the one record that engines weigh, select and combine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .program import Program
from .tensors import along


@dataclass(frozen=True)
class Particles:
    """Runs of a program; the particle is the first axis of every tensor.

    :param values: of latent and deterministic sites, (particle, *batch, *event).
    :param log_prior: log p of all latents, (particle, prompt).
    :param log_proposal: log q of all latents, (particle, prompt); the prior's where the prior proposed.
    :param log_likelihood: the term of each factor and each observed site, (particle, prompt).
    :param token_log_prob: log p of each token of a completion, (particle, *batch, token).
    :param pointwise: the log-likelihood of each observation of a site whose plates do not include the prompts',
        (particle, *batch).
    :param auxiliary: values of sites that the guide has and the program lacks, (particle, ...).
    :param proposal_token_log_prob: log q of each token of the completions that a guide drew,
        (particle, *batch, token).
    :param log_left_out: log p of the latents that a guide leaves to the prior, (particle, prompt); it is part of
        ``log_prior`` and of ``log_proposal``. None without a guide.
    :param prompts: indices of the minibatch's prompts, (particle, prompt); None if the program has all of them.
    """

    values: dict[str, Tensor]
    log_prior: Tensor
    log_proposal: Tensor
    log_likelihood: dict[str, Tensor]
    token_log_prob: dict[str, Tensor] = field(default_factory=dict)
    pointwise: dict[str, Tensor] = field(default_factory=dict)
    auxiliary: dict[str, Tensor] = field(default_factory=dict)
    proposal_token_log_prob: dict[str, Tensor] = field(default_factory=dict)
    log_left_out: Tensor | None = None
    prompts: Tensor | None = None

    def __len__(self) -> int:
        return len(self.log_prior)

    @property
    def total_log_likelihood(self) -> Tensor:
        """The sum of all factors and observations, (particle, prompt)."""
        return sum(self.log_likelihood.values(), torch.zeros_like(self.log_prior))

    @property
    def log_joint(self) -> Tensor:
        """log p(x) + the log-likelihood, (particle, prompt)."""
        return self.log_prior + self.total_log_likelihood

    @property
    def log_weights(self) -> Tensor:
        """log p(x) + the log-likelihood - log q(x), (particle, prompt)."""
        return self.log_joint - self.log_proposal

    def __getitem__(self, index: Any) -> Particles:
        """The particles that an index of the first axis selects."""
        return _combine([self], lambda _, x: x[0][index], lambda x: x[0][index])

    def gather(self, program: Program, index: Tensor) -> Particles:
        """Particles that have, for each prompt, the values of the particle that ``index`` (draw, prompt) names."""
        if program.shared:
            return self[index[:, 0].to(self.log_prior.device)]
        return _combine(
            [self.inside_prompts(program)],
            lambda name, x: program.take(name, x[0], index),
            lambda x: along(x[0], 1, index),
        )

    def inside_prompts(self, program: Program) -> Particles:
        """The particles with the values of sites inside the plate of prompts alone."""
        inside = {name: value for name, value in self.values.items() if "prompt" in program.sites[name].dims}
        return replace(self, values=inside, pointwise={}, auxiliary={}, proposal_token_log_prob={})

    @staticmethod
    def concatenate(parts: list[Particles]) -> Particles:
        """The particles of all parts, one after another."""
        return parts[0] if len(parts) == 1 else _combine(parts, lambda _, x: torch.cat(x), torch.cat)

    @staticmethod
    def side_by_side(program: Program, parts: list[Particles]) -> Particles:
        """The particles of each of a program's `chunks`, as particles of all its prompts."""
        join, sites = program.side_by_side, program.sites
        return _combine(
            [replace(part.inside_prompts(program), prompts=None) for part in parts],
            lambda name, x: join(x, 1 + sites[name].dims.index("prompt")),
            lambda x: join(x, 1),
        )


def _combine(
    parts: list[Particles], value: Callable[[str, list[Tensor]], Tensor], term: Callable[[list[Tensor]], Tensor]
) -> Particles:
    """Combine records of what all of them have: ``value`` the tensors of a site, ``term`` those (particle, prompt)."""

    def by_site(name: str) -> dict[str, Tensor]:
        columns = [getattr(part, name) for part in parts]
        common = [site for site in columns[0] if all(site in column for column in columns)]
        return {site: value(site, [column[site] for column in columns]) for site in common}

    def optional(name: str) -> Tensor | None:
        columns = [getattr(part, name) for part in parts]
        return None if any(column is None for column in columns) else term(columns)

    return Particles(
        values=by_site("values"),
        log_prior=term([part.log_prior for part in parts]),
        log_proposal=term([part.log_proposal for part in parts]),
        log_likelihood={name: term([part.log_likelihood[name] for part in parts]) for name in parts[0].log_likelihood},
        token_log_prob=by_site("token_log_prob"),
        pointwise=by_site("pointwise"),
        auxiliary=by_site("auxiliary"),
        proposal_token_log_prob=by_site("proposal_token_log_prob"),
        log_left_out=optional("log_left_out"),
        prompts=optional("prompts"),
    )
