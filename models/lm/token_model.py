"""A network, its tokenizer and its special tokens: what `Autoregressive` needs of a language model."""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from functools import partial
from typing import Annotated, Any, Self, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from bayeslm.model_card import TrainingNotes
from bayeslm.posterior import Posterior
from bayeslm.validation import Count, Shape, Unchecked, show, validated

from . import adapters, completions, joining, packing, texts
from .compiled import CompiledStep, refuse_uncompilable
from .configs import is_encoder_decoder
from .encoding import Encoded, Prompt, Prompts, Vocabulary, encode
from .gradient_checkpointing import checkpointable_layers
from .module_errors import ModuleWithProperties
from .network import CausalNetwork
from .own_forward import Findings
from .quantised import quantised_layers, refuse_quantised
from .sampler import Sampler, Weights
from .sharding import shard, take_in
from .special_tokens import find_special_tokens
from .token_bytes import token_bytes
from .weights import SharedWeights

M = TypeVar("M", bound="TokenModel")


@validated
class TokenModel(ModuleWithProperties):
    """A network as a model of token ids, and what they read as; see `LanguageModel`, also for the parameters.

    How the network is scored is found out at its first use, and again when its layers have been replaced (`current`);
    weights that several models share are known to each of them, and checked.
    """

    def __init__(
        self,
        network: nn.Module,
        tokenizer: Any = None,
        *,
        eos_token_ids: Annotated[int | Collection[int] | None, Unchecked] = None,
        pad_token_id: int | None = None,
        decoder_start_ids: Annotated[int | Collection[int] | None, Unchecked] = None,
        name: str | None = None,
        batch_size: Count | None = None,
        micro_batch_size: Count | None = None,
        gradient_checkpointing: bool = False,
        compute_dtype: torch.dtype | None = None,
        sampler: Annotated[Sampler | None, Unchecked] = None,
        compile: bool = False,
    ) -> None:
        super().__init__()
        if tokenizer is not None and not hasattr(tokenizer, "decode"):
            what = "must be a tokenizer of transformers or None"
            raise TypeError(f"LanguageModel: tokenizer {what}, got {show(tokenizer)}")
        network = adapters.unwrapped(network)
        adapters.check_supported(network)
        self.compute_dtype = compute_dtype
        self._compiled = CompiledStep() if compile else None
        self._take_in(network)
        self.network = network.requires_grad_(False)
        self.tokenizer = tokenizer
        self.name = name
        self.batch_size = batch_size
        self.micro_batch_size = micro_batch_size
        if gradient_checkpointing:
            checkpointable_layers(network)
        self.gradient_checkpointing = gradient_checkpointing
        self._exact: frozenset[str] | None = None  # the names of weights that are not converted, if known
        self._causal: CausalNetwork | None = None
        self._findings: Findings | None = None
        self._shared: SharedWeights | None = None
        self.provenance: Posterior | TrainingNotes | None = None
        self._is_named = True  # whether the weights are those that `name` names
        self.sampler = sampler
        self._departed = False  # whether weights other than adapters are not those that the sampler was given for
        if sampler is not None and is_encoder_decoder(network):
            raise TypeError("samplers continue prompts, and this network is an encoder-decoder: leave out the sampler")
        self.eval()
        found = find_special_tokens(network, tokenizer, eos_token_ids, decoder_start_ids)
        self.eos_token_ids: tuple[int, ...] = found.eos
        self.bos_token_id: int | None = found.bos
        self.pad_token_id: int = found.pad if pad_token_id is None else pad_token_id
        self._decoder_start_ids = found.start
        if compile:
            _ = self.causal  # which refuses it here
            self._causal = None  # the device may change

    # -- properties ------------------------------------------------------------------------------------------

    def identity(self) -> dict[str, Any]:
        """Return all on which the distribution depends, by which checkpoints tell runs apart."""
        names = ["network", "tokenizer", "eos_token_ids", "bos_token_id", "pad_token_id", "compute_dtype"]
        names += ["decoder_start_ids"] if self.decoder_start_ids else []
        return {name: getattr(self, name) for name in names}

    @property
    def config(self) -> Any:
        return getattr(self.network, "config", None)

    @property
    def has_adapters(self) -> bool:
        """Whether the network is PEFT adapters around weights."""
        return adapters.has_adapters(self.network)

    @property
    def is_quantised(self) -> bool:
        """Whether weights are stored in few bits."""
        return bool(quantised_layers(self.network))

    @property
    def compiles(self) -> bool:
        """Whether tokens are written by a compiled graph."""
        return self._compiled is not None

    @property
    def has_text(self) -> bool:
        """Whether it has a tokenizer."""
        return self.tokenizer is not None

    @property
    def decoder_start_ids(self) -> tuple[int, ...]:
        """The tokens before every completion of an encoder-decoder network; none of a causal one."""
        return self._decoder_start_ids

    @property
    def device(self) -> torch.device:
        return self.causal.device

    @property
    def vocab_size(self) -> int:
        return self.causal.vocab_size

    @property
    def vocabulary(self) -> Vocabulary:
        """The token ids of completions."""
        return Vocabulary(self.vocab_size, self.eos_token_ids, self.pad_token_id)

    # -- the network, as it is now ---------------------------------------------------------------------------

    @property
    def causal(self) -> CausalNetwork:
        """The network as body and head (found at first use, since the device may change until then)."""
        if self._causal is None:
            self._take_in(self.network)
            self.network.eval()  # tried without dropout
            settings = (self.compute_dtype, self._exact, self._findings)
            if is_encoder_decoder(self.network):
                from .encoder_decoder import EncoderDecoderNetwork

                self._causal = EncoderDecoderNetwork(self.network, self.decoder_start_ids, *settings)
            else:
                self._causal = CausalNetwork(self.network, *settings)
            if self._compiled is not None and self._findings is None:
                refuse_uncompilable(self._causal)
            self._findings = self._causal.findings
            self._causal.compiled = self._compiled
        return self._causal

    def current(self) -> CausalNetwork:
        """Return the network, after a look at what may have happened to it since its last use.

        It is put back in evaluation mode, and tried again if layers have been replaced.

        :raises RuntimeError: if weights that it shares with another model were changed through the other.
        :raises TypeError: if its parameters are sharded in a way that is not supported, see `sharding`.
        """
        known = self._causal
        is_as_tried = known is not None and known.is_current
        if not is_as_tried:  # sharding replaces parameters
            self._take_in(self.network)
        if self._shared is not None:
            self._shared.check()
        if known is None or known.is_training:
            self.network.eval()
        if known is not None and not is_as_tried:
            self._causal = self._findings = None
        return self.causal

    def shard(self) -> Self:
        """Shard the network over all processes of a launch, in place, by FSDP2 (``fully_shard``), and return it.

        Each process then holds a part of every weight, and gathers one layer at a time as it computes. All processes
        must use the model alike: in a run they do. A policy of it is sharded too; adapters are whole on each process.

        :raises RuntimeError: if no processes were launched together, by ``torchrun`` for example.
        :raises TypeError: if this model is `packed`, has adapters, is of the encoder-decoder kind, or computes in
            another dtype than its weights'.
        :raises ValueError: if the network has no layers that can be sharded one by one.
        """
        packing.refuse_packed(self.network)
        refuse_quantised(self.network, "shard()", "shard a network of bfloat16 weights")
        if self.compiles:
            raise TypeError("shard() is for a language model without compile=True: leave that out")
        if self.has_adapters:
            raise TypeError("shard() is for a network without adapters: shard it before policy(lora_rank)")
        shard(self.network, checkpointable_layers(self.network))
        self._take_in(self.network)
        return self

    def _take_in(self, network: nn.Module) -> None:
        """Refuse a sharded network with which passes cannot be divided."""
        if take_in(network) and (is_encoder_decoder(network) or self.compute_dtype is not None or self.compiles):
            what = "with compile=True" if self.compiles else "with a compute_dtype"
            what = "of the encoder-decoder kind" if is_encoder_decoder(network) else what
            raise TypeError(f"a sharded network {what} is not supported: hand in the network whole")

    @property
    def weights(self) -> Weights:
        """The weights that are to draw, for a sampler."""
        from . import saving

        save = partial(saving.write_adapters, self.network)
        return Weights(self.network, self.current().version, self.has_adapters, self._departed, save)

    def _sharing(self, other: M) -> M:
        """Note which weights another model shares with this one, and return the other."""
        own = {id(p) for p in self.parameters()}
        shared = {name: p for name, p in other.network.named_parameters() if id(p) in own}
        other._shared = SharedWeights(shared)
        self._shared = SharedWeights(shared | ({} if self._shared is None else self._shared.tensors))
        return other

    def _unfreeze(self, weights: list[nn.Parameter]) -> Self:
        """Make some weights trainable, and return the model."""
        for p in weights:
            p.requires_grad_(True)
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """Convert or move all weights, as `to` does. Another model that shares them then refuses converted ones."""
        super()._apply(fn, recurse)
        if self._shared is not None:
            self._shared.renew()
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        new = self.__class__.__new__(self.__class__)
        memo[id(self)] = new
        shared = ("tokenizer", "provenance", "sampler")
        state = {k: copy.deepcopy(v, memo) for k, v in self.__dict__.items() if k not in ("_causal", *shared)}
        new.__dict__.update(state, _causal=None, **{k: self.__dict__[k] for k in shared})
        return new

    # -- texts -----------------------------------------------------------------------------------------------

    def encode_prompts(self, prompts: Prompts, max_new_tokens: int = 0) -> Encoded:
        """Return the token ids of prompts that leave room for ``max_new_tokens`` more; see `encode`."""
        return encode(
            prompts,
            self.tokenizer,
            bos_token_id=self.bos_token_id,
            vocab_size=self.causal.prompt_vocab_size,
            room=self.causal.room(max_new_tokens),
            device=self.device,
            complete=bool(self.decoder_start_ids),
        )

    def join(self, prompts: Prompts, *parts: Any) -> Encoded:
        """Return prompts that are continued by what was drawn, and by texts between, for the next distribution.

        ``lm(lm.join(prompts, x, " Answer:"), max_new_tokens=8)`` is the distribution of what follows prompt, completion
        and " Answer:". A completion is conditioned on as it was drawn, id for id, without its end. Batches broadcast,
        as under the plate of particles; the result can be joined again.

        :param prompts: strings, chats or token ids, as for `forward`, or joined ones.
        :param parts: each of them completions (*batch, token); a text for all prompts; a list or an array of texts, of
            which "" and None add nothing; or a message of a chat, ``{"role": ..., "content": ...}``, whose content is
            any of these. A message ends the assistant's turn, in which all drawn since the last message stands, and
            begins its next one. A template that drops parts of earlier turns, such as reasoning, does not drop what was
            drawn.
        :raises TypeError: for a part of another kind, a text without a tokenizer, a message after what is no chat, or
            an encoder-decoder network, whose sources do not go on.
        :raises ValueError: if batches do not broadcast, the tokenizer has no tokens that read as a text, or the chat
            template writes earlier turns otherwise once others follow.
        """
        if self.decoder_start_ids:
            raise TypeError(
                "join continues prompts, and the source of an encoder-decoder network is a complete text: hand in new "
                "sources, such as lm(list of texts)"
            )
        return joining.join(self.encode_prompts(prompts), parts, self.tokenizer, self.vocabulary)

    @validated
    def encode(
        self, texts: Annotated[Sequence[str] | np.ndarray, Unchecked], max_new_tokens: Count = 24, *, eos: bool = True
    ) -> Tensor:
        """Return the completions that are these texts, (*batch, max_new_tokens), to be observed; `decode` reads them.

        ``pyro.sample("answer", lm(prompts, max_new_tokens=8), obs=lm.encode(answers, 8))`` observes the answers. A text
        continues its prompt: it begins with a space where its first word is one of its own, but for tokenizers of
        words.

        :param texts: a list, or an object array, whose shape becomes the batch's.
        :param max_new_tokens: that of the distribution.
        :param eos: whether the text ends there. If not, it is observed that the completion begins with it: its
            probability is the sum of those of all completions that do.
        :raises TypeError: if there is no tokenizer, or a text is no string.
        :raises ValueError: if a text has more tokens than ``max_new_tokens``, holds an end, or cannot be written in the
            tokenizer's tokens.
        """
        found = completions.encode_completions(
            texts, self.tokenizer, self.vocabulary, max_new_tokens, eos, self.decoder_start_ids
        )
        return found.to(self.device)

    @validated
    def decode(
        self,
        value: Annotated[Tensor, Shape("..., token", whole=True)],
        prompts: Sequence[Prompt] | np.ndarray | Tensor | Encoded | None = None,
    ) -> np.ndarray:
        """Return the texts of completions (*batch, token), up to their end, as an object array of the batch's shape.

        The text of a completion is what it adds to the text of its prompt (see `texts`); so it begins with a space
        where a word of its own begins. Without ``prompts``, and where several prompts share a value, it is what the
        completion adds to a text that ends in a word. Those of an encoder-decoder network are texts of their own.

        :param prompts: as for `forward`, or encoded; their shape broadcasts with the batch.
        :raises TypeError: if there is no tokenizer.
        :raises ValueError: if the shapes of prompts and batch do not broadcast.
        """
        if self.tokenizer is None:
            raise TypeError("this LanguageModel has no tokenizer to decode with")
        encoded = prompts if isinstance(prompts, Encoded | None) else self.encode_prompts(prompts)
        if self.decoder_start_ids:
            encoded = Encoded(torch.tensor(self.decoder_start_ids), None)
        rows = self.vocabulary.before_end(value)
        return texts.completion_texts(self.tokenizer, rows, value.shape[:-1], encoded)

    @validated
    def token_ends(self, value: Annotated[Tensor, Shape("..., token", whole=True)], decoded: np.ndarray) -> np.ndarray:
        """Return where each token of completions (*batch, token) ends in their texts (*batch), see `texts`."""
        before = texts.context_of(self.tokenizer, self.decoder_start_ids) if self.decoder_start_ids else None
        rows = self.vocabulary.before_end(value)
        return texts.token_ends(self.tokenizer, rows, decoded, value.shape[-1], before)

    def token_bytes(self, prompts: Encoded) -> tuple[bytes, ...] | None:
        """Return the bytes that each token adds to the text of these prompts, or None, see `token_bytes`."""
        return token_bytes(self.tokenizer, self.vocab_size, prompts)

    @validated
    def token_ids(self, value: Annotated[Tensor, Shape("..., token", whole=True)]) -> np.ndarray:
        """Return completions (*batch, token) as lists of token ids, with the end, an object array of the batch's shape.

        These are the ``completion_ids`` of a reward in TRL's convention.
        """
        rows = self.vocabulary.with_end(value)
        return np.fromiter(rows, dtype=object, count=len(rows)).reshape(tuple(value.shape[:-1]))

    @validated
    def detokenize(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """Return the text of each row of token ids, without special tokens."""
        return texts.decode(self.tokenizer, rows)
