"""Adapters that somebody else wrote: settings that can be honoured are, and nothing is imported for the others."""

from __future__ import annotations

import os
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from bayeslm.files import read_json, reason_of
from bayeslm.weight_files import stored_tensors

# fmt: off
# Adapters that are scored, trained, saved and merged rightly.
TASKS = ("CAUSAL_LM", "SEQ_2_SEQ_LM")  # of causal and of encoder-decoder networks
ADAPTERS = (
    "LORA", "LOHA", "LOKR", "IA3", "OFT", "HRA", "MISS", "C3A", "LN_TUNING", "ADALORA", "ADAMSS", "VERA", "PVERA",
    "FROD", "FOURIERFT", "WAVEFT", "GLORA", "GRALORA", "VBLORA", "UNILORA", "RANDLORA", "TINYLORA", "DELORA", "HIRA",
    "ROAD", "SHIRA", "TRAINABLE_TOKENS", "OSF", "PSOFT", "PEANUT", "SUPERTUNING", "DEFT",
)
# fmt: on
OF_PROMPTS = "it adds to the prompt, or changes how it is read"
REFUSED = {
    "PROMPT_TUNING": OF_PROMPTS,
    "MULTITASK_PROMPT_TUNING": OF_PROMPTS,
    "P_TUNING": OF_PROMPTS,
    "PREFIX_TUNING": OF_PROMPTS,
    "CPT": OF_PROMPTS,
    "CARTRIDGE": OF_PROMPTS,
    "ADAPTION_PROMPT": OF_PROMPTS,
    "POLY": "it needs to know the task of each text",
    "XLORA": "it reads each text twice",
    "SHADOW": "it is a second network beside the first",
    "LILY": "its forward pass is not causal",
    "BEFT": "it cannot be merged into layers without a bias",
    "BOFT": "it compiles CUDA code where it is made, and is another adapter where that fails",
}
# Settings of adapters that may differ from their defaults; the second only make new adapters, and are dropped.
# fmt: off
SETTINGS = (
    "peft_type", "peft_version", "base_model_name_or_path", "revision", "task_type", "inference_mode",
    "target_modules", "exclude_modules", "feedforward_modules", "layers_to_transform", "layers_pattern", "r",
    "alpha", "lora_alpha", "lora_dropout", "rank_dropout", "module_dropout", "rank_pattern", "alpha_pattern",
    "fan_in_fan_out", "use_rslora", "use_dora", "lora_bias", "init_weights", "modules_to_save",
    "trainable_token_indices", "target_parameters", "ensure_weight_tying", "use_effective_conv2d",
    "decompose_both", "decompose_factor", "rank_dropout_scale", "oft_block_size",
    "coft", "eps", "block_share",
    "use_cayley_neumann", "num_cayley_neumann_terms", "apply_GS", "mini_r", "miss_dropout", "block_size",
    "block_size_pattern", "init_lora_weights", "bias",
    "target_r", "init_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step",
    "num_subspaces", "subspace_rank", "svd_threshold", "random_seed",
    "projection_prng_key", "d_initial", "vera_dropout", "pvera_dropout", "frod_dropout", "sparse_rate",
    "n_frequency", "n_frequency_pattern", "scaling", "random_loc_seed", "wavelet_family", "use_idwt",
    "config_A_B", "config_C", "config_D_E", "hybrid_r", "gralora_k", "gralora_dropout",
    "num_vectors", "vector_length", "topk", "vblora_dropout", "proj_seed", "theta_d_length", "unilora_dropout",
    "randlora_alpha", "randlora_dropout", "u", "projection_seed", "tinylora_dropout",
    "delora_lambda", "lambda_pattern", "hira_dropout", "variant", "group_size", "token_indices",
    "psoft_alpha", "psoft_dropout", "depth", "act_fn", "sparsity", "select_top", "deft_dropout",
)
# fmt: on
DROPPED = ("auto_mapping", "runtime_config", "loftq_config", "eva_config", "corda_config", "lora_ga_config")
SIZES = (
    *("r", "init_r", "n_frequency", "num_vectors", "vector_length", "theta_d_length", "u", "group_size", "gralora_k"),
    *("hybrid_r", "num_subspaces", "subspace_rank", "depth", "topk"),
)
CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # values of init_lora_weights


def read_adapter_config(folder: str | os.PathLike[str]) -> Any:
    """Return the PEFT config of an adapter's folder, of settings that can be honoured alone.

    :raises ValueError: if the file is damaged, of another type of adapter, or has a setting that would change the
        weights under the adapter, import code, or is unknown; with its name.
    """
    path = Path(folder) / "adapter_config.json"
    config = read_json(path)
    kind = config.get("peft_type") if isinstance(config, dict) else None
    maker = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(kind)] if isinstance(kind, str) and kind in ADAPTERS else None
    if maker is None:
        raise ValueError(
            f"{path}: adapters of type {kind!r} are not supported{_why(kind)}, but {', '.join(ADAPTERS)} are: merge "
            "this one into its base model, and load that"
        )
    if config.get("task_type") not in (None, *TASKS):
        raise ValueError(
            f"{path}: task_type {config['task_type']!r} is not that of a language model, {' or '.join(TASKS)}"
        )
    defaults = {field.name: _default(field) for field in fields(maker)}
    for name, value in config.items():
        default = defaults.get(name)
        if name not in (*SETTINGS, *DROPPED) and value != default and (value or default):
            raise ValueError(f"{path}: {name} {value!r:.60} is not supported: merge the adapter into its base model")
    if str(init := config.get("init_lora_weights")).startswith(CHANGE_THE_BASE):
        raise ValueError(
            f"{path}: init_lora_weights {init!r} changes the weights of the base model: convert the adapter by PEFT's "
            "save_pretrained(path_initial_model_for_weight_conversion=...)"
        )
    kept = {name: value for name, value in config.items() if name in SETTINGS and name in defaults}
    try:
        return maker(**kept | ({"init_lora_weights": True} if "init_lora_weights" in defaults else {}))
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path}: {reason_of(error)}") from error


def _why(kind: Any) -> str:
    """Return the reason why a type of adapters is refused, if it is a known one."""
    return f" ({REFUSED[kind]})" if isinstance(kind, str) and kind in REFUSED else ""


def _default(field: Field[Any]) -> Any:
    if field.default_factory is not MISSING:
        return field.default_factory()
    return None if field.default is MISSING else field.default


def check_adapter_sizes(folder: Path, config: Any) -> None:
    """Check that an adapter's config does not ask for more than the weights in its folder.

    :raises OSError: if there are no weights.
    :raises ValueError: if it does; with the setting.
    """
    stored = stored_tensors(folder, "adapter_model.safetensors") or stored_tensors(folder, "adapter_model.bin")
    if stored is None:
        raise OSError(f"{folder} holds no weights: adapter_model.safetensors is missing")
    defaults = {field.name: field.default for field in fields(config)}
    sizes = {name: value for name, value in vars(config).items() if name in SIZES and value != defaults[name]}
    sizes |= {name: value for name, value in vars(config).items() if "block" in name and "size" in name}
    for pattern in ("rank_pattern", "n_frequency_pattern"):
        sizes |= named if isinstance(named := getattr(config, pattern, None), dict) else {}
    for name, size in sizes.items():
        if isinstance(size, float) or (isinstance(size, int) and not -1 <= size <= max(stored.largest, 64)):
            raise ValueError(
                f"{folder / 'adapter_config.json'}: {name} {size} does not fit the weights beside it, of which no axis "
                f"is longer than {stored.largest}"
            )
