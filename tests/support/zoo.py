"""Tiny networks of every architecture of transformers that writes texts, from two tables of settings."""

from __future__ import annotations

from typing import Any

import torch
from support import models
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

LARGEST = 3_000_000  # weights: networks that stay larger have parts that the settings do not reach, as for images

COMMON: dict[str, Any] = models.COMMON | {
    "vocab_size": 24,
    "intermediate_size": 32,
    "is_decoder": True,
    "sliding_window": 5,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}

LATENT_ATTENTION = {
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
    "n_group": 1,
    "topk_group": 1,
}
INDEXED = LATENT_ATTENTION | {"index_head_dim": 8, "index_n_heads": 2, "index_topk": 64}
DECODER = {  # of an encoder-decoder architecture
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "init_std": 0.3,
}
STATE_SPACE = {
    "state_size": 8,
    "mamba_d_ssm": 32,
    "mamba_n_heads": 4,
    "mamba_d_head": 8,
    "mamba_n_groups": 1,
    "mamba_d_state": 8,
    "mamba_expand": 1,
    "mamba_chunk_size": 8,
    "ssm_state_size": 8,
    "mamba_num_heads": 4,
    "mamba_head_dim": 8,
    "n_groups": 1,
    "chunk_size": 8,
}
DELTA = {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
HYBRID = {"layer_types": ["linear_attention", "full_attention"]}

# model type: settings in addition to `COMMON`; None takes a common one away
SETTINGS: dict[str, dict[str, Any]] = {
    "axk1": LATENT_ATTENTION,
    "axk2": INDEXED,
    "bailing_hybrid": LATENT_ATTENTION | HYBRID,
    "bamba": STATE_SPACE | {"attn_layer_indices": [1]},
    "bart": DECODER,
    "bigbird_pegasus": DECODER | {"attention_type": "original_full"},
    "blenderbot": DECODER,
    "blenderbot-small": DECODER,
    "codegen": {"rotary_dim": 4, "n_inner": 32},
    "cpmant": {"dim_head": 8, "dim_ff": 32},
    "ctrl": {"dff": 32},
    "deepseek_v2": LATENT_ATTENTION,
    "deepseek_v3": LATENT_ATTENTION,
    "deepseek_v32": INDEXED,
    "dots1": LATENT_ATTENTION | {"layer_types": ["sliding_attention", "full_attention"], "n_shared_experts": 1},
    "dots3_note_text": LATENT_ATTENTION,
    "falcon": {"head_dim": None, "ffn_hidden_size": 32},
    "falcon_h1": STATE_SPACE,
    "gemma4_text": {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 24},
    "glm4_moe_lite": LATENT_ATTENTION,
    "glm_moe_dsa": INDEXED,
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]], "window_size": 5},
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": STATE_SPACE | {"layer_types": ["mamba", "attention"], "shared_intermediate_size": 32},
    "hy_v4": LATENT_ATTENTION,
    "hrm_text": {"initializer_range": 0.1},  # its layers repeat, and so does rounding
    "jamba": STATE_SPACE | {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4},
    "kimi_linear": LATENT_ATTENTION | HYBRID | {"linear_attn_config": None},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "lfm3": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": LATENT_ATTENTION | {"num_layers": 2, "ffn_hidden_size": 32, "expert_ffn_hidden_size": 16},
    "mamba": STATE_SPACE,
    "mamba2": STATE_SPACE | {"num_heads": 8, "head_dim": 8, "expand": 2},
    "falcon_mamba": STATE_SPACE,
    "marian": DECODER,
    "mbart": DECODER,
    "minicpm3": LATENT_ATTENTION,
    "mvp": DECODER,
    "nemotron_h": STATE_SPACE
    | {"layers_block_type": ["mamba", "attention"], "moe_shared_expert_intermediate_size": 16},
    "openai-gpt": {"n_embd": 32},
    "opt": {"ffn_dim": 32, "word_embed_proj_dim": 32, "init_std": 0.3},
    "pegasus": DECODER,
    "plbart": DECODER,
    "prophetnet": {
        "num_hidden_layers": None,
        "num_encoder_layers": 1,
        "num_decoder_layers": 2,
        "num_decoder_attention_heads": 4,
        "num_encoder_attention_heads": 4,
        "decoder_ffn_dim": 32,
        "encoder_ffn_dim": 32,
        "init_std": 0.3,
    },
    "qwen2_moe": {"shared_expert_intermediate_size": 16},
    "qwen3_5_moe_text": HYBRID | DELTA | {"shared_expert_intermediate_size": 16},
    "qwen3_5_text": HYBRID | DELTA,
    "qwen3_next": HYBRID | DELTA | {"shared_expert_intermediate_size": 16},
    "qwen4_exp_text": HYBRID | DELTA,
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "lru_width": 32, "attention_window_size": 5},
    "reformer": {
        "attn_layers": ["local", "local"],
        "axial_pos_shape": [8, 8],
        "axial_pos_embds_dim": [16, 16],
        "attention_head_size": 8,
        "feed_forward_size": 32,
        "local_attn_chunk_length": 64,
    },
    "rembert": {"initializer_range": 0.2},  # log-probabilities of -30 are rounded to 1e-4
    "roc_bert": {
        "pronunciation_vocab_size": 24,
        "shape_vocab_size": 24,
        "pronunciation_embed_dim": 8,
        "shape_embed_dim": 8,
    },
    "rwkv": {"attention_hidden_size": 32},
    "trocr": DECODER,
    "whisper": DECODER,
    "xglm": {"ffn_dim": 32, "init_std": 0.3},
    "xlm": {"causal": True, "emb_dim": 32},
    "xlnet": {"max_position_embeddings": None, "d_inner": 32, "d_head": 8},
    "xlstm": {"chunk_size": 8, "head_dim": None, "num_heads": 4},
    "xmod": {"languages": ["en"], "default_language": "en"},
    "youtu": LATENT_ATTENTION,
    "zamba": STATE_SPACE | {"layer_types": ["mamba", "hybrid"], "layers_block_type": ["mamba", "hybrid"]},
    "zamba2": STATE_SPACE | {"layer_types": ["mamba", "hybrid"], "layers_block_type": ["mamba", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1},
}

ALL = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)

# -- encoder-decoder networks ----------------------------------------------------------------------------------

SOURCE = COMMON | DECODER | {"is_decoder": None, "decoder_start_token_id": 1, "num_decoder_layers": 2}
SOURCE |= {"num_layers": 2, "num_heads": 4, "d_kv": 8, "d_ff": 32}
SIDE = {name: COMMON[name] for name in models.COMMON} | {"vocab_size": 24, "intermediate_size": 32}
GEMMA = SIDE | {"query_pre_attn_scalar": 8, "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}
BERT = {name: value for name, value in SIDE.items() if name != "head_dim"} | {"model_type": "bert"}
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
SPEECH = {"speech_encoder_layers": 1, "speech_encoder_intermediate_size": 32, "speech_encoder_attention_heads": 4}
TRANSLATION = {"hidden_size": 32, "t2u_encoder_layers": 1, "t2u_decoder_layers": 1} | SPEECH

SEQ2SEQ_SETTINGS: dict[str, dict[str, Any]] = {
    "bigbird_pegasus": {"attention_type": "original_full"},
    "encoder-decoder": {
        "encoder": BERT,
        "decoder": BERT | {"is_decoder": True, "add_cross_attention": True},
        "vocab_size": None,
    },
    "led": {"attention_window": 4},
    "mt5": {"initializer_factor": 1.5, "tie_word_embeddings": False},
    "prophetnet": SETTINGS["prophetnet"]
    | dict.fromkeys(("encoder_layers", "decoder_layers", "num_layers"))
    | {"num_encoder_layers": 2},  # transformers' own cache has as many layers as the encoder
    "seamless_m4t": TRANSLATION,
    "seamless_m4t_v2": TRANSLATION,
    "t5gemma": {"encoder": GEMMA, "decoder": GEMMA},
    "t5gemma2": {
        "encoder": {
            "text_config": GEMMA,
            "vision_config": VISION | {"image_size": 8, "patch_size": 4},
            "mm_tokens_per_image": 4,
            "image_token_index": 23,
            "boi_token_index": 22,
            "eoi_token_index": 21,
        },
        "decoder": GEMMA,
        "image_token_index": 23,
    },
}

SEQ2SEQ = tuple(MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES)


def zoo_network(model_type: str, **extra: Any) -> PreTrainedModel | None:
    """A random causal network of an architecture; None if none of few weights can be built from the settings.

    :param extra: settings that come before the table's. Many networks ignore some, the window among them.
    """
    return _random(AutoModelForCausalLM, model_type, COMMON | SETTINGS.get(model_type, {}) | extra)


def seq2seq_network(model_type: str, **extra: Any) -> PreTrainedModel | None:
    """A random encoder-decoder network of an architecture; None as for `zoo_network`."""
    return _random(AutoModelForSeq2SeqLM, model_type, SOURCE | SEQ2SEQ_SETTINGS.get(model_type, {}) | extra)


def _random(auto_class: Any, model_type: str, settings: dict[str, Any]) -> PreTrainedModel | None:
    settings = {k: v for k, v in settings.items() if v is not None}
    try:
        config = AutoConfig.for_model(model_type, **settings)
        with torch.device("meta"):
            size = sum(p.numel() for p in auto_class.from_config(config).parameters())
        if size > LARGEST:
            return None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network: PreTrainedModel = auto_class.from_config(config).eval()
            ids = torch.tensor([[3, 4, 5]])
            network(input_ids=ids, **({"decoder_input_ids": ids} if network.config.is_encoder_decoder else {}))
    except Exception:  # of whatever type, where the architecture misses a setting
        return None
    return network


def embed_padding(network: PreTrainedModel) -> None:
    """Draw the embedding of a padding token, which is 0 in a new network: an indexer scores all keys after it alike."""
    embedding = network.get_input_embeddings()
    if getattr(embedding, "padding_idx", None) is not None:
        with torch.no_grad():
            embedding.weight[embedding.padding_idx].normal_().mul_(embedding.weight.std())
