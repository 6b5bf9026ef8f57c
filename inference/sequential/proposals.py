"""The distribution of the next token of particles, of which SMC draws them: the prior's, a policy's, or a twist's."""

from __future__ import annotations

import torch
from torch import Tensor

from bayeslm.models.lm import Decoder, categorical, log_softmax_at
from bayeslm.validation import validated

from .constraints import ConstraintTwist, Given
from .twists import SiteTwist


@validated
class TokenProposal:
    """The proposal of one site.

    :param decoder: the texts so far, scored by the prior.
    :param policy: the same texts, scored by the policy that proposes, if one does.
    :param twist: the twist that proposes, if one does and no policy.
    :param top_k: the number of tokens at which a twist is evaluated.
    """

    def __init__(
        self, decoder: Decoder, policy: Decoder | None, twist: SiteTwist | ConstraintTwist | None, top_k: int
    ) -> None:
        self._decoder = decoder
        self._policy = policy
        self._twist = None if policy is not None else twist
        self._top_k = top_k

    def draw(self, given: Given | None) -> tuple[Tensor, Tensor, Tensor]:
        """Draw the next token of each row, and return it with its log q and log p, each (row,).

        :param given: rows whose tokens are not drawn, and these tokens.
        """
        if isinstance(self._twist, ConstraintTwist):
            token, log_q = self._twist.draw(given)
            return token, log_q, log_softmax_at(self._decoder.logits, token)
        logits = self._logits()
        token, log_q = categorical(logits)
        if given is not None:
            token[given[0]] = given[1]
            log_q = log_softmax_at(logits, token)
        return token, log_q, log_q if logits is self._decoder.logits else log_softmax_at(self._decoder.logits, token)

    def log_q(self) -> Tensor:
        """Return log q of the next token, (row, vocabulary); a text that has ended goes on in one way.

        :raises ProgramError: if the twist is a constraint without masks.
        """
        twist = self._twist
        log_q = twist.log_q() if isinstance(twist, ConstraintTwist) else self._logits().log_softmax(-1)
        same = torch.full_like(log_q[:1], -torch.inf)
        same[:, 0] = 0.0
        return torch.where(self._decoder.finished[:, None], same, log_q)

    def _logits(self) -> Tensor:
        if self._policy is not None:
            return self._policy.logits
        if self._twist is None or isinstance(self._twist, ConstraintTwist):
            return self._decoder.logits
        return self._twist.propose(self._decoder.logits, self._top_k)
