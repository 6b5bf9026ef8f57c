r"""A language model that is an explicit table, small enough to be enumerated: p(x_t | x_{t-n+1}, ..., x_{t-1}).

It is a `transformers` model like any other (config, ``save_pretrained``, `AutoModelForCausalLM`), whose
key-value cache holds the tokens themselves, so that everything written for networks is tested on it exactly.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast


class NGramConfig(PreTrainedConfig):
    """``order`` n: the next token depends on the n - 1 tokens before it."""

    model_type = "bayeslm-ngram"

    def __init__(self, vocab_size: int = 8, order: int = 2, initializer_range: float = 1.0, **kwargs: Any) -> None:
        self.vocab_size = vocab_size
        self.order = order
        self.initializer_range = initializer_range
        super().__init__(**kwargs)


class NGramForCausalLM(PreTrainedModel):
    """``table`` (contexts, vocabulary) holds logits; a context is n - 1 tokens, of which one more means "none"."""

    config_class = NGramConfig
    base_model_prefix = "ngram"

    def __init__(self, config: NGramConfig) -> None:
        super().__init__(config)
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
        past_key_values: DynamicCache | None = None,
        use_cache: bool = True,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits (batch, tokens, vocabulary) of the token after each of ``input_ids`` (batch, tokens)."""
        nothing, history = self.config.vocab_size, self.config.order - 1
        new = input_ids.shape[-1]
        ids = input_ids
        if attention_mask is not None:
            ids = ids.masked_fill(attention_mask[:, -new:] == 0, nothing)
        cache = DynamicCache() if past_key_values is None else past_key_values
        entry = ids[:, None, :, None]
        seen = cache.update(entry, entry, 0)[0][:, 0, :, 0]
        seen = nn.functional.pad(seen, (history, 0), value=nothing)
        context = torch.zeros_like(ids)
        for lag in range(history):  # the oldest token of the context counts most
            context = context * (nothing + 1) + seen[:, seen.shape[-1] - new - history + 1 + lag :][:, :new]
        return CausalLMOutputWithPast(logits=self.table[context], past_key_values=cache if use_cache else None)


AutoConfig.register(NGramConfig.model_type, NGramConfig)
AutoModelForCausalLM.register(NGramConfig, NGramForCausalLM)
