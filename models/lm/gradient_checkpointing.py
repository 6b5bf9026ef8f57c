"""Gradient checkpointing (Chen et al. 2016, arXiv 1604.06174): a layer keeps its input, and the backward pass computes
its inside anew."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer


def checkpointable(network: nn.Module) -> list[nn.Module]:
    """The layers whose inside can be computed anew in the backward pass.

    :raises ValueError: if there are none.
    """
    layers: list[nn.Module] = [m for m in network.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(
            f"gradient_checkpointing: {type(network).__name__} has none of transformers' GradientCheckpointingLayers; "
            "a small micro_batch_size bounds the memory as well"
        )
    return layers


@contextlib.contextmanager
def checkpointed(network: nn.Module) -> Iterator[None]:
    """Inside, layers keep for the backward pass their inputs alone.

    (Their own switch would do so in training mode only, where some have dropout.)
    """
    with contextlib.ExitStack() as layers:
        for layer in checkpointable(network):
            again = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
            layers.enter_context(with_forward(layer, again))
        yield


@contextlib.contextmanager
def with_forward(module: Any, forward: Callable[..., Any]) -> Iterator[None]:
    """Inside, a module computes something else; one of its own, as libraries leave there, is put back after."""
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before
