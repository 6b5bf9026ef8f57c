"""Trainable copies of networks: in float32, or as adapters (LoRA) around shared weights."""

from __future__ import annotations

import contextlib
import copy
import itertools
import sys
import warnings
from collections.abc import Collection, Iterator
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from . import sharding
from .configs import is_encoder_decoder
from .module_copies import with_parameters
from .quantised import refuse_unsupported, refuse_without_gradient, tensors_in
from .sharding import has_shards, is_sharded, own_part

if TYPE_CHECKING:
    from peft import PeftConfig

OTHERS = ("XLORA", "POLY")  # whose layers' inputs are more than the hidden states before them


def has_adapters(network: nn.Module) -> bool:
    """Return whether a network is PEFT adapters around weights."""
    return hasattr(network, "peft_config")


def adapted_modules(network: nn.Module) -> list[nn.Module]:
    """Return the modules that PEFT has put in the place of a network's own."""
    if "peft" not in sys.modules:  # whose import takes seconds; none of its modules exists before
        return []
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    return [m for m in network.modules() if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper)]


def unwrapped(network: Any) -> nn.Module:
    """Return the network that torch.compile or a data-parallel wrapper computes, or the network itself."""
    while isinstance(network, nn.DataParallel | DistributedDataParallel) or "_orig_mod" in network._modules:
        network = network._orig_mod if "_orig_mod" in network._modules else network.module
    inner: nn.Module = network
    return inner


def check_supported(network: Any) -> None:
    """Refuse networks whose forward pass is not that of a network of tokens alone.

    :raises TypeError: for a network of speech or images, and for adapters that change texts or look into them.
    """
    base: Any = getattr(network, "get_base_model", lambda: network)()
    reads = getattr(base, "main_input_name", "input_ids")
    if is_encoder_decoder(network) and (reads != "input_ids" or not hasattr(base, "get_decoder")):
        lacks = f"reads {reads}" if reads != "input_ids" else "has no get_decoder()"
        raise TypeError(
            f"{type(base).__name__} {lacks}, and is not supported: prompts are token ids; use an encoder-decoder "
            "network of texts, such as AutoModelForSeq2SeqLM loads, or a causal one"
        )
    refuse_unsupported(base)
    for name, config in getattr(network, "peft_config", {}).items():
        kind = getattr(config.peft_type, "value", config.peft_type)
        if getattr(config, "alora_invocation_tokens", None):
            kind = "activated LoRA (alora_invocation_tokens)"
        elif not getattr(config, "is_prompt_learning", False) and kind not in OTHERS:
            continue
        raise TypeError(
            f"adapter {name!r} is of the kind {kind}, which is not supported: it changes more than the network's "
            "layers, and would be ignored; use LoRA or another adapter inside the layers"
        )


def own_parameters(network: Any) -> list[nn.Parameter]:
    """Return what training a network trains: all parameters, or of a PEFT network all that its active adapters have.

    That is what PEFT saves of them: with the adapters' own layers copies of modules (``modules_to_save``), rows of
    embeddings (``trainable_token_indices``), and biases.
    """
    if not has_adapters(network):
        return list(network.parameters())
    from peft import get_peft_model_state_dict

    def place(x: Tensor) -> int:
        return tensors_in(own_part(x))[0].data_ptr()

    saved = [
        place(tensor)
        for adapter in network.active_adapters
        for tensor in get_peft_model_state_dict(network, adapter_name=adapter, save_embedding_layers=False).values()
    ]
    return [p for p in network.parameters() if p.is_floating_point() and place(p) in saved]


def without_effect(network: nn.Module) -> list[nn.Parameter]:
    """Return parameters that change no distribution: the random factors of adapters whose others are 0."""
    named = list(network.named_parameters())
    if any(bool(p.any()) for name, p in named if ".lora_B." in name):
        return []
    return [p for name, p in named if ".lora_A." in name]


def float32_copy(network: nn.Module) -> tuple[nn.Module, torch.dtype | None, frozenset[str]]:
    """Return a copy to train, in float32.

    :returns: the copy; the dtype to compute in if its weights had half precision, else None; and the names of the
        weights that are computed in float32 all the same, since they were float32.
    """
    if has_shards(network):
        return sharding.copy_of(network, _float32_of), None, frozenset()
    new = copy.deepcopy(network)
    weights = {name: p for name, p in new.named_parameters() if p.is_floating_point()}
    half = next((p.dtype for p in weights.values() if p.dtype in (torch.bfloat16, torch.float16)), None)
    exact = frozenset(plain_name(name) for name, p in weights.items() if p.dtype == torch.float32)
    for p in weights.values():
        p.data = p.data.float()
    return new, half, frozenset() if half is None else exact


def _float32_of(p: nn.Parameter) -> torch.dtype:
    """Return the dtype of the copy of a sharded network's weight.

    :raises TypeError: if it is not float32 already: what it is computed in would have to be FSDP's to convert.
    """
    if p.dtype in (torch.bfloat16, torch.float16):
        raise TypeError(
            f"a sharded network of {p.dtype} cannot be trained with all weights: shard one that was loaded with "
            "dtype=torch.float32, with FSDP's mp_policy to compute in half precision; or train policy(lora_rank)"
        )
    return p.dtype


def plain_name(name: str) -> str:
    """Return the name that a weight of a PEFT network has in the network inside."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")


def exact_weights(network: nn.Module, causal: Any, names: Collection[str] | None) -> set[nn.Parameter]:
    """Return the weights that a pass in half precision does not convert: adapters, and those of some names."""
    if names is None:
        parts = getattr(causal, "_keep_in_fp32_modules_strict", None) or ()
        names = [name for name, _ in causal.named_parameters() if any(part in name for part in parts)]
    own = own_parameters(network) if has_adapters(network) else []
    return {*own, *(p for name, p in causal.named_parameters() if plain_name(name) in names)}


def merged(network: Any, dtype: torch.dtype | None = None) -> nn.Module:
    """Return a copy of a network, its active adapters merged into the weights.

    :param dtype: of the weights. They are merged in float32 and rounded to it once: added to bfloat16 weights, most of
        what an adapter has learned would be lost. None: they are merged in the dtype they have.
    """
    new = copy.deepcopy(network)
    if dtype is not None:
        _convert(new, torch.float32)
    plain: nn.Module = new.merge_and_unload() if has_adapters(network) else new
    if dtype is not None:
        _convert(plain, dtype)
    return plain


def _convert(network: nn.Module, dtype: torch.dtype) -> None:
    """Convert the parameters of a network; buffers, such as frequencies of positions, keep their precision."""
    for p in network.parameters():
        if p.is_floating_point():
            p.data = p.data.to(dtype)


def twin(network: Any) -> nn.Module:
    """Return new modules around the same frozen tensors: adapters put into the twin do not change the original.

    Tensors in training are copied, since freezing the twin would freeze them. Adapters that the network already has are
    merged into a copy of its weights instead.
    """
    if has_shards(network):
        if has_adapters(network):
            sharding.refuse_shards(network, "merging the adapters")
        return sharding.twin(network)
    if has_adapters(network):
        return merged(network)
    shared = [t for t in (*network.parameters(), *network.buffers()) if not t.requires_grad]
    return copy.deepcopy(network, memo={id(t): t for t in shared})


def with_lora(network: nn.Module, rank: int, alpha: int, name: str | None, layers: float = 1.0) -> nn.Module:
    """Return new LoRA adapters around a twin of a network.

    :param name: where the network can be loaded from, which is saved with the adapters.
    :param layers: the share of the layers that get adapters, the last ones.
    :raises ValueError: if ``rank`` < 1, or no layer takes an adapter.
    """
    if rank < 1:
        raise ValueError(f"lora_rank must be at least 1, got {rank}")
    refuse_without_gradient(network)
    from peft import LoraConfig, get_peft_model

    around: Any = twin(network)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules="all-linear",
        exclude_modules=[*_not_linear(around), *_in_first_layers(around, 1.0 - layers)],
        lora_dropout=0.0,
        task_type="SEQ_2_SEQ_LM" if is_encoder_decoder(network) else "CAUSAL_LM",
    )
    with _quiet():
        try:
            adapted: Any = get_peft_model(around, config)
        except ValueError as error:
            raise ValueError(
                f"lora_rank={rank}: {type(network).__name__} has no linear layer that takes an adapter; policy() "
                f"without lora_rank trains all weights ({error})"
            ) from error
    # Not the folder in transformers' config: the weights may have been trained since they were loaded from it.
    adapted.peft_config["default"].base_model_name_or_path = "" if has_adapters(network) else name or ""
    return adapted


def _not_linear(network: nn.Module) -> list[str]:
    """Return the names of linear layers to which PEFT's LoRA does not apply.

    Some routers and projections derive from `nn.Linear` and compute something else. And fused kernels of state-space
    layers, which have a convolution, read the weight of ``out_proj`` without calling it.
    """
    special = [
        name
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear) and type(module).__module__.startswith("transformers.models.")
        if not _is_linear(module)
    ]
    mixers = [name for name, module in network.named_modules() if {"conv1d", "out_proj"} <= module._modules.keys()]
    return special + [f"{name}.out_proj" for name in mixers]


def _in_first_layers(network: nn.Module, share: float) -> list[str]:
    """Return the names of the linear layers in the first so many of each stack of layers; at least one is left."""
    found: list[str] = []
    stacks: list[str] = []
    for name, stack in network.named_modules():
        if not isinstance(stack, nn.ModuleList) or any(name.startswith(f"{outer}.") for outer in stacks):
            continue  # a list inside a layer: its experts
        stacks.append(name)
        for i, layer in enumerate(stack[: min(round(share * len(stack)), len(stack) - 1)]):
            for key, module in layer.named_modules(prefix=f"{name}.{i}"):
                weight = getattr(module, "weight", None)
                found += [key] if isinstance(weight, Tensor) and weight.dim() == 2 else []
    return found


@torch.no_grad()
def _is_linear(module: nn.Linear) -> bool:
    """Return whether a layer that derives from `nn.Linear` computes what that does."""
    x = torch.linspace(-1, 1, 2 * module.in_features).reshape(2, -1).to(module.weight)
    try:
        y = module(x)
    except Exception:  # of whatever type, where its inputs have another form
        return False
    return isinstance(y, Tensor) and torch.allclose(y, nn.functional.linear(x, module.weight, module.bias), rtol=1e-2)


def load_adapters(network: Any, path: Path, config: PeftConfig) -> nn.Module:
    """Return the adapters in a folder around a network, whose modules are changed in place, but not their tensors.

    :param config: of the adapters, checked by `read_adapter_config` and `check_adapter_sizes`.
    :raises ValueError: if the adapters do not fit the network, or the file holds more or less than them.
    """
    from peft import PeftModel

    try:
        with _quiet():  # nothing is allocated before the weights are read
            adapted: Any = PeftModel.from_pretrained(network, str(path), config=config, low_cpu_mem_usage=True)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, UnpicklingError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"the adapter in {path} does not fit this model, or is damaged: {reason:.300}") from error
    tensors = itertools.chain(adapted.named_parameters(), adapted.named_buffers())
    if missing := [name for name, x in tensors if x.is_meta]:
        raise ValueError(f"the adapter in {path} is damaged: it lacks the weights of {missing[0]}")
    for p in own_parameters(adapted):
        if p.is_floating_point():
            p.data = p.data.float()  # as trained ones are
    return adapted


def adapters_copy(network: nn.Module) -> nn.Module:
    """Return new modules around the same weights, with a copy of the adapters, in float32, to train."""
    refuse_without_gradient(network)
    own = {id(p) for p in own_parameters(network)}
    if has_shards(network):
        return _sharded_adapters_copy(network, own)
    shared = [t for t in (*network.parameters(), *network.buffers()) if id(t) not in own]
    new = copy.deepcopy(network, memo={id(t): t for t in shared})
    for p in own_parameters(new):
        p.data = p.data.float()
    return new


def _sharded_adapters_copy(network: nn.Module, own: set[int]) -> nn.Module:
    if any(is_sharded(p) for p in network.parameters() if id(p) in own):
        raise TypeError(
            "the adapters of this network are sharded themselves, and cannot be copied: shard the network without "
            "adapters, then policy(lora_rank)"
        )

    def copied(p: nn.Parameter) -> Tensor:
        return nn.Parameter(p.detach().float().clone(), p.requires_grad) if id(p) in own else p

    return with_parameters(network, copied, None)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide warnings of PEFT: of an attribute of transformers, and of what is refused here with an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        warnings.filterwarnings("ignore", message="Found missing adapter keys")
        warnings.filterwarnings("ignore", message=".*get_apply_tensor_subclass")  # without which nothing can be merged
        yield
