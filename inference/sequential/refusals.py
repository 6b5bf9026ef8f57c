r"""Rejection sampling that learns: what a constraint has refused is not proposed again, and draws stay exact.

A tree holds for each beginning of a text the share c(x_{1:t}) of its mass that has not been refused: 0 for a refused
beginning, 1 where nothing is known, and else

    c(x_{1:t}) = \sum_v p(v | x_{1:t}) c(x_{1:t} v)

Completions are drawn token by token from q(v | x_{1:t}) = p(v | x_{1:t}) c(x_{1:t} v) / c(x_{1:t}). So q(x) = p(x) / c
of all texts that are not refused, c being the root's, and a draw that is accepted where the constraint allows it is a
draw of the posterior, whatever the tree has learned from earlier batches. Without the tree 1 / c draws would have been
made for each; so with l_i the likelihood of a draw, and c_i what was left when it was drawn,

    \hat Z = \sum_i l_i / \sum_i 1 / c_i

A `Grammar` tells at each text so far all tokens that it refuses; a `Constraint` tells those that were drawn. Where the
tree is complete, every draw is accepted: the limit of "grammar-aligned decoding with approximate expected futures"
(Park, Wang, Berg-Kirkpatrick, Polikarpova and D'Antoni 2024, arXiv 2405.21047), which is not exact before it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from bayeslm.inference.program import EvidenceError, Program, to_numpy
from bayeslm.models.lm import Autoregressive, Decoder, Encoded, log_softmax_at
from bayeslm.validation import validated

from .constraint_guide import ConstraintGuide
from .constraints import (
    AllowedTokens,
    Given,
    MaskedTokens,
    TokenConstraint,
    TokensOf,
    allowed_tokens,
    draw_from,
)


class Beginning:
    """A beginning of texts: the share of its mass that is not refused, and the longer ones that are known.

    ``masked`` says whether a grammar's mask of the next token has been taken from the share, if it has one.
    """

    __slots__ = ("after", "masked", "share")

    def __init__(self, share: float = 1.0) -> None:
        self.share = share
        self.masked = False
        self.after: dict[int, Beginning] = {}


class Visit:
    """What a batch finds out at a beginning, by the shares before the batch.

    ``share`` is the sum of p c over the tokens that are not refused by a mask. ``tokens`` are those that were drawn:
    their probability, what they contribute to the share, and the beginning with them.
    """

    __slots__ = ("share", "tokens")

    def __init__(self, share: float) -> None:
        self.share = share
        self.tokens: dict[int, tuple[float, float, Beginning]] = {}


class Refusals:
    """What a constraint has refused so far, of each prompt.

    :param constraint: the constraint.
    """

    def __init__(self, constraint: TokenConstraint) -> None:
        self._constraint = constraint
        self._roots: dict[tuple[int, ...], Beginning] = {}
        self._visits: list[dict[Beginning, Visit]] = []  # of this batch, by the number of tokens

    def tokens(self, distribution: Autoregressive, prompts: Tensor, decoder: Decoder) -> UnrefusedTokens:
        """Return the next tokens of completions of prompts (row,) that have not been refused."""
        known = Encoded(*distribution.flat_prompts).rows()
        roots = [self._roots.setdefault(tuple(known[i]), Beginning()) for i in prompts.tolist()]
        return UnrefusedTokens(self, roots, allowed_tokens(self._constraint, distribution, prompts, decoder), decoder)

    def visit(self, t: int, beginning: Beginning, share: float) -> Visit:
        """Return what this batch finds out at a beginning of t tokens."""
        self._visits += [{} for _ in range(t + 1 - len(self._visits))]
        return self._visits[t].setdefault(beginning, Visit(share))

    def learn(self) -> None:
        """Add what the batch has found out, the longest beginnings first, for they change the shares of the others."""
        for visits in reversed(self._visits):
            for beginning, visit in visits.items():
                share = visit.share
                for token, (probability, before, after) in visit.tokens.items():
                    share -= probability * (before - after.share)
                    beginning.after[token] = after
                beginning.share, beginning.masked = max(share, 0.0), True
        self._visits = []


class UnrefusedTokens:
    """The next tokens of texts that have not been refused.

    :param refusals: what is known, and what this batch finds out.
    :param roots: of each row, the beginning of all texts of its prompt.
    :param allowed: which tokens the constraint allows.
    :param decoder: the completions.
    """

    def __init__(
        self, refusals: Refusals, roots: Sequence[Beginning], allowed: AllowedTokens, decoder: Decoder
    ) -> None:
        self._refusals = refusals
        self._allowed = allowed
        self._decoder = decoder
        self._at: list[Beginning | None] = list(roots)  # None: the text has ended, or is refused

    def draw(self, given: Given | None = None) -> tuple[Tensor, Tensor]:
        """Draw a token (row,), and return it with its log q (row,); a text that is refused ends with its next token.

        :raises EvidenceError: if all texts of a prompt have been refused.
        """
        decoder, logits = self._decoder, self._decoder.logits.cpu()
        mask = self._allowed.mask.cpu() if isinstance(self._allowed, MaskedTokens) else None
        p = logits.double().softmax(-1)
        live = torch.tensor([at is not None for at in self._at]) & ~decoder.finished.cpu()
        mass = p.clone()
        for row in live.nonzero().squeeze(-1).tolist():
            at = self._at[row]
            assert at is not None
            if mask is not None and at.masked:
                mass[row].masked_fill_(~mask[row], 0.0)
            for token, after in at.after.items():
                mass[row, token] *= after.share
        total = mass.sum(-1)
        if decoder.t == 0 and bool((total <= 0).any()):
            raise EvidenceError("the constraint refuses every text of a prompt: all of them have been tried")
        live = live & (total > 0)  # 0 where a share was not yet known to be 0, but for rounding
        drawn = draw_from(mass, live)
        shares = total if mask is None else mass.masked_fill(~mask, 0.0).sum(-1)
        allowed = self._allowed.allows(drawn)
        for row, at in enumerate(self._at):
            if at is not None and not bool(decoder.finished[row]):
                visit = self._refusals.visit(decoder.t, at, float(shares[row]))
                ok = bool(live[row]) and allowed[row]
                counted = mask is None or bool(mask[row, drawn[row]])
                self._at[row] = self._note(visit, at, int(drawn[row]), float(p[row, drawn[row]]), ok, counted)
        token = torch.where(live, drawn, self._last(logits))
        log_q = torch.where(live, (mass.gather(-1, token[:, None])[:, 0] / total).log(), 0.0).to(logits.dtype)
        return token.to(decoder.values.device), torch.where(live, log_q, log_softmax_at(logits, token)).to(
            decoder.values.device
        )

    def _note(
        self, visit: Visit, at: Beginning, token: int, probability: float, ok: bool, counted: bool
    ) -> Beginning | None:
        """Note whether a token was allowed, and return the beginning with it; None if it was not.

        :param counted: whether it is in the share of the visit, from which a mask has taken what it refuses.
        """
        if token not in visit.tokens:
            after = at.after.get(token) or Beginning(1.0)
            visit.tokens[token] = (probability, after.share * counted, after if ok else Beginning(0.0))
        return visit.tokens[token][2] if ok else None

    def _last(self, logits: Tensor) -> Tensor:
        """Return the token that ends a refused text, or the likeliest if none ends a text."""
        ends = self._decoder.prompted.vocabulary.eos_token_ids
        return torch.full((len(logits),), ends[0]) if ends else logits.argmax(-1)


class LearnedRejection(ConstraintGuide):
    """A guide that proposes completions that its constraints have not refused; other latents are the prior's."""

    def __init__(self, program: Program, setting: TokenConstraint | Mapping[str, TokenConstraint]) -> None:
        self._refusals: dict[str, Refusals] = {}
        super().__init__(program, setting)

    def _tokens(self, name: str, constraint: TokenConstraint) -> TokensOf:
        self._refusals[name] = Refusals(constraint)
        return self._refusals[name].tokens

    def learn(self) -> None:
        """Add what the last batch has found out."""
        for known in self._refusals.values():
            known.learn()


@validated
def learned_evidence(log_likelihood: Tensor, log_share: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return log of Z-hat (prompt,) and its standard error.

    :param log_likelihood: log l of all draws, (draw, prompt).
    :param log_share: log c of them.
    """
    highest = log_likelihood.max()
    likelihood, made = (log_likelihood - highest).double().exp(), (-log_share.double()).exp()
    z = likelihood.sum(0) / made.sum(0)
    error = (likelihood - z * made).square().sum(0).sqrt() / likelihood.sum(0)
    return to_numpy(z.log() + highest), to_numpy(error)
