"""Weights that change behind a language model.

Torch counts the in-place changes of a tensor, but not those of its ``data``, through which PEFT merges adapters; and
some forward passes raise the count of weights that they do not change. So weights that models share, a prior and its
policy with LoRA, are compared by a few of their values.
"""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Iterable, Iterator, Mapping
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor, nn

from bayeslm.validation import validated

from .adapters import adapted_modules
from .quantised import tensors_in
from .sharding import own_part

VALUES = 64  # of each tensor, evenly spaced


class Changes:
    """What has changed of a network since it was tried: its weights, and what is computed with them.

    :param network: that was handed in.
    :param causal: the network inside its adapters, whose weights are counted.
    """

    def __init__(self, network: nn.Module, causal: nn.Module) -> None:
        self._network, self._tried = network, _made_of(network)
        self._weights = list(causal.parameters())
        self._adapted: list[Any] = adapted_modules(causal)
        self._miscounted: list[nn.Parameter] = []

    @contextlib.contextmanager
    def during_pass(self) -> Iterator[None]:
        """Find the weights whose changes torch counts in every pass, and that are none: of PEFT's experts."""
        counts = [_version(p) for p in self._weights]
        yield
        self._miscounted = [p for p, n in zip(self._weights, counts, strict=True) if _version(p) != n]

    @property
    def version(self) -> Hashable:
        """A value that changes with the weights, what is computed with them, and which adapters are active."""
        count = sum(map(_version, self._weights)) - sum(map(_version, self._miscounted))
        active = tuple((m.disable_adapters, *m.active_adapters) for m in self._adapted)
        few = tuple(values(self._miscounted).items()) if self._miscounted else ()
        return count, active, few, self._tried, tuple(map(id, self._weights))

    @property
    def is_training(self) -> bool:
        """Whether a module is in training mode."""
        return any(module.training for module in self._network.modules())

    @property
    def are_made(self) -> bool:
        """Whether a layer, a ``forward`` or a hook of one, or a parameter has been replaced or added."""
        return self._tried != _made_of(self._network)


class SharedWeights:
    """Frozen weights that several language models share, as they are now.

    :param tensors: the weights, by their names in one of the networks.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = dict(tensors)
        self._values = values(self.tensors.values())

    def check(self) -> None:
        """Compare the weights with what they were.

        :raises RuntimeError: if they have changed.
        """
        if values(self.tensors.values()) != self._values:
            raise RuntimeError(
                "the weights that this language model shares with another, a prior with its LoRA policy, were changed "
                "through the other's network: by PEFT's merge_and_unload() or merge_adapter(), load_state_dict(), "
                "half() or an optimizer. Load the model again. LanguageModel.merged() exports merged weights, and "
                "policy() without a rank trains all weights, of a copy each"
            )

    def renew(self) -> None:
        """Take the weights as they are now for unchanged."""
        self._values = values(self.tensors.values())


def values(tensors: Iterable[Tensor]) -> dict[torch.dtype, bytes]:
    """Return a few values of each tensor, by dtype: they are equal for equal tensors on any device."""
    parts: dict[torch.dtype, list[Tensor]] = {}
    for tensor in (inner for x in tensors for inner in tensors_in(own_part(x))):
        if tensor.numel() and tensor.layout is torch.strided and tensor.device.type != "meta":
            flat = tensor.detach().view(-1) if tensor.is_contiguous() else tensor.detach().flatten()
            parts.setdefault(tensor.dtype, []).append(flat[:: max(1, len(flat) // VALUES)][:VALUES])
    return {dtype: _bytes(few) for dtype, few in parts.items()}


def _bytes(parts: list[Tensor]) -> bytes:
    if len({part.device for part in parts}) > 1:
        parts = [part.cpu() for part in parts]
    return torch.cat(parts).view(torch.uint8).cpu().numpy().tobytes()


@validated
def digest_of_values(named: Iterable[tuple[str, Tensor]]) -> str:
    """Return a digest of the names, shapes and values of whole tensors, in their order."""
    found = blake2b(digest_size=16)
    for name, x in named:
        found.update(f"{name} {tuple(x.shape)} {x.dtype}".encode())
        for inner in tensors_in(x.detach()):
            found.update(inner.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _made_of(network: nn.Module) -> tuple[Hashable, ...]:
    """Return what the modules of a network compute: the ``forward`` of each, its class's, its hooks, its parameters."""
    return tuple(
        (
            vars(m).get("forward"),
            type(m).forward,
            *m._forward_pre_hooks.values(),
            *m._forward_hooks.values(),
            *map(id, m._parameters.values()),
        )
        for m in network.modules()
    )


def _version(x: Tensor) -> int:
    """Return torch's count of a tensor's in-place changes.

    One that was made in inference mode has none: only there could it be changed, where no score is kept.
    """
    return 0 if x.is_inference() else x._version
