"""Rewards: what makes one completion better evidence than another, and ready ones.

Any function in TRL's convention is one, ``f(prompts, completions, **columns) -> list[float]``; `Reward` wraps
it, checks what it gives, and lets it be added and scaled:

    reward = Sentiment() - 2 * Toxicity() + Constraint(lambda text: "refund" not in text)
    scores = reward(prompts, lm.decode(x))
"""

from .base import Reward, RewardError
from .classifier import Classifier
from .prefix import prefixes
from .registry import get, load
from .shapes import broadcast
from .text import Sentiment, Similarity, TextReward, Toxicity, sentence_embeddings
from .verifiable import Constraint, Contains, Length, Matches

__all__ = [
    "Classifier",
    "Constraint",
    "Contains",
    "Length",
    "Matches",
    "Reward",
    "RewardError",
    "Sentiment",
    "Similarity",
    "TextReward",
    "Toxicity",
    "broadcast",
    "get",
    "load",
    "prefixes",
    "sentence_embeddings",
]
