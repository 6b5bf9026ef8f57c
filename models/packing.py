"""Linear layers whose weights lie in the order in which oneDNN multiplies by them.

A product of few rows with a large weight, which is what writing a token is, spends much of its time on bringing
the weight into the blocks that the CPU's kernels read. Weights that never change can be kept in blocks: the same
products, some quarter faster on SmolLM2-135M with 32 rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

ROWS = 32  # that the blocks are chosen for; products of any number of rows are right


class PackedLinear(nn.Module):
    """``linear``, frozen: the weight is held in blocks alone and can be neither read, trained, moved nor saved."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = None if linear.bias is None else linear.bias.detach().clone()
        self._blocks = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), ROWS)

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
                setattr(parent, name, PackedLinear(child))
