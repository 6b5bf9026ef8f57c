"""Trainable copies of networks: in float32, or as adapters (LoRA) around shared weights."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from torch import nn


def has_adapters(network: nn.Module) -> bool:
    """Return whether a network is PEFT adapters around weights."""
    return hasattr(network, "peft_config")


def own_parameters(network: Any) -> list[nn.Parameter]:
    """Return the adapters of a PEFT network, or all parameters of any other."""
    prefix: str = network.base_model.prefix if has_adapters(network) else ""
    return [p for key, p in network.named_parameters() if prefix in key]


def float32_copy(network: nn.Module) -> tuple[nn.Module, torch.dtype | None]:
    """Return a copy to train, in float32, and the dtype to compute in: bfloat16 if that was the weights' dtype."""
    new = copy.deepcopy(network)
    dtypes = {p.dtype for p in new.parameters() if p.is_floating_point()}
    return new.float(), torch.bfloat16 if torch.bfloat16 in dtypes else None


def twin(network: Any) -> nn.Module:
    """Return new modules around the same frozen tensors: adapters put into the twin do not change the original.

    Tensors in training are copied, since freezing the twin would freeze them. Adapters that the network already has are
    merged into a copy of its weights instead.
    """
    if has_adapters(network):
        return copy.deepcopy(network).merge_and_unload()
    shared = [t for t in (*network.parameters(), *network.buffers()) if not t.requires_grad]
    return copy.deepcopy(network, memo={id(t): t for t in shared})


def with_lora(network: nn.Module, rank: int, alpha: int, name: str | None) -> nn.Module:
    """Return new LoRA adapters around a twin of a network.

    :param name: where the network can be loaded from, which is saved with the adapters.
    :raises ValueError: if ``rank`` < 1.
    """
    if rank < 1:
        raise ValueError(f"lora_rank must be at least 1, got {rank}")
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM")
    around: Any = twin(network)
    with _quiet():
        adapted: Any = get_peft_model(around, config)
    # Not the folder in transformers' config: the weights may have been trained since they were loaded from it.
    adapted.peft_config["default"].base_model_name_or_path = "" if has_adapters(network) else name or ""
    return adapted


def load_adapters(network: Any, path: Path, config: PeftConfig) -> nn.Module:
    """Return the adapters in a folder around a network, whose modules are changed in place, but not their tensors.

    :param config: of the adapters, checked by `read_adapter_config` and `check_adapter_sizes`.
    :raises ValueError: if the adapters do not fit the network, or the file holds more or less than them.
    """
    try:
        with _quiet():  # nothing is allocated before the weights are read
            adapted: Any = PeftModel.from_pretrained(network, str(path), config=config, low_cpu_mem_usage=True)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, UnpicklingError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"the adapter in {path} does not fit this model, or is damaged: {reason:.300}") from error
    if missing := [name for name, x in adapted.named_parameters() if x.is_meta]:
        raise ValueError(f"the adapter in {path} is damaged: it lacks the weights of {missing[0]}")
    for p in own_parameters(adapted):
        if p.is_floating_point():
            p.data = p.data.float()  # as trained ones are
    return adapted


def adapters_copy(network: nn.Module) -> nn.Module:
    """Return new modules around the same weights, with a copy of the adapters, in float32, to train."""
    own = {id(p) for p in own_parameters(network)}
    shared = [t for t in (*network.parameters(), *network.buffers()) if id(t) not in own]
    new = copy.deepcopy(network, memo={id(t): t for t in shared})
    for p in own_parameters(new):
        p.data = p.data.float()
    return new


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide a warning of PEFT about an attribute of transformers, which no caller can act on."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        yield
