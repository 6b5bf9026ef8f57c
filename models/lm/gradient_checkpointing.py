"""Gradient checkpointing (Chen et al. 2016, arXiv 1604.06174).

A layer keeps its input, and the backward pass computes its inside again.
"""

from __future__ import annotations

from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from .module_copies import with_forward, with_modules


def checkpointable_layers(network: nn.Module) -> list[nn.Module]:
    """Return the layers whose inside can be computed again in the backward pass.

    :raises ValueError: if there are none.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers: list[nn.Module] = [m for m in network.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(
            f"gradient_checkpointing: {type(network).__name__} has none of transformers' GradientCheckpointingLayers; "
            "a small micro_batch_size bounds the memory as well"
        )
    return layers


def checkpointed(network: nn.Module) -> nn.Module:
    """Return a copy of a network, around the same weights, whose layers keep only their inputs for the backward pass.

    (The switch of transformers works in training mode only, where some layers have dropout.)
    """
    again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    layers = checkpointable_layers(network)
    return with_modules(network, {layer: with_forward(layer, partial(again, layer.forward)) for layer in layers})
