"""A small enumerated problem for objectives and their sources of particles.

Vocabulary 4, 3 tokens, bigram: 40 completions a prompt.
"""

from __future__ import annotations

import torch
from support.gradients import COPIES, gradient_of, gradients, perturbed, policy_guide
from support.models import table_lm
from support.programs import score_table, tilted

BETA = 0.5
PROMPTS = [[1], [2, 3]]
T = 3


class Problem:
    """A problem that is enumerated: log q (completion, prompt) with gradient, log p + l, log pi*.

    A table of order 4 depends on all of a text, and can be the posterior; one of order 2 cannot.
    """

    def __init__(self, seed: int = 0, order: int = 2, scale: float = 0.5) -> None:
        self.lm, self.table = table_lm(order, seed=seed, vocab=4), score_table(seed, vocab=4, tokens=T, scale=1.0)
        self.policy = perturbed(self.lm, seed, scale)
        self.parameters = list(self.policy.network.parameters())
        self.model, self.guide = tilted(self.lm, self.table, BETA), policy_guide(self.policy, T)
        distribution = self.policy(PROMPTS, max_new_tokens=T)
        self.x = distribution.enumerate_support()
        self.log_q = distribution.log_prob(self.x)
        self.log_p = self.lm(PROMPTS, max_new_tokens=T).log_prob(self.x)
        self.log_target = self.log_p + self.table[torch.arange(T), self.x].sum(-1) / BETA
        self.log_z = self.log_target.logsumexp(0)
        self.log_posterior = self.log_target - self.log_z

    def reverse_kl(self):
        """KL(q || pi*), (prompt,), with gradient."""
        return (self.log_q.exp() * (self.log_q - self.log_posterior)).sum(0)

    def gradient(self, loss):
        """Of a loss (prompt,), of `COPIES` of the prompts."""
        return gradient_of(COPIES * loss.sum(), self.parameters)

    def estimates(self, objective, **settings):
        return gradients(objective, self.model, self.guide, self.parameters, (PROMPTS * COPIES,), **settings)


def kl_to(policy, small):
    """KL(q || pi*) by enumeration, (prompt,)."""
    with torch.no_grad():
        score = policy(PROMPTS, max_new_tokens=T).log_prob(small.x)
        return (score.exp() * (score - small.log_posterior)).sum(0)
