"""Who draws completions in the place of a language model's own decoding: engines that serve many texts at once."""

from bayeslm.models.lm import Drawn, DrawRequest, Draws, Sampler, SamplerError, Weights

from .continuous_batching import ContinuousBatching
from .vllm_engine import VLLM
from .vllm_server import VLLMServer

__all__ = [
    "VLLM",
    "ContinuousBatching",
    "DrawRequest",
    "Drawn",
    "Draws",
    "Sampler",
    "SamplerError",
    "VLLMServer",
    "Weights",
]
