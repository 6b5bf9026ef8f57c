r"""Markov moves: Metropolis-Hastings steps that leave a program's posterior invariant, many chains as one batch.

    target at inverse temperature g:   \pi_g(z) \propto p(z) L(z)^g,    L the product of factors and observations
    z' ~ q(. | z) is accepted with probability   min(1, \pi_g(z') q(z | z') / (\pi_g(z) q(z' | z)))

A move proposes a new value of one latent site and keeps the others; z is all of them, so a latent whose distribution
depends on that site counts in p(z'). Chains are the particles of one program run; each prompt that is a posterior of
its own accepts or rejects on its own.

* `SuffixMove` (`suffix_move.py`) redraws the suffixes of completions; it proposes N values at once (`ensemble.py`).
* `PriorMove` redraws a discrete latent of any other kind from its prior conditional on the latents before it: an
  independence step (Tierney 1994, doi 10.1214/aos/1176325750).
* `RandomWalk` adds a normal step to a continuous latent in unconstrained space, u = T^{-1}(z), with the ratio of
  |dT/du|. Its step size follows Robbins and Monro's rule to the optimal acceptance, 0.44 in one dimension and 0.234
  in many (Roberts and Rosenthal 2001, doi 10.1214/ss/1015346320; Andrieu and Thoms 2008,
  doi 10.1007/s11222-008-9110-y).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from pyro.distributions.util import sum_rightmost
from torch import Tensor
from torch.distributions import biject_to

from bayeslm.inference.program import (
    Assign,
    Assignment,
    Particles,
    Program,
    ProgramError,
    run_particles,
    same_distribution,
)
from bayeslm.validation import validated

from .ensemble import choose
from .tempering import log_target


@dataclass
class Proposal:
    """A proposed value of one site, with the particles in the outermost plate.

    N values of each particle are in the same axis, candidate by candidate, which is then (N * particle).

    :param value: (particle, *plates, *event).
    :param log_ratio: log q(z | z') - log q(z' | z), (particle, *plates).
    :param token_log_prob: log p of a completion's tokens, (particle, *plates, token); None where it is not known.
    :param cut: the number of tokens of a completion that are kept, (particle, *plates), the same for all N; -1 where
        none is redrawn.
    """

    value: Tensor
    log_ratio: Tensor
    token_log_prob: Tensor | None = None
    cut: Tensor | None = None


@dataclass
class Outcome:
    """The result of a move; the prompt axis has length 1 where prompts share a latent.

    :param tried: whether a value was proposed, bool (particle, prompt): a completion that has ended by the cut stays.
    :param accepted: whether the state has become a proposed one, bool (particle, prompt).
    :param probability: the probability of acceptance, (particle, prompt).
    :param candidates: the current states and N proposals of each, ((N + 1) * particle).
    :param shares: of each candidate in averages, (N + 1, particle, prompt).
    :param cut: that of the `Proposal`, (particle, *batch).
    """

    tried: Tensor
    accepted: Tensor
    probability: Tensor
    candidates: Particles
    shares: Tensor
    cut: Tensor | None = None

    @property
    def jump(self) -> Tensor:
        """The mean squared difference of log L to the current state, by the candidates' shares, (particle, prompt)."""
        log_l = self.candidates.total_log_likelihood.reshape(self.shares.shape)
        square = (log_l - log_l[0]).square()
        return torch.where((self.shares > 0) & square.isfinite(), self.shares * square, 0.0).sum(0)


class Move(ABC):
    """A Metropolis-Hastings step on one latent site: a function from the chains to the chains after the step.

    :param program: the inspected program.
    :param name: the site's name.
    :raises ProgramError: if the site is masked.
    """

    num_candidates = 1  # the number N of values that it proposes

    def __init__(self, program: Program, name: str) -> None:
        self.program = program
        self.site = program.sites[name]
        if self.site.masked:
            raise ProgramError(
                f"site {name!r} is masked, so its values have no probabilities to accept moves by: take the mask off"
            )

    @property
    def repeats(self) -> int:
        """The number of steps that propose every element of the site once on average."""
        return 1

    @abstractmethod
    def propose(self, fn: Any, value: Tensor, token_log_prob: Tensor | None) -> Proposal:
        """Propose a new value.

        :param fn: the site's distribution, which may depend on the latents before it.
        :param value: the site's current value, (particle, *plates, *event).
        :param token_log_prob: log p of the tokens of a completion, (particle, *plates, token).
        """

    def __call__(self, state: Particles, gamma: Tensor | float = 1.0) -> tuple[Particles, Outcome]:
        """Make one step of every chain.

        :param state: the chains, one a particle, scored at their values (`score_values`).
        :param gamma: inverse temperatures, broadcast to (particle, prompt).
        :returns: the chains after the step, and the result of the move.
        :raises ProgramError: if a term of the proposal's log-joint is NaN or +inf.
        """
        program, size = self.program, len(state)
        repeated = state[torch.arange(size, device=state.log_prior.device).repeat(self.num_candidates)]
        run = _MoveRun(self, repeated)
        with run.handler():
            new = run_particles(program, None, len(repeated))
        ratio = program.pooled(program.terms(run.log_ratio, len(repeated), self.site.in_prompts)) + run.outside
        gamma = torch.as_tensor(gamma, dtype=state.log_prior.dtype, device=state.log_prior.device)
        before = log_target(state, gamma)
        after = log_target(new, gamma.expand(before.shape).repeat(self.num_candidates, 1))
        ratio = (ratio + after).reshape(-1, *before.shape) - before
        choice = choose(ratio, before > -torch.inf)
        index = torch.arange(size, device=before.device)[:, None] + size * choice.index
        candidates = Particles.concatenate([state, new])
        tried, cut = torch.ones_like(choice.index, dtype=torch.bool), None
        if run.cut is not None:
            cut = run.cut.reshape(size, *self.site.shape[: self.site.batch_dims])
            tried = program.pooled(program.terms((run.cut >= 0).float(), size, self.site.in_prompts)) > 0
        outcome = Outcome(tried, choice.index > 0, choice.probability, candidates, choice.shares, cut)
        return candidates.gather(program, index), outcome

    def adapt(self, outcome: Outcome) -> None:
        """Learn from a step of the warm-up."""
        return  # most moves have nothing to learn

    def _pick(self, batch: Tensor) -> Tensor:
        """Choose one element of the site for each posterior at random; return a mask in the shape of ``batch``.

        A proposal that changes one of many elements is accepted far more often than one that changes all of them.

        :param batch: any tensor (particle, *plates).
        """
        u = torch.rand_like(batch, dtype=torch.float32)
        together = None if self.program.shared else self.program.prompt_dim
        others = [dim for dim in range(1 - u.dim(), 0) if dim != together]
        return u == u.amax(others, keepdim=True) if others else torch.ones_like(u, dtype=torch.bool)

    @property
    def _elements(self) -> int:
        """The number of elements of the site in one posterior."""
        batch = math.prod(self.site.shape[: self.site.batch_dims])
        return batch if self.program.shared else batch // self.program.num_prompts


class PriorMove(Move):
    """Redraw a discrete latent from its prior given earlier latents, one element of each posterior at a time."""

    @property
    def repeats(self) -> int:
        return self._elements

    def propose(self, fn: Any, value: Tensor, token_log_prob: Tensor | None) -> Proposal:
        log_prob = fn.log_prob(value)
        chosen = self._pick(log_prob)
        event = (1,) * (value.dim() - chosen.dim())
        new = torch.where(chosen.reshape(*chosen.shape, *event), fn.sample(), value)
        return Proposal(new, log_prob - fn.log_prob(new))


@validated
class RandomWalk(Move):
    """Add a normal step to a continuous latent in unconstrained space, all elements together.

    The standard deviation of the step is ``step_size`` times 2.38 / sqrt(d) (Roberts and Rosenthal 2001) times that of
    the latent's own distribution, estimated by a few draws: these do not depend on the current value, so the step is
    symmetric.

    :param program: the inspected program.
    :param name: the name of a continuous latent site.
    :param step_size: the initial step size.
    :param groups: the group of each chain, (particle,); the chains of a group adapt one step size together. None for
        one group.
    """

    draws = 32  # from which the standard deviation is estimated

    def __init__(self, program: Program, name: str, step_size: float = 1.0, groups: Tensor | None = None) -> None:
        super().__init__(program, name)
        self._groups = groups
        self._count = 1 if groups is None else int(groups.max()) + 1
        size = (self._count, program.weight_prompts)
        self._log_step = torch.full(size, math.log(step_size), device=program.device)
        self._dimension = 1  # of u in one posterior; set by `propose`
        self._adapted = 0

    @property
    def step_size(self) -> Tensor:
        """Step sizes, (group, prompt)."""
        return self._log_step.exp()

    def propose(self, fn: Any, value: Tensor, token_log_prob: Tensor | None) -> Proposal:
        transform = biject_to(fn.support)
        u = transform.inv(value)
        spread = transform.inv(fn.sample((self.draws,))).sort(0).values
        spread = (spread[self.draws * 5 // 6] - spread[self.draws // 6]) / 2  # about the standard deviation, if normal
        prompts = self.program.weight_prompts
        self._dimension = u.numel() // (len(u) * prompts)
        shape = [len(u)] + [1] * (u.dim() - 1)
        if not self.program.shared and self.program.prompt_dim is not None:
            shape[1 + self.program.max_plate_nesting + self.program.prompt_dim] = prompts
        step = self.step_size[self._groups_of(len(u))].reshape(shape) * 2.38 / self._dimension**0.5
        moved = u + step * spread * torch.randn_like(u)
        new = transform(moved)
        log_ratio = transform.log_abs_det_jacobian(moved, new) - transform.log_abs_det_jacobian(u, value)
        return Proposal(new, sum_rightmost(log_ratio, log_ratio.dim() - len(fn.batch_shape)))

    def adapt(self, outcome: Outcome) -> None:
        """Move the step sizes towards the optimal acceptance. While they adapt, the chain is not Markov."""
        self._adapted += 1
        rates = torch.zeros_like(self._log_step)
        groups = self._groups_of(len(outcome.probability))
        rates = rates.index_add(0, groups, outcome.probability) / groups.bincount(minlength=self._count)[:, None]
        best = 0.44 if self._dimension == 1 else 0.234
        self._log_step += (rates / best - 1.0) * self._adapted**-0.6

    def _groups_of(self, size: int) -> Tensor:
        if self._groups is not None:
            return self._groups
        return torch.zeros(size, dtype=torch.long, device=self._log_step.device)


class _MoveRun:
    """The assignments of one run of a move: all latents keep their values, but the move's site has the proposed one.

    ``log_ratio`` and ``cut`` are those of the proposal; ``outside`` (particle, prompt) is -inf where the value of a
    later latent is no longer in the support of its distribution, and 0 elsewhere.
    """

    def __init__(self, move: Move, state: Particles) -> None:
        self._move, self._program, self._state = move, move.program, state
        self._proposed = False
        self.log_ratio = self.outside = torch.zeros_like(state.log_prior)
        self.cut: Tensor | None = None

    def handler(self) -> Assign:
        return Assign({name: partial(self._assignment, name) for name in self._state.values})

    def _assignment(self, name: str, fn: Any) -> Assignment:
        value = self._program.under_plate(name, self._state.values[name])
        known = self._state.token_log_prob.get(name)
        known = None if known is None else self._program.under_plate(name, known)
        if name == self._move.site.name:
            proposal = self._move.propose(fn, value, known)
            self.log_ratio, self.cut, self._proposed = proposal.log_ratio, proposal.cut, True
            return proposal.value, proposal.token_log_prob
        if self._proposed and known is not None and not same_distribution(fn, self._program.sites[name].fn):
            return value, None  # the proposal may have changed its prompts; sites before the move's site are unchanged
        if self._proposed and known is None:
            value = self._within_support(name, fn, value)
        return value, known

    def _within_support(self, name: str, fn: Any, value: Tensor) -> Tensor:
        """Return the value, replaced by a draw where it is outside the support."""
        inside = fn.support.check(value)
        if inside.all():
            return value
        site, size = self._program.sites[name], len(value)
        dead = torch.zeros(inside.shape, device=inside.device).masked_fill(~inside, -torch.inf)
        self.outside = self.outside + self._program.pooled(self._program.terms(dead, size, site.in_prompts))
        return torch.where(inside.reshape(*inside.shape, *(1,) * (value.dim() - inside.dim())), value, fn.sample())
