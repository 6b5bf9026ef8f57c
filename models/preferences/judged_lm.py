"""A completion and uncertain judges of it, as latents of one Pyro program."""

from __future__ import annotations

from collections.abc import Sequence

import pyro
import pyro.distributions as dist
import torch
from pyro.ops.indexing import Vindex

from bayeslm.models.lm import LanguageModel
from bayeslm.models.rewards import record
from bayeslm.validation import Count, Positive, validated

from .uncertain import UncertainReward, log_mean_sigmoid


@validated
class JudgedLM:
    r"""A Pyro program of a completion and its judges, each of them a latent draw of the weights that prefers it.

        judge_k ~ p(w | D),   x ~ p(x | c),   preferred_k ~ Bernoulli(\sigma(\Delta_{judge_k}(c, x))) observed to be 1

    Sites are ``completion`` and ``judge``, the index of a draw. The completion's posterior is that of
    ``TiltedLM(prior, reward, beta=1 / judges)`` with the reward in the form ``marginal``, and engines infer the judges
    too. That reward is recorded, as `Posterior.rewards`.

    :param prior: the language model.
    :param reward: the learned reward, in any form.
    :param judges: number of judges of each completion, 1 / beta.
    :param max_new_tokens: length of the longest completion, in tokens.
    :param temperature: divides the prior's logits.
    :raises ValueError: if ``judges`` or ``max_new_tokens`` < 1.
    """

    stands_alone = True  # engines need not try whether particles of this very class mix

    def __init__(
        self,
        prior: LanguageModel,
        reward: UncertainReward,
        judges: Count = 1,
        *,
        max_new_tokens: Count = 24,
        temperature: Positive = 1.0,
    ) -> None:
        self.prior = prior
        self.reward = reward
        self.judges = judges
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature

    def __call__(self, prompts: Sequence[str], /) -> None:
        """Run the program."""
        completion = self.prior(prompts, max_new_tokens=self.max_new_tokens, temperature=self.temperature)
        judges = pyro.plate("judges", self.judges, dim=-2)
        with pyro.plate("prompts", len(prompts), dim=-1):
            with judges:
                equal = torch.zeros(len(self.reward.weights), device=self.prior.device)
                judge = pyro.sample("judge", dist.Categorical(logits=equal))  # (judge, prompt)
            x = pyro.sample("completion", completion)
            margins = self.reward.margins(prompts, completion.decode(x)).to(x.device)  # (prompt, draw)
            record("reward", log_mean_sigmoid(margins))
            with judges:
                preferred = dist.Bernoulli(logits=Vindex(margins)[..., judge])
                pyro.sample("preferred", preferred, obs=margins.new_ones(()).expand(judge.shape))
