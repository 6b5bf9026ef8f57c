"""Networks whose weights are stored in few bits: which are taken, and what cannot be done with them.

Such a network is a distribution as any other: that of its own forward pass. So a text must have one score, whatever
other texts are computed with it. Rounded weights give that (torchao's, bitsandbytes' 4 bits), and activations that are
rounded token by token (torchao's dynamic ones). Where their rounding depends on the batch there is no one distribution,
and the network is refused. Adapters are trained on quantised weights, which stay as they are, where gradients pass
through them: those of rounded activations are nearly 0, or none.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .sharding import is_sharded

EIGHT_BITS, FOUR_BITS = "Linear8bitLt", "Linear4bit"  # of bitsandbytes
LARGEST_ERROR = 0.05  # of the gradient of a layer, as a share of what it computes


def tensors_in(x: Tensor) -> list[Tensor]:
    """Return the tensors that hold a tensor's numbers: of one that torchao has quantised integers and their scales."""
    if is_sharded(x) or not hasattr(x, "__tensor_flatten__"):
        return [x]
    held: Any = x
    return [inner for name in held.__tensor_flatten__()[0] for inner in tensors_in(getattr(held, name))]


def quantised_layers(network: nn.Module) -> dict[str, nn.Module]:
    """Return the modules of which a parameter is stored in few bits, by their names."""

    def holds(module: nn.Module) -> bool:
        each = module._parameters.values()
        flat = any(p is not None and not is_sharded(p) and hasattr(p, "__tensor_flatten__") for p in each)
        return flat or _of_bitsandbytes(module) is not None

    return {name: module for name, module in network.named_modules() if holds(module)}


def refuse_unsupported(network: nn.Module) -> None:
    """Refuse layers that round the activations of a text by those of others, or whose passes change their weights.

    :raises TypeError: if there is one, with its name.
    """
    for name, module in network.named_modules():
        kind, weight = _of_bitsandbytes(module), getattr(module, "weight", None)
        library = type(module).__module__.partition(".nn.")[0]
        if type(module).__module__.startswith("torch.ao.nn.quantized"):
            why = "it rounds activations by their range in the batch, so that the score of a text depends on the others"
        elif kind == EIGHT_BITS:
            why = "it chooses by the batch what it does not round, so that the score of a text depends on the others"
        elif kind == FOUR_BITS and isinstance(weight, Tensor) and weight.device.type == "cpu":
            why = "on a CPU its passes store its weights in another order, in place, so that models cannot share them"
        else:
            continue
        raise TypeError(
            f"{name} is a {type(module).__name__} of {library}, which is not supported: {why}. Quantise the weights "
            "alone, as torchao's Int8WeightOnlyConfig does"
        )


def refuse_quantised(network: nn.Module, what: str, instead: str) -> None:
    """Refuse what needs weights that are not quantised.

    :param what: is refused.
    :param instead: what to do.
    :raises TypeError: if weights of the network are quantised.
    """
    if layers := quantised_layers(network):
        raise TypeError(f"{what} needs weights that are not quantised, and {next(iter(layers))}'s are: {instead}")


def refuse_without_gradient(network: nn.Module) -> None:
    """Refuse quantised layers through which no gradient passes, since adapters below them would not be trained.

    A layer y = W x is tried: for random c and u, the gradient of c . y in x times u must be c . W u.

    :raises TypeError: if it is not, with the layer's name.
    """
    for name, module in quantised_layers(network).items():
        width = getattr(module, "in_features", None)
        if width is None:  # no linear layer, and so without adapters
            continue
        weight: Any = module.weight
        dtype = weight.dtype if weight.dtype.is_floating_point else torch.float32
        generator = torch.Generator().manual_seed(0)
        x, u = (torch.randn(1, width, generator=generator).to(weight.device, dtype) for _ in range(2))
        reason = "its gradient is not that of what it computes"
        try:
            with torch.enable_grad():
                y = module(x.requires_grad_())
                with torch.no_grad():
                    change = module(u) - module(torch.zeros_like(u))  # also c
                (gradient,) = torch.autograd.grad(y, x, change)
            found, expected = float((gradient * u).sum()), float(change.square().sum())
        except Exception as error:  # of whatever type, where the backward pass is not written
            found, expected, reason = 0.0, 1.0, f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
        if abs(found - expected) > LARGEST_ERROR * abs(expected):
            raise TypeError(
                f"{name} has quantised weights ({type(weight).__name__}) through which gradients do not pass, so that "
                f"adapters cannot be trained ({reason:.120}). Quantise the weights alone, not the activations, as "
                "torchao's Int8WeightOnlyConfig does"
            )


def _of_bitsandbytes(module: nn.Module) -> str | None:
    """Return which of bitsandbytes' layers a module is, None if it is none of them; it need not be installed."""
    for kind in type(module).__mro__:
        if kind.__module__.startswith("bitsandbytes.") and kind.__name__ in (EIGHT_BITS, FOUR_BITS):
            return kind.__name__
    return None
