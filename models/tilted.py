r"""The ready-made program: a prior tilted by a reward.

    \pi^*(x | c) = p(x | c) \exp(r(c, x) / \beta) / Z(c)

the posterior whose variational inference is KL-penalised reinforcement learning (Korbak, Perez and Buckley 2022,
arXiv 2205.11275).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pyro

from .encoding import Prompt
from .language_model import LanguageModel
from .rewards import Reward


class TiltedLM:
    """A Pyro program: ``completion`` ~ prior, ``reward`` = factor r / beta, ``score`` = r in the reward's own units.

    :param prior: the frozen language model.
    :param reward: any function of (prompts, completions, **columns), see `bayeslm.models.rewards`.
    :param beta: the KL coefficient, or temperature of the likelihood; small is sharp.
    :param max_new_tokens: the longest completion.
    :param temperature: of the prior's sampling law.
    :raises ValueError: if ``beta`` or ``temperature`` is not positive and finite, or ``max_new_tokens`` < 1.
    """

    def __init__(
        self,
        prior: LanguageModel,
        reward: Reward | Callable[..., Sequence[float]],
        beta: float = 0.1,
        *,
        max_new_tokens: int = 24,
        temperature: float = 1.0,
    ) -> None:
        if not (beta > 0 and math.isfinite(beta)):
            raise ValueError(f"beta must be positive and finite, got {beta}")
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        if not (temperature > 0 and math.isfinite(temperature)):
            raise ValueError(f"temperature must be positive and finite, got {temperature}")
        self.prior = prior
        self.reward = reward if isinstance(reward, Reward) else Reward(reward)
        self.beta = beta
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature

    @property
    def log_bound(self) -> float:
        """An upper bound of the log-likelihood r / beta, for rejection sampling; inf if the reward has none."""
        return self.reward.upper_bound / self.beta

    def __call__(self, prompts: Sequence[Prompt], /, **columns: Sequence[Any]) -> None:
        """Run the program; ``columns`` are handed to the reward."""
        law = self.prior(prompts, max_new_tokens=self.max_new_tokens, temperature=self.temperature)
        with pyro.plate("prompts", len(prompts)):
            x = pyro.sample("completion", law)
            score = self.reward(prompts, self.prior.decode(x), **columns).to(x.device)
            pyro.deterministic("score", score, event_dim=0)
            pyro.factor("reward", score / self.beta)
