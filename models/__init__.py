"""What to infer: distributions over texts, language models, rewards, ready Pyro programs."""

from . import rewards
from .lm.autoregressive import Autoregressive
from .lm.language_model import LanguageModel
from .lm.twist import Twist
from .tilted import TiltedLM

__all__ = ["Autoregressive", "LanguageModel", "TiltedLM", "Twist", "rewards"]
