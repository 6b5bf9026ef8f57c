"""Rewards learned from comparisons, rankings and ratings, as Pyro programs, and their uncertainty."""

from .bradley_terry import BradleyTerry
from .comparisons import Comparisons
from .features import CachedFeatures, Features, LastHidden, SentenceEmbedding, Standardised
from .judged_lm import JudgedLM
from .judges import Answer, Judge, JudgeError, Question, SimulatedJudge, to_comparisons
from .linear import LinearReward
from .plackett_luce import PlackettLuce, Rankings
from .ratings import GaussianRatings, OrdinalRatings, Ratings
from .rows import PreferenceError
from .uncertain import Form, UncertainReward

__all__ = [
    "Answer",
    "BradleyTerry",
    "CachedFeatures",
    "Comparisons",
    "Features",
    "Form",
    "GaussianRatings",
    "Judge",
    "JudgeError",
    "JudgedLM",
    "LastHidden",
    "LinearReward",
    "OrdinalRatings",
    "PlackettLuce",
    "PreferenceError",
    "Question",
    "Rankings",
    "Ratings",
    "SentenceEmbedding",
    "SimulatedJudge",
    "Standardised",
    "UncertainReward",
    "to_comparisons",
]
