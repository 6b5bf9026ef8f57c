r"""The twist and the proposal of a power of the language model, which its next-token probabilities give in closed form.

The target is p(x)^\alpha, times exp of what other factors say. Each text so far is valued by what all its continuations
by one token have of it,

    \psi_t(x_{1:t}) = p(x_{1:t})^{\alpha - 1} S_t,      S_t = \sum_v p(v | x_{1:t})^\alpha      (1 if the text has ended)

and the next token is drawn from q(v | x_{1:t}) = p(v | x_{1:t})^\alpha / S_t: tokens of logits \alpha times as large.
Then the weight of a text grows by S_t at each token. S_t is a sum over the logits of the next token, which are computed
in any case: the twist needs no further pass of the network ("Power-SMC", arXiv 2602.10273; the target is that of Karan
and Du 2025, arXiv 2510.14901).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bayeslm.models.lm import Decoder
from bayeslm.validation import Positive, validated

from .twists import SiteRows


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

    def log_psi(self) -> Tensor:
        log_s = (self._alpha * self._decoder.logits.log_softmax(-1)).logsumexp(-1)
        so_far = (self._alpha - 1.0) * self._decoder.scores.sum(-1)
        return self._rows.pooled(so_far + torch.where(self._decoder.finished, 0.0, log_s))

    def propose(self, logits: Tensor, top_k: int) -> Tensor:
        """Return the logits (row, vocabulary) of q, of the prior's; of all tokens, as none costs more than others."""
        return self._alpha * logits

    def select(self, rows: Tensor) -> None:
        pass  # the state is the decoder's
