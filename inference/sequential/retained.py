r"""Exact draws of the posterior, one retained in each chain: they turn an estimate of log Z into an upper bound.

    \hat Z = (1/N) \sum_i w_i,    x_0 ~ \pi^*,  x_1, ..., x_{N-1} ~ q

    E[1 / \hat Z] <= 1 / Z,    E[log \hat Z] >= log Z

(the second by Jensen's inequality; the first is an equality unless all N weights can be 0 at once): bidirectional Monte
Carlo (Grosse, Ghahramani and Adams 2015, arXiv 1511.02543). With resampling, x_0 keeps its slot: conditional SMC
(Andrieu, Doucet and Holenstein 2010).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from bayeslm.inference.program import Particles, Program, ProgramError, assign_values, prompt_labels, run_particles
from bayeslm.posterior import Posterior

_REFUSED = {
    "weighted": "weighted draws are a proposal's",
    "particles": "weighted particles are a sampler's",
    "markov": "a Markov chain's draws only come near the posterior",
    "uncorrected": "their law is not known",
}


def check_retained(engine: Any) -> None:
    """:raises ValueError: if ``engine.retained`` is not of exact draws, one a chain at least."""
    retained: Posterior | None = engine.retained
    if retained is None:
        return
    name = type(engine).__name__
    if not isinstance(retained, Posterior):
        raise ValueError(f"{name}: retained must be a Posterior of exact draws, got {retained!r}")
    if retained.kind in _REFUSED:
        raise ValueError(
            f"{name}: retained must hold exact draws of the posterior (RejectionSampling, Exact), and "
            f"{_REFUSED[retained.kind]}: the upper bound would be none"
        )
    draws = retained.log_weights[..., 0].size
    if retained.kind == "exact" and draws < engine.num_chains:
        raise ValueError(f"{name}: {engine.num_chains} chains need a retained draw each, and there are {draws}")


def retained_particles(
    program: Program,
    retained: Posterior,
    num_chains: int,
    guide: Callable[..., Any] | None = None,
    *,
    batch_size: int | None = None,
    vectorize: bool = True,
) -> Particles:
    """The first draws of an exact posterior (drawn from it if it is enumerated), scored: one a chain.

    ``log_proposal`` is the guide's, run at these values; without one, the prior's.

    :raises ProgramError: if the draws are not of this program, or the guide cannot have proposed them.
    """
    if retained.kind == "enumerated":
        retained = retained.resample(num_chains, seed=int(torch.randint(2**31, ())))
    if retained.prompts != prompt_labels(program):
        raise ProgramError("the retained draws are of other prompts")

    def flat(x: Any) -> Tensor:
        return torch.as_tensor(x.reshape(-1, *x.shape[2:])[:num_chains])

    values = {}
    for site in program.latents:
        if site.name not in retained.samples or retained.samples[site.name].shape[2:] != site.shape:
            raise ProgramError(f"the retained draws have no {site.name!r} of shape {site.shape}")
        values[site.name] = flat(retained.samples[site.name]).to(site.value)
    size = (batch_size or program.max_particles) if vectorize else 1
    parts = []
    for i in range(0, num_chains, size):
        some = {name: value[i : i + size] for name, value in values.items()}
        with _Known(program), assign_values(program, some):
            parts.append(run_particles(program, guide, min(size, num_chains - i), vectorize=vectorize))
    particles = Particles.concatenate(parts)
    expected = flat(retained.log_joint).to(particles.log_joint)
    off = (particles.log_joint - expected).abs()
    if not (off <= 0.1 + 0.02 * expected.abs()).all():  # more than numerics of half precision explain
        raise ProgramError(
            f"the retained draws are of another program: their log-joint here is off by {off.max().item():.3g} nats"
        )
    if (particles.log_proposal == -torch.inf).any():
        raise ProgramError("the guide gives a retained draw probability 0: it does not cover the posterior")
    return particles


def retained_values(program: Program, retained: Posterior, num_chains: int) -> dict[str, Tensor]:
    """Values of the latent sites (chain, *batch, *event) of exact draws, checked as by `retained_particles`."""
    values = retained_particles(program, retained, num_chains).values
    return {site.name: values[site.name] for site in program.latents}


def in_front(kept: Particles, particles: Particles) -> Particles:
    """Particles, chain-major, with the first of each chain replaced by the chain's one of ``kept``."""
    chains = len(kept)
    each = len(particles) // chains
    index = chains + torch.arange(chains * each).reshape(chains, each)
    index[:, :1] = torch.arange(chains)[:, None]
    return Particles.concatenate([kept, particles])[index.flatten().to(kept.log_prior.device)]


class _Known(Messenger):
    """Refuses guides that draw more than the program's latents: what led to given latents is then not known."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self._program = program

    def _pyro_sample(self, msg: Any) -> None:
        if msg["infer"].get("is_auxiliary") and msg["name"] not in self._program.sites:
            raise ProgramError(
                f"the guide draws {msg['name']!r} besides the program's latents, so the probability that it proposes "
                "a retained draw is not known: use a guide without auxiliary variables"
            )
