"""A Hugging Face causal language model as a body and a head, for sampling, scoring and particle methods.

Encoder-decoder networks (`encoder_decoder`) differ in what a prompt is, and share all else.

* **body**: hidden states of tokens, with or without a key-value cache of those before them (`prefix`);
* **head**: float32 logits of hidden states (`scoring` asks for those of a block of tokens at a time);
* **size**: how many rows fit a pass of bounded memory (`memory`).

One forward pass of the network shows how its head follows its body: directly; or with another operation before it or
after it (logits soft-capped or scaled), where the network's forward pass is run with the hidden states in the place of
its body's output. Where neither gives the network's logits, these stand for hidden states and the head is the identity.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Collection, Hashable, Iterator
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from bayeslm.validation import validated

from . import configs, memory, own_forward, packing
from .adapters import exact_weights
from .encoding import positions_of
from .gradient_checkpointing import checkpointed
from .lockstep import BODY, HEAD, WHOLE
from .masks import causal_mask
from .module_copies import with_forward, with_modules, with_parameters
from .own_forward import Findings, accepted
from .sharded_passes import shards_of
from .usage import count_pass
from .weights import Changes
from .whole_texts import one_length_at_a_time

if TYPE_CHECKING:
    from .caches import DynamicCache

T = TypeVar("T")


@validated
class CausalNetwork:
    """The body and the head of a causal network.

    :param network: any module with the call convention of ``transformers``' causal language models.
    :param compute_dtype: the dtype that float32 weights are converted to in every pass; None: they are not.
    :param exact: the names of weights that are not converted; None: those that transformers keeps in float32.
    :param findings: those of a network of which this is a copy; None: it is tried.
    :raises TypeError: if it is not scored as its own forward pass scores, or is not causal.
    """

    auto_class = "AutoModelForCausalLM"  # by which transformers loads such networks
    start_ids: tuple[int, ...] = ()  # the tokens between a prompt and its completion
    compiled: Callable[..., Tensor] | None = None  # writes tokens (`compiled`); None: passes as of any text do

    def __init__(
        self,
        network: nn.Module,
        compute_dtype: torch.dtype | None = None,
        exact: Collection[str] | None = None,
        findings: Findings | None = None,
    ) -> None:
        inside_peft: Any = getattr(network, "get_base_model", None)
        causal: Any = inside_peft() if inside_peft else network
        self.network = causal
        self.compute_dtype = compute_dtype
        self.vocab_size = configs.vocab_size(causal)  # the width of the logits, maybe more than the tokenizer's tokens
        self.width = configs.size(causal, "hidden_size")  # of the hidden states, 0 if the network has none
        self._exact = set() if compute_dtype is None else exact_weights(network, causal, exact)
        self.parameters = list(causal.parameters())
        self._changes = Changes(network, causal)
        parameters = inspect.signature(causal.forward).parameters
        self.accepts_positions = self.pads_tokens and "position_ids" in parameters
        self.body: nn.Module | None = None  # None: logits are the hidden states
        self.head: nn.Module | None = None  # None with a body: logits are `_through` the network
        self._output_type: type[Any] = object  # of the body
        self.shards = shards_of(network, self._body_of(causal), self)
        self.findings = Findings() if findings is None else findings
        ids = own_forward.texts(self)
        with own_forward.aside(self.device), self._changes.during_pass():
            logits = self._logits_of(self._converted(network), ids)  # in the dtype that this model computes in
            self._split(ids)
            if self.shards is not None and self.body is None:
                self.shards.without_body()
            if findings is None:
                self.findings = own_forward.find(self, ids, logits)

    def _logits_of(self, network: nn.Module, ids: Tensor) -> Tensor:
        """Return the logits (row, length, vocabulary) that a network computes of texts (row, length).

        :raises TypeError: if it computes anything else, or fails.
        """

        def run() -> Any:
            return self._pass(WHOLE, partial(network, **accepted(network, self._arguments(ids))))

        return own_forward.checked_logits(self, ids, run)

    def _split(self, ids: Tensor) -> None:
        """Find body and head on some texts (row, length)."""
        body = self._body_of(self.network)
        head = self.network.get_output_embeddings() if hasattr(self.network, "get_output_embeddings") else None
        if body is None or head is None or body is self.network:
            return

        def of_body() -> Any:
            run = self._called(body, body)
            return self._pass(BODY, partial(run, **accepted(body, self._body_arguments(ids))))

        noise = 100.0 * torch.randn((*ids.shape, self.vocab_size), generator=torch.Generator().manual_seed(0))
        found = own_forward.follow(head, noise, partial(self._logits_of, self.network, ids), of_body)
        if found is None:
            return
        self.body, self._output_type = body, found.output_type
        if found.at_once:
            self.head = head
        elif not self._goes_through(found.hidden, ids):
            self.body = None

    def _goes_through(self, hidden: Tensor, ids: Tensor) -> bool:
        """Return whether the network's logits are a function of its body's hidden states."""
        try:
            logits = self._pass(HEAD, partial(self._through, hidden))
        except Exception:  # of whatever type, where the network needs more than the body's last hidden states
            return False
        return torch.allclose(logits, self._logits_of(self.network, ids), rtol=1e-3)

    def _through(self, hidden: Tensor) -> Tensor:
        """Return the logits (..., vocabulary) that the network computes of its body's hidden states (..., width)."""
        assert self.body is not None
        states = hidden.reshape(1, -1, hidden.shape[-1])
        output = self._output_type(last_hidden_state=states)
        body = with_forward(self.body, lambda *_, **__: output)
        network = self._converted(with_modules(self.network, {self.body: body}), stop=body)
        ids = torch.zeros(states.shape[:2], dtype=torch.long, device=states.device)
        run = self._called(self.network, network)
        logits: Tensor = run(**accepted(network, self._head_arguments(ids))).logits
        return logits.reshape(*hidden.shape[:-1], -1)

    def _body_of(self, network: Any) -> nn.Module | None:
        """Return the part of a network that computes hidden states."""
        body: nn.Module | None = getattr(network, "base_model", None)
        return body

    def _arguments(self, ids: Tensor) -> dict[str, Any]:
        """Return what the network is called with, to try it on texts (row, length)."""
        return {"input_ids": ids, "use_cache": False}

    def _body_arguments(self, ids: Tensor) -> dict[str, Any]:
        """Return what its body is called with, for the same hidden states."""
        return self._arguments(ids)

    def _head_arguments(self, ids: Tensor) -> dict[str, Any]:
        """Return what the network is called with where hidden states stand in the place of its body."""
        return self._arguments(ids)

    @property
    def name(self) -> str:
        return type(self.network).__name__

    @property
    def rounding(self) -> float:
        """The share of a number that is lost to rounding in a forward pass, at most."""
        dtypes = {p.dtype for p in self.parameters} | {self.compute_dtype or torch.float32}
        exact = dtypes <= {torch.float32, torch.float64} and torch.get_float32_matmul_precision() == "highest"
        return 1e-4 if exact else 2e-2

    @property
    def device(self) -> torch.device:
        return self.parameters[0].device if self.parameters else torch.device("cpu")

    @property
    def requires_grad(self) -> bool:
        return any(p.requires_grad for p in self.parameters)

    @property
    def version(self) -> Hashable:
        """A value that changes with the weights, what is computed with them, and which adapters are active."""
        return self._changes.version

    @property
    def is_training(self) -> bool:
        return self._changes.is_training

    @property
    def is_current(self) -> bool:
        """Whether it has the parameters, the forward passes and the hooks that it had when it was tried."""
        return not self._changes.are_made

    @property
    def prompt_vocab_size(self) -> int:
        """The number of tokens of prompts."""
        return self.vocab_size

    def room(self, max_new_tokens: int) -> int | None:
        """Return the most tokens of a prompt before a completion of so many; None: no limit."""
        return None if self.context_length is None else self.context_length - max_new_tokens

    @cached_property
    def context_length(self) -> int | None:
        """The most tokens that a text can have, None if the network's config does not say."""
        return configs.context_length(self.network)

    # -- size ------------------------------------------------------------------------------------------------

    def batches(self, prompt: int, new: int) -> memory.Batches:
        """Return how many prompts of so many tokens, and how many rows of so many new tokens, a pass takes."""
        records = self.compiled is not None and memory.records(self.device)
        return memory.Batches(self.footprint, memory.room(self.device), prompt, new, records)

    @cached_property
    def footprint(self) -> memory.Footprint:
        """What the network holds of a token."""
        dtype = self.compute_dtype or next((p.dtype for p in self.parameters if p.is_floating_point()), torch.float32)
        sizes = {"vocabulary": self.vocab_size, "cached": self.cached_numbers, "bytes_each": dtype.itemsize}
        return memory.Footprint.of(self.network, **sizes, logits_are_hidden=self.body is None)

    @cached_property
    def cached_numbers(self) -> int:
        """Numbers in the keys and values of a token, counted on a pass."""
        if not self.findings.caches:
            return 0
        ids = torch.zeros((1, 2), dtype=torch.long, device=self.device)
        with own_forward.aside(self.device):
            _, cache, *_ = self.read(ids, None)
        kept = [getattr(layer, name, None) for layer in getattr(cache, "layers", ()) for name in ("keys", "values")]
        return sum(x.numel() for x in kept if isinstance(x, Tensor)) // ids.numel()

    # -- body ------------------------------------------------------------------------------------------------

    def read(self, ids: Tensor, mask: Tensor | None) -> tuple[Tensor, Any, Tensor | None, Tensor]:
        """Read left-padded prompts (rows, length) once; return the fields of a `Prefix`."""
        rows, length = ids.shape
        lengths = torch.full((rows,), length, device=ids.device) if mask is None else mask.sum(-1)
        hidden, cache = self.hidden(ids, mask, positions_of(ids, mask), self.new_cache(mask))
        return hidden[:, -1], cache, mask, lengths

    def hidden_after(
        self, prompts: Tensor, mask: Tensor | None, ids: Tensor, gradient_checkpointing: bool = False
    ) -> Tensor:
        """Return hidden states (rows, 1 + tokens, width) after prompts and after each of ``ids`` that continue them.

        They are computed in one pass, without a cache.

        :param prompts: left-padded, (rows, length).
        :param mask: 1 at tokens of the prompts that are not padding, same shape; None where none is.
        :param ids: (rows, tokens).
        """
        mask = None if mask is None else pad(mask, (0, ids.shape[-1]), value=1)
        texts = torch.cat([prompts, ids], dim=-1)
        return self.hidden_of_texts(texts, mask, gradient_checkpointing)[:, prompts.shape[-1] - 1 :]

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
        :param cache: of the tokens before; for those after which others follow, `new_cache`.
        :param mask: 1 at tokens that are not padding, (rows, cached + tokens); None where none is.
        :param gradient_checkpointing: the backward pass computes the inside of each layer again.
        """
        from .caches import TextCache

        count_pass(ids.numel())
        if mask is not None and not isinstance(cache, TextCache) and self.mask_dtype is not None:
            mask = causal_mask(mask, ids.shape[-1], self.mask_dtype)
        module = self.decoding_module
        run = self._computing(checkpointed(module) if gradient_checkpointing else module)
        if isinstance(cache, TextCache):
            whole = one_length_at_a_time(partial(self._states_of_whole, run), cache.append(ids), mask)
            return whole[:, -ids.shape[-1] :], cache
        inputs = {"input_ids": ids, "attention_mask": mask, "past_key_values": cache, "use_cache": use_cache}
        if self.takes_positions:
            inputs["position_ids"] = positions
        out = run(**inputs)
        return self._states(out), getattr(out, "past_key_values", None)

    def hidden_of_texts(self, ids: Tensor, mask: Tensor | None, gradient_checkpointing: bool = False) -> Tensor:
        """Return hidden states (rows, tokens, width) of left-padded texts (rows, tokens), without a cache."""
        cache = None if self.shares_prefill(mask) else self.new_cache(mask)
        positions = positions_of(ids, mask)
        settings = {"use_cache": False, "gradient_checkpointing": gradient_checkpointing}
        return self.hidden(ids, mask, positions, cache, **settings)[0]

    @property
    def decoding_module(self) -> nn.Module:
        """What computes hidden states, or logits that stand for them."""
        return self._converted(self.body or self.network)

    @property
    def takes_positions(self) -> bool:
        """Whether the positions of tokens are passed to the network, rather than counted by it."""
        return self.accepts_positions and self.findings.takes_positions

    def shares_prefill(self, mask: Tensor | None) -> bool:
        """Return whether tokens continue the keys and values of texts with this mask; else whole texts are read."""
        if mask is not None and self.findings.caches and self.findings.pads is None:
            with own_forward.aside(self.device):
                self.findings.pads = self.holds_padded()
        return self.findings.caches and (mask is None or bool(self.findings.pads))

    def new_cache(self, mask: Tensor | None) -> DynamicCache:
        """Return the cache for the first tokens of texts with this mask.

        It keeps all tokens, also of networks whose layers attend to a window or a chunk: the one that such a network
        makes itself drops tokens by what its config says, whether or not its layers do as it says.
        """
        from .caches import DynamicCache, TextCache

        return DynamicCache() if self.shares_prefill(mask) else TextCache()

    def trial_cache(self, ids: Tensor) -> Any:
        """Return the cache before the first tokens of texts (rows, length), to try what `findings` say."""
        from .caches import DynamicCache, TextCache

        return DynamicCache() if self.findings.caches else TextCache()

    def holds_padded(self) -> bool:
        """Return whether padded prompts score as without padding."""
        return own_forward.holds_padded(self)

    @property
    def pads_tokens(self) -> bool:
        """Whether completions of different lengths can be continued in one batch."""
        return True

    def _states_of_whole(self, module: Callable[..., Any], ids: Tensor) -> Tensor:
        """Return hidden states (rows, tokens, width) of texts as the network's own forward pass computes them."""
        return self._states(module(**accepted(self.body or self.network, self._arguments(ids))))

    def _states(self, out: Any) -> Tensor:
        states: Tensor = out.logits if self.body is None else out.last_hidden_state
        return states

    @cached_property
    def mask_dtype(self) -> torch.dtype | None:
        """The dtype of the `causal_mask` that the network takes; None if it takes masks (rows, cached + tokens) alone.

        A network that makes the causal mask itself asks the device, at every token, whether anything is padding, and
        the host waits for the answer. Those whose layers have windows need several masks, and make them themselves.
        Others are tried: hidden states must be the same.
        """
        self.__dict__["mask_dtype"] = None  # while it is tried
        with own_forward.aside(self.device):
            return own_forward.mask_dtype(self)

    # -- sharded weights -------------------------------------------------------------------------------------

    def _pass(self, kind: int, work: Callable[[], T]) -> T:
        """Do a pass: of a sharded network with all processes, inside the hooks that gather what is around its body."""
        if self.shards is None:
            return work()
        return self.shards.together(kind, work if kind == WHOLE else partial(self.shards.inside, work))

    def _called(self, module: nn.Module, run: nn.Module) -> Callable[..., Any]:
        """Return what computes a module, or a copy ``run`` of it, where its own hooks have run already."""
        forward: Callable[..., Any] = run.forward
        return forward if self.shards is not None and self.shards.opens(module) else run

    def _computing(self, run: nn.Module) -> Callable[..., Any]:
        """Return what computes hidden states by a copy of the body, each time in a pass."""
        if self.shards is None:
            return run
        kind, called = (WHOLE, run) if self.body is None else (BODY, self._called(self.body, run))
        return lambda **inputs: self._pass(kind, partial(called, **inputs))

    # -- precision -------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def drawing(self, passes: int) -> Iterator[CausalNetwork]:
        """Give a network for so many passes without gradient: weights in training are converted, or packed, once.

        Where they cannot be packed, on a GPU or in half precision, adapters are not merged: in bfloat16 weights their
        small changes would be lost, and draws would not follow the distribution that is scored.
        """
        large = sum(p.numel() for p in self.parameters) >= packing.MIN_WEIGHTS
        if self.shards is not None or (self.compiled is not None and self.compute_dtype is None):
            yield self
        elif self.compute_dtype is not None:
            yield self._around(self._converted(self.network))
        elif self.requires_grad and large and passes >= packing.MIN_PASSES:
            yield self._around(packing.packed(self.network))
        else:
            yield self

    def _around(self, network: Any) -> CausalNetwork:
        """Return a copy for passes without gradient, around a copy of the network with other weights."""
        new = copy.copy(self)
        new.network = network
        new.parameters = list(network.parameters())
        new.compute_dtype = None
        new.body = None if self.body is None else self._body_of(network)
        new.head = None if self.head is None else network.get_output_embeddings()
        return new

    def _converted(self, module: nn.Module, stop: nn.Module | None = None) -> nn.Module:
        """Return a copy of a module that computes in ``compute_dtype``, with gradients for the weights themselves.

        So a policy computes what its prior does in half precision, to the bit, until it is trained: autocast would not.

        :param stop: a module inside that is left as it is.
        """
        if self.compute_dtype is None:
            return module
        return with_parameters(module, self._convert, stop)

    def _convert(self, weight: nn.Parameter) -> Tensor:
        return weight.to(self.compute_dtype) if weight.is_floating_point() and weight not in self._exact else weight

    # -- head ------------------------------------------------------------------------------------------------

    def logits(self, hidden: Tensor, temperature: float) -> Tensor:
        """Return float32 logits (..., vocabulary) of hidden states (..., width)."""
        if self.body is None:
            logits = hidden
        elif self.head is None:
            logits = self._through(hidden) if self.shards is None else self._pass(HEAD, partial(self._through, hidden))
        elif self.shards is None:
            logits = self._converted(self.head)(hidden)
        else:
            logits = self._pass(HEAD, partial(self._called(self.head, self.head), hidden))
        return logits.float() / temperature if temperature != 1.0 else logits.float()
