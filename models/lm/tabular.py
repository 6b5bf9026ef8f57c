r"""A language model that is an explicit table, small enough to be enumerated: p(x_t | x_{t-n+1}, ..., x_{t-1}).

It is a `transformers` model like any other (config, ``save_pretrained``, `AutoModelForCausalLM`), whose key-value cache
holds the tokens themselves, so that all code for networks is tested on it exactly. Imported with the first table, or
the first model that is loaded by name, not before: transformers takes a second or more to import.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configs import TABLE
from .scopes import forked


class NGramConfig(PreTrainedConfig):
    """The size of a table. ``order`` n: the next token depends on the n - 1 tokens before it."""

    model_type = TABLE

    def __init__(self, vocab_size: int = 8, order: int = 2, initializer_range: float = 1.0, **kwargs: Any) -> None:
        self.vocab_size = vocab_size
        self.order = order
        self.initializer_range = initializer_range
        super().__init__(**kwargs)


class NGramForCausalLM(PreTrainedModel):
    """``table`` (context, vocabulary) holds logits; a context is n - 1 tokens, one more token id meaning "none"."""

    config_class = NGramConfig
    base_model_prefix = "ngram"

    def __init__(self, config: NGramConfig) -> None:
        super().__init__(config)
        if config.order * math.log2(config.vocab_size + 1) > 40:
            raise ValueError(f"a table of order {config.order} over {config.vocab_size} tokens has over 2^40 numbers")
        contexts = (config.vocab_size + 1) ** (config.order - 1)
        self.table = nn.Parameter(torch.empty(contexts, config.vocab_size))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if module is self:
            nn.init.normal_(self.table, std=self.config.initializer_range)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        use_cache: bool = True,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Return logits (batch, tokens, vocabulary) of the token after each of ``input_ids`` (batch, tokens).

        :param position_ids: unused; a table is the same at every place, so that kept tokens may move.
        """
        none, history = self.config.vocab_size, self.config.order - 1
        new = input_ids.shape[-1]
        ids = input_ids
        if attention_mask is not None:
            ids = ids.masked_fill(attention_mask[:, -new:] == 0, none)
        cache = DynamicCache() if past_key_values is None else past_key_values
        entry = ids[:, None, :, None]
        tokens = cache.update(entry, entry, 0)[0][:, 0, :, 0]
        tokens = nn.functional.pad(tokens, (history, 0), value=none)
        context = torch.zeros_like(ids)
        for lag in range(history):  # the oldest token of the context counts most
            context = context * (none + 1) + tokens[:, tokens.shape[-1] - new - history + 1 + lag :][:, :new]
        return CausalLMOutputWithPast(logits=self.table[context], past_key_values=cache if use_cache else None)


def table_network(size: int, order: int, table: Tensor | None, seed: int) -> NGramForCausalLM:
    """Return a table of a vocabulary of ``size`` tokens as a network; see `LanguageModel.tabular`.

    :raises ValueError: if ``table`` has another shape.
    """
    with forked(seed):
        network = NGramForCausalLM(NGramConfig(vocab_size=size, order=order))
    if table is not None:
        if table.shape != network.table.shape:
            raise ValueError(f"table must have shape {tuple(network.table.shape)}, got {tuple(table.shape)}")
        network.table.data = table.clone()
    return network


AutoConfig.register(NGramConfig.model_type, NGramConfig)
AutoModelForCausalLM.register(NGramConfig, NGramForCausalLM)
