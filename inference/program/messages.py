"""What the processes of a run send each other, as bytes; and numbers that tell random states and tensors apart."""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import blake2b
from typing import Any, NamedTuple

import torch
from safetensors.torch import load, save
from torch import Tensor

from bayeslm.validation import validated


class Message(NamedTuple):
    """What a rank has sent: a value that JSON can hold, and tensors on the CPU."""

    value: Any
    tensors: dict[str, Tensor]


def packed(head: dict[str, Any], tensors: Mapping[str, Tensor]) -> Tensor:
    """Return a message as bytes, (byte,)."""
    text = json.dumps(head).encode()
    # clones, as tensors that share memory are refused
    body = save({name: x.detach().cpu().clone().contiguous() for name, x in tensors.items()}) if tensors else b""
    return torch.frombuffer(bytearray(len(text).to_bytes(8, "big") + text + body), dtype=torch.uint8)


def unpacked(message: bytes) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return head and tensors of a message."""
    start = 8 + int.from_bytes(message[:8], "big")
    return json.loads(message[8:start]), load(message[start:]) if len(message) > start else {}


@validated
def seed_of(state: Tensor) -> int:
    """Return a seed that depends on all of a random state."""
    return hashed(state.numpy().tobytes())


def hashed(data: bytes) -> int:
    """Return a seed, below 2^32, that depends on all of the data."""
    return int.from_bytes(blake2b(data, digest_size=4).digest(), "big")


@validated
def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """Return a digest of tensors: sums of their bits, computed on their devices, and their names and shapes."""
    sums = [_bits(x).sum(dtype=torch.int64) for x in tensors.values() if x.numel()]
    numbers = torch.stack([x.cpu() for x in sums]).tolist() if sums else []
    names = [(name, list(x.shape), str(x.dtype)) for name, x in tensors.items()]
    return blake2b(json.dumps([names, numbers]).encode(), digest_size=8).hexdigest()


def _bits(x: Tensor) -> Tensor:
    x = x.detach().contiguous()
    return x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])
