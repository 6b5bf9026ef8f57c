r"""Acquisition: which pair of completions to ask about, given the posterior over their rewards.

r_1 .. r_n are the rewards of a completion under n draws of the posterior, and y = 1 if the first of a pair is
preferred, which has probability p_k = \sigma(r_k(x) - r_k(x')) under draw k. `InformationGain` asks for the pair whose
answer is expected to be most informative about the parameters (BALD; Lindley 1956; Houlsby, Huszar, Ghahramani and
Lengyel 2011, arXiv 1112.5745):

    I(y; \theta) = H(E_k[p_k]) - E_k[H(p_k)],     H(p) = -p \log p - (1 - p) \log(1 - p)

the entropy of the prediction minus the noise of the judge. It is large where each draw of the posterior is sure of the
answer, but the draws disagree. `Duel` chooses each of the two completions by an exploration strategy: with `Thompson`
each is the best of one draw of the posterior (double Thompson sampling, Wu and Liu 2016, arXiv 1604.07101; for language
models Dwaracherla et al. 2024, arXiv 2402.00396), with `Random` all pairs are equally likely. `Tilted` draws from the
aligned model under an uncertain reward, with the uniform distribution of the candidates x_1 .. x_n as its prior,

    \pi(x) = E_k[ \pi*_k(x) ],     \pi*_k(x_i) \propto \exp(r_k(x_i) / \beta)

For distinct candidates drawn from the prior p, this estimates \pi*_k \propto p \exp(r_k / \beta). A text that was
drawn several times is one candidate of a `Pool`, and counts once; `FreshCompletions` draws with p itself.

Use `Duel` to find good completions, and `InformationGain` to learn which of any two is better.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits as cross_entropy

from bayeslm.inference.control import Exploration, Thompson
from bayeslm.validation import Count, Positive, validated


class Acquisition(ABC):
    """A rule that chooses the pair to ask about."""

    @abstractmethod
    def choose(self, rewards: Tensor, pairs: Tensor, prompts: Tensor) -> int:
        """Choose a pair, and return its index in ``pairs``.

        :param rewards: draws of the posterior over the candidates' rewards, (draw, candidate).
        :param pairs: indices of two candidates with the same prompt, (pair, 2).
        :param prompts: index of each candidate's prompt, (candidate,).
        """


@validated
@dataclass(frozen=True)
class InformationGain(Acquisition):
    """The pair with the largest expected information about the parameters.

    :param max_pairs: largest number of pairs to compare; if there are more, that many are picked at random.
    """

    max_pairs: Count = 8192

    def choose(self, rewards: Tensor, pairs: Tensor, prompts: Tensor) -> int:
        compared = torch.randperm(len(pairs))[: self.max_pairs]
        log_odds = rewards[:, pairs[compared, 0]] - rewards[:, pairs[compared, 1]]  # (draw, pair)
        return int(compared[information(log_odds).argmax()])


def information(log_odds: Tensor) -> Tensor:
    """Return I(y; theta) in nats, (pair,), of answers with log odds (draw, pair)."""
    probability = log_odds.sigmoid()
    noise = cross_entropy(log_odds, probability, reduction="none").mean(0)  # H(p) = CE(p, p)
    mean = probability.mean(0)
    return torch.special.entr(mean) + torch.special.entr(1.0 - mean) - noise


@validated
@dataclass(frozen=True)
class Duel(Acquisition):
    """Two completions of one prompt, the first and then the second of the others chosen by an exploration strategy.

    The prompt is drawn uniformly from those with pairs that were not asked about.

    :param strategy: chooses candidates by draws of their rewards; see `bayeslm.inference.control.Exploration`.
    """

    strategy: Exploration = field(default_factory=Thompson)

    def choose(self, rewards: Tensor, pairs: Tensor, prompts: Tensor) -> int:
        prompt_of_pair = prompts[pairs[:, 0]]
        available = prompt_of_pair.unique()
        prompt = available[torch.randint(len(available), ())]
        rows = (prompt_of_pair == prompt).nonzero()[:, 0]
        candidates = pairs[rows].unique()
        first = candidates[self.strategy.choose(rewards[:, candidates])]
        rows = rows[(pairs[rows] == first).any(-1)]
        partners = pairs[rows].sum(-1) - first
        return int(rows[self.strategy.choose(rewards[:, partners])])


@validated
@dataclass(frozen=True)
class Tilted(Exploration):
    """A draw of the posterior over completions under a draw of the reward, with a uniform prior over the candidates.

    :param beta: the KL coefficient, in units of reward. As it goes to 0, the strategy becomes `Thompson`.
    :raises ValueError: if ``beta`` is not positive and finite.
    """

    needs_draws: ClassVar[bool] = True
    beta: Positive = 1.0

    def _probabilities(self, values: Tensor) -> Tensor:
        return (values / self.beta).softmax(-1).mean(0)
