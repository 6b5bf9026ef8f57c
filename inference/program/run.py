"""A Pyro program run for many particles at once.

All particles stand in one outermost plate, as in Pyro's own vectorised ELBOs, and every term of the log-joint is
brought to the shape (particle, prompt). Where the plate of prompts is subsampled, a run has some of the prompts
(`minibatches`).
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from dataclasses import replace
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor

from .errors import ProgramError, explained
from .particles import Particles
from .program import PARTICLES, Program, Site, in_prompts, sample_sites


def traces(
    program: Program, guide: Callable[..., Any] | None, num_particles: int, *, vectorize: bool = True
) -> tuple[Trace, Trace | None]:
    """Model and guide traces of particles in one outermost plate; without a guide the model proposes."""

    def in_plate(fn: Callable[..., Any]) -> Callable[..., Any]:
        if not vectorize:
            return fn
        return pyro.plate(PARTICLES, num_particles, dim=-1 - program.max_plate_nesting)(fn)

    guide_trace = None
    model = program.pinned(program.model)
    if guide is not None:
        guide_trace = poutine.trace(in_plate(program.pinned(guide))).get_trace(*program.args, **program.kwargs)
        guide_trace = prune_subsample_sites(guide_trace)
        for name, node in sample_sites(guide_trace):
            if name not in program.sites and not node["infer"].get("is_auxiliary"):
                raise ProgramError(f"the guide samples {name!r}, which the program does not have")
            if not program.shared and not in_prompts(node):
                raise ProgramError(
                    f"the guide samples {name!r} outside the plate 'prompts', and the program's prompts are posteriors "
                    "of their own: put it inside the plate (AutoNormal does), or a latent of the program outside"
                )
        model = poutine.replay(model, trace=guide_trace)
    with explained():
        model_trace = poutine.trace(in_plate(model)).get_trace(*program.args, **program.kwargs)
    return prune_subsample_sites(model_trace), guide_trace


def site_terms(program: Program, trace: Trace, num_particles: int, *, skip: Container[str] = ()) -> dict[str, Tensor]:
    """The log_prob of every site of a trace but ``skip``, (particle, prompt), checked: no NaN, no +inf."""
    trace.compute_log_prob(site_filter=lambda name, node: name not in skip)
    terms = {}
    for name, node in sample_sites(trace):
        if name in skip or node["infer"].get("_deterministic", False):
            continue
        term = program.terms(node["log_prob"], num_particles, in_prompts(node))
        bad = torch.isnan(term) | (term == torch.inf)
        if bad.any():
            particle, prompt = (int(i) for i in bad.nonzero()[0])
            raise ProgramError(
                f"site {name!r} has log-probability {term[particle, prompt].item()} at particle {particle}"
                + (f", prompt {_number(program, prompt)}" if program.full_size > 1 and in_prompts(node) else "")
                + (": a reward must be finite or -inf, and beta positive" if node["is_observed"] else "")
                + "".join(_texts(program, trace, num_particles, particle, prompt))
            )
        terms[name] = term
    return terms


def _number(program: Program, prompt: int) -> int:
    """Which of all prompts one of a minibatch's is."""
    return prompt if program.minibatch is None else int(program.minibatch[prompt])


def _texts(program: Program, trace: Trace, num_particles: int, particle: int, prompt: int) -> Iterator[str]:
    """What a particle's completions of a prompt say, for an error."""
    for name, node in sample_sites(trace):
        site = program.sites.get(name)
        if site is None or not site.is_completion or node["fn"].lm.tokenizer is None:
            continue
        texts = node["fn"].decode(site_value(site, node["value"], num_particles)[particle]).reshape(-1)
        yield f"\n{name}: {texts[prompt if len(texts) > prompt else 0]!r}"


def run_particles(
    program: Program, guide: Callable[..., Any] | None, num_particles: int, *, vectorize: bool = True
) -> Particles:
    """Run the program for ``num_particles`` particles, latents proposed by the guide or, without one, the prior.

    ``vectorize=False`` runs them one by one, for programs whose Python code depends on a single latent value.
    """
    if program.in_chunks:
        runs = [run_particles(chunk, guide, num_particles, vectorize=vectorize) for chunk in program.chunks]
        return Particles.side_by_side(program, runs)
    if not vectorize and num_particles > 1:
        return Particles.concatenate([run_particles(program, guide, 1, vectorize=False) for _ in range(num_particles)])
    with torch.no_grad():
        model_trace, guide_trace = traces(program, guide, num_particles, vectorize=vectorize)
        terms = site_terms(program, model_trace, num_particles)
        nodes = dict(sample_sites(model_trace))
        guide_terms = {} if guide_trace is None else site_terms(program, guide_trace, num_particles)
    unseen = [name for name in terms if name not in program.sites]
    if unseen or len(terms) < sum(site.kind != "deterministic" for site in program.sites.values()):
        raise ProgramError(
            "the program's sites changed between runs: a site that is only sometimes there cannot be a latent "
            f"(seen now: {sorted(terms)}; first: {sorted(program.sites)})"
        )
    zero = torch.zeros((num_particles, program.weight_prompts), device=program.device)

    latent = [site.name for site in program.latents]  # in order: sums must not depend on a set's
    auxiliary = sum((program.pooled(t) for n, t in guide_terms.items() if n not in program.sites), zero)
    return Particles(
        values={
            site.name: site_value(site, nodes[site.name]["value"], num_particles)
            for site in program.sites.values()
            if site.kind != "observed"
        },
        log_prior=sum((program.pooled(terms[name]) for name in latent), zero),
        log_proposal=sum((program.pooled(guide_terms.get(name, terms[name])) for name in latent), auxiliary),
        log_likelihood={name: program.pooled(term) for name, term in terms.items() if name not in latent},
        token_scores={
            site.name: site_value(site, token_scores(nodes[site.name]), num_particles) for site in program.completions
        },
        pointwise={
            site.name: _batch(site, nodes[site.name]["log_prob"], num_particles)
            for site in program.sites.values()
            if site.is_pointwise
        },
    )


def site_value(site: Site, value: Tensor, num_particles: int) -> Tensor:
    """A site's value (particle, *batch, *event), without the axes that vectorisation put between."""
    shape = (num_particles, *site.shape)
    if value.numel() == torch.Size(shape).numel():
        return value.reshape(shape)
    return value.expand(shape)


def _batch(site: Site, log_prob: Tensor, num_particles: int) -> Tensor:
    """A site's log_prob (particle, *batch), as `site_value`."""
    return site_value(replace(site, shape=site.shape[: site.batch_dims]), log_prob, num_particles)


@torch.no_grad()
def token_scores(node: dict[str, Any]) -> Tensor:
    """What `site_terms` has just had scored."""
    return node["fn"].token_log_prob(node["value"])
