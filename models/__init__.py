"""What to infer: distributions over texts, language models, rewards, and the program of a prior tilted by a reward."""

from . import notebooks, rewards, samplers  # noqa: F401, notebooks first, since it quiets an import of the others
from .lm import Autoregressive, LanguageModel, Twist
from .moments import Moment, moment_target
from .tilted import TiltedLM
from .tools import Tool, ToolError

__all__ = [
    "Autoregressive",
    "LanguageModel",
    "Moment",
    "TiltedLM",
    "Tool",
    "ToolError",
    "Twist",
    "moment_target",
    "rewards",
    "samplers",
]
