"""What comes out of a run: particles as a `Posterior`."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bayeslm import diagnostics, reliability
from bayeslm.bounds import unseen_limit
from bayeslm.models.lm import LIMIT, Autoregressive, Encoded, LanguageModel
from bayeslm.models.rewards import Grammar
from bayeslm.posterior import Posterior
from bayeslm.validation import validated
from bayeslm.weights import conditional_log_evidence

from .description import chat_turns, describe, of_all, prompt_labels, prompt_texts
from .errors import EvidenceError
from .particles import Particles, to_numpy
from .program import Program
from .sites import Site


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
    sample_stats: dict[str, np.ndarray] | None = None,
    prior: Particles | None = None,
    from_prior: float | None = None,
    log_bound: float | None = None,
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
    :param sample_stats: what the sampler saw at each draw, (chain, draw).
    :param prior: draws of the prior, for comparison.
    :param from_prior: the number of draws of the prior behind the estimate of log Z (αN for N draws of a mixture that
        has the prior with share α); None if there are none. With a bound they give `Posterior.log_evidence_high`.
    :param log_bound: an upper bound of the sum of all log-likelihood terms; None takes the program's own, if any.
    :param policy: the trained policy, of `SVI`.
    :raises EvidenceError: if every weight of a prompt is zero, or a chain has no draw.
    """
    if "sampler_draws" in stats:  # which are near the prior, but not of it
        from_prior = None
        prior = None if stats["sampler_difference"][1] > LIMIT else prior
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
    check_evidence(split(particles.log_joint), program)
    origins = None if roots is None else split(roots)
    by_chain = diagnostics.chain_log_evidence(weights)  # (chain, prompt)
    if kind == "markov":
        evidence = (np.full(weights.shape[-1], np.nan),) * 2
    elif evidence is None and conditional:
        evidence = conditional_log_evidence(weights)
    elif evidence is None:
        evidence = diagnostics.log_evidence(weights, origins)
    has_bound = kind in ("weighted", "particles")
    if kind == "weighted":
        stats |= diagnostics.quality(weights)
    high, bound = None, float(getattr(program.model, "log_bound", np.inf) if log_bound is None else log_bound)
    if np.isfinite(bound):
        stats |= {"log_bound": bound}
        if from_prior and not conditional:
            high = unseen_limit(*evidence, bound, from_prior)
    values, observed = {name: split(particles.values[name]) for name in _kept(program)}, _observed(program)
    texts, lengths, truncated, token_ends, token_log_ratio = {}, {}, {}, {}, {}
    for site in program.completions:
        value = particles.values[site.name][: draws * num_chains]
        lengths[site.name] = split(site.fn.lengths(value))
        truncated[site.name] = split(site.fn.truncated(value))
        if site.fn.has_text:
            decoded = _decoded(program, site, value)
            texts[site.name] = decoded.reshape(lengths[site.name].shape)
            log_q = particles.proposal_token_log_prob.get(site.name)
            if kind == "weighted" and log_q is not None:
                token_log_ratio[site.name] = split(log_q - particles.token_log_prob[site.name])
                token_ends[site.name] = site.fn.lm.token_ends(value, decoded).reshape(values[site.name].shape)
    result = Posterior(
        samples=values,
        log_weights=weights,
        log_joint=split(particles.log_joint),
        log_likelihood={name: split(term) for name, term in particles.log_likelihood.items()},
        rewards={name: split(r) for name, r in particles.rewards.items()},
        log_evidence=evidence[0],
        log_evidence_stderr=evidence[1],
        log_evidence_lower=by_chain.mean(0) if has_bound and not conditional else None,
        log_evidence_upper=by_chain.mean(0) if has_bound and conditional else None,
        log_evidence_high=high,
        roots=origins,
        conditional=conditional,
        kind=kind,
        engine=engine,
        dims={name: program.sites[name].dims for name in [*values, *observed]},
        prompts=prompt_texts(program),
        prompt_names=chat_turns(program),
        texts=texts,
        lengths=lengths,
        truncated=truncated,
        sample_stats=sample_stats or {},
        token_ends=token_ends,
        token_log_ratio=token_log_ratio,
        prior=_prior_draws(program, prior),
        prior_rewards={} if prior is None else {name: to_numpy(r)[None] for name, r in prior.rewards.items()},
        pointwise={name: split(term) for name, term in particles.pointwise.items()},
        observed=observed,
        stats=stats | {"program": describe(program)},
        policy=policy,
    )
    if isinstance(policy, LanguageModel):
        policy.provenance = result
    reliability.warn(result)
    return result


def _decoded(program: Program, site: Site, value: Tensor) -> np.ndarray:
    """Return the texts of completions (particle, *batch, token) of all prompts."""
    if not program.in_chunks:
        return site.fn.decode(value)
    fns = [chunk.sites[site.name].fn for chunk in program.chunks]
    if site.dims != ("prompt",) or any(fn.prompt_ids.shape[:-1] != fn.batch_shape for fn in fns):
        return site.fn.lm.decode(value)
    return site.fn.lm.decode(value, of_all(program, [Encoded(fn.prompt_ids, fn.prompt_mask).rows() for fn in fns]))


def _kept(program: Program) -> list[str]:
    """Return the latent and deterministic sites; where prompts are posteriors of their own, those inside the plate."""
    sites = [site for site in program.sites.values() if site.kind != "observed" and site.reward is None]
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


def _prior_draws(program: Program, particles: Particles | None) -> dict[str, np.ndarray]:
    """Return draws of the prior (1, draw, *batch, *event) by site, with factors' values and completions' lengths."""
    if particles is None:
        return {}
    out = {name: particles.values[name] for name in _kept(program)} | particles.log_likelihood
    for site in program.completions:
        out[f"{site.name}_length"] = site.fn.lengths(particles.values[site.name])
    return {name: to_numpy(value)[None] for name, value in out.items()}


@validated
def check_evidence(log_weights: np.ndarray, program: Program) -> None:
    """Check that each prompt has a draw of positive probability.

    :param log_weights: (chain, draw, prompt).
    :raises EvidenceError: if all weights of a prompt are -inf; if the reward is a `Grammar` of which no text can fit
        the tokens, this is said.
    """
    dead = np.atleast_1d(np.isneginf(log_weights).all(axis=(0, 1)))
    if not dead.any():
        return
    i, labels = int(dead.argmax()), prompt_labels(program)
    of = f"for prompt {i} ({labels[i]!r}) " if len(labels) == len(dead) else ""
    limits = {site.fn.max_new_tokens for site in program.completions}
    reward = getattr(program.model, "reward", None)
    if isinstance(reward, Grammar):
        for site in program.completions:
            check_grammar(reward, token_bytes(site.fn), site.fn.max_new_tokens)
    tokens = f", of at most {limits.pop()} tokens (max_new_tokens)" if len(limits) == 1 else ""
    raise EvidenceError(
        f"every reward is -inf {of}in all {log_weights[..., i].size} draws{tokens}: the posterior does not exist, or "
        "the constraint is too rare to be met by chance. Draw more, loosen the constraint or raise max_new_tokens, or "
        "use a better proposal"
    )


@validated
def check_grammar(grammar: Grammar, tokens: tuple[bytes, ...] | None, limit: int) -> None:
    """Check that a text of a grammar may fit so many tokens, as far as that is known (`Grammar.least_tokens`).

    :param tokens: of `token_bytes`.
    :param limit: the most tokens of a completion.
    :raises EvidenceError: if none does.
    """
    least = 0 if tokens is None else grammar.least_tokens(tokens, limit)
    if least <= limit:
        return
    if math.isinf(least):
        raise EvidenceError("no text of the grammar can be written in the tokens of this language model")
    raise EvidenceError(
        f"no text of at most {limit} tokens (max_new_tokens) satisfies the grammar: the shortest takes {least:.0f} or "
        "more. Raise max_new_tokens, or loosen the grammar"
    )


@validated
def token_bytes(distribution: Autoregressive) -> tuple[bytes, ...] | None:
    """Return the bytes of each token, b"" of those that end a text; None if they depend on a token's neighbours."""
    if not distribution.has_text:
        return None
    known = distribution.lm.token_bytes(Encoded(*distribution.flat_prompts))
    ends = distribution.vocabulary.eos_token_ids
    return None if known is None else tuple(b"" if token in ends else text for token, text in enumerate(known))
