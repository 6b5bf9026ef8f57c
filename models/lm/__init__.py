"""Distributions over texts, and the networks behind them."""

from .ahead import answering, asking_ahead
from .autoregressive import Autoregressive
from .configs import is_table
from .decoding import Decoder, categorical, generate
from .encoding import Encoded, Prompt
from .generation import SampledText, sample_texts
from .language_model import LanguageModel
from .lockstep import announcing, wait_for_passes
from .memory import subsample_of, subsamples_of
from .module_errors import ModuleWithProperties
from .network import CausalNetwork
from .remembered import on_host, put_on_host, remembering
from .sampler import LIMIT, Drawn, DrawRequest, Draws, Sampler, SamplerError, Weights
from .scopes import differentiating, drawing_by_samplers, exclusive, forked
from .scoring import log_softmax_at
from .sharded_passes import passes_together
from .sharding import in_parts_like, is_sharded, offering, own_part, refuse_sharded, whole_offer, whole_state
from .stop_strings import check_stop
from .suffix import redraw
from .tables import read_table, without_index
from .tensor_files import read_tensors, write_tensors
from .token_model import TokenModel
from .twist import POWERS, Twist, TwistInputs
from .usage import Usage, count_usage
from .weights import digest_of_values
from .words import word_tokenizer

__all__ = [
    "LIMIT",
    "POWERS",
    "Autoregressive",
    "CausalNetwork",
    "Decoder",
    "DrawRequest",
    "Drawn",
    "Draws",
    "Encoded",
    "LanguageModel",
    "ModuleWithProperties",
    "Prompt",
    "SampledText",
    "Sampler",
    "SamplerError",
    "TokenModel",
    "Twist",
    "TwistInputs",
    "Usage",
    "Weights",
    "announcing",
    "answering",
    "asking_ahead",
    "categorical",
    "check_stop",
    "count_usage",
    "differentiating",
    "digest_of_values",
    "drawing_by_samplers",
    "exclusive",
    "forked",
    "generate",
    "in_parts_like",
    "is_sharded",
    "is_table",
    "log_softmax_at",
    "offering",
    "on_host",
    "own_part",
    "passes_together",
    "put_on_host",
    "read_table",
    "read_tensors",
    "redraw",
    "refuse_sharded",
    "remembering",
    "sample_texts",
    "subsample_of",
    "subsamples_of",
    "wait_for_passes",
    "whole_offer",
    "whole_state",
    "without_index",
    "word_tokenizer",
    "write_tensors",
]
