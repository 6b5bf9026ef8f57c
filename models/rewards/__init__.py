"""Rewards of completions, built-in and of any function in TRL's convention.

Such a function is ``f(prompts, completions, **columns) -> list[float]``; `Reward` wraps it, checks its scores, and adds
and scales it:

    reward = Sentiment() - 2 * Toxicity() + Constraint(lambda text: "refund" not in text)
    scores = reward(prompts, lm.decode(x))

In a program, `factor` multiplies the joint density by exp(r / beta) and records r.
"""

from .answers import ExactMatch, TokenF1, normalised_answer
from .best_of_n import BestOfNLikelihood
from .broadcasting import broadcast, check_columns, with_trainer_arguments
from .calling import TimeLimitError, call, copied
from .classifier import Classifier
from .grammar import Grammar, fewest_tokens
from .judge import Judge, JudgeUsage
from .recording import factor, record, reward_name
from .registry import BUILT_IN, get, load
from .rehearsal import RememberedScores, rehearsal, remembering_scores, repeating, watching_seed
from .reward import Reward
from .scorer import RewardError, RewardFunction
from .text_rewards import Sentiment, Similarity, TextReward, Toxicity, sentence_embeddings
from .unfinished import prefixes
from .verifiable import Constraint, Contains, Length, Matches

__all__ = [
    "BUILT_IN",
    "BestOfNLikelihood",
    "Classifier",
    "Constraint",
    "Contains",
    "ExactMatch",
    "Grammar",
    "Judge",
    "JudgeUsage",
    "Length",
    "Matches",
    "RememberedScores",
    "Reward",
    "RewardError",
    "RewardFunction",
    "Sentiment",
    "Similarity",
    "TextReward",
    "TimeLimitError",
    "TokenF1",
    "Toxicity",
    "broadcast",
    "call",
    "check_columns",
    "copied",
    "factor",
    "fewest_tokens",
    "get",
    "load",
    "normalised_answer",
    "prefixes",
    "record",
    "rehearsal",
    "remembering_scores",
    "repeating",
    "reward_name",
    "sentence_embeddings",
    "watching_seed",
    "with_trainer_arguments",
]
