"""Copies of networks in which some modules compute something else. The networks themselves are never changed."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn


def shallow(module: nn.Module) -> nn.Module:
    """Return a copy that shares all inside.

    FSDP gives a module that it has sharded a class of its own, which cannot be copied: the copy has the class before.
    """
    kind = type(module)
    if any(each.__name__ == "FSDPModule" for each in kind.__mro__):
        kind = next(each for each in kind.__mro__[1:] if each.__name__ != "FSDPModule")
        new = kind.__new__(kind)
        new.__dict__.update(module.__dict__)
        return new
    return copy.copy(module)


def with_forward(module: nn.Module, forward: Callable[..., Any]) -> nn.Module:
    """Return a copy of a module that computes ``forward``; hooks, submodules and tensors are shared with it."""
    new: Any = shallow(module)
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
                new = _copied(module)
                new._modules = children
            copies[module] = new
        return copies[module]

    return copied(network)


def with_parameters(network: nn.Module, replace: Callable[[nn.Parameter], Tensor], stop: nn.Module | None) -> nn.Module:
    """Return a copy of a network that computes with other tensors in the places of its parameters.

    :param replace: returns the tensor in the place of a parameter, or the parameter itself. Modules without others are
        shared with the network.
    :param stop: a module of the network to leave as it is, with all that is inside.
    """
    copies: dict[nn.Module, nn.Module] = {} if stop is None else {stop: stop}
    tensors: dict[nn.Parameter, Tensor] = {}

    def replaced(parameter: nn.Parameter) -> Tensor:
        if parameter not in tensors:  # else two layers share it
            tensors[parameter] = replace(parameter)
        return tensors[parameter]

    def copied(module: nn.Module) -> nn.Module:
        if module not in copies:
            children = {name: None if child is None else copied(child) for name, child in module._modules.items()}
            own: Any = {name: None if p is None else replaced(p) for name, p in module._parameters.items()}
            new = module
            if any(a is not b for a, b in zip(children.values(), module._modules.values(), strict=True)) or any(
                a is not b for a, b in zip(own.values(), module._parameters.values(), strict=True)
            ):
                new = _copied(module)
                new._modules, new._parameters = children, own
            copies[module] = new
        return copies[module]

    return copied(network)


def _copied(module: nn.Module) -> nn.Module:
    """Return a copy that shares all inside; its ``forward`` is its own, or its class's.

    Set on the instance, by accelerate for example, ``forward`` runs the original.
    """
    new = shallow(module)
    forward = vars(new).pop("forward", None)
    if isinstance(forward, types.MethodType) and forward.__self__ is module:
        vars(new)["forward"] = types.MethodType(forward.__func__, new)
    return new
