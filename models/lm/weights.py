"""Weights that change behind a language model.

Torch counts the in-place changes of a tensor, but not those of its ``data``, through which PEFT merges adapters; and
some forward passes raise the count of weights that they do not change. So weights that models share, a prior and its
policy with LoRA, are compared by a few of their values.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from hashlib import blake2b

import torch
from torch import Tensor

from bayeslm.validation import validated

from .sharding import own_part

VALUES = 64  # of each tensor, evenly spaced


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
    for tensor in map(own_part, tensors):
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
        found.update(x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
