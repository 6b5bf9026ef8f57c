"""Particles: runs of a program with their log-densities, and how a program is run for many of them at once.

All particles are in one outermost plate, as in Pyro's own vectorised ELBOs, and every term of the log-joint has the
shape (particle, prompt). Where the plate of prompts is subsampled, a run has the prompts of one minibatch (`handlers`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import enable_validation, is_validation_enabled, prune_subsample_sites
from torch import Tensor

from bayeslm.models.lm import Autoregressive
from bayeslm.models.rewards import RememberedScores, remembering_scores

from .errors import ProgramError
from .guides import check_latents_of_guide
from .handlers import PARTICLES, explained
from .independence import MISFITS, check_guide, check_independence
from .own_particles import check_own_guide, check_own_particles
from .program import Program, along
from .ranks import ranks
from .sites import Site, in_prompts, sample_sites, site_value
from .term_errors import invalid_term


@dataclass(frozen=True)
class Particles:
    """Runs of a program; the particle is the first axis of every tensor.

    :param values: of latent and deterministic sites, (particle, *batch, *event).
    :param log_prior: log p of all latents, (particle, prompt).
    :param log_proposal: log q of all latents, (particle, prompt); the prior's where the prior proposed, and of a
        completion that a sampler drew the sampler's own.
    :param log_likelihood: the term of each factor and each observed site, (particle, prompt).
    :param rewards: r in its own units, by the name of its factor, (particle, prompt); of a reward outside the plate of
        prompts (particle, 1).
    :param token_log_prob: log p of each token of a completion, (particle, *batch, token).
    :param pointwise: the log-likelihood of each observation of a site whose plates do not include the prompts',
        (particle, *batch).
    :param auxiliary: values of sites that the guide has and the program lacks, (particle, ...).
    :param proposal_token_log_prob: log q of each token of the completions that a guide drew, by its own network,
        (particle, *batch, token).
    :param log_left_out: log p of the latents that a guide leaves to the prior, (particle, prompt); it is part of
        ``log_prior`` and of ``log_proposal``. None without a guide.
    :param prompts: indices of the minibatch's prompts, (particle, prompt); None if the program has all of them.
    """

    values: dict[str, Tensor]
    log_prior: Tensor
    log_proposal: Tensor
    log_likelihood: dict[str, Tensor]
    rewards: dict[str, Tensor] = field(default_factory=dict)
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
    def reward(self) -> Tensor | None:
        """The reward, (particle, prompt), where the program records one (several have no common unit), else None."""
        return next(iter(self.rewards.values())) if len(self.rewards) == 1 else None

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

    def as_tensors(self) -> dict[str, Tensor]:
        """Return the record as tensors by name, ``field`` or ``field.site``."""
        tensors: dict[str, Tensor] = {}
        for each in fields(self):
            value = getattr(self, each.name)
            if isinstance(value, Mapping):
                tensors |= {f"{each.name}.{name}": x for name, x in value.items()}
            elif value is not None:
                tensors[each.name] = value
        return tensors

    @staticmethod
    def from_tensors(tensors: Mapping[str, Tensor], device: torch.device | str | None = None) -> Particles:
        """Return the record that `as_tensors` has taken apart.

        :param device: where the particles shall be, but for the indices of prompts; None leaves them where they are.
        """
        found: dict[str, Any] = {"values": {}, "log_likelihood": {}}
        for name, x in tensors.items():
            key, dot, site = name.partition(".")
            x = x.cpu() if key == "prompts" else x.to(device)
            if dot:
                found.setdefault(key, {})[site] = x
            else:
                found[key] = x
        return Particles(**found)

    @staticmethod
    def concatenate(parts: list[Particles]) -> Particles:
        """The particles of all parts, one after another."""
        return parts[0] if len(parts) == 1 else _combine(parts, lambda _, x: torch.cat(x), torch.cat)

    @staticmethod
    def side_by_side(program: Program, parts: list[Particles]) -> Particles:
        """The particles of each of a program's `chunks`, as particles of all its prompts."""
        join = program.side_by_side

        def inside(part: Particles) -> Particles:
            kept = part.inside_prompts(program)
            return replace(kept, prompts=None, proposal_token_log_prob=part.proposal_token_log_prob)

        return _combine(
            [inside(part) for part in parts],
            lambda name, x: join(x, program.prompt_axis(name)),
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

    def terms(name: str) -> dict[str, Tensor]:
        return {key: term([getattr(part, name)[key] for part in parts]) for key in getattr(parts[0], name)}

    def optional(name: str) -> Tensor | None:
        columns = [getattr(part, name) for part in parts]
        return None if any(column is None for column in columns) else term(columns)

    return Particles(
        values=by_site("values"),
        log_prior=term([part.log_prior for part in parts]),
        log_proposal=term([part.log_proposal for part in parts]),
        log_likelihood=terms("log_likelihood"),
        rewards=terms("rewards"),
        token_log_prob=by_site("token_log_prob"),
        pointwise=by_site("pointwise"),
        auxiliary=by_site("auxiliary"),
        proposal_token_log_prob=by_site("proposal_token_log_prob"),
        log_left_out=optional("log_left_out"),
        prompts=optional("prompts"),
    )


def gathered(parts: list[Particles], device: torch.device) -> Particles:
    """Return the particles of all processes of the run, in the order of their ranks.

    :param parts: this one's; those of a rank whose share is nothing are empty.
    :param device: where the particles are.
    """
    own = Particles.concatenate(parts) if parts else None
    if ranks().size == 1 and own is not None:
        return own
    messages = ranks().exchange(None, {} if own is None else own.as_tensors())
    return Particles.concatenate([Particles.from_tensors(x.tensors, device) for x in messages if x.tensors])


def run_particles(
    program: Program, guide: Callable[..., Any] | None, num_particles: int, *, vectorize: bool = True
) -> Particles:
    """Run the program for ``num_particles`` particles and score every site.

    :param guide: proposes the latents; None proposes from the prior.
    :param vectorize: False runs the particles one by one, for programs whose Python code depends on a latent's value.
    :raises ProgramError: if a term of the log-joint is NaN or +inf, the program's sites changed, or it mixes particles.
    """
    if program.in_chunks:
        runs = [run_particles(chunk, guide, num_particles, vectorize=vectorize) for chunk in program.chunks]
        return Particles.side_by_side(program, runs)
    if not vectorize and num_particles > 1:
        return Particles.concatenate([run_particles(program, guide, 1, vectorize=False) for _ in range(num_particles)])
    with torch.no_grad():
        model_trace, guide_trace = traces(program, guide, num_particles, vectorize=vectorize)
        terms = score_sites(program, model_trace, num_particles)
        guide_terms = {} if guide_trace is None else score_sites(program, guide_trace, num_particles)
    return particles_of(program, model_trace, guide_trace, terms, guide_terms, num_particles)


def traces(
    program: Program, guide: Callable[..., Any] | None, num_particles: int, *, vectorize: bool = True
) -> tuple[Trace, Trace | None]:
    """Return the traces of model and guide, with all particles in one outermost plate.

    :param guide: proposes the latents; None proposes from the prior and has no trace.
    :raises ProgramError: if the program or the guide mixes particles.
    """
    several = vectorize and num_particles > 1
    if several:
        check_independence(program)
    is_due = several and not program.stands_alone and program.verified.is_due()

    def in_plate(fn: Callable[..., Any]) -> Callable[..., Any]:
        if not vectorize:
            return fn
        return pyro.plate(PARTICLES, num_particles, dim=-1 - program.max_plate_nesting)(fn)

    guide_trace = None
    model = program.pinned(program.model)
    if guide is not None:
        try:
            guide_trace = poutine.trace(in_plate(program.pinned(guide))).get_trace(*program.args, **program.kwargs)
        except MISFITS:
            if several:
                check_guide(program, guide)
            raise
        guide_trace = prune_subsample_sites(guide_trace)
        if several:
            check_guide(program, guide)
        if is_due:
            check_own_guide(program, guide, guide_trace, num_particles)
        check_latents_of_guide(program, guide_trace)
        model = poutine.replay(model, trace=guide_trace)
    remembering: contextlib.AbstractContextManager[RememberedScores | None]
    remembering = remembering_scores() if is_due else contextlib.nullcontext()
    with explained(), remembering as scores:
        model_trace = poutine.trace(in_plate(model)).get_trace(*program.args, **program.kwargs)
    model_trace = prune_subsample_sites(model_trace)
    if scores is not None:
        check_own_particles(program, "program", model_trace, num_particles, scores)
    return model_trace, guide_trace


def score_sites(
    program: Program, trace: Trace, num_particles: int, *, skip: Container[str] = (), check: bool = True
) -> dict[str, Tensor]:
    """Return the log-probability of every site of a trace, (particle, prompt).

    The log-probabilities of a completion's tokens stay on its node, as ``token_log_prob`` (particle, *plates, token);
    where an `Assign` has put them there, they are not computed again.

    :param skip: sites to leave out.
    :param check: False where the caller finds a term that is NaN or +inf itself (`check_terms` says which).
    :raises ProgramError: if a term is NaN or +inf.
    """
    for name, message in trace.nodes.items():  # not `sample_sites`, whose nodes are copies
        if message["type"] == "sample" and name not in skip and isinstance(message["fn"], Autoregressive):
            _score_completion(message)
    with _without_warnings():
        trace.compute_log_prob(site_filter=lambda name, node: name not in skip)
    terms = {}
    for name, node in sample_sites(trace):
        if name in skip or node["infer"].get("_deterministic", False):
            continue
        terms[name] = program.terms(node["log_prob"], num_particles, in_prompts(node))
    if check:
        check_terms(program, trace, terms)
    return terms


def check_terms(program: Program, trace: Trace, terms: dict[str, Tensor]) -> None:
    """Check the terms (particle, prompt) of a trace's sites; the host looks once, at all of them.

    :raises ProgramError: if one is NaN or +inf, with its text.
    """
    wrong = {name: term.isnan() | (term == torch.inf) for name, term in terms.items()}
    if wrong and bool(torch.stack([where.any() for where in wrong.values()]).any()):
        raise invalid_term(program, trace, terms, wrong)


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Leave out Pyro's own look at each site of a trace for NaN and inf, of which it only warns."""
    own = is_validation_enabled()
    enable_validation(False)
    try:
        yield
    finally:
        enable_validation(own)


def _score_completion(node: Any) -> None:
    """Compute the log-probabilities of a completion's tokens, and their sum where Pyro's traces hold it."""
    node["token_log_prob"] = node["fn"].token_log_prob(node["value"], known=node.get("token_log_prob"))
    node["unscaled_log_prob"] = node["token_log_prob"].sum(-1)
    node["log_prob"] = scale_and_mask(node["unscaled_log_prob"], node["scale"], node["mask"])
    node["log_prob_sum"] = node["log_prob"].sum()


def particles_of(
    program: Program,
    model_trace: Trace,
    guide_trace: Trace | None,
    terms: dict[str, Tensor],
    guide_terms: dict[str, Tensor],
    num_particles: int,
) -> Particles:
    """Return the particles of a run, from its traces and the terms (particle, prompt) that `score_sites` gave.

    :raises ProgramError: if the run has other sites than the inspected program.
    """
    unknown = [name for name in terms if name not in program.sites]
    if unknown or len(terms) < sum(site.kind != "deterministic" for site in program.sites.values()):
        raise ProgramError(
            "the program's sites changed between runs: a site that is only sometimes there cannot be a latent "
            f"(now: {sorted(terms)}; when it was inspected: {sorted(program.sites)})"
        )
    nodes = dict(sample_sites(model_trace))
    guide_nodes = {} if guide_trace is None else dict(sample_sites(guide_trace))
    zero = torch.zeros((num_particles, program.weight_prompts), device=program.device)
    log_s = sampled_terms(program, nodes | guide_nodes, num_particles)
    latent = [site.name for site in program.latents]  # in the program's order, so that sums do not depend on a set's
    auxiliary = sum((program.pooled(term) for name, term in guide_terms.items() if name not in program.sites), zero)
    left_out = sum((program.pooled(terms[name]) for name in latent if name not in guide_terms), zero)

    def completions(nodes: dict[str, Any]) -> dict[str, Tensor]:
        sites = [site for site in program.completions if "token_log_prob" in nodes.get(site.name, ())]
        return {site.name: site_value(site, nodes[site.name]["token_log_prob"], num_particles) for site in sites}

    return Particles(
        values={
            site.name: site_value(site, nodes[site.name]["value"], num_particles)
            for site in program.sites.values()
            if site.kind != "observed" and site.reward is None
        },
        log_prior=sum((program.pooled(terms[name]) for name in latent), zero),
        log_proposal=sum((program.pooled({**terms, **guide_terms, **log_s}[name]) for name in latent), auxiliary),
        log_likelihood={name: program.pooled(term) for name, term in terms.items() if name not in latent},
        rewards={
            name: _reward(program, site, nodes[site.name]["value"], num_particles) for name, site in program.rewards
        },
        token_log_prob=completions(nodes),
        pointwise={
            site.name: _per_observation(site, nodes[site.name]["log_prob"], num_particles)
            for site in program.sites.values()
            if site.is_pointwise
        },
        auxiliary={name: node["value"] for name, node in guide_nodes.items() if name not in program.sites},
        proposal_token_log_prob=completions(guide_nodes),
        log_left_out=None if guide_trace is None else left_out,
        prompts=None if program.minibatch is None else program.minibatch.expand(num_particles, -1),
    )


def sampled_terms(program: Program, nodes: Mapping[str, Any], num_particles: int) -> dict[str, Tensor]:
    """Return log s (particle, prompt) of each completion that another engine drew, see `bayeslm.models.samplers`.

    :param nodes: of the traces in which the latents were drawn.
    :raises ProgramError: if a program or a handler has changed what the engine drew.
    """
    found = {}
    for site in program.completions:
        node = nodes[site.name]
        if not isinstance(node["fn"], Autoregressive):
            continue
        try:
            log_s = node["fn"].proposal_token_log_prob(node["value"])
        except LookupError as error:
            raise ProgramError(f"site {site.name!r} has no known density: {error}") from error
        if log_s is not None:
            term = scale_and_mask(log_s.sum(-1), node["scale"], node["mask"])
            found[site.name] = program.terms(term, num_particles, in_prompts(node))
    return found


def _reward(program: Program, site: Site, value: Tensor, num_particles: int) -> Tensor:
    """Return the reward that a site has recorded, (particle, prompt): the sum over other plates."""
    value = program.under_plate(site.name, site_value(site, value, num_particles))
    return program.terms(value.detach(), num_particles, site.in_prompts)


def _per_observation(site: Site, log_prob: Tensor, num_particles: int) -> Tensor:
    """Return a site's log_prob as (particle, *batch)."""
    return site_value(replace(site, shape=site.shape[: site.batch_dims]), log_prob, num_particles)


def all_to_numpy(tensors: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Return tensors as arrays, those of one device and dtype by one copy."""
    groups: dict[Any, dict[str, Tensor]] = {}
    for name, x in tensors.items():
        groups.setdefault((x.device, x.dtype), {})[name] = x
    found: dict[str, np.ndarray] = {}
    for group in groups.values():
        flat = to_numpy(torch.cat([x.reshape(-1) for x in group.values()]))
        ends = np.cumsum([x.numel() for x in group.values()])
        parts = np.split(flat, ends[:-1])
        found |= {name: part.reshape(x.shape) for (name, x), part in zip(group.items(), parts, strict=True)}
    return {name: found[name] for name in tensors}


def to_numpy(x: Tensor) -> np.ndarray:
    """Return a tensor as an array; half precisions, which NumPy lacks or computes badly in, become float32."""
    return (x.float() if x.dtype in (torch.bfloat16, torch.float16) else x).detach().cpu().numpy()
