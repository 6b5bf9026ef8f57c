r"""The evidence lower bound (ELBO), which times beta is the KL-penalised expected reward, as an objective.

    L(q) = E_q[ log p(x) + l(x) - log q(x) ] = log Z - KL(q || \pi^*),      l = r / beta

(Korbak, Perez and Buckley 2022, arXiv 2205.11275.) Its gradient in the parameters of q is the score-function gradient.
With particles x_1..x_n of q and f_i = log p(x_i) + l(x_i) - log q(x_i),

    \hat g = (1/n) \sum_i (f_i - b_i) \nabla log q(x_i)

is unbiased for every baseline b_i that does not depend on x_i (`baselines`). The term -\nabla log q inside f has mean
zero and is left out. A `TokenBaseline`, such as `Critic`, has a baseline for every token, which may depend on the
tokens before.

The plate ``prompts`` is used: the score of a completion is multiplied by the terms of its own prompt only.
Reparametrised latents of the same program get the pathwise gradient, as do the program's own parameters.

Where a sampler has drawn completions from s, near q (`bayeslm.models.samplers`), each term of \hat g is multiplied by
q(x_i) / s(x_i): the gradient is unbiased for any s, and its variance grows as they differ.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from bayeslm.inference.program import (
    STEPS,
    Particles,
    Program,
    ProgramError,
    in_prompts,
    particles_of,
    ranks,
    sample_sites,
    sampled_terms,
    score_sites,
    traces,
)
from bayeslm.models.lm import Autoregressive
from bayeslm.validation import Count, validated

from .baselines import Baseline, Texts, TokenBaseline, TokenDistribution, leave_one_out
from .objective import Estimate, Objective, of_all_processes
from .state import State, under, within


@validated
class ReverseKL(Objective):
    """The negative ELBO.

    :param num_particles: completions of each prompt in a step; all run at once.
    :param baseline: f less what is known of it without the particle itself (see `baselines`): `leave_one_out`, an
        `ExponentialAverage`, or a `TokenBaseline`, which has one for each token: a `Critic`, or `StateValues` for
        trajectories through finitely many states.
    """

    raises_elbo = True

    def __init__(self, num_particles: Count = 8, baseline: Baseline | TokenBaseline = leave_one_out) -> None:
        super().__init__(num_particles)
        self.baseline = baseline

    def estimate(
        self, program: Program, guide: Callable[..., Any], state: State, inverse_temperature: float
    ) -> Estimate:
        n = ranks().share(self.num_particles)  # the particles of this process
        model_trace, guide_trace = traces(program, guide, n)
        assert guide_trace is not None
        by_token = isinstance(self.baseline, TokenBaseline)
        texts, tokens = _texts(program, model_trace, guide_trace) if by_token else ({}, {})
        log_p = score_sites(program, model_trace, n)
        if texts:
            earned = self._earned(program, model_trace, inverse_temperature, n)
            texts = {name: _with_earned(text, earned) for name, text in texts.items()}
        log_q = score_sites(program, guide_trace, n, skip=tokens)
        log_q |= {name: scores.sum((2, 3)) for name, scores in tokens.items()}
        if torch.stack([torch.isneginf(term).any() for term in log_p.values()]).any():
            name = next(name for name, term in log_p.items() if torch.isneginf(term).any())
            raise ProgramError(
                f"site {name!r} is -inf under the policy: the KL to the posterior is infinite, and SVI cannot "
                "follow it. Use ImportanceSampling or RejectionSampling for hard constraints, or a finite penalty"
            )
        # A latent that the guide leaves out is drawn from the prior, which is then its distribution in q as well.
        left_out = [site.name for site in program.latents if site.name not in log_q]
        log_q |= {name: log_p[name] for name in left_out}
        sites = dict(sample_sites(model_trace)) | dict(sample_sites(guide_trace))

        terms = dict(log_p)
        zero = torch.zeros((n, 1), device=program.device)
        latents = {site.name for site in program.latents}
        log_p |= {name: inverse_temperature * term for name, term in terms.items() if name not in latents}
        inside = {name for name in {**log_p, **log_q} if in_prompts(sites[name])}
        # f = log p + l - log q in two parts: of single prompts (particle, prompt), and of all (particle, 1)
        local = sum((t for name, t in log_p.items() if name in inside), zero)
        local = local - sum((t for name, t in log_q.items() if name in inside), zero)
        common = sum((t for name, t in log_p.items() if name not in inside), zero)
        common = common - sum((t for name, t in log_q.items() if name not in inside), zero)
        total = common + local.sum(-1, keepdim=True)
        # What follows a completion: its own prompt's terms, and factors on all prompts; everything, if a latent
        # of all prompts is drawn after it.
        after = local + sum((t for name, t in log_p.items() if name not in inside | latents), zero)
        in_order = [name for name, _ in sample_sites(guide_trace)] + left_out
        if not _common_first([name in inside for name in in_order]):
            after = total.expand_as(local)

        _refuse_stale(program, sites)
        # log q / s of completions that a sampler drew, of single prompts or, where anything is of all, of all together
        off = {name: log_q[name].detach() - term for name, term in sampled_terms(program, sites, n).items()}
        ratio = sum(off.values(), zero)
        weight = (ratio if inside == {**log_p, **log_q}.keys() else ratio.sum(-1, keepdim=True)).exp() if off else 1.0

        # log p has a gradient through reparametrised latents alone: the pathwise one
        surrogate = sum(((weight * term).sum(-1) for term in log_p.values()), zero[:, 0])
        remembered, updates = within("baseline", state), dict[str, Tensor]()
        for name, term in log_q.items():
            if not term.requires_grad:
                continue
            if sites[name]["fn"].has_rsample:
                surrogate = surrogate - (weight * term).sum(-1)
                continue
            f = (after if name in inside else total).detach()
            own = {key.partition(":")[0]: x for key, x in remembered.items() if key.partition(":")[2] == name}
            advantage, own_after = self._advantage(name, f, texts.get(name), program, own)
            if name in texts:
                of_texts = weight[..., None, None] if isinstance(weight, Tensor) else weight
                surrogate = surrogate + (of_texts * advantage * tokens[name]).sum((1, 2, 3))
            else:
                surrogate = surrogate + (weight * advantage * term).sum(-1)
            updates |= {f"{key}:{name}": x for key, x in own_after.items()}
        guide_terms = {name: term for name, term in log_q.items() if name not in left_out}
        with torch.no_grad():
            drawn = particles_of(program, model_trace, guide_trace, terms, guide_terms, n)
            log_s = drawn.log_proposal if off else None
            of_guide = sum((program.pooled(x) for x in off.values()), drawn.log_proposal)
            particles = replace(drawn, log_proposal=of_guide)
            figures = of_all_processes(*_figures(particles, log_s), n)
        gain = surrogate.sum() / self.num_particles if ranks().size > 1 else surrogate.mean()
        loss = gain.detach() - gain - figures["elbo"].sum()
        return Estimate(loss, figures, particles, {**state, **under("baseline", updates)})

    def check_state(self, state: State, program: Program, steps: int) -> None:
        super().check_state(state, program, steps)
        remembered = within("baseline", state)
        if wrong := next((name for name, x in remembered.items() if not x.is_floating_point()), None):
            raise ValueError(f"baseline.{wrong} cannot be {remembered[wrong].dtype}")
        if (check := getattr(self.baseline, "check_state", None)) is not None:
            for site in {name.partition(":")[2] for name in remembered}:
                check({key.partition(":")[0]: x for key, x in remembered.items() if key.partition(":")[2] == site})

    def _advantage(
        self, name: str, f: Tensor, texts: Texts | None, program: Program, state: State
    ) -> tuple[Tensor, State]:
        """Return the advantages of this process's particles, and what the baseline remembers of the site."""
        if texts is None or not isinstance(self.baseline, TokenBaseline):
            return self.baseline(name, f, program.minibatch, state)
        return self.baseline.of_tokens(name, f, texts, state)

    def _earned(self, program: Program, model_trace: Trace, inverse_temperature: float, num: int) -> list[Tensor]:
        """Return the sums of earlier steps' terms (particle, prompt, 1, step), of each site in a plate `STEPS`."""
        found = []
        for _, node in sample_sites(model_trace):
            frames = [frame for frame in node["cond_indep_stack"] if frame.name == STEPS]
            if not frames or not node["is_observed"]:
                continue
            term = inverse_temperature * node["log_prob"].detach().to(program.device)
            particles = (num,) + (1,) * program.max_plate_nesting
            term = term.expand(torch.broadcast_shapes(term.shape, particles)).movedim(frames[0].dim, -1)
            if program.prompt_dim is not None and in_prompts(node):
                # with the steps last, a plate further out than they were stands one place further out
                term = term.movedim(program.prompt_dim - (frames[0].dim < program.prompt_dim), 1)
            else:
                term = term[:, None]
            term = term.reshape(*term.shape[:2], -1, term.shape[-1]).sum(2, keepdim=True)
            found.append(term.cumsum(-1) - term)
        return found


def _refuse_stale(program: Program, nodes: dict[str, Any]) -> None:
    """Refuse completions that a sampler has drawn by other weights than the policy's present ones.

    :raises ProgramError: if there are any.
    """
    for site in program.completions:
        fn, value = nodes[site.name]["fn"], nodes[site.name]["value"]
        if isinstance(fn, Autoregressive) and fn.is_stale(value):
            raise ProgramError(
                f"ReverseKL needs draws of the present policy, and the sampler drew {site.name!r} by older weights: "
                "use LogVariance, ForwardKL or FDivergence, which count stale draws with their own density"
            )


def _with_earned(texts: Texts, earned: list[Tensor]) -> Texts:
    """Add those sums that have as many steps as the texts have tokens."""
    fitting = [sums for sums in earned if sums.shape[-1] == texts.past.shape[-1]]
    return replace(texts, earned=sum(fitting, texts.earned))


def _texts(program: Program, model_trace: Trace, guide_trace: Trace) -> tuple[dict[str, Texts], dict[str, Tensor]]:
    """Return completions and trajectories by site, and log q of each of their tokens, with gradient.

    log q is (particle, prompt, text, token). The values come from the passes that score them, which are not made again.

    :raises ProgramError: if the program has no such site.
    """
    if not any(isinstance(site.fn, TokenDistribution) for site in program.latents):
        raise ProgramError(
            "the program has neither a completion nor a trajectory, and a Critic reads nothing else: use "
            "ReverseKL's leave_one_out, or an ExponentialAverage"
        )
    texts: dict[str, Texts] = {}
    tokens: dict[str, Tensor] = {}
    priors = dict(sample_sites(model_trace))
    for name, node in sample_sites(guide_trace):
        dist = node["fn"]
        if not isinstance(dist, TokenDistribution) or name not in priors or _is_partial(node):
            continue

        def by_prompt(x: Tensor, inside: bool = in_prompts(node), rest: int = 1) -> Tensor:
            """x (particle, *batch, token, ...) as (particle, prompt, text, token, ...)."""
            x = x.to(program.device)
            if program.prompt_dim is None or not inside:
                return x.reshape(len(x), 1, -1, *x.shape[-rest:])
            x = x.movedim(program.prompt_dim - rest, 1)
            return x.reshape(len(x), x.shape[1], -1, *x.shape[-rest:])

        log_p, hidden = priors[name]["fn"].token_log_prob_and_hidden(node["value"])
        scored: Any = model_trace.nodes[name]
        scored["token_log_prob"] = log_p  # `score_sites` does not compute it again
        tokens[name] = by_prompt(dist.token_log_prob(node["value"]))
        ratio = by_prompt(log_p) - tokens[name].detach()
        live = torch.arange(ratio.shape[-1], device=ratio.device) < by_prompt(dist.lengths(node["value"])[..., None])
        past = ratio.cumsum(-1) - ratio
        texts[name] = Texts(by_prompt(hidden, rest=2), past, live, torch.zeros_like(past), program.minibatch)
    return texts, tokens


def _figures(particles: Particles, log_s: Tensor | None) -> tuple[dict[str, Tensor], Tensor]:
    """Return figures (prompt,) of the target itself, whose inverse temperature is 1, and what they count for.

    :param log_s: of particles that a sampler drew, the density that they have; None: the guide's.
    :returns: the figures, and the logarithm of the sum of q / s over the particles, (prompt,).
    """
    ratio, weights = particles.log_weights, particles.log_weights if log_s is None else particles.log_joint - log_s
    of_sampler = None if log_s is None else particles.log_proposal - log_s

    def mean(x: Tensor) -> Tensor:
        return x.mean(0) if of_sampler is None else (of_sampler.softmax(0) * x).sum(0)

    elbo, likelihood = mean(ratio), mean(particles.total_log_likelihood)
    figures = {"elbo": elbo, "log_likelihood": likelihood, "kl": likelihood - elbo}
    figures["log_evidence"] = weights.logsumexp(0) - math.log(len(weights))
    if (reward := particles.reward) is not None:
        figures["reward"] = mean(reward.float())
    if of_sampler is None:
        return figures, ratio.new_full((1,), math.log(len(ratio)))
    return figures, of_sampler.logsumexp(0)


def _is_partial(node: dict[str, Any]) -> bool:
    """Return whether handlers of Pyro have a site's log-probability masked or scaled."""
    return node["mask"] is not None or not (isinstance(node["scale"], float) and node["scale"] == 1.0)


def _common_first(inside: list[bool]) -> bool:
    """Return whether, in the order drawn, every latent of all prompts comes before every latent of one prompt."""
    return inside == sorted(inside)
