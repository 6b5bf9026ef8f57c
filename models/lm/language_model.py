"""A network, its tokenizer and its special tokens: a prior over texts, or a policy."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import encoding, loading, packing
from .autoregressive import Autoregressive
from .gradient_checkpointing import checkpointable
from .network import CausalNetwork
from .tabular import NGramConfig, NGramForCausalLM


class LanguageModel(nn.Module):
    """Any Hugging Face causal language model as a law over completions.

    ``lm(prompts, max_new_tokens=24)`` is an `Autoregressive` distribution. The network is put in evaluation
    mode (a law must not change from call to call) and frozen (it is a prior); `policy` makes a trainable copy.

    :param network: a causal language model of `transformers`, a PEFT model around one, or any module with
        their call convention.
    :param tokenizer: its tokenizer; None if prompts are token ids and nothing is decoded.
    :param eos_token_ids: the tokens that end a completion. Default: as the network's generation config,
        its config or the tokenizer say, in this order; none of them if there are none.
    :param pad_token_id: fills completions after their end; it need not be a token of the network.
    :param name: where it was loaded from; written into adapters trained from it.
    :param batch_size: sequences in one forward pass at most; default: as many as bounded memory allows.
    :param micro_batch_size: of these, sequences whose activations are kept at once for a gradient; default: as many as
        bounded memory allows, ``batch_size`` at most.
    :param gradient_checkpointing: keep of each layer its input alone, and compute the rest anew in the backward pass
        of a policy: a third more time, and far less memory where texts are long.
    :param compute_dtype: what products of float32 weights are computed in (autocast), as in policies of bfloat16
        priors; None: in float32.
    :raises ValueError: if a batch size is < 1, an end is no token, or no layer can be checkpointed.
    """

    def __init__(
        self,
        network: nn.Module,
        tokenizer: Any = None,
        *,
        eos_token_ids: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
        name: str | None = None,
        batch_size: int | None = None,
        micro_batch_size: int | None = None,
        gradient_checkpointing: bool = False,
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for what, size in {"batch_size": batch_size, "micro_batch_size": micro_batch_size}.items():
            if size is not None and size < 1:
                raise ValueError(f"{what} must be at least 1, got {size}")
        self.network = network.requires_grad_(False)
        self.tokenizer = tokenizer
        self.name = name
        self.batch_size = batch_size
        self.micro_batch_size = micro_batch_size
        if gradient_checkpointing:
            checkpointable(network)
        self.gradient_checkpointing = gradient_checkpointing
        self.compute_dtype = compute_dtype
        self._causal: CausalNetwork | None = None
        self.eval()
        found = _first(
            eos_token_ids,
            getattr(getattr(network, "generation_config", None), "eos_token_id", None),
            getattr(self.config, "eos_token_id", None),
            getattr(tokenizer, "eos_token_id", None),
            (),
        )
        ends = {found} if isinstance(found, int) else set(found)
        vocabulary = range(self.config.get_text_config().vocab_size)
        if eos_token_ids is not None and not all(end in vocabulary for end in ends):
            raise ValueError(f"eos_token_ids {sorted(ends)} are not all in 0..{len(vocabulary) - 1}")
        self.eos_token_ids: tuple[int, ...] = tuple(sorted(end for end in ends if end in vocabulary))
        self.bos_token_id: int | None = _first(
            getattr(tokenizer, "bos_token_id", None), getattr(self.config, "bos_token_id", None)
        )
        self.pad_token_id: int = _first(
            pad_token_id,
            getattr(tokenizer, "pad_token_id", None),
            getattr(self.config, "pad_token_id", None),
            self.eos_token_ids[0] if self.eos_token_ids else 0,
        )

    # -- making one ------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str],
        *,
        base: LanguageModel | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        batch_size: int | None = None,
        micro_batch_size: int | None = None,
        gradient_checkpointing: bool = False,
        **kwargs: Any,
    ) -> LanguageModel:
        """Load a model by hub name or path; ``"smollm2"`` is SmolLM2-135M-Instruct from a package's own file.

        :param name_or_path: ``"smollm2"``, a folder, or a name on the Hugging Face hub. A folder that holds a
            PEFT adapter is loaded on top of its base model.
        :param base: the base model of an adapter, where the adapter's own record of it cannot be followed.
        :param dtype: of the weights; log-probabilities are float32 whatever it is, and so is what a policy trains.
        :param batch_size, micro_batch_size, gradient_checkpointing: as in `LanguageModel`.
        :param kwargs: handed to ``AutoModelForCausalLM.from_pretrained``. Remote code is never run.
        :raises OSError: if the model is not found, with how to get it.
        :raises ValueError: if ``base`` is given and there is no adapter to put on it.
        """
        network, tokenizer, name = loading.load(name_or_path, base=base, dtype=dtype, **kwargs)
        lm = cls(
            network,
            tokenizer,
            name=name,
            batch_size=batch_size,
            micro_batch_size=micro_batch_size,
            gradient_checkpointing=gradient_checkpointing,
            compute_dtype=loading.compute_dtype(name_or_path),
        )
        return lm.to(device) if device is not None else lm

    @classmethod
    def tabular(
        cls,
        vocabulary: Sequence[str],
        *,
        order: int = 2,
        table: Tensor | None = None,
        seed: int = 0,
        eos: str = "<eos>",
    ) -> LanguageModel:
        """A small explicit n-gram table, for exact work.

        :param vocabulary: the tokens, each a word without spaces; ``eos`` must be one of them. It also stands
            for the beginning of a text, so that an empty prompt is one ``eos``.
        :param order: n: the next token depends on the n - 1 before it.
        :param table: logits, shape ((V + 1) ** (order - 1), V), the extra context token being "nothing there";
            drawn from a standard normal with ``seed`` if None.
        """
        if eos not in vocabulary:
            raise ValueError(f"vocabulary has no {eos!r}: completions could not end")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = NGramForCausalLM(NGramConfig(vocab_size=len(vocabulary), order=order))
        if table is not None:
            if table.shape != network.table.shape:
                raise ValueError(f"table must have shape {tuple(network.table.shape)}, got {tuple(table.shape)}")
            network.table.data = table.clone()
        return cls(network, loading.word_tokenizer(vocabulary, eos))

    def policy(self, lora_rank: int | None = None, *, lora_alpha: int | None = None) -> LanguageModel:
        """A trainable copy.

        :param lora_rank: None copies every weight. A number gives LoRA adapters of that rank (Hu et al. 2021,
            arXiv 2106.09685) through PEFT on all linear layers but the head; the frozen weights under them are
            shared with this model, one copy in memory. Adapters begin at zero: the copy begins as this model.

        What is trained is float32, so that small steps are not lost: adapters are, whatever the frozen weights under
        them, and a copy of bfloat16 weights is a float32 one that computes in bfloat16.

        :raises TypeError: if this model is `packed`.
        :raises ValueError: if ``lora_rank`` < 1.
        """
        self._refuse_packed()
        if lora_rank is None:
            network, compute_dtype = loading.float32_copy(self.network)
            lm = self._around(network, name=None, compute_dtype=self.compute_dtype or compute_dtype)
            trainable = list(network.parameters())
        else:
            network = loading.with_lora(self.network, lora_rank, lora_alpha or 2 * lora_rank, self.name)
            lm = self._around(network, name=self.name, compute_dtype=self.compute_dtype)
            trainable = loading.own_parameters(network)
        for p in trainable:
            p.requires_grad_(True)
        return lm

    def continued(self) -> LanguageModel:
        """A trainable copy of a policy, to go on from where it is: of its adapters, whose weights are shared with this
        model, or of every weight where it has none.

        :raises TypeError: if this model is `packed`.
        """
        if not self.has_adapters:
            return self.policy()
        self._refuse_packed()
        lm = self._around(loading.adapters_copy(self.network), name=self.name, compute_dtype=self.compute_dtype)
        for p in loading.own_parameters(lm.network):
            p.requires_grad_(True)
        return lm

    def packed(self) -> LanguageModel:
        """The same law, to draw from and to score with only, faster on a CPU.

        The weights of linear layers in float32 on a CPU are copied into the order in which oneDNN multiplies by them
        (see `packing`); adapters are merged first. All else is shared with this model, which stays as it is, and
        later changes of whose linear layers the packed one does not see. Where nothing can be packed, as on a GPU, all
        is shared. A packed model can be neither trained, nor moved, nor saved.
        """
        network = loading.twin(self.network)
        if self.compute_dtype is None:
            packing.pack(network)
        return self._around(network, name=self.name, compute_dtype=self.compute_dtype)

    def _around(self, network: nn.Module, name: str | None, compute_dtype: torch.dtype | None = None) -> LanguageModel:
        """What this model is, around another network."""
        return LanguageModel(
            network,
            self.tokenizer,
            eos_token_ids=self.eos_token_ids,
            pad_token_id=self.pad_token_id,
            name=name,
            batch_size=self.batch_size,
            micro_batch_size=self.micro_batch_size,
            gradient_checkpointing=self.gradient_checkpointing,
            compute_dtype=compute_dtype,
        )

    def _refuse_packed(self) -> None:
        if any(isinstance(module, packing.PackedLinear) for module in self.network.modules()):
            raise TypeError("a packed model can be neither trained nor saved: use the model it was packed from")

    def save_pretrained(self, path: str | os.PathLike[str]) -> None:
        """Write the network (only the adapter, if there is one) and the tokenizer in the transformers/PEFT format, and
        beside them ``compute_dtype``, which that format has no place for.

        :raises TypeError: if this model is `packed`.
        """
        self._refuse_packed()
        network: Any = self.network
        # Embeddings are not adapted; PEFT would ask the hub whether the base's vocabulary was changed.
        settings: dict[str, Any] = {"save_embedding_layers": False} if self.has_adapters else {}
        network.save_pretrained(path, **settings)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(path)
        loading.note_compute_dtype(path, self.compute_dtype)

    def fit(self, texts: Sequence[str], **settings: Any) -> list[float]:
        """Maximum likelihood on texts; see `bayeslm.models.lm.fitting.fit`. Gives the loss of each step.

        :raises TypeError: if this model is `packed`.
        """
        self._refuse_packed()
        from .fitting import fit

        return fit(self, texts, **settings)

    # -- what it is ------------------------------------------------------------------------------------------

    @property
    def config(self) -> Any:
        return getattr(self.network, "config", None)

    @property
    def has_adapters(self) -> bool:
        """Whether it is PEFT adapters around weights."""
        return hasattr(self.network, "peft_config")

    @property
    def causal(self) -> CausalNetwork:
        """The network as body and head (found at first use, since devices may change until then)."""
        if self._causal is None:
            self._causal = CausalNetwork(self.network, self.compute_dtype)
        return self._causal

    @property
    def device(self) -> torch.device:
        return self.causal.device

    @property
    def vocab_size(self) -> int:
        return self.causal.vocab_size

    def __deepcopy__(self, memo: dict[int, Any]) -> LanguageModel:
        new = self.__class__.__new__(self.__class__)
        memo[id(self)] = new
        state = {k: copy.deepcopy(v, memo) for k, v in self.__dict__.items() if k not in ("_causal", "tokenizer")}
        new.__dict__.update(state, _causal=None, tokenizer=self.tokenizer)
        return new

    # -- what it does ----------------------------------------------------------------------------------------

    def forward(
        self,
        prompts: Sequence[encoding.Prompt] | np.ndarray | Tensor,
        max_new_tokens: int = 24,
        temperature: float = 1.0,
    ) -> Autoregressive:
        """The law of completions of ``prompts``; see `Autoregressive` and `encoding.encode` for the errors."""
        context = self.causal.context_length
        ids, mask = encoding.encode(
            prompts,
            self.tokenizer,
            bos_token_id=self.bos_token_id,
            vocab_size=self.vocab_size,
            room=None if context is None else context - max_new_tokens,
            device=self.device,
        )
        return Autoregressive(self, ids, mask, max_new_tokens, temperature)

    def decode(self, value: Tensor) -> np.ndarray:
        """Texts of completions (*batch, tokens), up to their end, as an object array of the batch's shape.

        :raises TypeError: if there is no tokenizer.
        """
        if self.tokenizer is None:
            raise TypeError("this LanguageModel has no tokenizer to decode with")
        ends = set(self.eos_token_ids)
        rows = []
        for row in value.reshape(-1, value.shape[-1]).tolist():
            end = next((t for t, token in enumerate(row) if token in ends), len(row))
            rows.append([token for token in row[:end] if token >= 0])
        texts = np.empty(len(rows), dtype=object)
        texts[:] = self.tokenizer.batch_decode(rows, skip_special_tokens=True)
        return texts.reshape(tuple(value.shape[:-1]))


def _first(*options: Any) -> Any:
    """The first option that is not None, or None."""
    return next((option for option in options if option is not None), None)
