r"""The move of completions: N new suffixes from one cut, and a choice among them and the current one (`ensemble`).

    i ~ c(. | x), the cut;    x_k = (x_{<=i}, y_k),    y_k ~ q(. | x_{<=i}) for k = 1, ..., N

The reverse move has the same cut, so the weights at inverse temperature g are

    w_k = c(i | x_k) p(z_k) L(z_k)^g / q(y_k | x_{<=i}),     with q the prior:  c(i | x_k) L(z_k)^g

times p of the latents whose distributions depend on x. (With N = 1 and uniform cuts, c = 1 / |x|: Faria, Agrawal,
Farinhas, Rei, de Souza and Martins 2024, QUEST, arXiv 2406.00049.) With a distribution a on {0, ..., T - 1},

* each text has a cut of its own, c(i | x) = a_i / (a_0 + ... + a_{|x| - 1}) for i < |x|, or
* all chains have the same cut, i ~ a whatever the text, and a text that has ended by then does not move: c(i | x_k) is
  a_i for all candidates, which have more than i tokens, and cancels. Each cut alone leaves the target invariant: cuts
  may follow any sequence: the quantiles of a at the points u + j (\sqrt 5 - 1) / 2 modulo 1, which cover a more evenly
  than random draws do. The new tokens of the batch are then equally many, and it takes half as many steps. Chains are
  independent given the cuts, and their distribution does not depend on these once they have reached the target; before
  that it does, so particles that are annealed have cuts of their own.

In the warm-up a adapts, and it is fixed after it. Let J_i be the mean squared jump of log L of a move from i, over
candidates: half of a is uniform, and half is in proportion to the square root of J_i over the new tokens T - i.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bayeslm.inference.program import Program
from bayeslm.models.lm import LanguageModel, redraw
from bayeslm.validation import validated

from .moves import Move, Outcome, Proposal

GOLDEN = (5**0.5 - 1) / 2


@validated
class SuffixMove(Move):
    """Redraw a completion from a cut, one completion of each posterior at a time.

    :param program: the inspected program.
    :param name: the name of a completion site.
    :param policy: the language model that proposes suffixes; None for the prior.
    :param num_candidates: the number N of suffixes.
    :param groups: the group of each chain, (particle,); the chains of a group learn one distribution of cuts together.
        None for one group.
    :param same_cut: whether all chains have the same cut at each step.
    """

    def __init__(
        self,
        program: Program,
        name: str,
        policy: LanguageModel | None = None,
        num_candidates: int = 1,
        groups: Tensor | None = None,
        same_cut: bool = False,
    ) -> None:
        super().__init__(program, name)
        self.policy = policy
        self.num_candidates = num_candidates
        self._groups = groups
        self._same_cut = same_cut
        self._tokens = self.site.shape[-1]
        size = (1 if groups is None else int(groups.max()) + 1, self._tokens)
        self._log_learned = torch.zeros(size, device=program.device)
        self._jumps, self._tried = torch.zeros((2, *size), device=program.device)
        self._point: Tensor | None = None

    @property
    def repeats(self) -> int:
        return self._elements

    @property
    def cut_probabilities(self) -> Tensor:
        """The distribution of cuts, (group, token)."""
        return (self._log_learned.softmax(-1) + 1.0 / self._tokens) / 2

    def propose(self, fn: Any, value: Tensor, token_log_prob: Tensor | None) -> Proposal:
        assert token_log_prob is not None
        size, positions = len(value) // self.num_candidates, torch.arange(self._tokens, device=value.device)
        fn, value, token_log_prob = fn.first(size), value[:size], token_log_prob[:size]
        lengths = fn.lengths(value)
        cdf = self._cdf(size).reshape(size, *(1,) * (lengths.dim() - 1), -1).expand(*lengths.shape, -1)
        within = cdf[..., -1] if self._same_cut else cdf.gather(-1, lengths[..., None] - 1)[..., 0]
        cut = (cdf < (self._points(lengths) * within)[..., None]).sum(-1)
        cut = cut.minimum(torch.full_like(lengths, self._tokens) - 1 if self._same_cut else lengths - 1)
        chosen = self._pick(lengths)
        moving = chosen & (cut < lengths)
        proposer = fn if self.policy is None else fn.with_model(self.policy)
        new, forward = redraw(proposer, value, torch.where(moving, cut, lengths), self.num_candidates)
        redrawn = moving[..., None] & (positions >= cut[..., None])
        old = token_log_prob if self.policy is None else proposer.token_log_prob(value)
        log_ratio = (old.masked_fill(~redrawn, 0.0) - forward).sum(-1)
        if not self._same_cut:
            after = cdf.expand(*new.shape[:-1], -1).gather(-1, fn.lengths(new)[..., None] - 1)[..., 0]
            log_ratio = log_ratio + within.log() - after.log()
        log_ratio = log_ratio.masked_fill(chosen & ~moving, -torch.inf)  # it stays, and is not counted as a move
        known = torch.where(redrawn, forward, token_log_prob).flatten(0, 1) if self.policy is None else None
        return Proposal(new.flatten(0, 1), log_ratio.flatten(0, 1), known, torch.where(moving, cut, -1))

    def adapt(self, outcome: Outcome) -> None:
        """Learn the distribution of cuts from a move of all chains. While it adapts, the chain is not Markov."""
        assert outcome.cut is not None
        jump, cut = self._by_completion(outcome.jump), outcome.cut
        group = self._groups_of(len(cut)).reshape(-1, *(1,) * (cut.dim() - 1)).expand_as(cut)
        place = (group[cut >= 0], cut[cut >= 0])
        self._tried.index_put_(place, torch.ones_like(place[0], dtype=self._tried.dtype), accumulate=True)
        self._jumps.index_put_(place, jump.expand_as(cut)[cut >= 0].to(self._jumps), accumulate=True)
        rooms = self._tokens - torch.arange(self._tokens, device=cut.device)
        all_tried = self._tried.sum(-1, keepdim=True)
        # counted as if each cut had been tried once more, with the mean jump
        mean = self._jumps.sum(-1, keepdim=True) / all_tried.clamp_min(1.0)
        jump = (self._jumps + mean) / (self._tried + 1.0)
        self._log_learned = (jump / rooms).clamp_min(1e-12).log() / 2

    def _by_completion(self, x: Tensor) -> Tensor:
        """Return x (particle, prompt) in a shape that broadcasts to the site's batch (particle, *batch)."""
        shape = [len(x)] + [1] * (len(self.site.shape) - 1)
        if not self.program.shared:
            shape[1 + self.site.dims.index("prompt")] = x.shape[1]
        return x.reshape(shape)

    def _cdf(self, size: int) -> Tensor:
        """Return the distribution function of each chain's cuts, (particle, token)."""
        return self.cut_probabilities.cumsum(-1)[self._groups_of(size)]

    def _points(self, like: Tensor) -> Tensor:
        """Return the points at whose quantiles to cut, in the shape of ``like`` or broadcast to it."""
        if not self._same_cut:
            return torch.rand_like(like, dtype=torch.float32)
        if self._point is None:
            self._point = torch.rand((), device=like.device)
        self._point = (self._point + GOLDEN) % 1.0
        return self._point

    def _groups_of(self, size: int) -> Tensor:
        if self._groups is not None:
            return self._groups
        return torch.zeros(size, dtype=torch.long, device=self.program.device)
