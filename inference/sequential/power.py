r"""The twist and the proposal of a power of the language model, which its next-token probabilities give in closed form.

The target is p(x)^\alpha, times exp of what other factors say. Each text so far is valued by what all its continuations
by one token have of it,

    \psi_t(x_{1:t}) = p(x_{1:t})^{\alpha - 1} S_t,      S_t = \sum_v p(v | x_{1:t})^\alpha      (1 if the text has ended)

and the next token is drawn from q(v | x_{1:t}) = p(v | x_{1:t})^\alpha / S_t: tokens of logits \alpha times as large.
Then the weight of a text grows by S_t at each token. S_t is a sum over the logits of the next token, which are computed
in any case: the twist needs no further pass of the network ("Power-SMC", arXiv 2602.10273; the target is that of Karan
and Du 2025, arXiv 2510.14901).

S_t is what one more token leaves of a text, and an unfinished text loses as much again with each token that follows.
Texts that have ended would be weighed too little against it, and resampled away. So \psi_t of an unfinished text has
one more factor,

    c_t = mean of S_{t+1} S_{t+2} ... S_{T-1}      of unfinished texts of t tokens,

over a fourth as many texts, drawn from q before and not used again: E[\hat Z] = Z as of any twist.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bayeslm.models.lm import Autoregressive, Decoder, categorical, log_softmax_at
from bayeslm.validation import Positive, validated

from .twists import SiteRows

PILOT = 4  # of so many particles, one text is drawn first


@validated
@dataclass(frozen=True)
class Power:
    r"""The twist of a program that raises its language model to a power, such as `TiltedLM` with ``power``.

    :param alpha: the power, \alpha.
    :raises ValueError: if it is not positive and finite.
    """

    alpha: Positive


@validated
class PowerTwist:
    r"""p(x_{1:t})^{\alpha - 1} S_t of the texts so far.

    :param power: \alpha.
    :param rows: the rows of the site's completions.
    :param decoder: the texts so far.
    """

    def __init__(self, power: Power, rows: SiteRows, decoder: Decoder) -> None:
        self.factors: dict[str, Tensor] = {}
        self._alpha = power.alpha
        self._rows = rows
        self._decoder = decoder
        self._ahead = self._log_c(rows.distribution)

    def log_psi(self) -> Tensor:
        decoder = self._decoder
        so_far = (self._alpha - 1.0) * decoder.scores.sum(-1)
        ahead = self._log_s(decoder.logits) + self._ahead[decoder.t]
        return self._rows.pooled(so_far + torch.where(decoder.finished, 0.0, ahead))

    def propose(self, logits: Tensor, top_k: int) -> Tensor:
        """Return the logits (row, vocabulary) of q, of the prior's; of all tokens, as none costs more than others."""
        return self._alpha * logits

    def select(self, rows: Tensor) -> None:
        pass  # the state is the decoder's

    def _log_s(self, logits: Tensor) -> Tensor:
        return (self._alpha * logits.log_softmax(-1)).logsumexp(-1)

    def _log_c(self, distribution: Autoregressive) -> Tensor:
        """Return log c_t, (token + 1,), of texts that are drawn from the proposal; 0 where all of them have ended."""
        log_c = torch.zeros(distribution.max_new_tokens + 1, device=self._decoder.hidden.device)
        if not distribution.vocabulary.eos_token_ids:  # no text ends, and what all texts have in common cancels
            return log_c
        decoder = distribution.decoder(every=PILOT)
        log_s = torch.zeros((len(decoder.values), len(log_c)), device=log_c.device)  # of t tokens; 0 where ended
        while not decoder.done:
            logits = decoder.logits
            log_s[:, decoder.t] = self._log_s(logits).masked_fill(decoder.finished, 0.0)
            token, _ = categorical(self._alpha * logits)
            decoder.append(token, log_softmax_at(logits, token))
        after = log_s.flip(-1).cumsum(-1).flip(-1) - log_s
        unfinished = log_s != 0.0
        mean = after.masked_fill(~unfinished, -torch.inf).logsumexp(0) - unfinished.sum(0).log()
        return torch.where(unfinished.any(0), mean, log_c)
