"""Linear layers whose weights are stored in the order in which oneDNN multiplies by them.

A product of a few rows with a large weight, as in writing one token, spends much of its time on bringing the weight
into the blocks that the CPU's kernels use. Weights that never change can be kept in blocks: the same products, about a
quarter faster on SmolLM2-135M with 32 rows.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, nn

from .module_copies import with_modules

if TYPE_CHECKING:
    from peft.tuners.lora import Linear as LoraLinear

ROWS = 32  # for which the blocks are chosen; products of any number of rows are right
MIN_PASSES = 12  # in fewer forward passes packing costs more than it saves,
MIN_WEIGHTS = 2**22  # and in a network of fewer weights, where products take a small part of the time


class PackedLinear(nn.Module):
    """A frozen linear layer whose weight is stored in blocks alone: it can be neither read, trained, moved nor saved.

    :param linear: the layer to copy.
    :param weight: replaces its weight, if given.
    """

    def __init__(self, linear: nn.Linear, weight: Tensor | None = None) -> None:
        super().__init__()
        weight = linear.weight if weight is None else weight
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = None if linear.bias is None else linear.bias.detach().clone()
        self._blocks = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), ROWS)

    weight = None  # as in quantised layers: T5 asks for its dtype

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self._blocks, self.bias, "none", [], "")

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedLinear:
        return self  # nothing in it ever changes

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> PackedLinear:
        raise TypeError("packed weights can be neither moved nor converted: do that first, then pack")


def refuse_packed(network: nn.Module) -> None:
    """Refuse a network whose weights are packed.

    :raises TypeError: if one of its layers is.
    """
    if any(isinstance(module, PackedLinear) for module in network.modules()):
        raise TypeError("a packed model can be neither trained nor saved: use the model it was packed from")


def can_pack(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Return whether oneDNN can multiply by a module's packed weight: a plain float32 linear layer on a CPU."""
    return (
        type(module) is nn.Linear
        and not (module._forward_hooks or module._forward_pre_hooks)  # what they compute would be lost
        and module.weight.device.type == "cpu"
        and module.weight.dtype == torch.float32
        and type(module.weight) in (Tensor, nn.Parameter)  # not quantised
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


@torch.no_grad()
def packed(network: nn.Module, checksums: bool = False) -> nn.Module:
    """Return a copy of a network with its linear layers packed, adapters (LoRA) merged into them; the rest is shared.

    :param checksums: give each packed layer a buffer by which networks' states differ if their weights do.
    """
    layers: dict[nn.Module, nn.Module] = {}
    lora, others = _adapter_layers()

    def collect(parent: nn.Module) -> None:
        for child in parent.children():
            if child in layers:
                continue
            if isinstance(child, lora):
                if (weight := _merged(child)) is not None:
                    base: Any = child.get_base_layer()
                    layers[child] = PackedLinear(base, weight)
            elif isinstance(child, others):
                continue  # it may read the weights of the layers inside, rather than call them
            elif can_pack(child):
                layers[child] = PackedLinear(child)
                if checksums:
                    layers[child].register_buffer("checksum", _checksum(child))
            else:
                collect(child)

    collect(network)
    return with_modules(network, layers)


def _adapter_layers() -> tuple[tuple[type[Any], ...], tuple[type[Any], ...]]:
    """Return PEFT's classes of LoRA around linear layers, and of other adapters; none before PEFT is imported."""
    if "peft" not in sys.modules:
        return (), ()
    from peft.tuners.lora import Linear as LoraLinear
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import TrainableTokensWrapper

    return (LoraLinear,), (BaseTunerLayer, TrainableTokensWrapper)


def _checksum(linear: nn.Linear) -> Tensor:
    """Return the sum of all weights' bits as integers, which no order of summation changes."""
    return sum((p.detach().view(torch.int32).sum() for p in linear.parameters()), torch.tensor(0))


def _merged(lora: LoraLinear) -> Tensor | None:
    """Return W + s B A of a layer's adapters; None if they are of another kind, or the layer cannot be packed."""
    base = lora.get_base_layer()
    adapters = [name for name in lora.active_adapters if name in lora.lora_A]
    hooked = lora._forward_hooks or lora._forward_pre_hooks
    plain = not (hooked or lora.merged or lora.disable_adapters or lora.fan_in_fan_out or lora.lora_variant)
    if not (plain and can_pack(base) and all(lora.lora_B[name].bias is None for name in adapters)):
        return None
    weight: Tensor = base.weight
    for name in adapters:
        a: Any = lora.lora_A[name]
        b: Any = lora.lora_B[name]
        weight = torch.addmm(weight, b.weight, a.weight, alpha=lora.scaling[name])
    return weight
