"""Distributions over texts, and the networks behind them."""

from .autoregressive import Autoregressive
from .decoding import Steps, categorical
from .encoding import Prompt, encode
from .language_model import LanguageModel
from .network import log_softmax_at
from .twist import Twist

__all__ = [
    "Autoregressive",
    "LanguageModel",
    "Prompt",
    "Steps",
    "Twist",
    "categorical",
    "encode",
    "log_softmax_at",
]
