r"""The Bradley-Terry model: a reward learned from pairs of completions of which one was preferred.

    P(x \succ x' | c, w) = \sigma(r_w(c, x) - r_w(c, x')),     r_w linear in features (see `linear`)

(Bradley and Terry 1952, "Rank analysis of incomplete block designs"; of language models, with w uncertain, Yang et al.
2024, "Bayesian reward models for LLM alignment", arXiv 2402.13210.) Comparisons determine the reward only up to a
constant for each prompt.
"""

from __future__ import annotations

import pyro
import pyro.distributions as dist
from torch import Tensor

from .comparisons import Comparisons
from .linear import LinearReward, under_plate


class BradleyTerry(LinearReward[Comparisons, Tensor]):
    """A Pyro program of `Comparisons`.

    ``weights`` ~ prior, and ``preferred``, observed to be 1, in a plate ``comparisons``.
    ``NUTS().run(BradleyTerry(features), comparisons).samples["weights"]`` is (chain, draw, d). In predictions
    (`bayeslm.inference.predict`) ``preferred`` is 0 where the rejected completion is preferred.
    """

    def prepare(self, data: Comparisons) -> Tensor:
        """Return f(chosen) - f(rejected), (comparisons, d)."""
        x = self.featurise(data.prompts * 2, data.chosen + data.rejected)
        return x[: len(data)] - x[len(data) :]

    def observe(self, prepared: Tensor) -> None:
        log_odds = under_plate(self.weights(prepared), prepared)
        with pyro.plate("comparisons", prepared.shape[-2]):
            pyro.sample("preferred", dist.Bernoulli(logits=log_odds), obs=prepared.new_ones(prepared.shape[:-1]))
