r"""Which pair of completions to ask about, given the posterior over their rewards.

r_1 .. r_n are rewards of the candidates under draws of the posterior, and y = 1 if the first of a pair is preferred,
which has probability p_k = \sigma(r_k(x) - r_k(x')) under draw k. `InformationGain` asks where the answer is expected
to say most about the parameters (BALD; Lindley 1956; Houlsby, Huszar, Ghahramani and Lengyel 2011, arXiv 1112.5745):

    I(y; \theta) = H(E_k[p_k]) - E_k[H(p_k)],     H(p) = -p \log p - (1 - p) \log(1 - p)

the entropy of what is predicted, less the judge's own noise: draws of the posterior each know the answer, and disagree.
`Duel` lets an exploration strategy choose each of the two: with `Thompson` each is the best of a draw of the posterior
(double Thompson sampling, Wu and Liu 2016, arXiv 1604.07101; for language models Dwaracherla et al. 2024, arXiv
2402.00396), with `Random` the pair is any. `Tilted` draws completions of the aligned model, with its reward uncertain
and in place of its prior the uniform law of the candidates x_1 .. x_n,

    \pi(x) = E_k[ \pi*_k(x) ],     \pi*_k(x_i) \propto \exp(r_k(x_i) / \beta)

which, of draws of the prior p that differ, estimates \pi*_k \propto p \exp(r_k / \beta). A text that was drawn often
is one candidate, as a `Pool` has it, and counts once; `FreshCompletions` draw with p itself.

Who wants good completions asks by `Duel`, who wants to know which of any two is better by `InformationGain`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits as cross_entropy

from bayeslm.inference.control import Exploration, Thompson
from bayeslm.inference.program import check_counts, check_positive


class Acquisition(ABC):
    """A choice of pairs."""

    @abstractmethod
    def choose(self, rewards: Tensor, pairs: Tensor, prompts: Tensor) -> int:
        """Which of the ``pairs`` (pair, 2), indices of candidates, to ask about.

        :param rewards: draws of the posterior over the candidates' rewards, (draw, candidate).
        :param prompts: which prompt each is a completion of, (candidate,); a pair has one prompt.
        """


@dataclass(frozen=True)
class InformationGain(Acquisition):
    """The pair whose answer says most about the parameters.

    :param max_pairs: at most so many are looked at, picked at random.
    """

    max_pairs: int = 8192

    def __post_init__(self) -> None:
        check_counts(self, "max_pairs")

    def choose(self, rewards: Tensor, pairs: Tensor, prompts: Tensor) -> int:
        some = torch.randperm(len(pairs))[: self.max_pairs]
        return int(some[information(_log_odds(rewards, pairs[some])).argmax()])


def information(log_odds: Tensor) -> Tensor:
    """I(y; theta) of answers with log odds (draw, pair), nats, (pair,)."""
    probability = log_odds.sigmoid()
    noise = cross_entropy(log_odds, probability, reduction="none").mean(0)  # H(p) = CE(p, p)
    mean = probability.mean(0)
    return torch.special.entr(mean) + torch.special.entr(1.0 - mean) - noise


def _log_odds(rewards: Tensor, pairs: Tensor) -> Tensor:
    """Of the first of each pair over the second, (draw, pair)."""
    return rewards[:, pairs[:, 0]] - rewards[:, pairs[:, 1]]


@dataclass(frozen=True)
class Duel(Acquisition):
    """Each of the two by an exploration strategy: the first of all candidates of a prompt, the second of the others.

    The prompt is any that has pairs left, each alike.

    :param strategy: a law of candidates given draws of their rewards; see `exploration`.
    """

    strategy: Exploration = field(default_factory=Thompson)

    def choose(self, rewards: Tensor, pairs: Tensor, prompts: Tensor) -> int:
        of_pair = prompts[pairs[:, 0]]
        prompt = (left := of_pair.unique())[torch.randint(len(left), ())]
        rows = (of_pair == prompt).nonzero()[:, 0]
        candidates = pairs[rows].unique()
        first = candidates[self.strategy.choose(rewards[:, candidates])]
        rows = rows[(pairs[rows] == first).any(-1)]
        partners = pairs[rows].sum(-1) - first
        return int(rows[self.strategy.choose(rewards[:, partners])])


@dataclass(frozen=True)
class Tilted(Exploration):
    """A draw of the posterior over completions under a draw of the reward, each distinct candidate as likely a priori.

    :param beta: the KL coefficient, in the rewards' own units. As it goes to 0, `Thompson`.
    :raises ValueError: if ``beta`` is not positive and finite.
    """

    needs_draws: ClassVar[bool] = True
    beta: float = 1.0

    def __post_init__(self) -> None:
        check_positive(self, "beta")

    def _probabilities(self, values: Tensor) -> Tensor:
        return (values / self.beta).softmax(-1).mean(0)
