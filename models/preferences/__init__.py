"""What people prefer, as Pyro programs: rewards learned from comparisons and ratings, with their uncertainty."""

from .bradley_terry import BradleyTerry
from .comparisons import Comparisons, PreferenceError, Rankings
from .features import LastHidden, SentenceEmbedding, Standardised
from .judges import Answer, Judge, Question, SimulatedJudge, answered
from .plackett_luce import PlackettLuce
from .ratings import GaussianRatings, OrdinalRatings, Ratings
from .uncertain import JudgedLM, UncertainReward

__all__ = [
    "Answer",
    "BradleyTerry",
    "Comparisons",
    "GaussianRatings",
    "Judge",
    "JudgedLM",
    "LastHidden",
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
    "answered",
]
