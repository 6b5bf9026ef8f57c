r"""Bradley-Terry: a reward learned from pairs of completions of which one was preferred.

    P(x \succ x' | c, w) = \sigma(r_w(c, x) - r_w(c, x')),     r_w linear in features (see `linear`)

(Bradley and Terry 1952, "Rank analysis of incomplete block designs"; of language models, with w uncertain, Yang et al.
2024, "Bayesian reward models for LLM alignment", arXiv 2402.13210.) What both completions have in common cancels: a
reward is known up to a constant for each prompt.
"""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
from torch import Tensor

from .comparisons import Comparisons
from .linear import LinearReward, under_plate


class BradleyTerry(LinearReward[Comparisons, Tensor]):
    """A Pyro program of `Comparisons`: ``weights`` ~ prior, and in the plate ``comparisons`` each ``preferred`` is 1.

    Drawn anew (`bayeslm.inference.predict`), 0 is a comparison that went the other way.

    So ``NUTS().run(BradleyTerry(features), comparisons).samples["weights"]`` is (chain, draw, d).
    """

    def read(self, data: Comparisons) -> Tensor:
        """f(chosen) - f(rejected), (comparisons, d)."""
        x = self.featurise(data.prompts * 2, data.chosen + data.rejected)
        return x[: len(data)] - x[len(data) :]

    def observe(self, read: Tensor) -> None:
        log_odds = under_plate(self.weights(read), read)
        with pyro.plate("comparisons", read.shape[-2]):
            pyro.sample("preferred", dist.Bernoulli(logits=log_odds), obs=read.new_ones(read.shape[:-1]))

    def log_odds(self, data: Comparisons, weights: Any) -> Tensor:
        """log P(chosen is preferred) / P(rejected is), (*, comparisons), under weights (*, d)."""
        chosen = self.reward(data.prompts, data.chosen, weights)
        return chosen - self.reward(data.prompts, data.rejected, weights)
