r"""Retained draws: with one exact draw of the posterior in each chain, an estimate of log Z becomes an upper bound.

    \hat Z = (1/N) \sum_i w_i,    x_0 ~ \pi^*,  x_1, ..., x_{N-1} ~ q

    E[1 / \hat Z] <= 1 / Z,    E[log \hat Z] >= log Z

(the second by Jensen's inequality; the first is an equality unless all N weights can be 0 at once): bidirectional Monte
Carlo (Grosse, Ghahramani and Adams 2015, arXiv 1511.02543). With resampling, x_0 always survives: conditional SMC
(Andrieu, Doucet and Holenstein 2010).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from bayeslm.inference.program import Particles, Program, ProgramError, prompt_texts, score_values
from bayeslm.posterior import Posterior
from bayeslm.validation import validated

_REFUSED = {
    "weighted": "weighted draws have the distribution of a proposal",
    "particles": "weighted particles have the distribution of a sampler",
    "markov": "draws of a Markov chain have only approximately the distribution of the posterior",
    "uncorrected": "the distribution of uncorrected draws is not known",
}


def check_retained(engine: Any) -> None:
    """Check the setting ``retained`` of an engine.

    :raises ValueError: if it is neither None nor a `Posterior` of exact draws, at least one for each chain.
    """
    retained: Posterior | None = engine.retained
    if retained is None:
        return
    name = type(engine).__name__
    if not isinstance(retained, Posterior):
        raise ValueError(f"{name}: retained must be a Posterior of exact draws, got {retained!r}")
    if retained.kind in _REFUSED:
        raise ValueError(
            f"{name}: retained must hold exact draws of the posterior (RejectionSampling, Exact), but "
            f"{_REFUSED[retained.kind]}, and log Z would have no upper bound"
        )
    draws = retained.log_weights[..., 0].size
    if retained.kind == "exact" and draws < engine.num_chains:
        raise ValueError(f"{name}: retained has {draws} draws, fewer than num_chains={engine.num_chains}: draw more")


@validated
def retained_particles(
    program: Program,
    retained: Posterior,
    num_chains: int,
    guide: Callable[..., Any] | None = None,
    *,
    batch_size: int | None = None,
    vectorize: bool = True,
) -> Particles:
    """Score one retained draw for each chain.

    :param retained: a posterior of exact draws, whose first draws are used, or an enumerated one, which is sampled.
    :param guide: the proposal, whose density at these values is ``log_proposal``; None for the prior.
    :param batch_size: particles in one run; None for as many as bounded memory allows.
    :param vectorize: whether one run holds all particles of a batch.
    :returns: the retained draws, one particle for each chain.
    :raises ProgramError: if the draws are not of this program, or the guide cannot have proposed them.
    """
    if retained.kind == "enumerated":
        retained = retained.resample(num_chains, seed=int(torch.randint(2**31, ())))
    if retained.prompts != prompt_texts(program):
        raise ProgramError(f"the retained draws have other prompts than the program: {retained.prompts}")

    def flat(x: Any) -> Tensor:
        return torch.as_tensor(x.reshape(-1, *x.shape[2:])[:num_chains])

    values = {}
    for site in program.latents:
        if site.name not in retained.samples or retained.samples[site.name].shape[2:] != site.shape:
            raise ProgramError(f"the retained draws have no {site.name!r} of shape {site.shape}")
        values[site.name] = flat(retained.samples[site.name]).to(site.value)
    size = batch_size if vectorize else 1
    with _RefuseAuxiliary(program):
        particles = score_values(program, values, guide=guide, batch_size=size, vectorize=vectorize)
    expected = flat(retained.log_joint).to(particles.log_joint)
    off = (particles.log_joint - expected).abs()
    if not (off <= 0.1 + 0.02 * expected.abs()).all():  # more than the rounding of half precision
        raise ProgramError(
            f"the retained draws are of another program: their log-joint differs by {off.max().item():.3g} nats here"
        )
    if (particles.log_proposal == -torch.inf).any():
        raise ProgramError("the guide gives a retained draw probability 0: it does not cover the posterior")
    return particles


@validated
def retained_values(program: Program, retained: Posterior, num_chains: int) -> dict[str, Tensor]:
    """Return the latents (chain, *batch, *event) of one retained draw for each chain, by site.

    :raises ProgramError: if the draws are not of this program.
    """
    values = retained_particles(program, retained, num_chains).values
    return {site.name: values[site.name] for site in program.latents}


@validated
def put_first(retained: Particles, particles: Particles) -> Particles:
    """Replace the first particle of each chain by the chain's retained one.

    :param retained: one particle for each chain.
    :param particles: the particles of all chains, chain by chain.
    """
    chains = len(retained)
    each = len(particles) // chains
    index = chains + torch.arange(chains * each).reshape(chains, each)
    index[:, :1] = torch.arange(chains)[:, None]
    return Particles.concatenate([retained, particles])[index.flatten().to(retained.log_prior.device)]


class _RefuseAuxiliary(Messenger):
    """Refuse guides with auxiliary variables, whose values are not known for a retained draw."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self._program = program

    def _pyro_sample(self, msg: Any) -> None:
        if msg["infer"].get("is_auxiliary") and msg["name"] not in self._program.sites:
            raise ProgramError(
                f"the guide draws {msg['name']!r}, which is no latent of the program, so the probability that it "
                "proposes a retained draw is not known: use a guide without auxiliary variables"
            )
