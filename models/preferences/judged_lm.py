"""A completion and uncertain judges of it, as latents of one Pyro program."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import pyro
import pyro.distributions as dist
import torch
from pyro.ops.indexing import Vindex

from bayeslm.models.lm import LanguageModel, check_stop
from bayeslm.models.rewards import record
from bayeslm.validation import Count, Positive, Unchecked, Within, validated

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
    :param top_k: of each token the k likeliest remain, renormalised; None: all.
    :param top_p: of each token the fewest likeliest with this probability remain, renormalised; None: all.
    :param stop: a string, or several, that end a completion as an end token does; they are part of it.
    :raises TypeError: if ``stop`` is no string, or the prior has no tokenizer to read it with.
    :raises ValueError: if ``judges``, ``max_new_tokens`` or ``top_k`` < 1, ``top_p`` is not in (0, 1], or ``stop``
        holds an empty string.
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
        top_k: Count | None = None,
        top_p: Annotated[float, Within("(0, 1]")] | None = None,
        stop: Annotated[str | Sequence[str] | None, Unchecked] = None,
    ) -> None:
        self.prior = prior
        self.reward = reward
        self.judges = judges
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.top_k = top_k
        self.top_p = top_p
        self.stop = None if stop is None else check_stop(stop, prior.tokenizer)

    @property
    def prior_settings(self) -> dict[str, Any]:
        """The settings of the prior's distribution, as of `TiltedLM`."""
        return {name: getattr(self, name) for name in ("max_new_tokens", "temperature", "top_k", "top_p", "stop")}

    def __call__(self, prompts: Sequence[str], /) -> None:
        """Run the program."""
        completion = self.prior(prompts, **self.prior_settings)
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
