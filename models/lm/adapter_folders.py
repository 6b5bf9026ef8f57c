"""Adapters that somebody else wrote: settings that can be honoured are, and nothing is imported for the others."""

from __future__ import annotations

import os
from dataclasses import fields
from pathlib import Path
from typing import Any

from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from bayeslm.files import read_json, reason_of
from bayeslm.weight_files import stored_tensors

# Adapters that are scored, trained, saved and merged rightly, whose weights are all in their file, and which compile
# nothing.
ADAPTERS = ("LORA", "LOHA", "LOKR", "IA3", "OFT", "HRA", "MISS", "C3A", "LN_TUNING")
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
    "block_size_pattern", "init_lora_weights",
)
# fmt: on
DROPPED = ("auto_mapping", "runtime_config", "loftq_config", "eva_config", "corda_config", "lora_ga_config")
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
            f"{path}: adapters of type {kind!r} are not supported, but {', '.join(ADAPTERS)} are: merge this one into "
            "its base model, and load that"
        )
    if config.get("task_type") not in (None, "CAUSAL_LM"):
        raise ValueError(f"{path}: task_type {config['task_type']!r} is not that of a language model, CAUSAL_LM")
    defaults = {field.name: field.default for field in fields(maker)}
    for name, value in config.items():
        if name not in (*SETTINGS, *DROPPED) and value and value != defaults.get(name) and value != "none":
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


def check_adapter_sizes(folder: Path, config: Any) -> None:
    """Check that an adapter's config does not ask for more than the weights in its folder.

    :raises OSError: if there are no weights.
    :raises ValueError: if it does; with the setting.
    """
    stored = stored_tensors(folder, "adapter_model.safetensors") or stored_tensors(folder, "adapter_model.bin")
    if stored is None:
        raise OSError(f"{folder} holds no weights: adapter_model.safetensors is missing")
    sizes = {"r": getattr(config, "r", None), **(getattr(config, "rank_pattern", None) or {})}
    sizes |= {name: value for name, value in vars(config).items() if "block" in name and "size" in name}
    for name, size in sizes.items():
        if isinstance(size, float) or (isinstance(size, int) and not -1 <= size <= max(stored.largest, 64)):
            raise ValueError(
                f"{folder / 'adapter_config.json'}: {name} {size} does not fit the weights beside it, of which no axis "
                f"is longer than {stored.largest}"
            )
