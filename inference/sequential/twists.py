r"""Twists: guesses \psi_t of what an unfinished completion will be worth, by which SMC weighs it while it is written.

    \psi_t(x_{1:t})  ~  E_p[ exp(r(x) / beta) | x_{1:t} ],     target at t:  p(x_{1:t}) \psi_t(x_{1:t})

The exact expectation would make every particle an exact draw of the posterior; any guess that is 0 only where the
expectation is gives the right posterior in the end, since guesses cancel from step to step. (Zhao, Brekelmans,
Makhzani and Grosse 2024, arXiv 2404.17546.)

And proposals: the law a next token is drawn from, the prior's, a policy's, or the one a twist induces,

    q(v | x_{1:t})  \propto  p(v | x_{1:t}) \psi_{t+1}(x_{1:t}, v)    for the k likeliest tokens v,

all others keeping the prior's mass.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from bayeslm.inference.program import PartialRun, Program, ProgramError
from bayeslm.models.lm import Autoregressive, Decoder, Twist
from bayeslm.models.rewards import prefixes


class SiteTwist(Protocol):
    """log psi of the completions that are being written at one site."""

    factors: dict[str, Tensor]
    """Terms (particle, weight prompt) of the program that `log_psi` was the sum of, to say what killed a particle."""

    def log_psi(self) -> Tensor:
        """Of the texts so far, (particle, weight prompt)."""

    def candidates(self, tokens: Tensor) -> Tensor:
        """Of the texts so far with each of the tokens (row, k) behind it, (row, k)."""

    def select(self, rows: Tensor) -> None:
        """Row i becomes what row ``rows[i]`` is; the steps and the history have changed already."""


class Rows:
    """How the rows of a site's completions, flat, belong to particles and prompts."""

    def __init__(self, program: Program, name: str, law: Autoregressive) -> None:
        self._program = program
        self.law = law
        self.site = program.sites[name]

    def pooled(self, x: Tensor) -> Tensor:
        """Sums of x (row,) as weights are, (particle, weight prompt)."""
        size = self.law.batch_shape[0]
        return self._program.pooled(self._program.terms(x.reshape(self.law.batch_shape), size, self.site.in_prompts))

    def spread(self, term: Tensor) -> Tensor:
        """A term (particle, weight prompt) at each of its rows (row,)."""
        batch = self.site.shape[:-1]
        shape = [len(term)] + [1] * len(batch)
        if term.shape[1] > 1:
            shape[1 + self.site.dims.index("prompt")] = term.shape[1]
        return term.reshape(shape).expand(len(term), *batch).reshape(-1)

    def chosen(self, index: Tensor) -> Tensor:
        """The rows (row,) of the particles that ``index`` (particle, weight prompt) names."""
        shape = self.law.batch_shape
        rows = torch.arange(shape.numel(), device=index.device).reshape(shape[0], *self.site.shape[:-1])
        return self._program.take(self.site.name, rows, index).reshape(-1)


class PrefixTwist:
    """exp of what the program's own factors say of the text so far: those between the completion and the next latent.

    :param partial: rewards that know nothing of unfinished texts score them as they are.
    """

    def __init__(self, history: PartialRun, rows: Rows, steps: Decoder, partial: bool) -> None:
        self._history = history
        self._rows = rows
        self._steps = steps
        self._partial = partial
        self.factors: dict[str, Tensor] = {}  # what `log_psi` was the sum of, to say what killed

    def log_psi(self) -> Tensor:
        program, size = self._history.program, self._history.size
        terms = self._terms(self._history.values, self._steps.values, self._steps.finished, self._steps.t)
        self.factors = {name: program.pooled(term) for name, term in terms.items()}
        return sum(self.factors.values(), torch.zeros((size, program.weight_prompts), device=program.device))

    def by_rows(self) -> Tensor:
        """The same, of each row (row,) by itself: without the factors that are over all prompts."""
        return self._by_rows(self._history.values, self._steps.values[:, None], self._steps.t)[:, 0]

    def candidates(self, tokens: Tensor) -> Tensor:
        k = tokens.shape[-1]
        values = self._steps.values[:, None].repeat(1, k, 1)
        values[..., self._steps.t] = tokens
        others = {name: value.repeat_interleave(k, 0) for name, value in self._history.values.items()}
        return self._by_rows(others, values, self._steps.t + 1)

    def _by_rows(self, others: dict[str, Tensor], values: Tensor, length: int) -> Tensor:
        """Sums of terms (row, k) of the texts (row, k, token), which run as k times as many particles."""
        (size, k), site = (self._history.size, values.shape[1]), self._rows.site
        rows = len(values) // size
        if rows not in (1, self._history.program.num_prompts):
            raise ProgramError(
                f"site {site.name!r} has several completions a prompt, of which the reward says nothing one by one: "
                'use proposal="prior", or a twist that does not read the reward'
            )
        values = values.reshape(size, rows, k, -1).transpose(1, 2)
        finished = self._rows.law.vocabulary.is_eos(values[..., :length]).any(
            -1
        )  # what follows may be padded by an EOS
        if length == values.shape[-1]:
            finished = torch.ones_like(finished)
        total = torch.zeros((size * k, rows), device=values.device)
        for term in self._terms(others, values, finished, length).values():
            if rows == 1 or term.shape[-1] == rows:  # a factor over all prompts says nothing of one prompt's text
                total = total + (term.sum(-1, keepdim=True) if rows == 1 else term)
        return total.reshape(size, k, rows).transpose(1, 2).reshape(-1, k)

    def _terms(self, others: dict[str, Tensor], values: Tensor, finished: Tensor, length: int) -> dict[str, Tensor]:
        """Terms (particle, prompt) of completions of ``length`` tokens so far, by factor."""
        site, program = self._rows.site, self._history.program
        unfinished = ~finished.reshape(-1, *site.shape[:-1])
        value = self._blanked(values.reshape(-1, *site.shape), unfinished, length)
        ended = ~program.under_plate(site.name, unfinished)
        with prefixes(ended, partial=self._partial) as told:
            terms = self._history.terms_with(others | {site.name: value})
        # -inf is final where a reward says so, and where all is written; elsewhere it says nothing yet
        lost = torch.as_tensor(told.lost, device=ended.device)
        open_, lost = (program.terms(x.float(), len(value), site.in_prompts) > 0 for x in (~ended, lost))
        doubtful = open_ & ~lost

        def believed(term: Tensor) -> Tensor:
            doubt = doubtful if doubtful.shape[-1] in (1, term.shape[-1]) else doubtful.any(-1, keepdim=True)
            return torch.where((term == -torch.inf) & doubt, 0.0, term)

        return {name: believed(term) for name, term in terms.items()}

    def _blanked(self, values: Tensor, unfinished: Tensor, length: int) -> Tensor:
        """Completions (particle, *batch, token) with nothing after ``length``, though the pad token be a word."""
        ends = self._rows.law.vocabulary.eos_token_ids
        beyond = torch.arange(values.shape[-1], device=values.device) >= length
        return torch.where(unfinished[..., None] & beyond, ends[0] if ends else -1, values)

    def select(self, rows: Tensor) -> None:
        pass  # what it reads is the history's and the steps'


class LearnedTwist:
    """A `Twist` that reads the prior's hidden states and, if it was trained so, the reward of the text so far.

    A text that has ended is worth what it was at its end: what the reward says, or the last guess.
    """

    def __init__(self, twist: Twist, rows: Rows, steps: Decoder, so_far: PrefixTwist | None) -> None:
        self.factors: dict[str, Tensor] = {}
        self._twist = twist
        self._rows = rows
        self._steps = steps
        self._so_far = so_far
        self._state = twist.start(steps)
        self._psi = torch.zeros(len(steps.values), device=steps.values.device)
        self._ended = steps.finished

    def log_psi(self) -> Tensor:
        token = self._steps.values[:, self._steps.t - 1 : self._steps.t]
        if self._so_far is None:
            now = self._twist.lookahead(self._state, token)[:, 0]
            self._psi = torch.where(self._ended, self._psi, now)
        else:
            said = self._so_far.by_rows()
            now = self._twist.lookahead(self._state, token, said[:, None])[:, 0]
            self._psi = torch.where(self._steps.finished, said, now)
        self._ended = self._steps.finished
        self._state = self._twist.advance(self._state, self._steps)
        return self._rows.pooled(self._psi)

    def candidates(self, tokens: Tensor) -> Tensor:
        if self._so_far is None:
            return self._twist.lookahead(self._state, tokens)
        said = self._so_far.candidates(tokens)
        return torch.where(
            self._rows.law.vocabulary.is_eos(tokens), said, self._twist.lookahead(self._state, tokens, said)
        )

    def select(self, rows: Tensor) -> None:
        self._state, self._psi, self._ended = self._state.select(rows), self._psi[rows], self._ended[rows]


class PolicyTwist:
    """The ratio q(x_1:t) / p(x_1:t) of a policy, which reads along, and the prior: exp(r / beta) / Z, if the policy is
    the posterior."""

    def __init__(self, policy: Decoder, rows: Rows, steps: Decoder) -> None:
        self.factors: dict[str, Tensor] = {}
        self._policy = policy
        self._rows = rows
        self._steps = steps

    def log_psi(self) -> Tensor:
        return self._rows.pooled(self._ratio())

    def candidates(self, tokens: Tensor) -> Tensor:
        ours, theirs = (x.logits.log_softmax(-1).gather(-1, tokens) for x in (self._policy, self._steps))
        return self._ratio()[:, None] + _difference(ours, theirs)

    def select(self, rows: Tensor) -> None:
        pass  # what it reads is the policy's and the steps'

    def _ratio(self) -> Tensor:
        return _difference(self._policy.scores, self._steps.scores).sum(-1)


def _difference(log_q: Tensor, log_p: Tensor) -> Tensor:
    """log q - log p; 0 where p is 0, which the particle's weight knows already."""
    return (log_q - log_p).masked_fill(log_p == -torch.inf, 0.0)


def induced(logits: Tensor, twist: SiteTwist, top_k: int) -> Tensor:
    """Logits (row, vocabulary) of the law that a twist induces on the k likeliest tokens; the rest keep their mass."""
    log_p = logits.log_softmax(-1)
    top, tokens = log_p.topk(min(top_k, log_p.shape[-1]), dim=-1)
    tilted = top + twist.candidates(tokens)
    tilted = tilted + (top.logsumexp(-1, keepdim=True) - tilted.logsumexp(-1, keepdim=True))
    # where none of them has a future, the prior goes on: the particle's weight will say so
    return log_p.scatter(-1, tokens, torch.where(tilted.isnan(), top, tilted))
