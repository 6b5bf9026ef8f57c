"""What a distribution over texts asks of a Hugging Face causal language model.

Each done once here, for sampling, scoring and particle methods:

* **body**: hidden states of tokens, with or without a key-value cache of those before them (`prefix`);
* **head**: float32 log-probabilities of hidden states a block of tokens at a time, so that (rows x tokens x
  vocabulary) logits are never held at once;
* **size**: how many rows fit a pass of bounded memory.

The network at hand says on a forward pass (once) how its head follows its body: alone; or with something before it or
after it (logits soft-capped or scaled), where the network's own forward pass is run with the hidden states in the
place of its body's. Where neither gives its logits, these stand in for hidden states, and the head is the identity.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from . import packing
from .gradient_checkpointing import checkpointed, with_forward
from .masks import positions_of, ready_mask

# Elements of one float32 block of logits: 2**25 is 128 MB, some 680 tokens of a 49k vocabulary.
LOGITS_BLOCK = 2**25
# Numbers that one pass may hold: 512 MB in float32. On a GPU an eighth of its memory, where that is more.
HELD = 2**27


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
        self._body: nn.Module | None = None  # None: logits are the hidden states
        self._head: nn.Module | None = None  # None with a body: logits are `_through` the network
        self._answer: type[Any] = object  # of what the body gives
        self._split()

    def _split(self) -> None:
        """Find body and head.

        The head alone is seen by letting it answer noise: the body's output must reach it as it is, and its answer
        must come out as it is. Noise, since soft-capping does not show on small logits.
        """
        body = getattr(self.network, "base_model", None)
        head = self.network.get_output_embeddings() if hasattr(self.network, "get_output_embeddings") else None
        if body is None or head is None or body is self.network:
            return
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
                out = body(input_ids=probe, use_cache=False)
        finally:
            hook.remove()
        hidden = getattr(out, "last_hidden_state", None)
        if hidden is None or len(said) != 1:
            return
        self._body, self._answer = body, type(out)
        untouched = given[0].shape == hidden.shape and torch.allclose(given[0], hidden, rtol=1e-3)
        if untouched and torch.equal(whole.to(said[0]), said[0]):
            self._head = head
        elif not self._goes_through(hidden, probe):
            self._body = None

    def _goes_through(self, hidden: Tensor, probe: Tensor) -> bool:
        """Whether the network's logits are those of its body's hidden states."""
        with torch.no_grad():
            try:
                logits = self._through(hidden)
            except Exception:  # whatever it is that it misses in its body's answer
                return False
            return torch.allclose(logits, self.network(input_ids=probe, use_cache=False).logits, rtol=1e-3)

    def _through(self, hidden: Tensor) -> Tensor:
        """Logits (..., vocabulary) of hidden states (..., width), as the network has them of its body's."""
        states = hidden.reshape(1, -1, hidden.shape[-1])
        with with_forward(self._body, lambda *_, **__: self._answer(last_hidden_state=states)):
            ids = torch.zeros(states.shape[:2], dtype=torch.long, device=states.device)
            logits: Tensor = self.network(input_ids=ids, use_cache=False).logits
        return logits.reshape(*hidden.shape[:-1], -1)

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
        """How many sequences of ``length`` tokens fit a pass without gradient: all keys and values, the states of a
        layer, and the logits of one token each, with what it takes to draw from them.
        """
        return max(1, self._room // (length * (self._cached + self._layer) + 3 * self.vocab_size))

    def rows_per_micro_batch(self, length: int) -> int:
        """How many sequences of ``length`` tokens have activations, kept for a gradient, that fit."""
        return max(1, self._room // (length * max(self._kept, 1)))

    @property
    def _room(self) -> int:
        """Numbers that a pass may hold: of the device, not of what is free of it, so that a seed reproduces a run."""
        if self.device.type != "cuda":
            return HELD
        return max(HELD, torch.cuda.get_device_properties(self.device).total_memory // (8 * 4))

    @cached_property
    def _cached(self) -> int:
        """Numbers in the keys and values of a token, counted."""
        ids = torch.zeros((1, 2), dtype=torch.long, device=self.device)
        with torch.no_grad():
            _, cache = self._pass(ids, None, positions_of(ids, None), None)
        kept = [getattr(layer, name, None) for layer in getattr(cache, "layers", ()) for name in ("keys", "values")]
        return sum(x.numel() for x in kept if isinstance(x, Tensor)) // ids.numel()

    @cached_property
    def _layers(self) -> int:
        return int(getattr(self.network.config.get_text_config(), "num_hidden_layers", 0) or 0)

    @cached_property
    def _layer(self) -> int:
        """Numbers that one layer computes of a token, as counted in Llamas; and logits that stand for hidden states."""
        config = self.network.config.get_text_config()
        inner = int(getattr(config, "intermediate_size", 0) or 4 * self.width)
        return 12 * self.width + 4 * inner + (self.vocab_size if self._body is None else 0)

    @property
    def _kept(self) -> int:
        """Numbers that a gradient keeps of a token."""
        return max(self._layers, 1) * self._layer

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
        if mask is not None and self._ready is not None:
            mask = ready_mask(mask, ids.shape[-1], self._ready)
        return self._pass(ids, mask, positions, cache, use_cache)

    def _pass(
        self, ids: Tensor, mask: Tensor | None, positions: Tensor, cache: Any, use_cache: bool = True
    ) -> tuple[Tensor, Any]:
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "past_key_values": cache}
        if self._takes_positions:
            inputs["position_ids"] = positions
        with self.precision():
            out = (self._body or self.network)(**inputs, use_cache=use_cache)
        hidden = out.logits if self._body is None else out.last_hidden_state
        return hidden, getattr(out, "past_key_values", None)

    @cached_property
    def _ready(self) -> torch.dtype | None:
        """The dtype of masks that the network takes as they are to be, (rows, 1, tokens, cached + tokens); None if it
        wants to make them itself, of (rows, cached + tokens). Making them it asks the device, at every token, whether
        all is padding, for which the host has to wait.

        Those whose layers have windows make several masks. Others are tried: hidden states must be the same.
        """
        config = self.network.config.get_text_config()
        kinds = set(getattr(config, "layer_types", None) or ())
        windows = kinds - {"full_attention"} or getattr(config, "sliding_window", None)
        own = next((p.dtype for p in self.parameters), torch.float32)
        dtype = {"sdpa": torch.bool, "eager": own}.get(getattr(config, "_attn_implementation", ""))
        if windows or dtype is None or not self._takes_positions:
            return None
        ids = (torch.arange(8, device=self.device) % self.vocab_size).reshape(2, 4)
        mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]], device=self.device)
        positions = positions_of(ids, mask)

        def states(form: Callable[[Tensor, int], Tensor]) -> Tensor:
            """Of a pass of three tokens, and one of the last."""
            first, cache = self._pass(ids[:, :3], form(mask[:, :3], 3), positions[:, :3], None)
            last, _ = self._pass(ids[:, 3:], form(mask, 1), positions[:, 3:], cache)
            return torch.cat([first, last], dim=1)[mask.bool()].float()

        with torch.no_grad():
            expected = states(lambda mask, tokens: mask)
            try:
                found = states(lambda mask, tokens: ready_mask(mask, tokens, dtype))
            except Exception:  # whatever it is that it does with masks
                return None
        rounding = 1e-5 if (self.compute_dtype or own) == torch.float32 else 2e-2
        close = (expected - found).abs().max() <= rounding * expected.abs().max()
        return dtype if close else None

    @contextlib.contextmanager
    def drawing(self, passes: int) -> Iterator[None]:
        """Around so many passes without gradient: weights in training are converted, or packed, once for all.

        Where they cannot be packed, on a GPU or in half precision, adapters stay apart: merged into bfloat16 weights
        their small changes would be lost, and the law drawn from would not be the one that is scored.
        """
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
            return self.hidden(ids, mask, positions_of(ids, mask), use_cache=False)[0]

    def logits(self, hidden: Tensor, temperature: float) -> Tensor:
        """Float32 logits (..., vocabulary) of hidden states (..., width)."""
        with self.precision():
            if self._body is None:
                logits = hidden
            else:
                logits = self._through(hidden) if self._head is None else self._head(hidden)
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


def log_softmax_at(logits: Tensor, token: Tensor) -> Tensor:
    """log softmax(logits) (rows, vocabulary) at tokens (rows,)."""
    return logits.gather(-1, token[:, None]).squeeze(-1) - logits.logsumexp(-1)
