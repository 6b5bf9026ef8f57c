"""The `Posterior` of an engine's particles."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bayeslm import diagnostics
from bayeslm.posterior import Posterior

from .errors import EvidenceError
from .particles import Particles
from .program import Program


def posterior(
    program: Program,
    particles: Particles,
    *,
    engine: str,
    kind: str,
    num_chains: int,
    stats: dict[str, Any],
    evidence: tuple[np.ndarray, np.ndarray] | None = None,
    log_weights: Tensor | None = None,
    roots: Tensor | None = None,
    conditional: bool = False,
    prior: Particles | None = None,
    policy: Any = None,
) -> Posterior:
    """Return particles, chain-major, as a `Posterior` of ``num_chains`` chains; a remainder is dropped.

    :param engine: the engine's name.
    :param kind: of the draws, see `Posterior.kind`.
    :param stats: the engine's figures; for weighted draws ``ess`` and ``khat`` (prompt,) are added.
    :param evidence: log Z and its standard error (prompt,), if they do not come from the weights. Weights of the kinds
        "weighted" and "particles" also bound log Z: from above in a conditional run, else from below. Markov chains
        have no estimate.
    :param log_weights: (particle, prompt); None takes the particles' own, log p - log q, or zeros if the kind has equal
        weights.
    :param roots: of kind "particles", (particle, prompt), see `Posterior.roots`.
    :param conditional: whether particle 0 of each chain began as a draw of the posterior, see `Posterior.conditional`.
    :param prior: draws of the prior, for comparison.
    :param policy: the trained policy, of `SVI`.
    :raises EvidenceError: if every weight of a prompt is zero, or a chain has no draw.
    """
    draws = len(particles) // num_chains
    if draws == 0:
        raise EvidenceError(f"interrupted before each of the {num_chains} chains had a draw")

    def split(x: Tensor) -> np.ndarray:
        x = x[: draws * num_chains]
        return to_numpy(x).reshape(num_chains, draws, *x.shape[1:])

    if log_weights is None:
        equal = kind in ("exact", "uncorrected", "markov")
        log_weights = torch.zeros_like(particles.log_prior) if equal else particles.log_weights
    weights = split(log_weights)
    labels = prompt_labels(program)
    check_evidence(split(particles.log_joint), labels)
    origins = None if roots is None else split(roots)
    by_chain = diagnostics.chain_log_evidence(weights)  # (chain, prompt)
    if kind == "markov":
        evidence = (np.full(weights.shape[-1], np.nan),) * 2
    elif evidence is None and conditional:
        # 1 / Z-hat of a chain is unbiased for 1 / Z, unless all its weights can be 0
        inverse, stderr = diagnostics.log_evidence(-by_chain[:, None])
        unknown = np.isneginf(weights).any((0, 1))
        evidence = np.where(unknown, np.nan, -inverse), np.where(unknown, np.nan, stderr)
    elif evidence is None:
        evidence = diagnostics.log_evidence(weights, origins)
    has_bound = kind in ("weighted", "particles")
    if kind == "weighted":
        stats |= {"ess": diagnostics.ess(weights), "khat": diagnostics.psis(weights)[1]}
    values = {name: split(particles.values[name]) for name in _kept(program)}
    texts, lengths = {}, {}
    for site in program.completions:
        value = particles.values[site.name][: draws * num_chains]
        lengths[site.name] = split(site.fn.lengths(value))
        if site.fn.has_text:
            texts[site.name] = site.fn.decode(value).reshape(lengths[site.name].shape)
    return Posterior(
        samples=values,
        log_weights=weights,
        log_joint=split(particles.log_joint),
        log_likelihood={name: split(term) for name, term in particles.log_likelihood.items()},
        log_evidence=evidence[0],
        log_evidence_stderr=evidence[1],
        log_evidence_lower=by_chain.mean(0) if has_bound and not conditional else None,
        log_evidence_upper=by_chain.mean(0) if has_bound and conditional else None,
        roots=origins,
        conditional=conditional,
        kind=kind,
        engine=engine,
        dims={name: program.sites[name].dims for name in [*values, *particles.pointwise]},
        prompts=labels,
        texts=texts,
        lengths=lengths,
        prior=prior_draws(program, prior),
        pointwise={name: split(term) for name, term in particles.pointwise.items()},
        observed=_observed(program),
        stats=stats,
        policy=policy,
    )


def _kept(program: Program) -> list[str]:
    """Return the latent and deterministic sites; where prompts are posteriors of their own, those inside the plate."""
    sites = [site for site in program.sites.values() if site.kind != "observed"]
    return [site.name for site in sites if program.shared or "prompt" in site.dims]


def _observed(program: Program) -> dict[str, np.ndarray]:
    """Return the values of observed sites, without factors, whose values have no elements."""
    observed = {site.name: site for site in program.sites.values() if site.kind == "observed" and site.value.numel()}
    values = {name: site.value for name, site in observed.items()}
    for name, site in observed.items():
        if program.in_chunks and site.value.dim() == len(site.dims):  # else one value for all prompts
            parts = [chunk.sites[name].value for chunk in program.chunks]
            values[name] = program.side_by_side(parts, site.dims.index("prompt"))
    return {name: to_numpy(value) for name, value in values.items()}


def prior_draws(program: Program, particles: Particles | None) -> dict[str, np.ndarray]:
    """Return draws of the prior (1, draw, *batch, *event) by site, with factors' values and completions' lengths."""
    if particles is None:
        return {}
    out = {name: particles.values[name] for name in _kept(program)} | particles.log_likelihood
    for site in program.completions:
        out[f"{site.name}_length"] = site.fn.lengths(particles.values[site.name])
    return {name: to_numpy(value)[None] for name, value in out.items()}


def prompt_labels(program: Program) -> list[str]:
    """Return the label of each prompt: its text, if a completion site has one text a prompt, else its number."""
    if program.in_chunks:
        *labels, last = [prompt_labels(chunk) for chunk in program.chunks]
        return [*itertools.chain(*labels), *last[sum(map(len, labels)) - program.full_size :]]
    for site in program.completions:
        if site.fn.prompt_ids.shape[:-1].numel() == program.num_prompts:
            return site.fn.prompt_texts()
    return [str(i) for i in range(program.num_prompts)]


def check_evidence(log_weights: np.ndarray, labels: list[str]) -> None:
    """Check that each prompt has a draw of positive probability.

    :param log_weights: (chain, draw, prompt).
    :param labels: of the prompts.
    :raises EvidenceError: if all weights of a prompt are -inf.
    """
    dead = np.atleast_1d(np.isneginf(log_weights).all(axis=(0, 1)))
    if dead.any():
        i = int(dead.argmax())
        of = f"for prompt {i} ({labels[i]!r}) " if len(labels) == len(dead) else ""
        raise EvidenceError(
            f"every reward is -inf {of}in all {log_weights[..., i].size} draws: the posterior does not exist, or the "
            "constraint is too rare to be met by chance. Draw more, loosen the constraint, or use a better proposal"
        )


def to_numpy(x: Tensor) -> np.ndarray:
    """Return a tensor as an array; half precisions, which NumPy lacks or computes badly in, become float32."""
    return (x.float() if x.dtype in (torch.bfloat16, torch.float16) else x).detach().cpu().numpy()
