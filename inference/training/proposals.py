r"""Draws of the prior and of a policy that learns, each with a weight that does not depend on what it has taught.

Round t has draws of the prior q_0 = p and of the policy q_k as it is then. A density that was fitted to a draw is too
high at it, and a weight with that density in its denominator is too low. So draws that have taught no policy are
weighted by the mixture of the proposals of all of them, n_k of q_k,

    m(x) = \sum_k n_k q_k(x) / \sum_k n_k

(Owen and Zhou 2000, doi 10.2307/2669533; the balance heuristic of Veach and Guibas 1995), and those that have taught
one by the proposals of their own round, m_t, which its past determines; with K the last policy, and N draws,

    \hat Z = (1/N) ( \sum_{i taught} 2^{-(K - k)} \tilde p(x_i) / m_t(x_i)  +  c \sum_{i not} \tilde p(x_i) / m(x_i) )

\tilde p(x) = p(x) exp(l(x)), and c makes the factors' mean 1. Given all draws that teach, the policies are fixed: so
both sums are unbiased for a fixed number of draws. Draws of worse policies count less.

The prior has its share in m: no weight of a draw that taught nothing is above c exp(max l) over that share. Draws are
stratified by proposals, so that the error of \hat Z has no part of the differences between these,

    Var \hat Z = (1/N^2) \sum_s n_s Var_s[w]     (He and Owen 2014, arXiv 1411.3954).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bayeslm.inference.program import Particles, Program
from bayeslm.weights import Array, Estimate, log_evidence

from .auto_policy import AutoPolicy
from .sources import log_q
from .state import assign, copies

NEVER = torch.iinfo(torch.long).max  # the policy that a draw which has taught none has taught first


class ProposalDraws:
    """The draws of a chain, and their weights.

    ``particles`` has all draws. For each there is a number (particle,) in ``rounds``, in ``policies``, the policy of
    its round (0 where that is of the prior alone), and in ``components``, the proposal that drew it, the prior's being
    0. ``num_rounds`` and ``num_policies`` count them.

    :param program: the program, inspected.
    :param guide: whose parameters, at the time of `keep`, are a policy.
    :param num_teachers: draws of each round that may teach.
    :param own: whether each draw of a policy before the last one is weighted by its own round.
    """

    def __init__(self, program: Program, guide: AutoPolicy, num_teachers: int, own: bool) -> None:
        self._program, self._guide, self._num_teachers, self._own = program, guide, num_teachers, own
        self._kept: list[dict[str, Tensor]] = []  # the guide's parameters of each policy
        self.particles: Particles | None = None
        self.num_rounds = self.num_policies = 0
        self.rounds, self.policies, self.components = (torch.empty(0, dtype=torch.long) for _ in range(3))
        self._may_teach = torch.empty(0, dtype=torch.bool)
        self._taught = torch.empty(0, dtype=torch.long)  # the first policy that each has taught
        self._log_own = torch.empty(0)  # (particle, prompt), log m_t
        self._log_q: list[Tensor] = []  # of each proposal, (particle, prompt); NaN where not known

    def teachers(self) -> Tensor:
        """Return the rows of the draws that teach the next policy, if one is kept."""
        return self._may_teach.nonzero()[:, 0]

    def keep(self) -> None:
        """Make the guide as it is a policy, which the `teachers` have taught."""
        assert self.particles is not None, "the first draws are the prior's"
        self.num_policies += 1
        self._kept.append(copies(self._trained()))
        self._log_q.append(torch.full_like(self.particles.log_prior, torch.nan))
        self._taught[self._may_teach] = self._taught[self._may_teach].clamp_max(self.num_policies)

    def add(self, prior: Particles, policy: Particles | None) -> None:
        """Add the draws of a round: of the prior, and of the last policy, which the guide must still be.

        Nothing is added if an error or Ctrl-C stops their scoring.
        """
        parts = [self._prepared(part) for part in (prior, policy) if part is not None]
        new, counts = Particles.concatenate(parts), torch.tensor([len(part) for part in parts])
        last: Tensor | None = None
        log_own = new.log_prior
        if policy is not None:
            last = torch.cat([self._score(parts[0]), policy.log_proposal])
            log_own = _log_mixture([new.log_prior, last], counts)
        rows = [new.log_prior, *(torch.full_like(new.log_prior, torch.nan) for _ in self._kept)]
        if last is not None:
            rows[-1] = last
        if self.particles is None:
            self.particles, self._log_own, self._log_q = new, log_own, rows
        else:
            self.particles = Particles.concatenate([self.particles, new])
            self._log_own = torch.cat([self._log_own, log_own])
            self._log_q = [torch.cat(pair) for pair in zip(self._log_q, rows, strict=True)]
        some = [-(-self._num_teachers * int(n) // int(counts.sum())) for n in counts]  # of each proposal alike
        may_teach = torch.cat([torch.arange(int(n)) < few for n, few in zip(counts, some, strict=True)])
        of_policy = torch.arange(len(new)) >= counts[0]
        self.rounds = torch.cat([self.rounds, torch.full((len(new),), self.num_rounds)])
        self.policies = torch.cat([self.policies, torch.full((len(new),), self.num_policies if policy else 0)])
        self.components = torch.cat([self.components, of_policy * self.num_policies])
        self._may_teach = torch.cat([self._may_teach, may_teach])
        self._taught = torch.cat([self._taught, torch.full((len(new),), NEVER)])
        self.num_rounds += 1

    def first(self, num_rounds: int) -> tuple[Particles, Tensor, Array]:
        """Return the first rounds' draws, their log weights (particle, prompt), and strata.

        Strata (particle,) are numbers that are equal for draws of one distribution and one formula of the weight.
        """
        assert self.particles is not None, "there are no draws yet"
        num = int((self.rounds < num_rounds).sum())
        particles, policies, components = self.particles[:num], self.policies[:num], self.components[:num]
        later = policies.max() - policies
        taught = (later > 0) if self._own else (self._taught[:num] <= policies.max())
        factors = torch.where(taught, 0.5**later, 0.0).double()
        counts = torch.bincount(components[~taught], minlength=self.num_policies + 1)
        factors[~taught] = (num - factors.sum()) / counts.sum()
        log_m = self._log_own[:num].clone()
        rows = (~taught).nonzero()[:, 0].to(log_m.device)
        known = [self._known(k, rows) for k in counts.nonzero()[:, 0].tolist()]
        log_m[rows] = _log_mixture(known, counts[counts > 0])
        strata = torch.where(taught, (self.rounds[:num] + 1) * (self.num_policies + 1) + components, components)
        return particles, particles.log_joint - log_m + factors.log().to(log_m)[:, None], strata.numpy()

    def _known(self, proposal: int, rows: Tensor) -> Tensor:
        """Return log q (row, prompt) of a proposal at some draws, computed where it is not known yet."""
        assert self.particles is not None
        unknown = rows[self._log_q[proposal][rows].isnan().any(-1)]
        if len(unknown):
            with self._at(self._kept[proposal - 1]):
                log_q = self._log_q[proposal].clone()
                log_q[unknown] = self._score(self.particles[unknown])
            self._log_q[proposal] = log_q
        return self._log_q[proposal][rows]

    def _prepared(self, particles: Particles) -> Particles:
        """Return particles with what every proposal needs to score them, and without what is one proposal's."""
        return Particles(
            values=particles.values,
            log_prior=particles.log_prior,
            log_proposal=particles.log_proposal,
            log_likelihood=particles.log_likelihood,
            rewards=particles.rewards,
            pointwise=particles.pointwise,
            auxiliary=self._guide.auxiliary(particles.values),
        )

    @torch.no_grad()
    def _score(self, particles: Particles) -> Tensor:
        """Return log q (particle, prompt) of the guide as it is, in batches of bounded memory."""
        rows = torch.arange(len(particles)).split(self._program.particles_a_run)
        return torch.cat([log_q(self._program, self._guide, particles[some]) for some in rows])

    def _trained(self) -> dict[str, Tensor]:
        return {name: x for name, x in self._guide.named_parameters() if x.requires_grad}

    @contextlib.contextmanager
    def _at(self, kept: dict[str, Tensor]) -> Iterator[None]:
        """Have the parameters of another policy in the guide inside the block."""
        params = self._trained()
        now = copies(params)
        assign(kept, params)
        try:
            yield
        finally:
            assign(now, params)


def _log_mixture(log_q: list[Tensor], counts: Tensor) -> Tensor:
    r"""Return log \sum_k n_k q_k / \sum_k n_k (particle, prompt).

    :param log_q: of each proposal, (particle, prompt).
    :param counts: n, (proposal,).
    """
    total = int(counts.sum())
    return torch.stack([x + math.log(int(n) / total) for x, n in zip(log_q, counts, strict=True)]).logsumexp(0)


def stratified_log_evidence(log_weights: Array, strata: Array) -> Estimate:
    """Return log of the mean weight and its standard error, both (prompt,), of stratified draws.

    :param log_weights: (chain, draw, prompt).
    :param strata: (chain, draw), equal for draws of a chain that have one distribution. The only draw of a stratum
        counts with its distance from the mean of all draws.
    """
    log_z = log_evidence(log_weights)[0]
    relative = np.exp(log_weights - np.where(np.isfinite(log_z), log_z, 0.0))
    total: Any = np.zeros(log_z.shape)
    for weights, groups in zip(relative, strata, strict=True):
        for group in np.unique(groups):
            some = weights[groups == group]
            n = len(some)
            total = total + (n * some.var(axis=0, ddof=1) if n > 1 else (some[0] - 1.0) ** 2)
    return log_z, np.where(np.isfinite(log_z), np.sqrt(total) / strata.size, np.inf)
