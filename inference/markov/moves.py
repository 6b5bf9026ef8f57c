r"""Markov moves: Metropolis-Hastings steps that leave a program's posterior invariant, many chains as one batch.

    target at inverse temperature g:   \pi_g(z) \propto p(z) L(z)^g,    L the product of factors and observations
    z' ~ q(. | z) is accepted with probability   min(1, \pi_g(z') q(z | z') / (\pi_g(z) q(z' | z)))

A move proposes one latent site and keeps the others; z is all of them, so a latent whose law depends on that site
counts in p(z'). Chains are the particles of one program run; each prompt that is a posterior of its own accepts or
refuses on its own.

* `SuffixMove` redraws a completion x from a cut: i ~ U{0, ..., |x| - 1}, x'_{>i} ~ q(. | x_{<=i}). The way back has
  the same cut, with probability 1 / |x'|, so

      q(z | z') / q(z' | z)  =  |x| / |x'|  q(x_{>i} | x_{<=i}) / q(x'_{>i} | x_{<=i})

  and where q is the prior, what is left of the whole ratio is (L(z') / L(z))^g |x| / |x'|. Faria, Agrawal,
  Farinhas, Rei, de Souza and Martins 2024, QUEST, arXiv 2406.00049.
* `PriorMove` redraws a discrete latent of any other kind from its own law given the latents before it: an
  independence step (Tierney 1994, doi 10.1214/aos/1176325750).
* `RandomWalk` adds a normal step to a continuous latent in unconstrained space, u = T^{-1}(z), with the ratio of
  |dT/du|. Its step size follows Robbins and Monro's rule to the acceptance that is best in one dimension, 0.44, or
  in many, 0.234 (Roberts and Rosenthal 2001, doi 10.1214/ss/1015346320; Andrieu and Thoms 2008,
  doi 10.1007/s11222-008-9110-y).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
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
    Site,
    assign_values,
    run_particles,
    same_distribution,
)
from bayeslm.models.lm import LanguageModel, redraw


@dataclass
class Proposal:
    """A new value of one site, as the program sees it: particles in the outermost plate.

    ``value`` (particle, *plates, *event); ``log_ratio``, log q(z | z') - log q(z' | z), (particle, *plates);
    ``token_log_prob`` log p of a completion's tokens, where known; ``cut`` (particle, *plates) where a completion was
    cut, -1 where it was left alone.
    """

    value: Tensor
    log_ratio: Tensor
    token_log_prob: Tensor | None = None
    cut: Tensor | None = None


@dataclass
class Outcome:
    """What came of a move: ``accepted`` (bool) and with what ``probability``, both (particle, column), a column being
    a prompt, or all prompts if they share a latent; ``cut`` (particle, *batch) as in `Proposal`."""

    accepted: Tensor
    probability: Tensor
    cut: Tensor | None = None


class Move(ABC):
    """A Metropolis-Hastings step on one latent site.

    Called with chains and their inverse temperature, it gives the chains after one step, and what came of it.

    :raises ProgramError: if the site is masked.
    """

    def __init__(self, program: Program, name: str) -> None:
        self.program = program
        self.site = program.sites[name]
        if self.site.masked:
            raise ProgramError(f"site {name!r} is masked: its values have no probabilities to move by")

    @property
    def repeats(self) -> int:
        """Steps after which every element of the site has been proposed once, on average."""
        return 1

    @abstractmethod
    def propose(self, fn: Any, value: Tensor, known: Tensor | None) -> Proposal:
        """Propose a new value.

        :param fn: the site's distribution, which may depend on the latents before it.
        :param value: its current value, (particle, *plates, *event).
        :param known: log p of the tokens of a completion, (particle, *plates, token).
        """

    def __call__(self, state: Particles, gamma: Tensor | float = 1.0) -> tuple[Particles, Outcome]:
        """One step of every chain.

        :param state: the chains, their terms and token scores up to date (`score` makes one of values).
        :param gamma: inverse temperature, broadcast to (particle, column).
        :raises ProgramError: if a term of the proposal's log-joint is NaN or +inf.
        """
        program, size = self.program, len(state)
        run = _Proposing(self, state)
        with run.handler():
            new = run_particles(program, None, size)
        log_ratio = program.pooled(program.terms(run.log_ratio, size, self.site.in_prompts)) + run.outside
        log_ratio = log_ratio + log_target(new, gamma) - log_target(state, gamma)
        log_ratio = log_ratio.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)  # -inf to -inf: refused
        accepted = torch.rand_like(log_ratio).log() < log_ratio
        index = torch.arange(size, device=accepted.device)[:, None] + size * accepted
        state = Particles.concatenate([state, new]).gather(program, index)
        cut = None if run.cut is None else run.cut.reshape(size, *self.site.shape[: self.site.batch_dims])
        return state, Outcome(accepted, log_ratio.clamp_max(0.0).exp(), cut)

    def _pick(self, batch: Tensor) -> Tensor:
        """One element of the site for each posterior, at random: a mask of the shape of ``batch`` (particle, *plates).

        Of many elements, changing one is accepted far more often than changing all.
        """
        u = torch.rand_like(batch, dtype=torch.float32)
        together = None if self.program.shared else self.program.prompt_dim
        others = [dim for dim in range(1 - u.dim(), 0) if dim != together]
        return u == u.amax(others, keepdim=True) if others else torch.ones_like(u, dtype=torch.bool)

    @property
    def _elements(self) -> int:
        """Elements of the site in one posterior."""
        batch = math.prod(self.site.shape[: self.site.batch_dims])
        return batch if self.program.shared else batch // self.program.num_prompts


class SuffixMove(Move):
    """Redraws a completion from a uniform cut, one completion of each posterior at a time.

    :param policy: proposes in the prior's place.
    """

    def __init__(self, program: Program, name: str, policy: LanguageModel | None = None) -> None:
        super().__init__(program, name)
        self.policy = policy

    @property
    def repeats(self) -> int:
        return self._elements

    def propose(self, fn: Any, value: Tensor, known: Tensor | None) -> Proposal:
        assert known is not None
        lengths = fn.lengths(value)
        chosen = self._pick(lengths)
        cut = (torch.rand_like(lengths, dtype=torch.float32) * lengths).long().minimum(lengths - 1)
        proposer = fn if self.policy is None else fn.with_model(self.policy)
        new, forward = redraw(proposer, value, torch.where(chosen, cut, lengths))
        redrawn = chosen[..., None] & (torch.arange(value.shape[-1], device=value.device) >= cut[..., None])
        old = known if self.policy is None else proposer.token_log_prob(value)
        backward = old.masked_fill(~redrawn, 0.0)
        log_ratio = (backward - forward).sum(-1) + lengths.log() - fn.lengths(new).log()
        token_log_prob = torch.where(redrawn, forward, known) if self.policy is None else None
        return Proposal(new, log_ratio, token_log_prob, torch.where(chosen, cut, -1))


class PriorMove(Move):
    """Redraws a discrete latent from its law given the latents before it, one element of each posterior at a time."""

    @property
    def repeats(self) -> int:
        return self._elements

    def propose(self, fn: Any, value: Tensor, known: Tensor | None) -> Proposal:
        log_prob = fn.log_prob(value)
        chosen = self._pick(log_prob)
        event = (1,) * (value.dim() - chosen.dim())
        new = torch.where(chosen.reshape(*chosen.shape, *event), fn.sample(), value)
        return Proposal(new, log_prob - fn.log_prob(new))


class RandomWalk(Move):
    """A normal step of a continuous latent in unconstrained space, all elements together.

    The step is ``step_size`` times 2.38 / sqrt(d) (Roberts and Rosenthal 2001) times the spread of the latent's own
    law, measured on a few draws of it: they know nothing of the current value, so the step stays symmetric.

    :param step_size: at the start.
    :param groups: (particle,) the group of each chain; chains of a group adapt one step size together.
    """

    draws = 32

    def __init__(self, program: Program, name: str, step_size: float = 1.0, groups: Tensor | None = None) -> None:
        super().__init__(program, name)
        self._groups = groups
        self._count = 1 if groups is None else int(groups.max()) + 1
        size = (self._count, program.weight_prompts)
        self._log_step = torch.full(size, math.log(step_size), device=program.device)
        self._dimension = 1  # of u in one posterior, known once there is one
        self._adapted = 0

    @property
    def step_size(self) -> Tensor:
        """(group, column)."""
        return self._log_step.exp()

    def propose(self, fn: Any, value: Tensor, known: Tensor | None) -> Proposal:
        transform = biject_to(fn.support)
        u = transform.inv(value)
        spread = transform.inv(fn.sample((self.draws,))).sort(0).values
        spread = (spread[self.draws * 5 // 6] - spread[self.draws // 6]) / 2  # a normal's standard deviation, nearly
        columns = self.program.weight_prompts
        self._dimension = u.numel() // (len(u) * columns)
        shape = [len(u)] + [1] * (u.dim() - 1)
        if not self.program.shared and self.program.prompt_dim is not None:
            shape[1 + self.program.max_plate_nesting + self.program.prompt_dim] = columns
        step = self.step_size[self._groups_of(len(u))].reshape(shape) * 2.38 / self._dimension**0.5
        moved = u + step * spread * torch.randn_like(u)
        new = transform(moved)
        log_ratio = transform.log_abs_det_jacobian(moved, new) - transform.log_abs_det_jacobian(u, value)
        return Proposal(new, sum_rightmost(log_ratio, log_ratio.dim() - len(fn.batch_shape)))

    def adapt(self, outcome: Outcome) -> None:
        """Move step sizes towards the best acceptance. The chain is Markov only while this is not called."""
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


class _Proposing:
    """One run of a move: latents keep their current values, and the move's site has the value that it proposes.

    ``log_ratio`` and ``cut`` are the proposal's; ``outside`` (particle, column) is -inf where a later latent's value is
    no longer in the support of its distribution.
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
            return value, None  # the proposal may have changed its prompts; before it, nothing has changed
        if self._proposed and known is None:
            value = self._within_support(name, fn, value)
        return value, known

    def _within_support(self, name: str, fn: Any, value: Tensor) -> Tensor:
        """Return the value, with another one of the support where it is outside."""
        inside = fn.support.check(value)
        if inside.all():
            return value
        site, size = self._program.sites[name], len(value)
        dead = torch.zeros(inside.shape, device=inside.device).masked_fill(~inside, -torch.inf)
        self.outside = self.outside + self._program.pooled(self._program.terms(dead, size, site.in_prompts))
        return torch.where(inside.reshape(*inside.shape, *(1,) * (value.dim() - inside.dim())), value, fn.sample())


def latent_moves(
    program: Program, *, policy: LanguageModel | None = None, step_size: float = 1.0, groups: Tensor | None = None
) -> list[Move]:
    """A move for each latent: suffixes of completions, other discrete latents, continuous ones; in their order.

    :param policy: proposes completions in the prior's place.
    :param step_size, groups: of `RandomWalk`.
    :raises ProgramError: if a latent is masked.
    """

    def move(site: Site) -> Move:
        if site.is_completion:
            return SuffixMove(program, site.name, policy)
        if site.fn.support.is_discrete:
            return PriorMove(program, site.name)
        return RandomWalk(program, site.name, step_size, groups)

    return [move(site) for site in program.latents]


def score(program: Program, values: dict[str, Tensor], token_log_prob: dict[str, Tensor] | None = None) -> Particles:
    """Particles at given values (particle, *batch, *event) of all latents, as moves take them."""
    with assign_values(program, values, token_log_prob):
        return run_particles(program, None, len(next(iter(values.values()))))


def log_target(state: Particles, gamma: Tensor | float) -> Tensor:
    """log p(z) + gamma log L(z), (particle, column); at gamma = 0 the prior, where L = 0 too."""
    return state.log_prior + tempered(state.total_log_likelihood, gamma)


def tempered(log_likelihood: Tensor, gamma: Tensor | float) -> Tensor:
    """gamma log L, with 0 log 0 = 0."""
    gamma = torch.as_tensor(gamma, dtype=log_likelihood.dtype, device=log_likelihood.device)
    return torch.where(gamma == 0, 0.0, gamma * log_likelihood)


class Tally:
    """Acceptance of moves: by site and column, and of completions by the position of the cut."""

    def __init__(self) -> None:
        self._sites: dict[str, Tensor] = {}  # (2, column): tried, accepted
        self._cuts: dict[str, Tensor] = {}  # (2, token)

    def add(self, move: Move, outcome: Outcome, rows: Tensor | slice = slice(None)) -> None:
        """Count a move; of the particles ``rows`` alone."""
        name, site = move.site.name, move.site
        accepted = outcome.accepted[rows]
        counts = torch.stack([torch.full_like(accepted[0], len(accepted), dtype=torch.long), accepted.sum(0)])
        self._sites[name] = counts + self._sites.get(name, 0)
        if outcome.cut is None:
            return
        cut = outcome.cut[rows]
        shape = [len(cut)] + [1] * (cut.dim() - 1)
        if not move.program.shared:
            shape[1 + site.dims.index("prompt")] = accepted.shape[1]
        accepted = accepted.reshape(shape).expand_as(cut)
        length = site.shape[-1]
        tried = (cut[cut >= 0].bincount(minlength=length), cut[(cut >= 0) & accepted].bincount(minlength=length))
        self._cuts[name] = torch.stack(tried) + self._cuts.get(name, 0)

    def stats(self) -> dict[str, np.ndarray]:
        """``acceptance_<site>`` (column,); and of completions ``acceptance_by_cut_<site>`` (max_new_tokens,), where 0,
        1, ... tokens were kept (NaN where that never was), with ``cuts_<site>``, how often they were."""
        stats = {}
        with np.errstate(invalid="ignore"):
            for name, counts in self._sites.items():
                tried, accepted = counts.cpu().numpy()
                stats[f"acceptance_{name}"] = accepted / tried
            for name, counts in self._cuts.items():
                tried, accepted = counts.cpu().numpy()
                stats |= {f"acceptance_by_cut_{name}": accepted / tried, f"cuts_{name}": tried}
        return stats


def sweep(
    moves: list[Move],
    state: Particles,
    gamma: Tensor | float = 1.0,
    *,
    tally: Tally | None = None,
    rows: Tensor | slice = slice(None),
    adapt: bool = False,
) -> Particles:
    """Each move in turn, as often as it takes to propose every element once on average.

    :param tally: counts the moves of the particles ``rows``.
    :param adapt: let random walks adapt their steps.
    """
    for move in moves:
        for _ in range(move.repeats):
            state, outcome = move(state, gamma)
            if tally is not None:
                tally.add(move, outcome, rows)
            if adapt and isinstance(move, RandomWalk):
                move.adapt(outcome)
    return state
