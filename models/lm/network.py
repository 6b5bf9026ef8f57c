"""A Hugging Face causal language model as a body and a head, for sampling, scoring and particle methods.

* **body**: hidden states of tokens, with or without a key-value cache of those before them (`prefix`);
* **head**: float32 log-probabilities of hidden states a block of tokens at a time, so that (rows x tokens x
  vocabulary) logits are never held at once;
* **size**: how many rows fit a pass of bounded memory.

One forward pass of the network shows how its head follows its body: directly; or with another operation before it or
after it (logits soft-capped or scaled), where the network's forward pass is run with the hidden states in the place of
its body's output. Where neither gives the network's logits, these stand for hidden states and the head is the identity.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from . import packing
from .gradient_checkpointing import checkpointed
from .module_copies import with_forward, with_modules
from .usage import count_pass

# Elements of one float32 block of logits: 2**25 is 128 MB, about 680 tokens of a 49k vocabulary.
LOGITS_BLOCK = 2**25
# Numbers that one pass may hold: 512 MB in float32. On a GPU an eighth of its memory, where that is more.
HELD = 2**27


class CausalNetwork:
    """The body and the head of a causal network.

    :param network: any module with the call convention of ``transformers``' causal language models.
    :param compute_dtype: the dtype in which products of float32 weights are computed (autocast); None: float32.
    """

    def __init__(self, network: nn.Module, compute_dtype: torch.dtype | None = None) -> None:
        inside_peft: Any = getattr(network, "get_base_model", None)
        causal: Any = inside_peft() if inside_peft else network
        self.network = causal
        self.compute_dtype = compute_dtype
        self.parameters = list(causal.parameters())
        accepted = inspect.signature(causal.forward).parameters
        self._takes_positions = "position_ids" in accepted
        self.body: nn.Module | None = None  # None: logits are the hidden states
        self.head: nn.Module | None = None  # None with a body: logits are `_through` the network
        self._output_type: type[Any] = object  # of the body
        self._split()

    def _split(self) -> None:
        """Find body and head.

        A hook replaces the output of the head by noise: the body's output must reach the head unchanged, and the head's
        must come out unchanged. Noise, since soft-capping does not show on small logits.
        """
        body = getattr(self.network, "base_model", None)
        head = self.network.get_output_embeddings() if hasattr(self.network, "get_output_embeddings") else None
        if body is None or head is None or body is self.network:
            return
        probe = (torch.arange(4, device=self.device) % self.vocab_size)[None]
        noise = 100.0 * torch.randn((1, 4, self.vocab_size), generator=torch.Generator().manual_seed(0))
        inputs: list[Tensor] = []
        outputs: list[Tensor] = []

        def replace(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            inputs.extend(args)
            outputs.append(noise.to(output))
            return outputs[-1]

        hook = head.register_forward_hook(replace)
        try:
            with torch.no_grad():
                logits = self.network(input_ids=probe, use_cache=False).logits
                out = body(input_ids=probe, use_cache=False)
        finally:
            hook.remove()
        hidden = getattr(out, "last_hidden_state", None)
        if hidden is None or len(outputs) != 1:
            return
        self.body, self._output_type = body, type(out)
        unchanged = inputs[0].shape == hidden.shape and torch.allclose(inputs[0], hidden, rtol=1e-3)
        if unchanged and torch.equal(logits.to(outputs[0]), outputs[0]):
            self.head = head
        elif not self._goes_through(hidden, probe):
            self.body = None

    def _goes_through(self, hidden: Tensor, probe: Tensor) -> bool:
        """Return whether the network's logits are a function of its body's hidden states."""
        with torch.no_grad():
            try:
                logits = self._through(hidden)
            except Exception:  # of whatever type, where the network needs more than the body's last hidden states
                return False
            return torch.allclose(logits, self.network(input_ids=probe, use_cache=False).logits, rtol=1e-3)

    def _through(self, hidden: Tensor) -> Tensor:
        """Return the logits (..., vocabulary) that the network computes of its body's hidden states (..., width)."""
        assert self.body is not None
        states = hidden.reshape(1, -1, hidden.shape[-1])
        output = self._output_type(last_hidden_state=states)
        network = with_modules(self.network, {self.body: with_forward(self.body, lambda *_, **__: output)})
        ids = torch.zeros(states.shape[:2], dtype=torch.long, device=states.device)
        logits: Tensor = network(input_ids=ids, use_cache=False).logits
        return logits.reshape(*hidden.shape[:-1], -1)

    @property
    def device(self) -> torch.device:
        return self.parameters[0].device if self.parameters else torch.device("cpu")

    @property
    def requires_grad(self) -> bool:
        return any(p.requires_grad for p in self.parameters)

    @property
    def version(self) -> int:
        """Torch's count of the weights' in-place changes.

        Weights that were made in inference mode have none: only there could they be changed, where no score is kept.
        """
        return sum(p._version for p in self.parameters if not p.is_inference())

    @cached_property
    def vocab_size(self) -> int:
        """Width of the logits, which may be more than the tokenizer's tokens."""
        return int(self.network.config.get_text_config().vocab_size)

    @cached_property
    def context_length(self) -> int | None:
        """The most tokens the network can attend to, None if its config does not say."""
        config = self.network.config.get_text_config()
        return getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)

    @cached_property
    def width(self) -> int:
        """Width of the hidden states, 0 if the network has none."""
        return int(getattr(self.network.config.get_text_config(), "hidden_size", 0) or 0)

    # -- size ------------------------------------------------------------------------------------------------

    def rows_per_batch(self, length: int) -> int:
        """Return how many sequences of ``length`` tokens fit a pass without gradient.

        Counted are all keys and values, the states of a layer, and the logits of one token each, three times over,
        which drawing from them takes.
        """
        return max(1, self._room // (length * (self.cached_numbers + self.layer_numbers) + 3 * self.vocab_size))

    def rows_per_micro_batch(self, length: int) -> int:
        """Return of how many sequences of ``length`` tokens the activations, kept for a gradient, fit."""
        return max(1, self._room // (length * max(self._kept, 1)))

    @property
    def _room(self) -> int:
        """Numbers that a pass may hold: a share of all memory, not of free memory, so that a seed reproduces runs."""
        if self.device.type != "cuda":
            return HELD
        return max(HELD, torch.cuda.get_device_properties(self.device).total_memory // (8 * 4))

    @cached_property
    def cached_numbers(self) -> int:
        """Numbers in the keys and values of a token, counted on a pass."""
        ids = torch.zeros((1, 2), dtype=torch.long, device=self.device)
        with torch.no_grad():
            _, cache = self._probe(ids, None, positions_of(ids, None), None)
        kept = [getattr(layer, name, None) for layer in getattr(cache, "layers", ()) for name in ("keys", "values")]
        return sum(x.numel() for x in kept if isinstance(x, Tensor)) // ids.numel()

    @cached_property
    def _layers(self) -> int:
        return int(getattr(self.network.config.get_text_config(), "num_hidden_layers", 0) or 0)

    @cached_property
    def layer_numbers(self) -> int:
        """Numbers that one layer computes of a token, as counted in Llamas; and logits that stand for hidden states."""
        config = self.network.config.get_text_config()
        inner = int(getattr(config, "intermediate_size", 0) or 4 * self.width)
        return 12 * self.width + 4 * inner + (self.vocab_size if self.body is None else 0)

    @property
    def _kept(self) -> int:
        """Numbers that a gradient keeps of a token."""
        return max(self._layers, 1) * self.layer_numbers

    # -- body ------------------------------------------------------------------------------------------------

    def hidden(
        self,
        ids: Tensor,
        mask: Tensor | None,
        positions: Tensor,
        cache: Any = None,
        *,
        use_cache: bool = True,
        gradient_checkpointing: bool = False,
    ) -> tuple[Tensor, Any]:
        """Return hidden states (rows, tokens, width) of ``ids`` (rows, tokens), and the cache that they have grown.

        :param positions: of the tokens, (rows, tokens).
        :param cache: keys and values of the tokens before; None if there are none.
        :param mask: 1 at tokens that are not padding, (rows, cached + tokens); None where none is.
        :param gradient_checkpointing: the backward pass computes the inside of each layer again.
        """
        count_pass(ids.numel())
        if mask is not None and self.mask_dtype is not None:
            mask = causal_mask(mask, ids.shape[-1], self.mask_dtype)
        module = self.body or self.network
        with self.precision():
            inputs = self._inputs(ids, mask, positions, cache)
            out = (checkpointed(module) if gradient_checkpointing else module)(**inputs, use_cache=use_cache)
        return self._states(out)

    def hidden_of_texts(self, ids: Tensor, mask: Tensor | None, gradient_checkpointing: bool = False) -> Tensor:
        """Return hidden states (rows, tokens, width) of left-padded texts (rows, tokens), without a cache."""
        positions = positions_of(ids, mask)
        return self.hidden(ids, mask, positions, use_cache=False, gradient_checkpointing=gradient_checkpointing)[0]

    def _inputs(self, ids: Tensor, mask: Tensor | None, positions: Tensor, cache: Any) -> dict[str, Any]:
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "past_key_values": cache}
        return inputs | {"position_ids": positions} if self._takes_positions else inputs

    def _states(self, out: Any) -> tuple[Tensor, Any]:
        return out.logits if self.body is None else out.last_hidden_state, getattr(out, "past_key_values", None)

    def _probe(self, ids: Tensor, mask: Tensor | None, positions: Tensor, cache: Any) -> tuple[Tensor, Any]:
        """Return what `hidden` does, with any form of mask, and without counting the pass."""
        with self.precision():
            return self._states((self.body or self.network)(**self._inputs(ids, mask, positions, cache)))

    @cached_property
    def mask_dtype(self) -> torch.dtype | None:
        """The dtype of the `causal_mask` that the network takes; None if it takes masks (rows, cached + tokens) alone.

        A network that makes the causal mask itself asks the device, at every token, whether anything is padding, and
        the host waits for the answer. Those whose layers have windows need several masks, and make them themselves.
        Others are tried: hidden states must be the same.
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
            """Return the hidden states of a pass of three tokens, and of one more of the last."""
            first, cache = self._probe(ids[:, :3], form(mask[:, :3], 3), positions[:, :3], None)
            last, _ = self._probe(ids[:, 3:], form(mask, 1), positions[:, 3:], cache)
            return torch.cat([first, last], dim=1)[mask.bool()].float()

        with torch.no_grad():
            expected = states(lambda mask, tokens: mask)
            try:
                found = states(lambda mask, tokens: causal_mask(mask, tokens, dtype))
            except Exception:  # of whatever type, where the network expects another mask
                return None
        rounding = 1e-5 if (self.compute_dtype or own) == torch.float32 else 2e-2
        close = (expected - found).abs().max() <= rounding * expected.abs().max()
        return dtype if close else None

    # -- precision -------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def drawing(self, passes: int) -> Iterator[CausalNetwork]:
        """Give a network for so many passes without gradient: weights in training are converted, or packed, once.

        Where they cannot be packed, on a GPU or in half precision, adapters are not merged: in bfloat16 weights their
        small changes would be lost, and draws would not follow the distribution that is scored.
        """
        large = sum(p.numel() for p in self.parameters) >= packing.MIN_WEIGHTS
        if self.requires_grad and large and passes >= packing.MIN_PASSES and self.compute_dtype is None:
            yield self._packed()
        else:
            with self.precision():
                yield self

    def _packed(self) -> CausalNetwork:
        """Return a copy with packed weights."""
        new = copy.copy(self)
        network: Any = packing.packed(self.network)
        new.network = network
        new.body = None if self.body is None else network.base_model
        new.head = None if self.head is None else network.get_output_embeddings()
        return new

    def precision(self) -> contextlib.AbstractContextManager[Any]:
        """Autocast to ``compute_dtype``. One block around several passes converts the weights once."""
        if self.compute_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.compute_dtype)

    # -- head ------------------------------------------------------------------------------------------------

    def logits(self, hidden: Tensor, temperature: float) -> Tensor:
        """Return float32 logits (..., vocabulary) of hidden states (..., width)."""
        with self.precision():
            if self.body is None:
                logits = hidden
            elif self.head is None:
                logits = self._through(hidden)
            else:
                logits = self.head(hidden)
        return logits.float() / temperature if temperature != 1.0 else logits.float()

    def token_log_prob(self, hidden: Tensor, targets: Tensor, temperature: float) -> Tensor:
        """Return log p(target | hidden), (tokens,), for hidden (tokens, width) and targets (tokens,), block by block.

        With gradients, if these tokens are more than one block, the logits of a block are not kept, and the backward
        pass computes them again.
        """

        def block(h: Tensor, x: Tensor) -> Tensor:
            return log_softmax_at(self.logits(h, temperature), x)

        size = max(1, LOGITS_BLOCK // self.vocab_size)
        blocks = zip(hidden.split(size), targets.split(size), strict=True)
        if torch.is_grad_enabled() and len(targets) > size:
            return torch.cat([checkpoint(block, h, x, use_reentrant=False) for h, x in blocks])
        return torch.cat([block(h, x) for h, x in blocks])


def log_softmax_at(logits: Tensor, token: Tensor) -> Tensor:
    """Return log softmax(logits), of logits (rows, vocabulary), at tokens (rows,)."""
    return logits.gather(-1, token[:, None]).squeeze(-1) - logits.logsumexp(-1)


def positions_of(ids: Tensor, mask: Tensor | None) -> Tensor:
    """Return the positions (row, length) of left-padded ids (row, length)."""
    if mask is None:
        return torch.arange(ids.shape[-1], device=ids.device).expand(ids.shape)
    return (mask.cumsum(-1) - 1).clamp_min(0)  # no token attends to padding, whose own position does not matter


def causal_mask(mask: Tensor, tokens: int, dtype: torch.dtype) -> Tensor:
    """Return where each of the last ``tokens`` of left-padded texts attends to, (row, 1, tokens, length).

    :param mask: 1 at tokens that are not padding, (row, length).
    :param dtype: bool for True and False; a float type for 0 and its minimum, which are added to attention logits.
    """
    length = mask.shape[-1]
    at = torch.arange(length, device=mask.device)
    row = at[length - tokens :, None]
    # padding attends to itself: some kernels return NaN for a row that attends to nothing
    attended = (mask.bool()[:, None, None, :] & (at < row)) | (at == row)
    if dtype == torch.bool:
        return attended
    return torch.zeros_like(attended, dtype=dtype).masked_fill(~attended, torch.finfo(dtype).min)
