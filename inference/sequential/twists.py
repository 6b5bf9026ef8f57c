r"""Twists: estimates \psi_t of the value of an unfinished completion, by which SMC weighs it while it is written.

    \psi_t(x_{1:t})  ~  E_p[ exp(r(x) / beta) | x_{1:t} ],     target at t:  p(x_{1:t}) \psi_t(x_{1:t})

The exact expectation would make every particle an exact draw of the posterior; any estimate that is 0 only where the
expectation is 0 leads to the right posterior, since the estimates cancel from step to step. (Zhao, Brekelmans,
Makhzani and Grosse 2024, arXiv 2404.17546.)

A twist also induces a proposal, a distribution of the next token,

    q(v | x_{1:t})  \propto  p(v | x_{1:t}) \psi_{t+1}(x_{1:t}, v)    for the k likeliest tokens v,

while all other tokens keep their probability under the prior.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from bayeslm.inference.program import PartialRun, Program, ProgramError
from bayeslm.models.lm import Autoregressive, Decoder, Twist, put_on_host
from bayeslm.models.rewards import prefixes
from bayeslm.validation import validated


@runtime_checkable
class SiteTwist(Protocol):
    """The log-twist of the completions that are being written at one site, a row each."""

    factors: dict[str, Tensor]
    """The program's terms (particle, prompt) that `log_psi` is the sum of, if it is one: the cause of a weight of 0."""

    def log_psi(self) -> Tensor:
        """Return log psi of the texts so far, (particle, prompt)."""

    def propose(self, logits: Tensor, top_k: int) -> Tensor:
        """Return the logits (row, vocabulary) of the proposal that the twist induces, of the prior's.

        :param top_k: the tokens of each row at which a twist is evaluated, if each costs something.
        """

    def select(self, rows: Tensor) -> None:
        """Replace row i by row ``rows[i]``; the decoder and the partial run have already been changed."""


@validated
class SiteRows:
    """The correspondence between the rows of a site's completions, flat, and particles and prompts.

    :param program: the inspected program.
    :param name: the site's name.
    :param distribution: the site's distribution in the run, of batch shape (particle, *plates).
    """

    def __init__(self, program: Program, name: str, distribution: Autoregressive) -> None:
        self._program = program
        self.distribution = distribution
        self.site = program.sites[name]

    def pooled(self, x: Tensor) -> Tensor:
        """Return sums of x (row,) in the shape of weights, (particle, prompt)."""
        shape = self.distribution.batch_shape
        return self._program.pooled(self._program.terms(x.reshape(shape), shape[0], self.site.in_prompts))

    def check_one_of_each(self) -> None:
        """Check that each weight (particle, prompt) is that of one completion.

        :raises ProgramError: if it is not.
        """
        shape = self.distribution.batch_shape
        if shape.numel() != shape[0] * self._program.weight_prompts:
            raise ProgramError(
                f"at site {self.site.name!r} a weight is that of several completions together, and "
                'resampling="optimal" chooses among the continuations of one: use another resampling'
            )

    def spread(self, term: Tensor) -> Tensor:
        """Return a term (particle, prompt) at each of its rows, (row,)."""
        batch = self.site.shape[:-1]
        shape = [len(term)] + [1] * len(batch)
        if term.shape[1] > 1:
            shape[1 + self.site.dims.index("prompt")] = term.shape[1]
        return term.reshape(shape).expand(len(term), *batch).reshape(-1)

    def selected(self, index: Tensor) -> Tensor:
        """Return the rows (row,) of the particles that ``index`` (particle, prompt) selects."""
        shape = self.distribution.batch_shape
        rows = torch.arange(shape.numel(), device=index.device).reshape(shape[0], *self.site.shape[:-1])
        return self._program.take(self.site.name, rows, index).reshape(-1)


@validated
class PrefixTwist:
    """The twist exp(terms of the text so far), by the program's own factors between the completion and the next latent.

    :param partial_run: the particles in mid-program.
    :param rows: the rows of the site's completions.
    :param decoder: the texts so far.
    :param partial: whether rewards without a ``prefix`` method score an unfinished text as if it were finished.
    """

    def __init__(self, partial_run: PartialRun, rows: SiteRows, decoder: Decoder, partial: bool) -> None:
        self._partial_run = partial_run
        self._rows = rows
        self._decoder = decoder
        self._partial = partial
        self.factors: dict[str, Tensor] = {}

    def log_psi(self) -> Tensor:
        """Return log psi; terms that are NaN or +inf are found by who weighs by it, and explained by `check`."""
        program, size = self._partial_run.program, self._partial_run.size
        terms = self._terms_so_far(check=False)
        self.factors = {name: program.pooled(term) for name, term in terms.items()}
        return sum(self.factors.values(), torch.zeros((size, program.weight_prompts), device=program.device))

    def check(self) -> None:
        """Check the terms of the texts so far.

        :raises ProgramError: if one is NaN or +inf, with its text.
        """
        self._terms_so_far(check=True)

    def _terms_so_far(self, check: bool) -> dict[str, Tensor]:
        decoder = self._decoder
        return self._terms(self._partial_run.values, decoder.values, decoder.finished, decoder.t, check=check)

    def by_rows(self) -> Tensor:
        """Return log psi of each row (row,) without the factors that are shared by all prompts."""
        return self._by_rows(self._partial_run.values, self._decoder.values[:, None], self._decoder.t)[:, 0]

    def propose(self, logits: Tensor, top_k: int) -> Tensor:
        return induced(logits, self.candidates, top_k)

    def candidates(self, tokens: Tensor) -> Tensor:
        """Return log psi of the texts so far, each continued by each of its ``tokens`` (row, k); (row, k)."""
        k = tokens.shape[-1]
        values = self._decoder.values[:, None].repeat(1, k, 1)
        values[..., self._decoder.t] = tokens
        others = {name: value.repeat_interleave(k, 0) for name, value in self._partial_run.values.items()}
        return self._by_rows(others, values, self._decoder.t + 1)

    def _by_rows(self, others: dict[str, Tensor], values: Tensor, length: int) -> Tensor:
        """Return sums of terms (row, k) of the texts (row, k, token), which run as k times as many particles."""
        (size, k), site = (self._partial_run.size, values.shape[1]), self._rows.site
        rows = len(values) // size
        if rows not in (1, self._partial_run.program.num_prompts):
            raise ProgramError(
                f"site {site.name!r} has several completions a prompt, whose terms the reward does not separate: use "
                'proposal="prior", or a twist with reads_reward=False'
            )
        values = values.reshape(size, rows, k, -1).transpose(1, 2)
        is_end = self._rows.distribution.vocabulary.is_end
        finished = is_end(values[..., :length]).any(-1)  # padding, which comes after, may be an EOS too
        if length == values.shape[-1]:
            finished = torch.ones_like(finished)
        total = torch.zeros((size * k, rows), device=values.device)
        for term in self._terms(others, values, finished, length).values():
            if rows == 1 or term.shape[-1] == rows:  # a factor of all prompts does not separate their texts
                total = total + (term.sum(-1, keepdim=True) if rows == 1 else term)
        return total.reshape(size, k, rows).transpose(1, 2).reshape(-1, k)

    def _terms(
        self, others: dict[str, Tensor], values: Tensor, finished: Tensor, length: int, check: bool = True
    ) -> dict[str, Tensor]:
        """Return the terms (particle, prompt) of completions of ``length`` tokens so far, by factor."""
        run = self._partial_run
        site, program = self._rows.site, run.program
        unfinished = ~finished.reshape(-1, *site.shape[:-1])
        value = self._blanked(values.reshape(-1, *site.shape), unfinished, length)
        ended = program.under_plate(site.name, ~unfinished)
        on_cpu = torch.cat([value, (~unfinished)[..., None].to(value)], -1).cpu()  # one copy, not two, from a device
        put_on_host(value, on_cpu[..., :-1])
        all_ended = run.with_others(site.name, on_cpu[..., -1].bool(), torch.ones((), dtype=torch.bool))
        with prefixes(program.under_plate(site.name, all_ended), partial=self._partial) as context:
            terms = run.terms_with(others | {site.name: value}, check=check)
        # -inf is final where the text is finished or a Reward says so; elsewhere a continuation may have another score
        final = torch.zeros_like(ended)
        if context.lost.any():
            final = run.own(torch.as_tensor(context.lost, device=ended.device), program.prompt_dim or 0)
        open_, final = (program.terms(x.float(), len(value), site.in_prompts) > 0 for x in (~ended, final))
        provisional = open_ & ~final

        def without_provisional(term: Tensor) -> Tensor:
            where = provisional if provisional.shape[-1] in (1, term.shape[-1]) else provisional.any(-1, keepdim=True)
            return torch.where((term == -torch.inf) & where, 0.0, term)

        return {name: without_provisional(term) for name, term in terms.items()}

    def _blanked(self, values: Tensor, unfinished: Tensor, length: int) -> Tensor:
        """Return completions (particle, *batch, token) without text after ``length``, as the pad may be a word."""
        ends = self._rows.distribution.vocabulary.eos_token_ids
        beyond = torch.arange(values.shape[-1], device=values.device) >= length
        return torch.where(unfinished[..., None] & beyond, ends[0] if ends else -1, values)

    def select(self, rows: Tensor) -> None:
        pass  # the state is the partial run's and the decoder's


@validated
class LearnedTwist:
    """A `Twist`, evaluated on the prior's hidden states and, if it was trained with them, the terms of the text so far.

    The log psi of a finished text remains that at its end: the program's own terms, or else the twist's last estimate.

    :param twist: the learned twist.
    :param rows: the rows of the site's completions.
    :param decoder: the texts so far, and the prior's hidden states.
    :param prefix_twist: the terms of the text so far; None if the twist does not use them.
    """

    def __init__(self, twist: Twist, rows: SiteRows, decoder: Decoder, prefix_twist: PrefixTwist | None) -> None:
        self.factors: dict[str, Tensor] = {}
        self._twist = twist
        self._rows = rows
        self._decoder = decoder
        self._prefix_twist = prefix_twist
        self._state = twist.start(decoder)
        self._psi = torch.zeros(len(decoder.values), device=decoder.values.device)
        self._ended = decoder.finished

    def log_psi(self) -> Tensor:
        token = self._decoder.values[:, self._decoder.t - 1 : self._decoder.t]
        if self._prefix_twist is None:
            estimate = self._twist.lookahead(self._state, token)[:, 0]
            self._psi = torch.where(self._ended, self._psi, estimate)
        else:
            so_far = self._prefix_twist.by_rows()
            estimate = self._twist.lookahead(self._state, token, so_far[:, None])[:, 0]
            self._psi = torch.where(self._decoder.finished, so_far, estimate)
        self._ended = self._decoder.finished
        self._state = self._twist.advance(self._state, self._decoder)
        return self._rows.pooled(self._psi)

    def propose(self, logits: Tensor, top_k: int) -> Tensor:
        return induced(logits, self.candidates, top_k)

    def candidates(self, tokens: Tensor) -> Tensor:
        """Return log psi of the texts so far, each continued by each of its ``tokens`` (row, k); (row, k)."""
        if self._prefix_twist is None:
            return self._twist.lookahead(self._state, tokens)
        so_far = self._prefix_twist.candidates(tokens)
        estimate = self._twist.lookahead(self._state, tokens, so_far)
        return torch.where(self._decoder.ends_with(tokens), so_far, estimate)

    def select(self, rows: Tensor) -> None:
        self._state, self._psi, self._ended = self._state.select(rows), self._psi[rows], self._ended[rows]


@validated
class PolicyTwist:
    """The ratio q(x_{1:t}) / p(x_{1:t}) of a policy and the prior: exp(r / beta) / Z, if the policy is the posterior.

    :param policy: the texts so far, scored by the policy.
    :param rows: the rows of the site's completions.
    :param decoder: the same texts, scored by the prior.
    """

    def __init__(self, policy: Decoder, rows: SiteRows, decoder: Decoder) -> None:
        self.factors: dict[str, Tensor] = {}
        self._policy = policy
        self._rows = rows
        self._decoder = decoder

    def log_psi(self) -> Tensor:
        return self._rows.pooled(self._log_ratio())

    def propose(self, logits: Tensor, top_k: int) -> Tensor:
        return induced(logits, self.candidates, top_k)

    def candidates(self, tokens: Tensor) -> Tensor:
        """Return log psi of the texts so far, each continued by each of its ``tokens`` (row, k); (row, k)."""
        log_q, log_p = (x.logits.log_softmax(-1).gather(-1, tokens) for x in (self._policy, self._decoder))
        return self._log_ratio()[:, None] + _difference(log_q, log_p)

    def select(self, rows: Tensor) -> None:
        pass  # the state is the decoders'

    def _log_ratio(self) -> Tensor:
        return _difference(self._policy.scores, self._decoder.scores).sum(-1)


def _difference(log_q: Tensor, log_p: Tensor) -> Tensor:
    """Return log q - log p, or 0 where p is 0, because the particle's weight is 0 there already."""
    return (log_q - log_p).masked_fill(log_p == -torch.inf, 0.0)


def induced(logits: Tensor, candidates: Callable[[Tensor], Tensor], top_k: int) -> Tensor:
    """Return the logits (row, vocabulary) of the proposal that a twist induces on the k likeliest tokens.

    :param logits: the prior's, (row, vocabulary); all tokens other than the k likeliest keep their probability.
    :param candidates: returns log psi (row, k) of the texts so far, each continued by each of its tokens (row, k).
    :param top_k: the number k.
    """
    log_p = logits.log_softmax(-1)
    top, tokens = log_p.topk(min(top_k, log_p.shape[-1]), dim=-1)
    tilted = top + candidates(tokens)
    tilted = tilted + (top.logsumexp(-1, keepdim=True) - tilted.logsumexp(-1, keepdim=True))
    # where psi is 0 for all of them the prior proposes, and the particle's weight becomes 0
    return log_p.scatter(-1, tokens, torch.where(tilted.isnan(), top, tilted))
