"""Tiny language models: tables and random Transformers."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from bayeslm.models import LanguageModel
from bayeslm.models.lm import word_tokenizer

WORDS = ("<eos>", "a", "b", "c", "d", "e", "f", "g", "h", "i", "j", "k")


def table_lm(order: int = 3, seed: int = 0, vocab: int = 8) -> LanguageModel:
    """An n-gram table with standard normal logits over ``vocab`` words, the first of which ends a text."""
    return LanguageModel.tabular(WORDS[:vocab], order=order, seed=seed)


def llama_network(seed: int = 0, scale: float = 2.0, **config: Any) -> LlamaForCausalLM:
    """A random Llama whose logits have standard deviation ``scale`` and depend on all of the context."""
    settings: dict[str, Any] = {
        "vocab_size": 8,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": None,  # transformers fixes the embedding of a pad token at zero, and 0 also begins texts
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = LlamaForCausalLM(LlamaConfig(**(settings | config)))
        torch.nn.init.normal_(network.lm_head.weight, std=scale / network.config.hidden_size**0.5)
    return network


def tiny_llama(seed: int = 0, scale: float = 2.0, **settings: Any) -> LanguageModel:
    """`llama_network` with the vocabulary of `table_lm`; ``settings`` go to `LanguageModel`."""
    return LanguageModel(llama_network(seed, scale), word_tokenizer(WORDS[:8], "<eos>"), **settings)


# Of an encoder-decoder architecture; the vocabulary is that of `tiny_llama`, whose token 0 begins and ends texts.
SEQ2SEQ: dict[str, dict[str, Any]] = {
    "t5": {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "tie_word_embeddings": False},
    "bart": {
        "d_model": 16,
        "encoder_layers": 1,
        "decoder_layers": 2,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 32,
        "decoder_ffn_dim": 32,
        "init_std": 0.5,
    },
}


def tiny_seq2seq(model_type: str, seed: int = 1, scale: float = 1.5, **settings: Any) -> LanguageModel:
    """A random encoder-decoder network whose logits depend on all of the source; ``settings`` go to the config."""
    special = {"pad_token_id": 0, "eos_token_id": 0, "bos_token_id": 0, "decoder_start_token_id": 0}
    config = AutoConfig.for_model(model_type, vocab_size=8, **(SEQ2SEQ[model_type] | special | settings))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = AutoModelForSeq2SeqLM.from_config(config)
        if model_type == "t5":  # which draws embeddings that drown all else
            torch.nn.init.normal_(network.lm_head.weight, std=scale / config.d_model**0.5)
    return LanguageModel(network, word_tokenizer(WORDS[:8], "<eos>"))


COMMON = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


PADDED_PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12, 13, 14], [20], [30, 31, 32]]

SHORT_WINDOW = {"sliding_window": 5}  # shorter than the longest prompt

# model type: (settings in addition to `COMMON`, whether it is only a body and a linear head)
ARCHITECTURES = {
    "llama": ({}, True),
    "qwen2": ({}, True),
    "qwen3": ({}, True),
    "mistral": (SHORT_WINDOW, True),
    "mixtral": ({"num_local_experts": 4}, True),
    "gemma": ({}, True),
    "gemma2": (SHORT_WINDOW | {"query_pre_attn_scalar": 8}, False),  # logits soft-capped
    "gemma3_text": (SHORT_WINDOW | {"query_pre_attn_scalar": 8}, True),
    "granite": ({"logits_scaling": 2.0}, False),
    "cohere": ({"logit_scale": 0.5}, False),
    "gpt2": ({"n_positions": 64}, True),  # absolute positions
    "opt": ({"ffn_dim": 64, "word_embed_proj_dim": 32, "init_std": 0.3}, True),
    "bloom": ({}, True),  # positions by linear biases, from the mask
}


def random_network(model_type: str, **extra: Any) -> PreTrainedModel:
    """A random network of an architecture of transformers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **(COMMON | extra)))


def count_abc(prompts: list[str], completions: list[str]) -> torch.Tensor:
    """Return how often a, b and c occur; b counts double after a prompt of several words."""
    counts = torch.tensor([[float(text.split().count(word)) for word in WORDS[1:4]] for text in completions])
    counts[:, 1] *= torch.tensor([2.0 if " " in prompt else 1.0 for prompt in prompts])
    return counts
