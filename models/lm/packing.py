"""Linear layers whose weights lie in the order in which oneDNN multiplies by them.

A product of few rows with a large weight, which is what writing a token is, spends much of its time on bringing
the weight into the blocks that the CPU's kernels read. Weights that never change can be kept in blocks: the same
products, some quarter faster on SmolLM2-135M with 32 rows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeGuard

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

ROWS = 32  # that the blocks are chosen for; products of any number of rows are right
PAYS_FROM = 12  # forward passes that one packing is for, and
LARGE = 2**22  # weights, below which it is not products that take the time


class PackedLinear(nn.Module):
    """``linear``, frozen: the weight is held in blocks alone and can be neither read, trained, moved nor saved.

    :param weight: in the place of its own.
    """

    def __init__(self, linear: nn.Linear, weight: Tensor | None = None) -> None:
        super().__init__()
        weight = linear.weight if weight is None else weight
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = None if linear.bias is None else linear.bias.detach().clone()
        self._blocks = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), ROWS)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self._blocks, self.bias, "none", [], "")

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedLinear:
        return self  # nothing in it ever changes

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> PackedLinear:
        raise TypeError("packed weights can be neither moved nor converted: do that first, then pack")


def can_pack(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether oneDNN has products of packed weights for this module: a plain linear layer in float32 on a CPU."""
    return (
        type(module) is nn.Linear
        and not (module._forward_hooks or module._forward_pre_hooks)  # what they compute would be lost
        and module.weight.device.type == "cpu"
        and module.weight.dtype == torch.float32
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def pack(network: nn.Module) -> None:
    """Put a `PackedLinear` in the place of every linear layer that can be packed."""
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if can_pack(child):
                packed = PackedLinear(child)
                packed.register_buffer("checksum", _checksum(child))
                setattr(parent, name, packed)


def _checksum(linear: nn.Linear) -> Tensor:
    """Tells networks apart by their state though weights in blocks cannot be read: the sum of their bits, as integers,
    which no order of summation changes."""
    return sum((p.detach().view(torch.int32).sum() for p in linear.parameters()), torch.tensor(0))


@contextlib.contextmanager
def packed_inside(network: nn.Module) -> Iterator[None]:
    """Inside, linear layers are packed as they are now, adapters (LoRA) merged into the weights.

    The weights themselves are left as they are, to the last bit; all passes inside have to be without gradients.
    """
    swapped: list[tuple[nn.Module, str, nn.Module]] = []

    def swap(parent: nn.Module) -> None:
        for name, child in list(parent.named_children()):
            if isinstance(child, LoraLinear):
                if (weight := _merged(child)) is not None:
                    swapped.append((parent, name, child))
                    base: Any = child.get_base_layer()
                    setattr(parent, name, PackedLinear(base, weight))
            elif can_pack(child):
                swapped.append((parent, name, child))
                setattr(parent, name, PackedLinear(child))
            else:
                swap(child)

    try:
        with torch.no_grad():
            swap(network)
        yield
    finally:
        for parent, name, child in swapped:
            setattr(parent, name, child)


def _merged(lora: LoraLinear) -> Tensor | None:
    """W + s B A of a layer's adapters; None if they are of another kind, or the layer cannot be packed."""
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
