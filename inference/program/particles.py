"""Runs of a program, many at once: what engines weigh, pick and put together."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .program import Program
from .tensors import along


@dataclass
class Particles:
    """Runs of a program, particle first.

    ``values[name]`` (particle, *batch, *event); ``log_prior`` and ``log_proposal`` of all latents and each
    ``log_likelihood`` term (particle, prompt); ``token_scores[name]`` (particle, *batch, token), log p of each token
    of a completion; ``pointwise[name]`` (particle, *batch), the log-likelihood of each observation of a site whose
    plates are its own and not the prompts'.
    """

    values: dict[str, Tensor]
    log_prior: Tensor
    log_proposal: Tensor
    log_likelihood: dict[str, Tensor]
    token_scores: dict[str, Tensor]
    pointwise: dict[str, Tensor] = field(default_factory=dict)

    @property
    def total_log_likelihood(self) -> Tensor:
        """The sum of all factors and observations."""
        return sum(self.log_likelihood.values(), torch.zeros_like(self.log_prior))

    @property
    def log_joint(self) -> Tensor:
        return self.log_prior + self.total_log_likelihood

    @property
    def log_weights(self) -> Tensor:
        """log p(x, reward) - log q(x)."""
        return self.log_joint - self.log_proposal

    def __getitem__(self, index: Any) -> Particles:
        return Particles(
            {name: value[index] for name, value in self.values.items()},
            self.log_prior[index],
            self.log_proposal[index],
            {name: term[index] for name, term in self.log_likelihood.items()},
            {name: scores[index] for name, scores in self.token_scores.items()},
            {name: term[index] for name, term in self.pointwise.items()},
        )

    def gather(self, program: Program, index: Tensor) -> Particles:
        """New particles that have, for each prompt, the particles that ``index`` (draw, prompt) names."""
        if program.shared:
            return self[index[:, 0].to(self.log_prior.device)]
        inside = [name for name in self.values if "prompt" in program.sites[name].dims]
        return Particles(
            {name: program.take(name, self.values[name], index) for name in inside},
            along(self.log_prior, 1, index),
            along(self.log_proposal, 1, index),
            {name: along(term, 1, index) for name, term in self.log_likelihood.items()},
            {name: program.take(name, scores, index) for name, scores in self.token_scores.items()},
        )

    @staticmethod
    def concatenate(parts: list[Particles]) -> Particles:
        return Particles(
            {name: torch.cat([p.values[name] for p in parts]) for name in parts[0].values},
            torch.cat([p.log_prior for p in parts]),
            torch.cat([p.log_proposal for p in parts]),
            {name: torch.cat([p.log_likelihood[name] for p in parts]) for name in parts[0].log_likelihood},
            {name: torch.cat([p.token_scores[name] for p in parts]) for name in parts[0].token_scores},
            {name: torch.cat([p.pointwise[name] for p in parts]) for name in parts[0].pointwise},
        )

    @staticmethod
    def side_by_side(program: Program, parts: list[Particles]) -> Particles:
        """The particles of each of a program's `chunks`, as particles of all its prompts."""
        join, sites = program.side_by_side, program.sites
        inside = {
            name: 1 + sites[name].dims.index("prompt") for name in parts[0].values if "prompt" in sites[name].dims
        }
        return Particles(
            {name: join([p.values[name] for p in parts], axis) for name, axis in inside.items()},
            join([p.log_prior for p in parts], 1),
            join([p.log_proposal for p in parts], 1),
            {name: join([p.log_likelihood[name] for p in parts], 1) for name in parts[0].log_likelihood},
            {name: join([p.token_scores[name] for p in parts], inside[name]) for name in parts[0].token_scores},
        )
