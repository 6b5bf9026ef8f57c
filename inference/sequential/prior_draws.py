"""Draws of the prior with what a twist is learned from: the network's hidden states before each token.

They are recorded while the completions are written, which costs no pass of the network.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bayeslm.inference.program import PartialRun, Particles, Program
from bayeslm.models.lm import Autoregressive, Decoder, categorical, generate

from .resampling import systematic
from .twists import PrefixTwist, SiteRows


class SiteDraws(NamedTuple):
    """Completions of one site with features of each token, (row, token).

    ``hidden`` (row, token, width) is the hidden state before it, ``tokens`` its id, ``written`` whether there is a
    token, ``ends`` whether the text ends with it, ``so_far`` the sum of the program's terms of the text up to it (0
    if the twist does not use them).
    """

    hidden: Tensor
    tokens: Tensor
    written: Tensor
    ends: Tensor
    so_far: Tensor


class PriorDraws(NamedTuple):
    """Particles of the prior, (particle, prompt) their log-likelihood, and their completions by site.

    Where a sampler drew, the last two are resampled towards the prior, and the particles are the sampler's.
    """

    particles: Particles
    log_likelihood: Tensor
    sites: dict[str, SiteDraws]


def draw_prior(program: Program, names: list[str], size: int, *, reads_reward: bool = False) -> PriorDraws:
    """Draw particles from the prior, with the features of the completions of some sites.

    :param names: of the sites. A sampler, if the language model has one, draws the completions of a single one.
    :param size: the number of particles.
    :param reads_reward: whether to evaluate the program's terms of each unfinished text.
    """
    partial_run = PartialRun(program, size, retained={}, slots=torch.arange(0, device=program.device))
    draws: dict[str, SiteDraws] = {}
    sampled: tuple[SiteRows, Tensor] | None = None
    while not partial_run.complete:
        name, distribution = partial_run.advance()
        partial_run.begin(name, distribution)
        if [name] == names and distribution.is_sampled and not reads_reward:
            rows = SiteRows(program, name, distribution)
            draws[name], log_p, log_weights = _draw_by_sampler(distribution)
            sampled = rows, rows.pooled(log_weights.sum(-1))
            partial_run.write(name, draws[name].tokens, log_p)
            continue
        decoder = distribution.decoder()
        if name not in names:
            partial_run.write(name, *generate(decoder))
            continue
        prefix_twist = None
        if reads_reward:
            prefix_twist = PrefixTwist(partial_run, SiteRows(program, name, distribution), decoder, partial=True)
        draws[name] = _write(decoder, distribution.max_new_tokens, prefix_twist)
        partial_run.write(name, decoder.values, decoder.scores)
    particles = partial_run.finish()
    found = PriorDraws(particles, particles.total_log_likelihood, draws)
    return found if sampled is None else _resampled(found, *sampled)


def _write(decoder: Decoder, length: int, prefix_twist: PrefixTwist | None) -> SiteDraws:
    """Write completions of at most ``length`` tokens; return them with their features."""
    hidden = decoder.hidden.new_zeros((len(decoder.values), length, decoder.hidden.shape[-1]))
    written, ends = (torch.zeros_like(decoder.values, dtype=torch.bool) for _ in range(2))
    so_far = torch.zeros_like(decoder.scores)
    while not decoder.done:
        t = decoder.t
        hidden[:, t], written[:, t] = decoder.hidden, ~decoder.finished
        decoder.append(*categorical(decoder.logits))
        ends[:, t] = decoder.finished & written[:, t]
        if prefix_twist is not None:
            so_far[:, t] = prefix_twist.by_rows()
    return SiteDraws(hidden, decoder.values, written, ends, so_far)


def _draw_by_sampler(distribution: Autoregressive) -> tuple[SiteDraws, Tensor, Tensor]:
    """Draw completions by the language model's sampler; return them, log p of their tokens, and log p / s of these."""
    value = distribution.sample()
    log_s = distribution.proposal_token_log_prob(value)
    assert log_s is not None
    log_p, hidden = distribution.token_log_prob_and_hidden(value)
    log_p, log_s, tokens = (x.reshape(-1, x.shape[-1]) for x in (log_p, log_s, value))
    written = distribution.vocabulary.is_live(tokens)
    ends = written & distribution.vocabulary.is_end(tokens)
    hidden = hidden.reshape(*tokens.shape, -1)
    return SiteDraws(hidden, tokens, written, ends, torch.zeros_like(log_p)), log_p, log_p - log_s


def _resampled(draws: PriorDraws, rows: SiteRows, log_weights: Tensor) -> PriorDraws:
    """Return draws of the prior: those of a sampler, resampled by p / s, (particle, prompt)."""
    index = systematic(log_weights.T).T
    likelihood = draws.log_likelihood.gather(0, index.expand(-1, draws.log_likelihood.shape[1]))
    texts = rows.selected(index)
    sites = {name: SiteDraws(*(x[texts] for x in site)) for name, site in draws.sites.items()}
    return PriorDraws(draws.particles, likelihood, sites)
