r"""How much memory passes of a network hold, and so how many rows one pass takes.

Of a network of L layers, width d, with inner layers of width f and attention heads of width h,

    k            numbers in the keys and values of a token, of all layers together (counted on a pass)
    i = 4 d + 3 f + 2 h    numbers that one layer computes of a token without a gradient
    a = 12 d + 4 f         numbers that one layer keeps of a token for its gradient
    V            logits of a token, always float32

(d is 0 and i and a are V more where the logits stand for hidden states). With prompts of P tokens, T new tokens, and
s bytes a number of the dtype that is computed in, these hold at once, at most,

    prefill      b prompts                s b P (k + i)
    decoding     n rows                   n (s (P + T) k + max(s ((P + T) k / (2 L) + 8 d), 20 V))
    scoring      n rows                   s n ((P + T) k + T i)
    gradient     n rows of b prompts      s L a (n T + b P)
    checkpointed, n rows                  s n (P + T) (L d + a)

beside the weights. Decoding holds the states of one token a row, not those of a whole text. A cache that grows by a
token holds the keys of one layer twice; drawing from logits holds them five times over (once in float64). Where each
text is read as a whole (networks without keys and values, gradient checkpointing), all its tokens are new. Blocks of
logits of scoring (`network`) are bounded by themselves. Keys and values of a fixed size (`compiled`) do not grow, and
resampling holds those of one layer twice: the rule is the same. Where CUDA graphs are recorded, P + T is rounded up to
a multiple of 64, the prompts' own are held beside it, and n is a number of rows for which graphs are recorded. Mixtures
of experts, and layers of other kinds than a Llama's, are counted as a Llama's.

A pass may hold the `room`: on a CPU 512 MB, so that a seed gives the same numbers everywhere. On a GPU it is what is
free at the start of the run, less a tenth, rounded down to a power of two: so small changes of what else is on the
device do not change the sizes of batches, and with them the numbers that a seed gives. Prompts that have been read
wait with their keys and values while their completions are drawn: they take a quarter of it, and all else the rest.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch

from bayeslm.validation import Count, validated

from .configs import size
from .remembered import recalled, remembered
from .scopes import having

ON_CPU = 2**29  # bytes
FEWEST = 2**28  # bytes, where less is free: a pass may still fit, and nothing smaller would
LOGITS_BYTES = 5 * 4
LENGTHS = 64  # tokens, to multiples of which lengths are padded where graphs are recorded


@dataclass(frozen=True)
class Footprint:
    """What a network holds of a token, in numbers; see above for the letters."""

    layers: int  # L
    width: int  # d
    cached: int  # k
    inside: int  # i
    kept: int  # a
    vocabulary: int  # V
    bytes_each: int  # s

    @classmethod
    def of(cls, network: Any, *, vocabulary: int, cached: int, bytes_each: int, logits_are_hidden: bool) -> Footprint:
        """Return what a network holds, of sizes that its config has and these."""
        width = size(network, "hidden_size")
        inner = size(network, "intermediate_size") or 4 * width
        head = size(network, "head_dim") or width // (size(network, "num_attention_heads") or 1)
        logits = vocabulary if logits_are_hidden else 0
        inside, kept = 4 * width + 3 * inner + 2 * head + logits, 12 * width + 4 * inner + logits
        layers = max(1, size(network, "num_hidden_layers"))
        return cls(layers, width, cached, inside, kept, vocabulary, bytes_each)

    def prefill(self, prompts: int, prompt: int) -> int:
        """Return the bytes that reading prompts of so many tokens holds."""
        return self.bytes_each * prompts * prompt * (self.cached + self.inside)

    def decoding(self, rows: int, length: int) -> int:
        """Return the bytes that drawing rows holds, of ``length`` tokens with their prompts."""
        cache = length * self.cached
        growing = cache // (2 * self.layers) + 8 * self.width if cache else length * self.inside
        return rows * (self.bytes_each * cache + max(self.bytes_each * growing, LOGITS_BYTES * self.vocabulary))

    def scoring(self, rows: int, prompt: int, new: int, *, whole: bool = False) -> int:
        """Return the bytes that scoring rows holds, without a gradient.

        :param whole: whether each row is read with its prompt.
        """
        if whole:
            return self.bytes_each * rows * (prompt + new) * self.inside
        return self.bytes_each * rows * ((prompt + new) * self.cached + new * self.inside)

    def gradient(self, rows: int, prompt: int, new: int, *, checkpointing: bool, prompts: int | None = None) -> int:
        """Return the bytes that a gradient holds.

        :param prompts: whose rows they are, each of which is read once; None: each row is read with its prompt.
        """
        if checkpointing:
            return self.bytes_each * rows * (prompt + new) * (self.layers * self.width + self.kept)
        tokens = rows * new + (rows if prompts is None else prompts) * prompt
        return self.bytes_each * self.layers * self.kept * tokens


@dataclass(frozen=True)
class Batches:
    """How many prompts or rows one pass takes.

    :param footprint: of the network.
    :param room: bytes that a pass may hold.
    :param prompt: tokens of a prompt.
    :param new: new tokens.
    :param records: whether CUDA graphs of a compiled step are recorded.
    """

    footprint: Footprint
    room: int
    prompt: int
    new: int
    records: bool = False

    @property
    def prefill(self) -> int:
        return self._fit(self.room // 4, self.footprint.prefill(1, self.prompt))

    @property
    def decoding(self) -> int:
        length = self.prompt + self.new
        if self.records:
            length = self.prompt + recorded_length(length)
        rows = self._fit(3 * self.room // 4, self.footprint.decoding(1, length))
        return recorded_rows(rows, most=True) if self.records else rows

    def scoring(self, whole: bool = False) -> int:
        return self._fit(3 * self.room // 4, self.footprint.scoring(1, self.prompt, self.new, whole=whole))

    def gradient(self, checkpointing: bool) -> int:
        """Return of how many rows a micro-batch takes; each may have a prompt of its own."""
        return self._fit(self.room, self.footprint.gradient(1, self.prompt, self.new, checkpointing=checkpointing))

    def _fit(self, room: int, each: int) -> int:
        return max(1, room // max(each, 1))


_subsample: ContextVar[int | None] = ContextVar("bayeslm_subsample", default=None)


@contextlib.contextmanager
def subsamples_of(size: int | None) -> Iterator[None]:
    """Let programs that ask `subsample_of` take so many of their prompts inside the block; None: their own number."""
    with having(_subsample, size):
        yield


@validated
def subsample_of(size: Count | None, prompts: Count) -> int | None:
    """Return how many of a program's prompts a run of it takes, for Pyro's plate; None for all.

    It is the program's own number in a training, and as many as fit a pass where draws are taken of all prompts.

    :param size: the program's own number, None for all.
    :param prompts: the number of prompts.
    """
    return None if size is None else _subsample.get() or min(size, prompts)


def records(device: torch.device) -> bool:
    """Return whether compiled steps are recorded on a device, as CUDA graphs, one for each size."""
    return device.type == "cuda"


def recorded_rows(rows: int, *, most: bool = False) -> int:
    """Return the least number for which a graph is recorded that is at least, or the most that is at most, ``rows``.

    Those are powers of two and the numbers halfway between two of them.
    """
    power: int = 2 ** (rows.bit_length() - 1)
    each = [n for n in (power, 3 * power // 2, 2 * power) if (n <= rows if most else n >= rows)]
    return max(each) if most else min(each)


def recorded_length(length: int) -> int:
    """Return the least number of tokens for which a graph is recorded that is at least ``length``."""
    return -(-length // LENGTHS) * LENGTHS


def room(device: torch.device) -> int:
    """Return the bytes that a pass may hold on a device; in a run they are those of its start."""
    if device.type != "cuda":
        return ON_CPU
    return recalled(remembered().rooms, device, lambda: rounded(free(device)))


def free(device: torch.device) -> int:
    """Return the free bytes of a GPU, with those that PyTorch has reserved and does not use."""
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + unused


def rounded(free_bytes: int) -> int:
    """Return nine tenths of what is free, rounded down to a power of two."""
    return max(FEWEST, 2 ** int(math.log2(max(1.0, 0.9 * free_bytes))))
