"""Small programs whose posteriors can be enumerated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import torch

from bayeslm.models import LanguageModel

# Token ids of different lengths. (A prompt that repeats one token is no test of SVI on a Transformer without
# absolute positions: it cannot tell [5] from [5, 5], whatever its weights.)
PROMPTS = [[2, 3, 4], [5, 6]]
TOKENS = 5


def score_table(seed: int, vocab: int = 8, tokens: int = TOKENS, scale: float = 0.5) -> torch.Tensor:
    """A reward a position and token, (tokens, vocab)."""
    return scale * torch.randn(tokens, vocab, generator=torch.Generator().manual_seed(seed))


def tilted(
    lm: LanguageModel, table: torch.Tensor, beta: float = 1.0, constant: float = 0.0
) -> Callable[[list[Any]], None]:
    """``completion`` ~ lm, reward = sum of the table over all positions (padding too) + constant."""
    positions = torch.arange(len(table))

    def model(prompts: list[Any]) -> None:
        with pyro.plate("prompts", len(prompts)):
            x = pyro.sample("completion", lm(prompts, max_new_tokens=len(table)))
            score = table[positions, x].sum(-1) + constant
            pyro.deterministic("score", score, event_dim=0)
            pyro.factor("reward", score / beta)

    return model


def highest(table: torch.Tensor) -> float:
    """An upper bound of the reward of `tilted`."""
    return float(table.amax(-1).sum())
