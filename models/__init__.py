"""What to infer: distributions over texts, language models, rewards, ready Pyro programs."""

from . import rewards
from .autoregressive import Autoregressive
from .language_model import LanguageModel
from .tilted import TiltedLM
from .twist import Twist

__all__ = ["Autoregressive", "LanguageModel", "TiltedLM", "Twist", "rewards"]
