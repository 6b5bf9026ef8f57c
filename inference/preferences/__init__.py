"""Preference elicitation: which completions to compare next, and what the answers say about the reward."""

from .acquisition import Acquisition, Duel, InformationGain, Tilted
from .elicitation import Elicitation, FreshCompletions, Pool

__all__ = ["Acquisition", "Duel", "Elicitation", "FreshCompletions", "InformationGain", "Pool", "Tilted"]
