r"""Proposals that keep to a hard constraint, with the weights that make the posterior that of whole texts.

The target is p(x) 1[x in L] / Z. Drawing each token from those that L allows next, renormalised, has another
distribution: it forgets what mass each text has lost on its way. That mass is the weight,

    q(v | x_{1:t}) = p(v | x_{1:t}) 1[v allowed] / S_t,     S_t = \sum_v p(v | x_{1:t}) 1[v allowed]

    w = \prod_t S_t

`MaskedTokens` know the mask of all tokens (`Grammar`), and S_t from logits that are computed in any case; so a twist
\psi_t = S_t weighs a text one token ahead. It is 0 for a text whose forced bytes do not fit the tokens that are left.

`CheckedTokens` ask a predicate of a text with one token more (`Constraint`): adaptive weighted rejection sampling
(Lipkin et al. 2025, arXiv 2504.05410). Tokens are drawn from p without those that were refused already, until one is
accepted, x. It has the distribution q, and the refused ones, R, are independent of it. One more token, y, is then drawn
from all but R and x:

    \hat S = p(x) + (1 - p(R) - p(x)) 1[y allowed],     E[\hat S | x, R] = S

as the tokens that are left hold the mass S - p(x) of allowed ones. \hat S in the place of S leaves E[w f(x)] as it is.
It is positive, and exact where no token is left.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from bayeslm.inference.program import ProgramError, check_grammar
from bayeslm.models.lm import Autoregressive, Decoder, categorical, log_softmax_at
from bayeslm.models.rewards import Constraint, Grammar
from bayeslm.validation import validated

from .spelling import Spelling, TextState, first_states
from .twists import SiteRows

TokenConstraint = Grammar | Constraint
Given = tuple[Tensor, Tensor]  # rows, and the tokens that they have in the place of draws


class NextTokens(Protocol):
    """A proposal of the next tokens of texts that a decoder writes, one a row."""

    def draw(self, given: Given | None = None) -> tuple[Tensor, Tensor]:
        """Draw a token (row,), and return it with log q of it (row,), or an estimate; +inf where none is allowed.

        :param given: rows whose token is not drawn.
        """


TokensOf = Callable[[Autoregressive, Tensor, Decoder], NextTokens]  # of completions of prompts (row,) that one writes


class AllowedTokens(NextTokens, Protocol):
    """The next tokens of texts that a constraint allows: log q of a token x is that of p(x) / S."""

    def allows(self, token: Tensor) -> list[bool]:
        """Return for each row whether a token (row,) is allowed."""

    def log_mass(self) -> Tensor:
        """Return the log of an estimate of the mass that the next token keeps, (row,); 0 if none is known."""

    def select(self, rows: Tensor) -> None:
        """Replace row i by row ``rows[i]``; the decoder has already been changed."""


def allowed_tokens(
    constraint: TokenConstraint, distribution: Autoregressive, prompts: Tensor, decoder: Decoder
) -> AllowedTokens:
    """Return which tokens a constraint allows: by masks if it is a `Grammar` whose masks are known.

    :param distribution: of the completions.
    :param prompts: the prompt that each row continues, (row,).
    :param decoder: the completions.
    :raises EvidenceError: if no text of a grammar fits the tokens.
    :raises ProgramError: if tokens have no texts.
    """
    if not distribution.has_text:
        raise ProgramError(
            "a constraint is about texts, and this LanguageModel has no tokenizer: give it one, or write the "
            "constraint as a factor of the token ids"
        )
    spelling = Spelling(distribution, prompts)
    if isinstance(constraint, Grammar):
        check_grammar(constraint, spelling.token_bytes, distribution.max_new_tokens)
    roots = first_states(constraint, spelling) if isinstance(constraint, Grammar) else None
    if roots is None:
        return CheckedTokens(constraint, spelling, decoder)
    return MaskedTokens(roots, spelling, decoder)


class MaskedTokens:
    """The tokens that a grammar allows, all of them known.

    :param states: of the text of each row.
    :param spelling: the texts of tokens.
    :param decoder: the completions.
    """

    def __init__(self, states: Sequence[TextState], spelling: Spelling, decoder: Decoder) -> None:
        self._states: list[TextState | None] = list(states)  # None: no text of the language begins so
        self._vocabulary = spelling.distribution.vocabulary
        self._shortest = spelling.shortest
        self._decoder = decoder
        self._read = 0
        self._mask: Tensor | None = None

    @property
    def mask(self) -> Tensor:
        """The tokens that the texts so far may continue with, bool (row, vocabulary)."""
        self._catch_up()
        if self._mask is None:
            different = {id(state): state for state in self._states}
            place = {key: i for i, key in enumerate(different)}
            table = np.zeros((len(different), self._vocabulary.size), dtype=bool)
            for row, state in zip(table, different.values(), strict=True):
                if state is not None:
                    row[:] = state.mask
                    row[list(self._vocabulary.eos_token_ids)] = state.accepts
            device = self._decoder.values.device
            index = torch.tensor([place[id(state)] for state in self._states], device=device)
            self._mask = torch.from_numpy(table).to(device)[index]
        return self._mask

    def draw(self, given: Given | None = None) -> tuple[Tensor, Tensor]:
        logits, mask = self._decoder.logits, self.mask
        dead = ~mask.any(-1)
        logits = logits.masked_fill(~mask & ~dead[:, None], -torch.inf)
        token, log_q = categorical(logits)
        if given is not None:
            token[given[0]] = given[1]
            log_q = log_softmax_at(logits, token)
        return token, log_q.masked_fill(dead, torch.inf)

    def log_q(self) -> Tensor:
        """Return log q of each token, (row, vocabulary); -inf of all where none is allowed."""
        logits, mask = self._decoder.logits, self.mask
        log_q = logits.masked_fill(~mask, -torch.inf)
        return torch.where(mask.any(-1, keepdim=True), log_q.log_softmax(-1), -torch.inf)

    def allows(self, token: Tensor) -> list[bool]:
        allowed: list[bool] = self.mask.gather(-1, token[:, None].to(self.mask.device))[:, 0].tolist()
        if self._decoder.t + 1 < self._decoder.values.shape[-1]:
            return allowed
        return [
            ok and self._completes(state, int(v)) for ok, state, v in zip(allowed, self._states, token, strict=True)
        ]

    def _completes(self, state: TextState | None, token: int) -> bool:
        """Whether a text with one more token, its last, is in the language."""
        if state is None or token in self._vocabulary.eos_token_ids:
            return state is not None and state.accepts
        after = state.after(token)
        return after is not None and after.accepts

    def log_mass(self) -> Tensor:
        """Return log S of the texts so far (row,); 0 of those that have ended, -inf of those that cannot be completed.

        Of these are texts with forced bytes that take more tokens than are left.
        """
        decoder, mask = self._decoder, self.mask
        log_s = decoder.logits.log_softmax(-1).masked_fill(~mask, -torch.inf).logsumexp(-1)
        left = decoder.values.shape[-1] - decoder.t
        different = {id(state): state for state in self._states if state is not None}
        fits = {key: self._shortest(state.forced) <= left for key, state in different.items()}
        lost = torch.tensor([not fits.get(id(state), False) for state in self._states], device=log_s.device)
        log_s = torch.where(decoder.finished, 0.0, log_s)
        dead = torch.tensor([state is None for state in self._states], device=log_s.device)
        return log_s.masked_fill(dead | (lost & ~decoder.finished), -torch.inf)

    def select(self, rows: Tensor) -> None:
        self._states = [self._states[row] for row in rows.tolist()]
        self._mask = None if self._mask is None else self._mask[rows]

    def _catch_up(self) -> None:
        """Read the tokens that the decoder has written since."""
        for t in range(self._read, self._decoder.t):
            tokens = self._decoder.values[:, t]
            live = self._vocabulary.is_live(self._decoder.values[:, : t + 1])[:, -1].tolist()
            ends = self._vocabulary.is_eos(tokens).tolist()
            for row, (token, written, end) in enumerate(zip(tokens.tolist(), live, ends, strict=True)):
                state = self._states[row]
                if written and state is not None:
                    self._states[row] = (state if state.accepts else None) if end else state.after(token)
            self._mask = None
        self._read = self._decoder.t


class CheckedTokens:
    """The tokens that a constraint allows, each found by a check of the text with it.

    :param constraint: the constraint.
    :param spelling: the texts of tokens.
    :param decoder: the completions.
    """

    def __init__(self, constraint: TokenConstraint, spelling: Spelling, decoder: Decoder) -> None:
        self._constraint = constraint
        self._spelling = spelling
        self._decoder = decoder
        self._known: dict[tuple[int, ...], bool] = {}  # of a prompt and tokens

    def draw(self, given: Given | None = None) -> tuple[Tensor, Tensor]:
        decoder, device = self._decoder, self._decoder.values.device
        logits, open_ = decoder.logits.cpu(), ~decoder.finished.cpu()
        mass = logits.double().softmax(-1)  # of the tokens that have not been drawn yet
        token = self._draw_until_allowed(mass, open_)
        if given is not None:
            token[given[0].cpu()] = given[1].cpu()
        accepted = token >= 0
        token = torch.where(accepted, token, logits.argmax(-1))
        log_p = log_softmax_at(logits, token)
        mass.scatter_(-1, token[:, None], 0.0)
        rest = mass.sum(-1)
        more = open_ & accepted & (rest > 0)
        rest = torch.where(self._check(draw_from(mass, more), more), rest, 0.0)
        log_s = torch.where(accepted, log_p.double().exp() + rest, 0.0).log().to(log_p.dtype)
        return token.to(device), torch.where(open_, log_p - log_s, log_p).to(device)

    def allows(self, token: Tensor) -> list[bool]:
        return list(map(bool, self._check(token.cpu(), ~self._decoder.finished.cpu()).tolist()))

    def log_mass(self) -> Tensor:
        return torch.zeros(len(self._decoder.values), device=self._decoder.values.device)

    def select(self, rows: Tensor) -> None:
        self._spelling.select(rows)

    def _draw_until_allowed(self, mass: Tensor, open_: Tensor) -> Tensor:
        """Draw an allowed token of each open row (row,), -1 where there is none; refused ones leave ``mass``."""
        found = torch.full((len(mass),), -1)
        open_ = open_ & (mass.sum(-1) > 0)
        while bool(open_.any()):
            token = draw_from(mass, open_)
            allowed = self._check(token, open_)
            found = torch.where(allowed, token, found)
            open_ = open_ & ~allowed
            refused = open_.nonzero().squeeze(-1)
            mass[refused, token[refused]] = 0.0
            open_ = open_ & (mass.sum(-1) > 0)
        return torch.where(self._decoder.finished.cpu(), 0, found)

    def _check(self, token: Tensor, where: Tensor) -> Tensor:
        """Return in which rows, of those of ``where``, the text with one more token is allowed, bool (row,)."""
        decoder, result = self._decoder, torch.zeros(len(token), dtype=torch.bool)
        rows = where.nonzero().squeeze(-1)
        values = torch.cat([decoder.values[:, : decoder.t].cpu()[rows], token[rows, None]], -1)
        last = decoder.t + 1 == decoder.values.shape[-1]
        keys = [(self._spelling.prompts[row], *text) for row, text in zip(rows.tolist(), values.tolist(), strict=True)]
        new = {key: i for i, key in enumerate(keys) if key not in self._known}
        if new:
            some = values[list(new.values())]
            finished = (self._spelling.distribution.vocabulary.is_eos(some[:, -1]) | last).tolist()
            truths = self._spelling.check(self._constraint, some, [key[0] for key in new], finished)
            self._known.update(zip(new, truths, strict=True))
        result[rows] = torch.tensor([self._known[key] for key in keys], dtype=torch.bool)
        return result


def draw_from(mass: Tensor, where: Tensor) -> Tensor:
    """Draw a token (row,) in proportion to mass (row, vocabulary), by inversion; 0 in the rows that are left out."""
    token, rows = torch.zeros(len(mass), dtype=torch.long), where.nonzero().squeeze(-1)
    cdf = mass[rows].cumsum(-1)
    total = cdf[:, -1:]
    u = torch.minimum(torch.rand_like(total) * total, torch.nextafter(total, torch.zeros_like(total)))
    token[rows] = torch.searchsorted(cdf, u, right=True).squeeze(-1)
    return token


@validated
class ConstraintTwist:
    """A constraint as the twist and the proposal of one site.

    :param constraint: the constraint.
    :param rows: the rows of the site's completions.
    :param decoder: the texts so far.
    """

    def __init__(self, constraint: TokenConstraint, rows: SiteRows, decoder: Decoder) -> None:
        self.factors: dict[str, Tensor] = {}
        self._rows = rows
        distribution = rows.distribution
        prompts = distribution.prompt_rows(distribution.batch_shape)
        self._allowed = allowed_tokens(constraint, distribution, prompts, decoder)

    def log_psi(self) -> Tensor:
        return self._rows.pooled(self._allowed.log_mass())

    def draw(self, given: Given | None) -> tuple[Tensor, Tensor]:
        """Draw the next token, see `AllowedTokens.draw`."""
        return self._allowed.draw(given)

    def log_q(self) -> Tensor:
        """Return log q of each token, (row, vocabulary).

        :raises ProgramError: if the constraint has no masks.
        """
        if not isinstance(self._allowed, MaskedTokens):
            raise ProgramError(
                'resampling="optimal" needs the probability of each next token, and this constraint only says whether '
                "one is allowed: use a Grammar, or another resampling"
            )
        return self._allowed.log_q()

    def select(self, rows: Tensor) -> None:
        self._allowed.select(rows)
