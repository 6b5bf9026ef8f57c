"""Distributions over texts, and the networks behind them."""

from .autoregressive import Autoregressive
from .decoding import Steps, categorical
from .encoding import Prompt, encode
from .language_model import LanguageModel
from .network import count_usage, log_softmax_at
from .twist import Twist

__all__ = [
    "Autoregressive",
    "LanguageModel",
    "Prompt",
    "Steps",
    "Twist",
    "categorical",
    "count_usage",
    "encode",
    "log_softmax_at",
]
