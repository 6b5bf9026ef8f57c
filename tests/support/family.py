"""One policy and many prompts, all of them enumerated.

Vocabulary 4, 3 tokens, and a reward that depends on the prompt's last token: 40 completions a prompt.
"""

from __future__ import annotations

import pyro
import torch
from support.gradients import perturbed
from support.models import table_lm
from support.programs import score_table

from bayeslm.models.rewards import factor

T = 3
PROMPTS = [[1], [2, 3], [3], [1, 2], [3, 1, 2]]


class Family:
    """One policy, many prompts, all of them enumerated: log q (completion, prompt) with gradient, log p + l."""

    def __init__(self, prompts, order: int = 2, seed: int = 0) -> None:
        self.lm, self.prompts = table_lm(order, seed=seed, vocab=4), prompts
        self.tables = torch.stack([score_table(10 * seed + i, vocab=4, tokens=T, scale=1.0) for i in range(4)])
        self.policy = perturbed(self.lm, seed)
        q = self.policy(prompts, max_new_tokens=T)
        self.x = q.enumerate_support()
        self.log_q = q.log_prob(self.x)
        self.log_target = self.lm(prompts, max_new_tokens=T).log_prob(self.x) + self.reward(prompts, self.x)
        self.log_z = self.log_target.logsumexp(0)

    def reward(self, prompts, x):
        last = torch.tensor([prompt[-1] for prompt in prompts])
        return self.tables[last[..., None], torch.arange(T), x].sum(-1)

    def model(self, size=None):
        def model(prompts):
            with pyro.plate("prompts", len(prompts), subsample_size=size) as batch:
                some = [prompts[i] for i in batch]
                x = pyro.sample("completion", self.lm(some, max_new_tokens=T))
                factor("reward", self.reward(some, x), 1.0)

        return model

    def guide(self, size):
        def guide(prompts):
            pyro.module("policy", self.policy)
            with pyro.plate("prompts", len(prompts), subsample_size=size) as batch:
                pyro.sample("completion", self.policy([prompts[i] for i in batch], max_new_tokens=T))

        return guide

    def kl(self, policy):
        """KL(q || pi*) of each prompt, by enumeration."""
        with torch.no_grad():
            score = policy(self.prompts, max_new_tokens=T).log_prob(self.x)
            return (score.exp() * (score - self.log_target + self.log_z)).sum(0)
