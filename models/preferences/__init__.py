"""What people prefer, as Pyro programs: rewards learned from comparisons and ratings, with their uncertainty."""

from .bradley_terry import BradleyTerry
from .comparisons import Comparisons, PreferenceError, Rankings
from .features import LastHidden, SentenceEmbedding, Standardised
from .uncertain import JudgedLM, UncertainReward

__all__ = [
    "BradleyTerry",
    "Comparisons",
    "JudgedLM",
    "LastHidden",
    "PreferenceError",
    "Rankings",
    "SentenceEmbedding",
    "Standardised",
    "UncertainReward",
]
