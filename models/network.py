"""What a distribution over texts asks of a Hugging Face causal language model.

Three things, each done once here for sampling, scoring and (later) particle methods:

* **prefill**: run every prompt through the network once and keep its key-value cache;
* **fork**: give the cache of prompt ``rows[i]`` to row ``i``, so that particles share the prefill;
* **head**: turn hidden states into float32 log-probabilities a block of tokens at a time, so that
  (rows x tokens x vocabulary) logits are never held at once.

The head is applied apart from the body where ``head(body(x)) == network(x).logits`` holds for the network
at hand (checked once, on a real forward pass); for architectures with something before or after the head (logit
soft-capping, scaling) the network's own logits stand in for the hidden states, and the head is the identity.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import DynamicLayer
from transformers.modeling_layers import GradientCheckpointingLayer

from . import packing

# Elements of one float32 block of logits: 2**25 is 128 MB, some 680 tokens of a 49k vocabulary.
LOGITS_BLOCK = 2**25


@dataclass
class Usage:
    """What the networks did: forward passes, and token positions pushed through them."""

    model_calls: int = 0
    tokens: int = 0
    _mismatch: tuple[Tensor, Tensor, Tensor] | None = None

    @property
    def mismatch(self) -> tuple[float, float] | None:
        """The largest and the mean |log q as it was sampled - log q as it was differentiated|, a token.

        Two ways through the same network, whose rounding differs: some 1e-6 in float32, more in bfloat16. None if no
        completions were both. (Kept on the device until it is read.)
        """
        if self._mismatch is None:
            return None
        largest, total, count = (float(x) for x in self._mismatch)
        return largest, total / max(count, 1.0)

    def numbers(self) -> dict[str, Any]:
        """All of it as plain numbers, to `go_on` from."""
        seen = None if self._mismatch is None else [float(x) for x in self._mismatch]
        return {"model_calls": self.model_calls, "tokens": self.tokens, "mismatch": seen}

    def go_on(self, model_calls: int, tokens: int, mismatch: list[float] | None) -> None:
        """Count from there."""
        self.model_calls, self.tokens = model_calls, tokens
        if mismatch is not None:
            largest, total, count = mismatch
            self._mismatch = torch.tensor(largest), torch.tensor(total), torch.tensor(int(count))


_usage: ContextVar[tuple[Usage, ...]] = ContextVar("bayeslm_usage", default=())


@contextlib.contextmanager
def count_usage() -> Iterator[Usage]:
    """Count the forward passes and tokens of every network used inside the block.

    A gradient's passes count where its scores were asked for, whenever its backward pass runs.
    """
    usage = Usage()
    with counting((*_usage.get(), usage)):
        yield usage


def usages() -> tuple[Usage, ...]:
    """What counts here."""
    return _usage.get()


@contextlib.contextmanager
def counting(these: tuple[Usage, ...]) -> Iterator[None]:
    """Count for these alone (in a backward pass, which may have a thread of its own)."""
    token = _usage.set(these)
    try:
        yield
    finally:
        _usage.reset(token)


def note_mismatch(difference: Tensor, where: Tensor) -> None:
    """Note differences between scores of the same tokens, at those of ``where`` (same shape)."""
    size = difference.abs().where(where & difference.isfinite(), 0.0)
    for usage in _usage.get():
        seen = (size.amax(), size.sum(), where.sum())
        if usage._mismatch is not None:
            before = [x.to(size.device) for x in usage._mismatch]
            seen = (torch.maximum(before[0], seen[0]), before[1] + seen[1], before[2] + seen[2])
        usage._mismatch = seen


class CausalNetwork:
    """A causal network seen as body and head.

    :param network: any module with the call convention of ``transformers``' causal language models.
    :param compute_dtype: what matrix products of float32 weights are computed in (autocast); None: in float32.
    """

    def __init__(self, network: nn.Module, compute_dtype: torch.dtype | None = None) -> None:
        inside_peft: Any = getattr(network, "get_base_model", None)
        causal: Any = inside_peft() if inside_peft else network
        self.network = causal
        self.compute_dtype = compute_dtype
        self.parameters = list(causal.parameters())
        accepted = inspect.signature(causal.forward).parameters
        self._takes_positions = "position_ids" in accepted
        self._body, self._head = self._split()

    def _split(self) -> tuple[nn.Module | None, nn.Module | None]:
        """Body and head, if head(body(x)) is the whole network; else (None, None).

        Seen on a forward pass whose head answers noise: the body's output must reach the head as it is, and the
        head's answer must come out as it is. Noise, since soft-capping does not show on small logits.
        """
        body = getattr(self.network, "base_model", None)
        head = self.network.get_output_embeddings() if hasattr(self.network, "get_output_embeddings") else None
        if body is None or head is None or body is self.network:
            return None, None
        probe = (torch.arange(4, device=self.device) % self.vocab_size)[None]
        noise = 100.0 * torch.randn((1, 4, self.vocab_size), generator=torch.Generator().manual_seed(0))
        given: list[Tensor] = []
        said: list[Tensor] = []

        def answer(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            given.extend(inputs)
            said.append(noise.to(output))
            return said[-1]

        hook = head.register_forward_hook(answer)
        try:
            with torch.no_grad():
                whole = self.network(input_ids=probe, use_cache=False).logits
                hidden = getattr(body(input_ids=probe, use_cache=False), "last_hidden_state", None)
        finally:
            hook.remove()
        if hidden is None or len(given) != 1 or len(said) != 1 or given[0].shape != hidden.shape:
            return None, None
        untouched = torch.allclose(given[0], hidden, rtol=1e-3) and torch.equal(whole.to(said[0]), said[0])
        return (body, head) if untouched else (None, None)

    @property
    def device(self) -> torch.device:
        return self.parameters[0].device if self.parameters else torch.device("cpu")

    @property
    def requires_grad(self) -> bool:
        return any(p.requires_grad for p in self.parameters)

    @cached_property
    def vocab_size(self) -> int:
        """Width of the logits, which may be more than the tokenizer's tokens."""
        return int(self.network.config.get_text_config().vocab_size)

    @cached_property
    def context_length(self) -> int | None:
        """The most tokens the network can attend to, None if it does not say."""
        config = self.network.config.get_text_config()
        return getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)

    @cached_property
    def width(self) -> int:
        """Width of the hidden states, 0 if the network has none."""
        return int(getattr(self.network.config.get_text_config(), "hidden_size", 0) or 0)

    def rows_per_batch(self, length: int) -> int:
        """How many sequences of ``length`` tokens fit a forward pass of bounded memory."""
        return max(1, 2**27 // (length * max(self.vocab_size, 32 * self.width)))

    def rows_per_micro_batch(self, length: int) -> int:
        """How many sequences of ``length`` tokens have activations, kept for a gradient, of 2**27 numbers at most."""
        return min(self.rows_per_batch(length), max(1, 2**27 // (length * max(self._kept, 1))))

    @cached_property
    def _kept(self) -> int:
        """Numbers that a gradient keeps of a token, as counted in Llamas."""
        config = self.network.config.get_text_config()
        layers = int(getattr(config, "num_hidden_layers", 0) or 0)
        inner = int(getattr(config, "intermediate_size", 0) or 4 * self.width)
        return layers * (12 * self.width + 4 * inner)

    @property
    def version(self) -> int:
        """Torch's count of changes in place of the weights."""
        return sum(p._version for p in self.parameters)

    def hidden(
        self, ids: Tensor, mask: Tensor | None, positions: Tensor, cache: Any = None, use_cache: bool = True
    ) -> tuple[Tensor, Any]:
        """Hidden states (rows, tokens, width) of ``ids`` (rows, tokens) that follow ``cache``, and the cache grown.

        ``mask`` (rows, cached + tokens) marks the tokens that are not padding; None where none is.
        """
        for usage in _usage.get():
            usage.model_calls += 1
            usage.tokens += ids.numel()
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "past_key_values": cache}
        if self._takes_positions:
            inputs["position_ids"] = positions
        with self.precision():
            out = (self._body or self.network)(**inputs, use_cache=use_cache)
        hidden = out.logits if self._body is None else out.last_hidden_state
        return hidden, getattr(out, "past_key_values", None)

    @contextlib.contextmanager
    def drawing(self, passes: int) -> Iterator[None]:
        """Around so many passes without gradient: weights in training are converted, or packed, once for all."""
        large = sum(p.numel() for p in self.parameters) >= packing.LARGE
        if not (self.requires_grad and large and passes >= packing.PAYS_FROM and self.compute_dtype is None):
            with self.precision():
                yield
            return
        head = self._head
        with packing.packed_inside(self.network):
            self._head = None if head is None else self.network.get_output_embeddings()
            try:
                yield
            finally:
                self._head = head

    def precision(self) -> contextlib.AbstractContextManager[Any]:
        """Autocast to ``compute_dtype``. Around several passes it converts the weights once."""
        if self.compute_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.compute_dtype)

    def read(self, ids: Tensor, mask: Tensor | None, gradient_checkpointing: bool = False) -> Tensor:
        """Hidden states (rows, tokens, width) of left-padded texts (rows, tokens), in one pass without a cache.

        With ``gradient_checkpointing`` the backward pass computes the inside of each layer anew.
        """
        with checkpointed(self.network) if gradient_checkpointing else contextlib.nullcontext():
            return self.hidden(ids, mask, _positions(ids, mask), use_cache=False)[0]

    def logits(self, hidden: Tensor, temperature: float) -> Tensor:
        """Float32 logits (..., vocabulary) of hidden states (..., width)."""
        with self.precision():
            logits = hidden if self._head is None else self._head(hidden)
        return logits.float() / temperature if temperature != 1.0 else logits.float()

    def token_log_prob(self, hidden: Tensor, targets: Tensor, temperature: float) -> Tensor:
        """log p(target | hidden) for hidden (tokens, width) and targets (tokens,), in blocks of bounded memory.

        With gradients, if these tokens are more than one block, the logits of a block are computed anew in the
        backward pass rather than kept.
        """

        def block(h: Tensor, x: Tensor) -> Tensor:
            return log_softmax_at(self.logits(h, temperature), x)

        size = max(1, LOGITS_BLOCK // self.vocab_size)
        blocks = zip(hidden.split(size), targets.split(size), strict=True)
        if torch.is_grad_enabled() and len(targets) > size:
            return torch.cat([checkpoint(block, h, x, use_reentrant=False) for h, x in blocks])
        return torch.cat([block(h, x) for h, x in blocks])


def checkpointable(network: nn.Module) -> list[nn.Module]:
    """The layers whose inside can be computed anew in the backward pass.

    :raises ValueError: if there are none.
    """
    layers: list[nn.Module] = [m for m in network.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(
            f"gradient_checkpointing: {type(network).__name__} has none of transformers' GradientCheckpointingLayers; "
            "a small batch_size bounds the memory as well"
        )
    return layers


@contextlib.contextmanager
def checkpointed(network: nn.Module) -> Iterator[None]:
    """Inside, layers keep for the backward pass their inputs alone.

    (Their own switch would do so in training mode only, where some have dropout.)
    """
    layers = checkpointable(network)
    before = [vars(layer).get("forward") for layer in layers]
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
    try:
        yield
    finally:
        for layer, forward in zip(layers, before, strict=True):
            del layer.forward
            if forward is not None:
                layer.forward = forward


def log_softmax_at(logits: Tensor, token: Tensor) -> Tensor:
    """log softmax(logits) (rows, vocabulary) at tokens (rows,)."""
    return logits.gather(-1, token[:, None]).squeeze(-1) - logits.logsumexp(-1)


@dataclass
class Prefix:
    """Prompts after their forward pass: what every continuation starts from.

    ``hidden`` (rows, width) predicts the first new token; ``mask`` (rows, length) is None without padding;
    ``lengths`` (rows,) counts the real tokens.
    """

    hidden: Tensor
    cache: Any
    mask: Tensor | None
    lengths: Tensor

    def fork(self, rows: Tensor) -> Prefix:
        """The prefix of prompt ``rows[i]`` as row i. The cache is copied, never changed in place."""
        cache = copy.copy(self.cache)
        cache.layers = [copy.copy(layer) for layer in self.cache.layers]
        cache.batch_select_indices(rows)
        mask = None if self.mask is None else self.mask[rows]
        return Prefix(self.hidden[rows], cache, mask, self.lengths[rows])

    def cut(self) -> tuple[Prefix, list[Tensor], list[Tensor]]:
        """The same where a graph begins: the prefix, tensors of this one, and the leaves that stand in their place."""
        roots: list[Tensor] = []
        leaves: list[Tensor] = []

        def leaf(x: Tensor) -> Tensor:
            if not x.requires_grad:
                return x
            roots.append(x)
            leaves.append(x.detach().requires_grad_())
            return leaves[-1]

        cache = copy.copy(self.cache)
        cache.layers = [copy.copy(layer) for layer in self.cache.layers]
        for layer in cache.layers:
            layer.keys, layer.values = leaf(layer.keys), leaf(layer.values)
        return Prefix(leaf(self.hidden), cache, self.mask, self.lengths), roots, leaves

    def select(self, rows: Tensor) -> None:
        """Row i becomes what row ``rows[i]`` is, cache included; a row that stays costs nothing."""
        self.lengths = self.lengths[rows]
        self.mask = None if self.mask is None else self.mask[rows]
        moved = (rows != torch.arange(len(rows), device=rows.device)).nonzero().squeeze(-1)
        for layer in self.cache.layers:
            for kept in (layer.keys, layer.values):
                kept[moved] = kept[rows[moved]]


def _positions(ids: Tensor, mask: Tensor | None) -> Tensor:
    """Positions (rows, length) of left-padded ids."""
    if mask is None:
        return torch.arange(ids.shape[-1], device=ids.device).expand(ids.shape)
    return (mask.cumsum(-1) - 1).clamp_min(0)  # padding's own position is never attended to


def prefill(network: CausalNetwork, ids: Tensor, mask: Tensor | None) -> Prefix:
    """Run left-padded prompts ``ids`` (rows, length) through the network once.

    :raises TypeError: if the network keeps anything but the keys and values of attention layers.
    """
    rows, length = ids.shape
    lengths = torch.full((rows,), length, device=ids.device) if mask is None else mask.sum(-1)
    hidden, cache = network.hidden(ids, mask, _positions(ids, mask))
    layers = getattr(cache, "layers", [])
    if not layers or not all(isinstance(layer, DynamicLayer) and not hasattr(layer, "conv_states") for layer in layers):
        raise TypeError(
            f"{type(network.network).__name__} keeps more than the keys and values of attention layers "
            "(recurrent and hybrid networks do): completions cannot share the prefill of their prompt"
        )
    return Prefix(hidden[:, -1], cache, mask, lengths)


def extend(network: CausalNetwork, prefix: Prefix, ids: Tensor, done: int = 0) -> Tensor:
    """Hidden states (rows, new, width) of ``ids`` (rows, new) that follow a prefix and ``done`` earlier tokens.

    The prefix's cache grows by the new tokens.
    """
    rows, new = ids.shape
    steps = torch.arange(done, done + new, device=ids.device)
    mask = prefix.mask
    if mask is not None:
        mask = torch.cat([mask, mask.new_ones((rows, done + new))], dim=-1)
    hidden, prefix.cache = network.hidden(ids, mask, prefix.lengths[:, None] + steps, prefix.cache)
    return hidden
