r"""Truncated distributions of the next token, renormalised.

    p'(v) = p(v) 1[v \in S] / p(S)

S is the set of the k likeliest tokens, or the smallest set of likeliest tokens whose probability is at least p_min
(nucleus: Holtzman et al. 2020, arXiv 1904.09751), or both: the nucleus of what the k likeliest are renormalised to, as
in transformers. Of tokens that are equally likely, those of low ids are taken first.

A policy q in the place of a truncated prior has the prior's S, at every token: q'(v) = q(v) 1[v \in S] / q(S). So it
draws nothing that the prior cannot, and KL(q' || p') is finite.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Truncation:
    """What remains of the distribution of the next token.

    :param top_k: the number of tokens; None for all.
    :param top_p: their probability at least; None for all.
    """

    top_k: int | None = None
    top_p: float | None = None

    def __call__(self, logits: Tensor, of: Tensor | None = None) -> Tensor:
        """Return logits (..., vocabulary) that are -inf outside S; those inside do not change.

        :param of: the logits that S is found in, same shape; None: these.
        """
        size = logits.shape[-1]
        k = size if self.top_k is None else min(self.top_k, size)
        if k == size and self.top_p is None:
            return logits
        ordered, tokens = (logits if of is None else of).detach().sort(dim=-1, descending=True, stable=True)
        kept = logits.new_ones(ordered.shape, dtype=torch.bool)
        kept[..., k:] = False
        if self.top_p is not None:
            mass = ordered.masked_fill(~kept, -torch.inf).double().softmax(-1)
            kept &= mass.cumsum(-1) - mass < self.top_p  # what is before a token is not enough yet
        return logits.masked_fill(~kept.scatter(-1, tokens, kept), -torch.inf)
