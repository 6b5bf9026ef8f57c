r"""The twist and the proposal of a power of the language model, which its next-token probabilities give in closed form.

The target is p(x)^\alpha, times exp of what other factors say. A text so far is valued by its continuations by a token,

    \psi_t(x_{1:t}) = p(x_{1:t})^{\alpha - 1} S_t(x_{1:t}),     S_t = \sum_v p(v | x_{1:t})^\alpha C_{t+1}(v)

(S_t = 1 if it has ended), and the next token is drawn from q(v | x_{1:t}) = p(v | x_{1:t})^\alpha C_{t+1}(v) / S_t. The
weights then grow by S_t / C_t at each token. All of it is a sum over the logits of the next token, which are computed
in any case: no further pass of the network is needed ("Power-SMC", arXiv 2602.10273; the target is that of Karan and Du
2025, arXiv 2510.14901).

C is what the tokens after the next leave of a text's mass: 1 for a text that ends, and for the others C_{t+1} < 1 if
\alpha > 1. Without it texts that go on would be valued too high, and those that end would be neither drawn nor kept. It
is computed backward for each prompt, C_t = mean of S_t and C_T = 1, over a fourth as many texts as there are particles,
which are drawn first, without an end, and not used again: E[\hat Z] = Z as of any twist.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bayeslm.models.lm import Autoregressive, Decoder, categorical
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
        self._ends = torch.tensor(
            rows.distribution.vocabulary.eos_token_ids, dtype=torch.long, device=decoder.values.device
        )
        self._log_c = self._backward(rows.distribution)

    def log_psi(self) -> Tensor:
        decoder = self._decoder
        so_far = (self._alpha - 1.0) * decoder.scores.sum(-1)
        log_s = self.propose(decoder.logits, 0).logsumexp(-1)
        return self._rows.pooled(so_far + torch.where(decoder.finished, 0.0, log_s))

    def propose(self, logits: Tensor, top_k: int) -> Tensor:
        """Return log p(v)^alpha C(v), (row, vocabulary); of all tokens, as none costs more than others."""
        log_p = self._alpha * logits.log_softmax(-1)
        log_c = self._log_c[:, self._decoder.t + 1]
        going_on = log_p + log_c.repeat(len(log_p) // len(log_c))[:, None]
        going_on[:, self._ends] = log_p[:, self._ends]
        return going_on

    def select(self, rows: Tensor) -> None:
        pass  # the state is the decoder's

    def _backward(self, distribution: Autoregressive) -> Tensor:
        """Return log C_t of texts that go on, (completion of a particle, token + 1).

        It is 0 where no text ends, as what all texts have in common cancels.
        """
        each = distribution.batch_shape[1:].numel()
        log_c = torch.zeros((each, distribution.max_new_tokens + 1), device=self._decoder.hidden.device)
        if not len(self._ends):
            return log_c
        decoder = distribution.decoder(every=PILOT)
        ending, going_on = [], []
        while not decoder.done:
            log_p = self._alpha * decoder.logits.log_softmax(-1)
            others = log_p.index_fill(-1, self._ends, -torch.inf)
            ending.append(log_p[:, self._ends].logsumexp(-1).reshape(-1, each))
            going_on.append(others.logsumexp(-1).reshape(-1, each))
            token, _ = categorical(others)
            decoder.append(token, torch.zeros_like(token, dtype=torch.float32))
        for t in range(len(ending) - 1, 0, -1):
            log_s = torch.logaddexp(ending[t], going_on[t] + log_c[:, t + 1])
            log_c[:, t] = log_s.logsumexp(0) - math.log(len(log_s))
        return log_c
