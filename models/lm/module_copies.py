"""Copies of networks in which some modules compute something else. The networks themselves are never changed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn


def with_forward(module: nn.Module, forward: Callable[..., Any]) -> nn.Module:
    """Return a copy of a module that computes ``forward``; hooks, submodules and tensors are shared with it."""
    new: Any = copy.copy(module)
    new.forward = forward
    return new


def with_modules(network: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """Return a copy of a network with other modules in the places of some of its own.

    Only the modules above a replaced one are copied, and compute their class's ``forward``; all others are shared with
    the network, and so are all tensors.
    """
    copies: dict[nn.Module, nn.Module] = dict(replacements)

    def copied(module: nn.Module) -> nn.Module:
        if module not in copies:
            old, new = module._modules, module
            children = {name: None if child is None else copied(child) for name, child in old.items()}
            if any(child is not old[name] for name, child in children.items()):
                new = copy.copy(module)
                vars(new).pop("forward", None)  # set on the instance, by accelerate for example, it runs the original
                new._modules = children
            copies[module] = new
        return copies[module]

    return copied(network)
