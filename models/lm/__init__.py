"""Distributions over texts, and the networks behind them."""

from .autoregressive import Autoregressive
from .language_model import LanguageModel
from .twist import Twist

__all__ = ["Autoregressive", "LanguageModel", "Twist"]
