r"""The evidence lower bound (ELBO), which times beta is the KL-penalised expected reward, as a Pyro ELBO.

    L(q) = E_q[ log p(x) + l(x) - log q(x) ] = log Z - KL(q || \pi^*),      l = r / beta

(Korbak, Perez and Buckley 2022, arXiv 2205.11275.) Its gradient in the parameters of q is the score-function gradient.
With particles x_1..x_n of q and f_i = log p(x_i) + l(x_i) - log q(x_i),

    \hat g = (1/n) \sum_i (f_i - b_i) \nabla log q(x_i)

is unbiased for every baseline b_i that does not depend on x_i (`baselines`). The term -\nabla log q inside f has mean
zero and is left out. A `Critic` has a baseline for every token of a completion, which may depend on the tokens before.

The plate ``prompts`` is used: the score of a completion is multiplied by the terms of its own prompt only.
Reparametrised latents of the same program get the pathwise gradient, as do the program's own parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from bayeslm.inference.control.state_values import StateValues
from bayeslm.inference.program import (
    STEPS,
    Program,
    ProgramError,
    in_prompts,
    sample_sites,
    score_sites,
    site_value,
    traces,
)

from .baselines import Baseline, leave_one_out
from .critic import Critic, Readable, Texts
from .objective import Objective, Seen


class ReverseKL(Objective):
    """The negative ELBO.

    :param num_particles: completions of each prompt in a step; all run at once.
    :param baseline: f less what is known of it without the particle itself (see `baselines`): `leave_one_out`, an
        `ExponentialAverage`, or a `Critic`, which learns one for each token; `StateValues` of trajectories through
        finitely many states.
    """

    def __init__(self, num_particles: int = 8, baseline: Baseline | Critic | StateValues = leave_one_out) -> None:
        super().__init__(num_particles, baseline)
        self._baseline = baseline

    def estimate(self, program: Program, guide: Callable[..., Any]) -> Tensor:
        surrogate = self._surrogate(program, guide)
        return surrogate.detach() - surrogate - self.last["elbo"].sum()

    def _surrogate(self, program: Program, guide: Callable[..., Any]) -> Tensor:
        """A scalar whose gradient estimates the ELBO's."""
        n = self.num_particles
        model_trace, guide_trace = traces(program, guide, n)
        assert guide_trace is not None
        texts, tokens = self._read(program, model_trace, guide_trace)
        log_p = score_sites(program, model_trace, n)
        self._credit(program, model_trace, texts)
        log_q = score_sites(program, guide_trace, n, skip=tokens)
        log_q |= {name: scores.sum((2, 3)) for name, scores in tokens.items()}
        for name, term in log_p.items():
            if torch.isneginf(term).any():
                raise ProgramError(
                    f"site {name!r} is -inf under the policy: the KL to the posterior is infinite, and SVI cannot "
                    "follow it. Use ImportanceSampling or RejectionSampling for hard constraints, or a finite penalty"
                )
        # A latent that the guide leaves out is drawn from the prior, which is then its law in q as well.
        left_out = [site.name for site in program.latents if site.name not in log_q]
        log_q |= {name: log_p[name] for name in left_out}
        sites = dict(sample_sites(model_trace)) | dict(sample_sites(guide_trace))

        zero = torch.zeros((n, 1), device=program.device)
        latents = {site.name for site in program.latents}
        seen = {name: term for name, term in log_p.items() if name not in latents}
        log_p |= {name: self.inverse_temperature * term for name, term in seen.items()}
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
        drawn = [name for name, _ in sample_sites(guide_trace)] + left_out
        if not _common_first([name in inside for name in drawn]):
            after = total.expand_as(local)

        # log p has a gradient through reparametrised latents alone: the pathwise one
        surrogate = sum((term.sum(-1) for term in log_p.values()), zero[:, 0])
        for name, term in log_q.items():
            if not term.requires_grad:
                continue
            if sites[name]["fn"].has_rsample:
                surrogate = surrogate - term.sum(-1)
            else:
                f = (after if name in inside else total).detach()
                if isinstance(self._baseline, Critic | StateValues) and name in texts:
                    advantage = self._baseline.of_tokens(name, f, texts[name])
                    surrogate = surrogate + (advantage * tokens[name]).sum((1, 2, 3))
                else:
                    surrogate = surrogate + (self._baseline(name, f, program.minibatch) * term).sum(-1)
        f = (total if program.shared else local).detach()
        terms = [term.detach() for term in seen.values()]
        if program.shared:
            terms = [term.sum(-1, keepdim=True) for term in terms]
        each = sum(terms, torch.zeros_like(f))
        self.particles = Seen({name: node["value"] for name, node in sample_sites(guide_trace)}, f, each)
        self._note(program, sites, each, f)
        return surrogate.mean()

    def _read(
        self, program: Program, model_trace: Trace, guide_trace: Trace
    ) -> tuple[dict[str, Texts], dict[str, Tensor]]:
        """Completions and trajectories as a critic reads them, and log q of each of their tokens, (particle, prompt,
        text, token), with gradient; from the passes that score them, which are not made again.

        :raises ProgramError: if there is a critic, and nothing for it to read.
        """
        texts: dict[str, Texts] = {}
        tokens: dict[str, Tensor] = {}
        if not isinstance(self._baseline, Critic | StateValues):
            return texts, tokens
        if not any(isinstance(site.fn, Readable) for site in program.latents):
            raise ProgramError(
                "the program has neither a completion nor a trajectory, and a Critic reads nothing else: use "
                "ReverseKL's leave_one_out, or an ExponentialAverage"
            )
        priors = dict(sample_sites(model_trace))
        for name, node in sample_sites(guide_trace):
            law = node["fn"]
            if not isinstance(law, Readable) or name not in priors or _is_partial(node):
                continue

            def by_prompt(x: Tensor, inside: bool = in_prompts(node), rest: int = 1) -> Tensor:
                """x (particle, *batch, token, ...) as (particle, prompt, text, token, ...)."""
                x = x.to(program.device)
                if program.prompt_dim is None or not inside:
                    return x.reshape(len(x), 1, -1, *x.shape[-rest:])
                x = x.movedim(program.prompt_dim - rest, 1)
                return x.reshape(len(x), x.shape[1], -1, *x.shape[-rest:])

            log_p, hidden = priors[name]["fn"].token_log_prob_and_hidden(node["value"])
            model_trace.nodes[name]["token_log_prob"] = log_p  # `score_sites` does not compute it again
            tokens[name] = by_prompt(law.token_log_prob(node["value"]))
            ratio = by_prompt(log_p) - tokens[name].detach()
            live = torch.arange(ratio.shape[-1], device=ratio.device) < by_prompt(law.lengths(node["value"])[..., None])
            past = ratio.cumsum(-1) - ratio
            texts[name] = Texts(by_prompt(hidden, rest=2), past, live, torch.zeros_like(past), program.minibatch)
        return texts, tokens

    def _credit(self, program: Program, model_trace: Trace, texts: dict[str, Texts]) -> None:
        """Note in ``texts`` what their steps have earned, by the sites that are in a plate `STEPS`."""
        for _, node in sample_sites(model_trace) if texts else ():
            frames = [frame for frame in node["cond_indep_stack"] if frame.name == STEPS]
            if not frames or not node["is_observed"]:
                continue
            term = self.inverse_temperature * node["log_prob"].detach().to(program.device)
            particles = (self.num_particles,) + (1,) * program.max_plate_nesting
            term = term.expand(torch.broadcast_shapes(term.shape, particles)).movedim(frames[0].dim, -1)
            if program.prompt_dim is not None and in_prompts(node):
                # moved behind it, the steps have brought every plate further in one place out
                term = term.movedim(program.prompt_dim - (frames[0].dim < program.prompt_dim), 1)
            else:
                term = term[:, None]
            term = term.reshape(*term.shape[:2], -1, term.shape[-1]).sum(2, keepdim=True)
            for read in texts.values():
                if read.past.shape[-1] == term.shape[-1]:
                    read.earned = read.earned + term.cumsum(-1) - term

    def _note(self, program: Program, sites: dict[str, Any], each: Tensor, f: Tensor) -> None:
        """Keep what the particles saw in ``last``: of each the log-likelihood, and f of the tempered target."""
        likelihood = each.mean(0)
        ratio = f + (1.0 - self.inverse_temperature) * each
        elbo = ratio.mean(0)
        self.last = {"elbo": elbo, "log_likelihood": likelihood, "kl": likelihood - elbo}
        self.last["log_evidence"] = ratio.logsumexp(0) - math.log(len(ratio))
        if "score" in sites:
            value = site_value(program.sites["score"], sites["score"]["value"], self.num_particles)
            self.last["score"] = value.detach().float().mean(0).reshape(-1)


def _is_partial(node: dict[str, Any]) -> bool:
    """Whether handlers of Pyro have a site's log-probability masked or scaled."""
    return node["mask"] is not None or not (isinstance(node["scale"], float) and node["scale"] == 1.0)


def _common_first(inside: list[bool]) -> bool:
    """Whether, in the order drawn, every latent of all prompts comes before every latent of one prompt."""
    return inside == sorted(inside)
