"""Distributions over texts, and the networks behind them."""

from .autoregressive import Autoregressive
from .language_model import LanguageModel
from .network import count_usage
from .twist import Twist

__all__ = ["Autoregressive", "LanguageModel", "Twist", "count_usage"]
