r"""The Plackett-Luce model: a reward learned from rankings of several completions, best first.

    P(x_1 \succ ... \succ x_k | c, w) = \prod_{j=1}^{k} exp r_w(c, x_j) / \sum_{i=j}^{k} exp r_w(c, x_i)

The best is chosen from all, then the best of the rest, and so on (Plackett 1975, "The analysis of permutations"; Luce
1959). Rankings of two are Bradley-Terry. A draw sorts the rewards plus Gumbel noise (Yellott 1977).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import Any, ClassVar

import numpy as np
import pyro
import torch
from pyro.distributions import TorchDistribution
from torch import Size, Tensor
from torch.distributions import constraints
from torch.nn.utils.rnn import pad_sequence

from .linear import LinearReward, under_plate
from .rows import PreferenceData, PreferenceError, check_texts

ABSENT = -1e9  # the score of padding: never chosen before an item


@dataclass(frozen=True)
class Rankings(PreferenceData):
    """Completions of each prompt, best first: two or more, not necessarily the same number for each.

    A row has ``prompt``, a string, and ``completions``, a list of strings.

    :raises PreferenceError: if the lists differ in length, or a row has fewer than two completions or one twice.
    """

    FIELDS: ClassVar = ("prompt", "completions")
    completions: list[list[str]]

    @classmethod
    def _check_row(cls, *values: Any) -> tuple[Any, ...]:
        prompt, completions = values
        completions = completions.tolist() if isinstance(completions, np.ndarray) else completions  # of pandas
        if not isinstance(completions, list | tuple) or len(completions) < 2:
            raise PreferenceError(
                f"has {completions!r:.60} for 'completions': it must be two texts or more, best first"
            )
        check_texts({"prompt": prompt} | {f"completions[{i}]": text for i, text in enumerate(completions)})
        if twice := next((text for i, text in enumerate(completions) if text in completions[:i]), None):
            raise PreferenceError(f"ranks {twice!r:.60} twice: name each text once")
        return prompt, list(completions)


class RankingDistribution(TorchDistribution):
    """The distribution of a ranking: indices of items, best first, int64; batch shape (*,), event shape (k,).

    :param scores: scores of the items, (*, k); `ABSENT` pads rows with fewer items: padding comes last, in its order.
    """

    arg_constraints: dict[str, Any] = {"scores": constraints.real_vector}
    support = constraints.independent(constraints.nonnegative_integer, 1)

    def __init__(self, scores: Tensor, validate_args: bool | None = None) -> None:
        self.scores = scores
        super().__init__(scores.shape[:-1], scores.shape[-1:], validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> RankingDistribution:
        return RankingDistribution(self.scores.expand(*batch_shape, -1), validate_args=False)

    def sample(self, sample_shape: Any = Size()) -> Tensor:
        scores = self.scores.detach().expand(self.shape(sample_shape))
        gumbel = -torch.empty_like(scores).exponential_().log()
        noisy = torch.where(scores > ABSENT, scores + gumbel, scores)
        return noisy.argsort(dim=-1, descending=True, stable=True)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return log P, (*batch); ``value`` must rank every item once."""
        scores = self.scores.expand(torch.broadcast_shapes(self.scores.shape, value.shape))
        ranked = scores.gather(-1, value.expand(scores.shape))
        remaining = ranked.flip(-1).logcumsumexp(-1).flip(-1)  # log of the sum over items not yet chosen
        return torch.where(ranked > ABSENT, ranked - remaining, 0.0).sum(-1)


class PlackettLuce(LinearReward[Rankings, tuple[Tensor, Tensor]]):
    """A Pyro program of `Rankings`.

    ``weights`` ~ prior, and ``ranking``, observed to be 0, 1, ..., in a plate ``rankings``.
    """

    def prepare(self, data: Rankings) -> tuple[Tensor, Tensor]:
        """Return the features of all completions, (n, d), and their indices by ranking, (rankings, k), padded by -1."""
        sizes = [len(row) for row in data.completions]
        prompts = chain.from_iterable([prompt] * n for prompt, n in zip(data.prompts, sizes, strict=True))
        x = self.featurise(list(prompts), list(chain.from_iterable(data.completions)))
        rows = torch.arange(len(x), device=x.device).split(sizes)
        return x, pad_sequence(list(rows), batch_first=True, padding_value=-1)

    def observe(self, prepared: tuple[Tensor, Tensor]) -> None:
        x, rows = prepared
        rewards = under_plate(self.weights(x), x)  # (*particles, n)
        scores = torch.where(rows < 0, ABSENT, rewards[..., rows])
        best_first = torch.arange(rows.shape[-1], device=x.device).expand(rows.shape)
        with pyro.plate("rankings", len(rows)):
            pyro.sample("ranking", RankingDistribution(scores), obs=best_first)
