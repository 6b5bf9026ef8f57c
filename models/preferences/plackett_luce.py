r"""Plackett-Luce: a reward learned from rankings of several completions, best first.

    P(x_1 \succ ... \succ x_k | c, w) = \prod_{j=1}^{k} exp r_w(c, x_j) / \sum_{i=j}^{k} exp r_w(c, x_i)

the best is chosen from all, then the best of those left, and so on (Plackett 1975, "The analysis of permutations"; Luce
1959). Rankings of two are Bradley-Terry. A draw sorts the rewards with Gumbel noise added (Yellott 1977).
"""

from __future__ import annotations

from itertools import chain
from typing import Any

import pyro
import torch
from pyro.distributions import TorchDistribution
from torch import Size, Tensor
from torch.distributions import constraints
from torch.nn.utils.rnn import pad_sequence

from .comparisons import Rankings
from .linear import LinearReward, under_plate

ABSENT = -1e9  # the score of no item: never chosen before one that is there


class RankingLaw(TorchDistribution):
    """The law of a ranking: indices of items, best first, int64; batch shape (*,), event shape (k,).

    :param scores: of the items, (*, k); `ABSENT` pads rows with fewer items, which then come last, in their order.
    """

    arg_constraints: dict[str, Any] = {"scores": constraints.real_vector}
    support = constraints.independent(constraints.nonnegative_integer, 1)

    def __init__(self, scores: Tensor, validate_args: bool | None = None) -> None:
        self.scores = scores
        super().__init__(scores.shape[:-1], scores.shape[-1:], validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> RankingLaw:
        return RankingLaw(self.scores.expand(*batch_shape, -1), validate_args=False)

    def sample(self, sample_shape: Any = Size()) -> Tensor:
        scores = self.scores.detach().expand(self.shape(sample_shape))
        gumbel = -torch.empty_like(scores).exponential_().log()
        noisy = torch.where(scores > ABSENT, scores + gumbel, scores)
        return noisy.argsort(dim=-1, descending=True, stable=True)

    def log_prob(self, value: Tensor) -> Tensor:
        """log P, shape of the batch; `value` must rank every item once."""
        scores = self.scores.expand(torch.broadcast_shapes(self.scores.shape, value.shape))
        ranked = scores.gather(-1, value.expand(scores.shape))
        left = ranked.flip(-1).logcumsumexp(-1).flip(-1)  # log of the sum over those not yet chosen
        return torch.where(ranked > ABSENT, ranked - left, 0.0).sum(-1)


class PlackettLuce(LinearReward[Rankings, tuple[Tensor, Tensor]]):
    """A Pyro program of `Rankings`: ``weights`` ~ prior, and in the plate ``rankings`` each ``ranking`` is 0, 1, ..."""

    def read(self, data: Rankings) -> tuple[Tensor, Tensor]:
        """Features of all completions, (n, d), and of each row which of them it ranks, (rankings, k), -1 where none."""
        sizes = [len(row) for row in data.completions]
        prompts = chain.from_iterable([prompt] * n for prompt, n in zip(data.prompts, sizes, strict=True))
        x = self.featurise(list(prompts), list(chain.from_iterable(data.completions)))
        rows = torch.arange(len(x), device=x.device).split(sizes)
        return x, pad_sequence(list(rows), batch_first=True, padding_value=-1)

    def observe(self, read: tuple[Tensor, Tensor]) -> None:
        x, rows = read
        rewards = under_plate(self.weights(x), x)  # (*particles, n)
        scores = torch.where(rows < 0, ABSENT, rewards[..., rows])
        best_first = torch.arange(rows.shape[-1], device=x.device).expand(rows.shape)
        with pyro.plate("rankings", len(rows)):
            pyro.sample("ranking", RankingLaw(scores), obs=best_first)
