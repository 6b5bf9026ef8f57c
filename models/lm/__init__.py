"""Distributions over texts, and the networks behind them."""

from .autoregressive import Autoregressive
from .decoding import Decoder, categorical, generate
from .encoding import Prompt
from .language_model import LanguageModel
from .network import CausalNetwork, log_softmax_at
from .suffix import redraw
from .tabular import word_tokenizer
from .tensor_files import read_tensors
from .twist import POWERS, Twist, TwistInputs
from .usage import count_usage

__all__ = [
    "POWERS",
    "Autoregressive",
    "CausalNetwork",
    "Decoder",
    "LanguageModel",
    "Prompt",
    "Twist",
    "TwistInputs",
    "categorical",
    "count_usage",
    "generate",
    "log_softmax_at",
    "read_tensors",
    "redraw",
    "word_tokenizer",
]
