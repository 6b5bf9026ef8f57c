r"""Learning a twist \psi_t(x_{1:t}) ~ E_p[ L(x) | x_{1:t} ], L = exp(r / beta), from draws of the prior.

Draws x ~ p and their likelihoods are made once, with the network's hidden states; the head is then fitted to them for
as many steps as pay. Two objectives (Zhao, Brekelmans, Makhzani and Grosse 2024, arXiv 2404.17546):

* ``contrastive`` twist learning makes the targets \pi_t(x_{1:t}) \propto p(x_{1:t}) \psi_t(x_{1:t}) the posterior's
  own marginals \sigma(x_{1:t}), by the gradient of \sum_t KL(\sigma || \pi_t):

      \sum_t  E_{\pi_t}[\nabla \log \psi_t] - E_\sigma[\nabla \log \psi_t]

  Both expectations are self-normalised over the draws (weights \psi_t, and L), which makes the loss the cross-entropy
  -\sum_i \bar L_i \log softmax_i(\log \psi_t) and its bias O(1 / draws).

* ``soft-value`` regression fits the soft Bellman equation, log \psi_t being the soft value / beta,

      \psi_t(x_{1:t}) = \sum_v p(v | x_{1:t}) \psi_{t+1}(x_{1:t}, v),    \psi_T = L

  The paper regresses logarithms, with the sum over v at hand. Here the draw's own next token stands for the sum, which
  is unbiased for a loss whose minimiser is the mean: that of Poisson regression, \psi_t - y \log \psi_t, with y half
  L and half the \psi_{t+1} of the step before (both have the mean that is sought).

Both are summed over powers of L (`models.twist.POWERS`). A part of the draws is held out: the head with the lowest
contrastive loss on it is kept, and how far that is to be believed, c_t, is found there too.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bayeslm.inference.program import (
    PartialRun,
    Program,
    ProgramError,
    Stopwatch,
    check_counts,
    check_evidence,
    check_positive,
    inspect,
    prompt_labels,
    seeded,
)
from bayeslm.models.lm import POWERS, Twist, TwistInputs, categorical, generate
from bayeslm.progress import track

from .twists import PrefixTwist, Rows

PATIENCE = 10  # steps between looks at what is held out


@dataclass
class Draws:
    """Completions of the prior: ``of`` as the head reads them, which tokens teach it (row, token), and the
    log-likelihood (particle, text), rows being (particle, text): a text for each prompt, or more."""

    of: TwistInputs
    taught: Tensor
    log_likelihood: Tensor


@dataclass(frozen=True)
class TwistLearning:
    """Trains a `Twist` for `SMC`.

    :param method: "contrastive" or "soft-value".
    :param reads_reward: the twist also reads what the program's factors say of the text so far, as by SMC's "partial".
        Much more precise where that means anything (sentiment), and free of model calls; but the reward is then called
        for every unfinished text, and, with ``proposal="twist"``, for each of its ``top_k`` continuations.
    :param num_particles: draws of the prior, a quarter of which is held out.
    :param num_steps: gradient steps, each on all draws.
    :param learning_rate, weight_decay: of AdamW.
    :param site: the completion, where the program has several.
    :param seed, progress: as in `ImportanceSampling`.
    """

    method: str = "contrastive"
    reads_reward: bool = False
    num_particles: int = 1024
    num_steps: int = 150
    learning_rate: float = 1e-3
    weight_decay: float = 1.0
    site: str | None = None
    seed: int | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        check_counts(self, "num_particles", "num_steps")
        check_positive(self, "learning_rate")
        if self.method not in LOSSES:
            raise ValueError(f"TwistLearning: method must be one of {', '.join(LOSSES)}, got {self.method!r}")
        if self.num_particles < 8:
            raise ValueError("TwistLearning: num_particles must be at least 8, of which a quarter is held out")

    def run(self, model: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Twist:
        """A twist for ``model(*args, **kwargs)``. ``stats``: ``loss`` and ``held_out`` by step, ``kept_step``, and the
        cost.

        :raises EvidenceError: if no draw has positive probability.
        :raises ProgramError: if the program has no completion, or several and ``site`` names none of them.
        """
        with seeded(self.seed), Stopwatch() as watch:
            program = inspect(model, *args, **kwargs)
            name = self._site(program)
            twist, draws = self._draw(program, name)
            history = self._fit(twist, draws)
            twist.stats = watch.stats() | history | {"method": self.method, "draws": self.num_particles}
            return twist

    def _site(self, program: Program) -> str:
        names = [site.name for site in program.completions]
        if self.site is None and len(names) == 1:
            return names[0]
        if self.site not in names:
            raise ProgramError(f"TwistLearning: site must be one of {names}, got {self.site!r}")
        return self.site

    def _draw(self, program: Program, name: str) -> tuple[Twist, Draws]:
        """Draws of the prior, and a twist that knows how their features are scaled."""
        law = program.sites[name].fn
        twist = Twist(law.lm, law.max_new_tokens, reads_reward=self.reads_reward)
        parts: list[_Batch] = []
        size = program.max_particles
        with track("draws for the twist", self.num_particles, self.progress) as report, torch.no_grad():
            for done in range(0, self.num_particles, size):
                n = min(size, self.num_particles - done)
                batch = _write(program, name, n, self.reads_reward)
                if not parts:
                    twist.fit_projection(batch.hidden[batch.written])
                parts.append(batch._replace(hidden=twist.project(batch.hidden)))  # a fifth of the memory, or less
                report(n)
        hidden, tokens, written, ends, said, log_l = (torch.cat(x) for x in zip(*parts, strict=True))
        taught = written
        if self.reads_reward:
            taught = written & ~ends & said.isfinite()  # what has ended, or is lost, is worth what the reward says
            if taught.any():
                twist.so_far_scale.copy_(
                    torch.stack([said[taught].mean(), said[taught].std(correction=0).clamp_min(1e-6)])
                )
        check_evidence(log_l[None].cpu().numpy(), prompt_labels(program))
        log_l = Rows(program, name, law).spread(log_l).reshape(len(log_l), -1).float()
        return twist, Draws(twist.inputs(hidden, tokens, said if self.reads_reward else None), taught, log_l)

    def _fit(self, twist: Twist, draws: Draws) -> dict[str, Any]:
        """Gradient steps; what was seen in each."""
        # every fourth draw in the order of likelihood is held out, so that there are good ones on both sides
        order = draws.log_likelihood.amax(1).argsort(descending=True)
        held = torch.zeros(len(order), dtype=torch.bool, device=order.device)
        held[order[1::4]] = True
        learn, check = (_part(draws, chosen) for chosen in (~held, held))
        optimizer = torch.optim.AdamW(twist.parameters(), self.learning_rate, weight_decay=self.weight_decay)
        losses, held_out, best = [], [], None
        with torch.enable_grad(), track("the twist", self.num_steps, self.progress) as report:
            for step in range(self.num_steps):
                twist.train()
                loss = _over_powers(LOSSES[self.method], twist(learn.of), learn)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(float(loss.detach()))
                if (step + 1) % PATIENCE == 0 or step + 1 == self.num_steps:
                    twist.eval()
                    with torch.no_grad():
                        now = float(_over_powers(contrastive, twist(check.of), check))
                    held_out.append(now)
                    if best is None or now <= best[0]:
                        best = (now, step + 1, copy.deepcopy(twist.state_dict()))
                report(values={"loss": losses[-1]})
        assert best is not None
        twist.load_state_dict(best[2])
        twist.eval()
        with torch.no_grad():
            twist.confidence[1:] = confidence(twist(check.of)[..., 0], check)
            psi = twist.confidence[1:] * twist(draws.of)[..., 0]
            twist.offset[1:] = offset(psi, draws)
        return {"loss": losses, "held_out": held_out, "kept_step": best[1]}


class _Batch(NamedTuple):
    """Draws as they are written, a completion a row: ``tokens``, whether there is a token (``written``), whether it
    ``ends`` the text, and what the reward has ``said`` of the text then, all (row, token)."""

    hidden: Tensor
    tokens: Tensor
    written: Tensor
    ends: Tensor
    said: Tensor
    log_likelihood: Tensor


def _write(program: Program, name: str, size: int, reads_reward: bool) -> _Batch:
    """Particles of the prior, with what is seen while the completion of a site is written."""
    history = PartialRun(program, size, retained={}, slots=torch.arange(0, device=program.device))
    seen: _Batch | None = None
    while not history.complete:
        site, law = history.advance()
        history.begin(site, law)
        steps = law.decoder()
        if site != name:
            history.write(site, *generate(steps))
            continue
        so_far = PrefixTwist(history, Rows(program, site, law), steps, partial=True) if reads_reward else None
        hidden = steps.hidden.new_zeros((len(steps.values), law.max_new_tokens, steps.hidden.shape[-1]))
        written, ends = (torch.zeros_like(steps.values, dtype=torch.bool) for _ in range(2))
        said = torch.zeros_like(steps.scores)
        while not steps.done:
            t = steps.t
            hidden[:, t], written[:, t] = steps.hidden, ~steps.finished
            steps.append(*categorical(steps.logits))
            ends[:, t] = steps.finished & written[:, t]
            if so_far is not None:
                said[:, t] = so_far.by_rows()
        history.write(site, steps.values, steps.scores)
        seen = _Batch(hidden, steps.values, written, ends, said, torch.empty(0))
    assert seen is not None
    return seen._replace(log_likelihood=history.finish().total_log_likelihood)


def _part(draws: Draws, chosen: Tensor) -> Draws:
    """Some of the particles (particle,)."""
    rows = chosen.repeat_interleave(len(draws.taught) // len(chosen))
    of = draws.of
    some = of._replace(
        hidden=of.hidden[rows], tokens=of.tokens[rows], so_far=None if of.so_far is None else of.so_far[rows]
    )
    return Draws(some, draws.taught[rows], draws.log_likelihood[chosen])


def _over_powers(loss: Callable[[Tensor, Draws], Tensor], log_psi: Tensor, draws: Draws) -> Tensor:
    """A loss for each power a of the likelihood over a: as a nears 0, so that no power's loss vanishes."""
    return torch.stack(
        [
            loss(log_psi[..., j], replace(draws, log_likelihood=power * draws.log_likelihood)) / power
            for j, power in enumerate(POWERS)
        ]
    ).sum()


def _by_prompt(log_psi: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
    """log psi_t and log L, (particle, prompt, token): -inf where a token does not teach."""
    shape = (*draws.log_likelihood.shape, -1)
    taught = draws.taught.reshape(shape)
    log_l = torch.where(taught, draws.log_likelihood[..., None], -torch.inf)
    return log_psi.reshape(shape).masked_fill(~taught, -torch.inf), log_l


def contrastive(log_psi: Tensor, draws: Draws) -> Tensor:
    """Mean over t and prompts of -sum_i L_i log softmax_i(log psi_t), L normalised; log_psi (row, token)."""
    log_psi, log_l = _by_prompt(log_psi, draws)
    alive = log_l.logsumexp(0) > -torch.inf  # a prompt of which no draw has any likelihood teaches nothing
    if not alive.any():
        return log_psi.nan_to_num(neginf=0.0).sum() * 0.0
    log_psi, log_l = log_psi[:, alive], log_l[:, alive]
    share = log_psi.log_softmax(0)
    return -(log_l.softmax(0) * share.masked_fill(log_l == -torch.inf, 0.0)).sum(0).mean()


def soft_value(log_psi: Tensor, draws: Draws) -> Tensor:
    """Mean over t and draws of psi_t - y log psi_t, y half L and half psi_{t+1}, over mean(L); log_psi (row, token).

    The level of psi_t, which is fitted in the end, is here as if it were right.
    """
    log_psi, log_l = _by_prompt(log_psi, draws)
    mean_l = draws.log_likelihood.logsumexp(0)[:, None] - math.log(len(log_l))
    likelihood = (draws.log_likelihood[..., None] - mean_l).exp()
    level = (log_l.logsumexp(0) - log_psi.logsumexp(0)).detach() - mean_l
    psi = (log_psi.detach() + level).exp()
    teaching = log_psi > -torch.inf
    after = torch.where(teaching, psi, likelihood)[..., 1:]  # what has ended is worth what it is worth
    target = (torch.cat([after, likelihood], -1) + likelihood) / 2
    chosen = teaching & level.isfinite()
    log_psi = (log_psi + level)[chosen]
    return (log_psi.exp() - target[chosen] * log_psi).mean() if len(log_psi) else log_psi.sum()


LOSSES = {"contrastive": contrastive, "soft-value": soft_value}


def confidence(log_psi: Tensor, draws: Draws) -> Tensor:
    """c_t, (token,), of the least E[L^2 / psi_t^c] E[psi_t^c] / Z^2, the prompts' geometric mean; log_psi (row, token).

    That is 1 + chi^2 of the posterior from the target at t, which the variance of SMC adds up. What is fitted to few
    draws is too sure of itself, and the second moment pays for it.
    """
    log_psi, log_l = _by_prompt(log_psi, draws)
    alive = log_l.logsumexp(0) > -torch.inf
    grid = torch.linspace(0.2, 1.0, 17, device=log_psi.device)
    costs = []
    for c in grid:
        tempered = c * log_psi  # -inf where nothing is taught, as is log_l
        second = (2 * log_l - tempered.nan_to_num(neginf=0.0)).logsumexp(0)
        moments = second + tempered.logsumexp(0) - 2 * log_l.logsumexp(0)
        costs.append(torch.where(alive, moments, 0.0).sum(0))
    return grid[torch.stack(costs).argmin(0)].where(alive.any(0), 1.0)


def offset(log_psi: Tensor, draws: Draws) -> Tensor:
    """b_t, (token,): with it the mean of psi_t is that of L, over the draws that t teaches; log_psi (row, token)."""
    log_psi, log_l = _by_prompt(log_psi, draws)
    gap = (log_l.logsumexp(0) - log_psi.logsumexp(0)).T  # (token, prompt)
    return torch.stack([of[of.isfinite()].mean() if of.isfinite().any() else of.new_zeros(()) for of in gap])
