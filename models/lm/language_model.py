"""A network, its tokenizer and its special tokens: a prior over texts, or a policy."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from bayeslm.model_card import read_notes
from bayeslm.processes import is_first
from bayeslm.validation import Count, Positive, Seed, Share, Unchecked, Within, validated

from . import adapters, fit_texts, fitting, generation, packing, stop_strings
from .autoregressive import Autoregressive
from .devices import own_device
from .encoding import Prompts, broadcast_where
from .quantised import refuse_quantised
from .sampler import Sampler
from .scopes import differentiating
from .settings import Settings
from .sharding import has_shards, refuse_shards, unsharded
from .token_model import TokenModel
from .truncation import Truncation
from .words import word_tokenizer


class LanguageModel(TokenModel):
    """Any Hugging Face language model, causal or encoder-decoder, as a distribution over completions.

    ``lm(prompts, max_new_tokens=24)`` is an `Autoregressive` distribution. The network is kept in evaluation mode (a
    distribution must not change from call to call) and frozen (it is a prior); `policy` makes a trainable copy. It is
    scored as its own forward pass scores: that is tried at its first use, and otherwise it is refused.

    Of an encoder-decoder network the prompt is the source: a complete text, which the encoder reads. A completion is
    what its decoder writes after ``decoder_start_ids``.

    :param network: a causal or encoder-decoder language model of `transformers`, a PEFT model around one, or any module
        with their call convention.
    :param tokenizer: its tokenizer; None if prompts are token ids and nothing is decoded.
    :param eos_token_ids: the tokens that end a completion. Default: those of the network's generation config, its
        config or the tokenizer, all those of the first of these that names a token of the vocabulary; else none.
    :param pad_token_id: fills completions after their end; it need not be a token of the network. Default: the
        tokenizer's or the config's, else the first end.
    :param decoder_start_ids: of an encoder-decoder network, the tokens before every completion, which are given and not
        drawn. Default: ``decoder_start_token_id`` and, if there is one, ``forced_bos_token_id`` of its generation
        config or config; name both to choose the language of a multilingual translation model.
    :param name: where it was loaded from; written into adapters trained from it.
    :param batch_size: sequences in one forward pass at most; default: as many as bounded memory allows.
    :param micro_batch_size: of these, sequences whose activations are kept at once for a gradient; default: as many as
        bounded memory allows, ``batch_size`` at most.
    :param gradient_checkpointing: keep of each layer its input alone, and compute the rest again in the backward pass
        of a policy: a third more time, and far less memory where texts are long.
    :param compute_dtype: the dtype that float32 weights are converted to in every pass, as in policies of bfloat16
        priors; None: they are not.
    :param sampler: who draws complete texts, of this model and of its policies, see `bayeslm.models.samplers`; None:
        the network here, token by token.
    :param compile: write tokens by one graph that `torch.compile` captures, in this model and in its policies, see
        `compiled`: the same numbers up to rounding, after a minute or so that the first token takes.
    :raises TypeError: for a network that reads speech or images, for adapters that are not inside the network's layers,
        for ``decoder_start_ids`` of a network without a decoder of its own, and for a sampler of one with it.
        And, with ``compile``, for networks that cannot be, with the reason.
    :raises ValueError: if a batch size is < 1, an end is not a token, or no layer can be checkpointed.
    """

    # -- loading and copying ---------------------------------------------------------------------------------

    @classmethod
    @validated
    @differentiating()
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str],
        *,
        base: LanguageModel | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        eos_token_ids: Annotated[int | Collection[int] | None, Unchecked] = None,
        pad_token_id: int | None = None,
        decoder_start_ids: Annotated[int | Collection[int] | None, Unchecked] = None,
        batch_size: Count | None = None,
        micro_batch_size: Count | None = None,
        gradient_checkpointing: bool = False,
        sampler: Annotated[Sampler | None, Unchecked] = None,
        compile: bool | None = None,
        **kwargs: Any,
    ) -> LanguageModel:
        """Load a model by hub name or path; ``"smollm2"`` is SmolLM2-135M-Instruct from a package's own file.

        :param name_or_path: ``"smollm2"``, a folder, or a name on the Hugging Face hub. A folder that holds a PEFT
            adapter is loaded on top of its base model, with the adapter's own tokenizer, chat template and EOS if the
            folder has them.
        :param base: the base model of an adapter, if not the one that the adapter names.
        :param device: where to put it. Of several processes on one machine "cuda" is each one's own GPU.
        :param dtype: of the weights; log-probabilities are float32 in any case, and so are weights in training.
        :param eos_token_ids: default: those that were given to the saved model, else see `LanguageModel`.
        :param pad_token_id: likewise.
        :param decoder_start_ids: likewise.
        :param batch_size: see `LanguageModel`.
        :param micro_batch_size: see `LanguageModel`.
        :param gradient_checkpointing: see `LanguageModel`.
        :param sampler: see `LanguageModel`; default: that of ``base``.
        :param compile: see `LanguageModel`; default: as ``base`` is, else False.
        :param kwargs: for ``from_pretrained`` of transformers' ``AutoModelForCausalLM``, or ``AutoModelForSeq2SeqLM``
            where the config says that it is an encoder-decoder network; ``subfolder``, ``revision`` and others that say
            where files are hold for the tokenizer too. Remote code is never run.
        :raises OSError: if the model is not found, with how to get it, or its tokenizer cannot be loaded.
        :raises ValueError: if ``base`` is given and the folder holds no adapter.
        """
        from . import loading  # here, as below: transformers takes a second or more to import

        around = None
        if base is not None:
            start = base.decoder_start_ids or None
            kept = Settings(base.eos_token_ids, base.pad_token_id, base.compute_dtype, None, start)
            around = loading.Pretrained(base.network, base.tokenizer, base.name if base._is_named else None, kept)
            sampler = base.sampler if sampler is None else sampler
            compile = base.compiles if compile is None else compile
        network, tokenizer, name, settings = loading.load(name_or_path, base=around, dtype=dtype, **kwargs)
        lm = cls(
            network,
            tokenizer,
            eos_token_ids=settings.eos_token_ids if eos_token_ids is None else eos_token_ids,
            pad_token_id=settings.pad_token_id if pad_token_id is None else pad_token_id,
            decoder_start_ids=settings.decoder_start_ids if decoder_start_ids is None else decoder_start_ids,
            name=name,
            batch_size=batch_size,
            micro_batch_size=micro_batch_size,
            gradient_checkpointing=gradient_checkpointing,
            compute_dtype=settings.compute_dtype,
            sampler=sampler,
            compile=bool(compile),
        )
        lm.provenance = read_notes(Path(name_or_path) / str(kwargs.get("subfolder") or ""))
        lm = lm if base is None else base._sharing(lm)
        return lm.to(own_device(device)) if device is not None else lm

    @classmethod
    @validated
    @differentiating()
    def tabular(
        cls,
        vocabulary: Sequence[str],
        *,
        order: Count = 2,
        table: Tensor | None = None,
        seed: Seed = 0,
        eos: str = "<eos>",
    ) -> LanguageModel:
        """Return a small explicit n-gram table, for exact work.

        :param vocabulary: the tokens, each a word without spaces; ``eos`` must be one of them.
        :param order: n: the next token depends on the n - 1 before it.
        :param table: logits, shape ((V + 1) ** (order - 1), V), the extra context token meaning "none"; drawn from a
            standard normal with ``seed`` if None.
        :param seed: of a table that is drawn.
        :param eos: the token before and after a text; an empty prompt is one ``eos``.
        :raises ValueError: if ``eos`` is not in the vocabulary, a token is in it twice, or ``table`` has another shape.
        """
        from .tabular import table_network

        if eos not in vocabulary:
            raise ValueError(f"vocabulary has no {eos!r}: completions could not end")
        return cls(table_network(len(vocabulary), order, table, seed), word_tokenizer(vocabulary, eos))

    @validated
    @differentiating()
    def policy(
        self, lora_rank: Count | None = None, *, lora_alpha: Count | None = None, lora_layers: Share = 1.0
    ) -> LanguageModel:
        """Return a trainable copy.

        Trained weights are float32, so that small steps are not lost: those of adapters, whatever the dtype of the
        frozen weights under them; and a copy of bfloat16 weights is a float32 one that computes in bfloat16.

        :param lora_rank: None copies every weight. A number gives LoRA adapters of that rank (Hu et al. 2021, arXiv
            2106.09685) through PEFT on all linear layers but the head; the frozen weights under them are shared with
            this model, one copy in memory. Adapters are 0 at first: the copy starts with this model's distribution.
        :param lora_alpha: scales the adapters by ``lora_alpha / lora_rank``; default: twice the rank.
        :param lora_layers: the share of the layers that get adapters, the last ones, but one at least. Gradients do not
            go through the layers before them.
        :raises TypeError: if this model is `packed`, or has quantised weights and there is no rank.
        :raises ValueError: if ``lora_rank`` < 1, or no layer takes an adapter.
        """
        packing.refuse_packed(self.network)
        self.current()
        if lora_rank is None:
            refuse_quantised(self.network, "policy() without a rank, which trains all weights,", "policy(lora_rank=16)")
            network, compute_dtype, exact = adapters.float32_copy(self.network)
            lm = self._with_network(network, None, self.compute_dtype or compute_dtype)
            lm._departed = True
            if self.compute_dtype is None:
                lm._exact = exact
            return lm._unfreeze(list(network.parameters()))
        network = adapters.with_lora(
            self.network, lora_rank, lora_alpha or 2 * lora_rank, self.name if self._is_named else None, lora_layers
        )
        lm = self._with_network(network, self.name, self.compute_dtype)
        return self._sharing(lm)._unfreeze(adapters.own_parameters(network))

    @differentiating()
    def continued(self) -> LanguageModel:
        """Return a trainable copy of a policy, with which its training can continue.

        Its adapters are copied and the weights under them shared; a policy without adapters is copied completely.

        :raises TypeError: if this model is `packed`.
        """
        if not self.has_adapters:
            return self.policy()
        packing.refuse_packed(self.network)
        self.current()
        network = adapters.adapters_copy(self.network)
        lm = self._with_network(network, self.name, self.compute_dtype)
        return self._sharing(lm)._unfreeze(adapters.own_parameters(network))

    @validated
    @differentiating()
    def merged(self, dtype: torch.dtype | None = None) -> LanguageModel:
        """Return the same distribution without adapters: a copy into whose weights they are merged.

        It shares nothing with this model. PEFT's own ``merge_and_unload`` changes weights in place, and with them the
        prior of a LoRA policy.

        :param dtype: of the copy's weights, into which they are rounded once. None: that of the weights under the
            adapters; of bfloat16 ones torch.float32 keeps what adding to them would round away.
        :raises TypeError: if this model is `packed`, or has quantised weights.
        :raises ValueError: if ``dtype`` is no floating-point type.
        """
        packing.refuse_packed(self.network)
        if dtype is not None and not dtype.is_floating_point:
            raise ValueError(f"dtype must be a floating-point type such as torch.bfloat16, got {dtype}")
        refuse_shards(self.network, "merging the adapters")
        instead = "from_pretrained(folder of the adapters, base=a model of whole weights).merged() rounds nothing away"
        refuse_quantised(self.network, "merged()", instead)
        self.current()
        network = adapters.merged(self.network, dtype)
        lm = self._with_network(network, None, self.compute_dtype if dtype is None else None)
        lm.provenance = self.provenance
        lm._departed = self._departed or self.has_adapters
        return lm

    def packed(self) -> LanguageModel:
        """Return the same distribution, for drawing and scoring only, faster on a CPU.

        The weights of linear layers in float32 on a CPU are copied into the order in which oneDNN multiplies by them
        (see `packing`); adapters are merged first. All else is shared with this model, which does not change; later
        changes of its linear layers do not reach the packed one. Where nothing is packed, as on a GPU and with
        ``compile``, all is shared. A packed model can be neither trained, nor moved, nor saved.
        """
        refuse_shards(self.network, "packing")
        self.current()
        network = adapters.twin(self.network)
        if self.compute_dtype is None and not self.compiles:
            network = packing.packed(network, checksums=True)
        return self._sharing(self._with_network(network, self.name, self.compute_dtype))

    def _with_network(self, network: nn.Module, name: str | None, compute_dtype: torch.dtype | None) -> LanguageModel:
        """Return a copy with another network and the same settings."""
        same = ("eos_token_ids", "pad_token_id", "batch_size", "micro_batch_size", "gradient_checkpointing")
        settings: dict[str, Any] = {setting: getattr(self, setting) for setting in same}
        start = self.decoder_start_ids or None
        lm = LanguageModel(
            network, self.tokenizer, name=name, compute_dtype=compute_dtype, decoder_start_ids=start, **settings
        )
        lm._exact, lm._findings = self._exact, self._findings
        lm.sampler, lm._departed, lm._compiled = self.sampler, self._departed, self._compiled
        return lm

    @validated
    def save_pretrained(self, path: str | os.PathLike[str]) -> None:
        """Write the network (only the adapter, if there is one) and the tokenizer in the transformers/PEFT format.

        The folder appears when it is complete; a model that it holds already is replaced, and other files stay. What
        that format has no place for goes into a file of its own, ``bayeslm.json``: ``compute_dtype``, and end and
        padding tokens that the saved network and tokenizer do not name themselves. A model card, README.md, says how to
        load it in other programs, and how it was trained (`provenance`); a README.md of your own stays. Of several
        processes that run together the first one writes alone.

        :raises TypeError: if this model is `packed`.
        :raises ValueError: if it has several active adapters.
        :raises OSError: if the disk refuses; the folder is then as it was before.
        """
        packing.refuse_packed(self.network)
        network = unsharded(self.network, keep=is_first()) if has_shards(self.network) else self.network
        if network is not None and is_first():
            from . import saving

            saving.save(self, network, path)

    def push_to_hub(
        self, repo_id: str, *, private: bool | None = None, token: str | bool | None = None, **kwargs: Any
    ) -> str:
        """Upload what `save_pretrained` writes to the Hugging Face hub; a repository is made if there is none.

        :param repo_id: such as "me/my-policy".
        :param private: of a new repository; None: as the account has it.
        :param token: of the account; None: the one that ``hf auth login`` has stored.
        :param kwargs: for ``huggingface_hub.HfApi.upload_folder``: ``commit_message``, ``revision``, ``create_pr``, ...
        :returns: the address of the commit.
        :raises ValueError: if this model is an adapter whose base model is not on the hub.
        """
        from . import saving

        packing.refuse_packed(self.network)
        return saving.push(self.save_pretrained, self.network, repo_id, private, token, **kwargs)

    @validated
    def fit(
        self,
        texts: Annotated[Any, Unchecked],
        prompts: Prompts | None = None,
        *,
        num_steps: Count = 200,
        batch_size: Count = 16,
        learning_rate: Positive = 1e-3,
        schedule: fitting.Schedule = "constant",
        max_tokens: Count = 128,
        held_out: Annotated[Any, Unchecked] = None,
        every: Count | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
        seed: Seed | None = None,
        progress: bool = True,
    ) -> fitting.Losses:
        """Maximise sum_n log p(text_n EOS | prompt_n) over the weights with AdamW; they are frozen again after.

        Of a network with adapters the adapters are trained, since the weights under them may be another model's.
        Without prompts BOS is that of each text; without a BOS token, the text's own first token.

        :param texts: a list of texts; or a table, such as a ``datasets.Dataset``, with a column ``text``, or ``prompt``
            and ``completion``.
        :param prompts: of each text the prompt that it completes: of an encoder-decoder network, which needs them, the
            source.
        :param num_steps: steps of AdamW.
        :param batch_size: texts in a step, drawn without replacement; all of them if there are no more. Those that do
            not fit the memory of a pass (or ``micro_batch_size``) are computed in parts.
        :param learning_rate: of AdamW, at the start.
        :param schedule: of the learning rate: "constant", or "linear" or "cosine" decay to 0 after the last step.
        :param max_tokens: longer texts are cut there, and their end is not learned.
        :param held_out: texts that are not learned, whose loss is computed, and the weights of its lowest value are
            kept: a share of the texts, chosen at random, or what ``texts`` may be.
        :param every: steps from one loss held out, and from one checkpoint, to the next; None: a tenth of all steps.
        :param checkpoint: a folder. The same call, on the same weights, resumes what it holds, bit-identically on a
            CPU, and of a fit that is done takes the result. With a constant rate ``num_steps`` may have been raised.
        :param seed: of the batches and of a share held out; None: one that the system chooses.
        :param progress: show a progress bar.
        :returns: the loss of each step, nats a token: a list, which has those held out as ``held_out``.
        :raises TypeError: if there is no tokenizer, this model is `packed`, or prompts are missing.
        :raises ValueError: if there are no texts, one has no token to predict, a setting is out of range, or the
            checkpoint is damaged or another fit's.
        :raises FloatingPointError: if a loss is not finite.
        """
        packing.refuse_packed(self.network)
        refuse_shards(self.network, "fitting")
        if self.tokenizer is None:
            raise TypeError("fit needs a tokenizer")
        pairs, others = fit_texts.read(self, texts, prompts, held_out, max_tokens, seed or 0)
        every = every or max(1, num_steps // 10)
        micro = self.micro_batch_size
        settings = fitting.FitSettings(num_steps, batch_size, learning_rate, schedule, seed, every, micro)
        losses = fitting.fit(self, pairs, others, settings, checkpoint=checkpoint, progress=progress)
        self._is_named = self._is_named and self.has_adapters
        self._departed = self._departed or not self.has_adapters
        if self._shared is not None:
            self._shared.renew()
        return losses

    # -- the distribution ------------------------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not args and not kwargs:  # as Pyro calls what stands in the place of a distribution
            raise TypeError("a LanguageModel is no distribution, lm(prompts, max_new_tokens=24) is: sample from that")
        return super().__call__(*args, **kwargs)

    @validated
    def forward(
        self,
        prompts: Prompts,
        max_new_tokens: Count = 24,
        temperature: Positive = 1.0,
        *,
        top_k: Count | None = None,
        top_p: Annotated[float, Within("(0, 1]")] | None = None,
        stop: Annotated[str | Sequence[str] | None, Unchecked] = None,
        where: Tensor | None = None,
    ) -> Autoregressive:
        """Return the distribution of completions of ``prompts``.

        :param prompts: strings, chats, token ids or what `join` returns; see `encode`, also for the errors.
        :param max_new_tokens: the longest completion.
        :param temperature: divides the logits.
        :param top_k: of each token the k likeliest remain, renormalised; None: all.
        :param top_p: of each token the fewest likeliest with this probability remain, renormalised; None: all.
        :param stop: a string, or several, that end a completion as an end token does; they are part of it.
        :param where: bool, in a shape that broadcasts with the prompts': elsewhere the completion is the text that ends
            at once, with probability 1, as in a turn of a dialogue that is not taken.
        :raises TypeError: if ``where`` is not bool, or ``stop`` is no string, or there is no tokenizer to read it with.
        :raises ValueError: if ``where`` does not broadcast, or there is no end token, or ``stop`` is empty.
        """
        encoded = self.encode_prompts(prompts, max_new_tokens)
        strings = () if stop is None else stop_strings.check_stop(stop, self.tokenizer)
        if where is not None:
            encoded, where = broadcast_where(encoded, where, self.vocabulary)
        stops = stop_strings.stops_of(self.tokenizer, strings, self.vocab_size) if strings else None
        return Autoregressive(
            self,
            encoded.ids,
            encoded.mask,
            max_new_tokens,
            temperature,
            truncation=None if top_k is None and top_p is None else Truncation(top_k, top_p),
            stops=None if stops is None else stops.to(encoded.ids.device),
            where=where,
            base=encoded.base,
        )

    @validated
    def generate_texts(
        self,
        prompts: Prompts,
        num_texts: Count = 1,
        *,
        max_new_tokens: Count = 128,
        temperature: Positive = 1.0,
        top_k: Count | None = None,
        top_p: Annotated[float, Within("(0, 1]")] | None = None,
        stop: Annotated[str | Sequence[str] | None, Unchecked] = None,
        seed: Seed | None = None,
    ) -> list[list[str]]:
        """Draw texts that continue prompts: a list of ``num_texts`` for each prompt.

        :param prompts: strings, chats or token ids, as for `forward`.
        :param num_texts: of each prompt.
        :param max_new_tokens: the longest text, in tokens.
        :param temperature: divides the logits.
        :param top_k: as for `forward`.
        :param top_p: as for `forward`.
        :param stop: as for `forward`.
        :param seed: of the draws; the state of the random numbers is restored after. None: that state is used.
        :raises TypeError: if there is no tokenizer.
        """
        settings: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "stop": stop}
        drawn = generation.sample_texts(self, prompts, num_texts, max_new_tokens=max_new_tokens, seed=seed, **settings)
        return [[sampled.text for sampled in of_prompt] for of_prompt in drawn]
