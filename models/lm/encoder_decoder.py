r"""A network that reads a prompt by an encoder, and writes its completion by a decoder.

    p(x | c)  =  \prod_t p(x_t | encoder(c), s, x_{<t})

The prompt c is a text of its own, complete with what its tokenizer appends, and the decoder begins with tokens s that
no prompt has: ``decoder_start_token_id``, and the token that generation forces after it (``forced_bos_token_id``, such
as the language of the completion), which is given and not drawn. After that both kinds of network are one: a prefix,
which is computed once for each prompt (here the encoder's states, and the keys and values by which the decoder attends
to them), and then tokens. All that draws and scores them is shared with causal networks.

Tokens of the decoder are never padded, and prompts are padded on their right, where no position is moved.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from . import own_forward
from .caches import SourceCache
from .gradient_checkpointing import checkpointed
from .network import CausalNetwork
from .own_forward import Findings, accepted
from .usage import count_pass
from .whole_texts import one_length_at_a_time


@dataclass
class EncoderStates(BaseModelOutput):
    """The states of an encoder, as its network takes them; ``router_logits`` are asked for by those of experts."""

    router_logits: Any = None


class EncoderDecoderNetwork(CausalNetwork):
    """The decoder of an encoder-decoder network as a causal network, whose prefix is what the encoder has read.

    :param network: any module with the call convention of ``transformers``' encoder-decoder networks.
    :param start_ids: the tokens before a completion.
    :param compute_dtype: see `CausalNetwork`.
    :param exact: see `CausalNetwork`.
    :param findings: see `CausalNetwork`.
    :raises TypeError: if it is not scored as its own forward pass scores, or no token is known to start with.
    """

    auto_class = "AutoModelForSeq2SeqLM"

    def __init__(
        self,
        network: nn.Module,
        start_ids: tuple[int, ...],
        compute_dtype: torch.dtype | None = None,
        exact: Collection[str] | None = None,
        findings: Findings | None = None,
    ) -> None:
        if not start_ids:
            raise TypeError(
                f"the config of {type(network).__name__} does not name the token that its decoder starts with: set "
                "decoder_start_token_id, or give LanguageModel decoder_start_ids"
            )
        self.start_ids = start_ids
        super().__init__(network, compute_dtype, exact, findings)

    # -- how it is tried: on texts that are prompts and completions at once ------------------------------------------

    def _body_of(self, network: Any) -> nn.Module | None:
        decoder: nn.Module | None = network.get_decoder()
        return decoder

    def _arguments(self, ids: Tensor) -> dict[str, Any]:
        return {"input_ids": self._as_prompt(ids), "decoder_input_ids": ids, "use_cache": False}

    def _body_arguments(self, ids: Tensor) -> dict[str, Any]:
        return {"input_ids": ids, "encoder_hidden_states": self._read(self._as_prompt(ids)), "use_cache": False}

    def _head_arguments(self, ids: Tensor) -> dict[str, Any]:
        states = torch.zeros((*ids.shape[:1], 1, self.width), device=ids.device)  # which the body does not read
        return {"encoder_outputs": EncoderStates(states), "decoder_input_ids": ids, "use_cache": False}

    def _as_prompt(self, ids: Tensor) -> Tensor:
        return ids % self.prompt_vocab_size

    def trial_cache(self, ids: Tensor) -> SourceCache:
        """Return the cache of prompts that are the texts (rows, length) themselves."""
        return SourceCache(*self._encoded(self._as_prompt(ids), None))

    def holds_padded(self) -> bool:
        """Return whether the states of a padded prompt are those that it has alone."""
        ids = self._as_prompt(own_forward.texts(self))
        real = max(1, ids.shape[-1] // 2)
        alone = self._read(ids[:1, :real])
        mask = torch.ones_like(ids)
        mask[0, real:] = 0
        try:
            found = self._read(ids.masked_fill(mask == 0, 0), mask)[:1, :real]
        except Exception:  # of whatever type, where the encoder takes no mask
            return False
        return bool((found - alone).abs().max() <= self.rounding * alone.abs().max())

    # -- size --------------------------------------------------------------------------------------------------------

    @property
    def prompt_vocab_size(self) -> int:
        """The number of tokens of prompts, which may be others than those of completions."""
        config = self.network.config
        encoder = getattr(config, "encoder", config)
        size: Any = getattr(config, "src_vocab_size", None) or getattr(encoder, "vocab_size", self.vocab_size)
        return int(size)

    def room(self, max_new_tokens: int) -> int | None:
        """Return the most tokens of a prompt; the completion takes none of them.

        :raises ValueError: if the decoder has no positions for so many new tokens.
        """
        most = self._positions("max_decoder_position_embeddings", "max_target_positions")
        if most is not None and len(self.start_ids) + max_new_tokens > most:
            raise ValueError(
                f"max_new_tokens is {max_new_tokens}, and {self.name}'s decoder has positions for "
                f"{most - len(self.start_ids)}"
            )
        return self._positions("max_encoder_position_embeddings", "max_source_positions")

    @cached_property
    def context_length(self) -> int | None:
        """The most tokens of its texts when it is tried."""
        return self.room(0)

    def _positions(self, *names: str) -> int | None:
        """Return how many positions the encoder, or the decoder, has; None if the config does not say."""
        config = self.network.config
        sides = [getattr(config, side, None) for side in ("encoder", "decoder")]
        side = sides["decoder" in names[0]] or config
        limits = [getattr(side, name, None) for name in (*names, "max_position_embeddings")]
        return next((x for x in limits if x and x > 0), None)

    # -- body --------------------------------------------------------------------------------------------------------

    def read(self, ids: Tensor, mask: Tensor | None) -> tuple[Tensor, Any, Tensor | None, Tensor]:
        """Encode left-padded prompts (rows, length) once, and start the decoder; return the fields of a `Prefix`."""
        cache = SourceCache(*self._encoded(ids, mask))
        start = self._started(ids[:, :0])
        hidden, _ = self.hidden(start, None, start, cache)
        return hidden[:, -1], cache, None, torch.full((len(ids),), start.shape[-1], device=ids.device)

    def hidden_after(
        self, prompts: Tensor, mask: Tensor | None, ids: Tensor, gradient_checkpointing: bool = False
    ) -> Tensor:
        """Return hidden states (rows, 1 + tokens, width) after prompts and after each of ``ids``; without a cache."""
        states, mask = self._encoded(prompts, mask, gradient_checkpointing)
        texts = self._started(ids)
        count_pass(texts.numel())
        return self._states(self._decoded(texts, states, mask, gradient_checkpointing))[:, len(self.start_ids) - 1 :]

    def hidden_of_texts(self, ids: Tensor, mask: Tensor | None, gradient_checkpointing: bool = False) -> Tensor:
        """Return the hidden state (rows, 1, width) after prompts (rows, length)."""
        return self.hidden_after(ids, mask, ids[:, :0], gradient_checkpointing)

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
        """Return hidden states (rows, tokens, width) of the decoder's tokens ``ids``, and the cache, grown.

        :param mask: None, since no token is padding.
        :param positions: are counted by the decoder itself.
        :param cache: a `SourceCache`.
        """
        count_pass(ids.numel())
        if not self.findings.caches:
            out = self._decoded(cache.append(ids), cache.states, cache.mask, gradient_checkpointing)
            return self._states(out)[:, -ids.shape[-1] :], cache
        grown = cache.of_decoder()
        out = self._decoded(
            ids, cache.states, cache.mask, gradient_checkpointing, past_key_values=grown, use_cache=use_cache
        )
        cache.keep(grown)
        return self._states(out), cache

    def shares_prefill(self, mask: Tensor | None) -> bool:
        """Return whether tokens continue the decoder's keys and values."""
        return self.findings.caches

    @property
    def pads_tokens(self) -> bool:
        """Completions of different lengths are continued apart: few decoders take positions."""
        return False

    @cached_property
    def mask_dtype(self) -> torch.dtype | None:
        """None: tokens of the decoder are never padded."""
        return None

    def _started(self, ids: Tensor) -> Tensor:
        """Return the decoder's tokens (rows, start + tokens) for a completion's first ``ids`` (rows, tokens)."""
        start = torch.tensor(self.start_ids, device=ids.device)
        return torch.cat([start.expand(len(ids), -1), ids], -1)

    def _decoded(self, ids: Tensor, states: Tensor, mask: Tensor, gradient_checkpointing: bool, **settings: Any) -> Any:
        """Return the output of a pass of the decoder."""
        given = {"use_cache": False} | settings
        if self.body is None:
            given |= {"decoder_input_ids": ids, "encoder_outputs": EncoderStates(states), "attention_mask": mask}
        else:
            given |= {"input_ids": ids, "encoder_hidden_states": states, "encoder_attention_mask": mask}
        module = self._converted(self.body or self.network)
        return (checkpointed(module) if gradient_checkpointing else module)(**given)

    def _encoded(self, ids: Tensor, mask: Tensor | None, gradient_checkpointing: bool = False) -> tuple[Tensor, Tensor]:
        """Return the encoder's states (rows, length, width) of left-padded prompts (rows, length), and their mask.

        Both are padded on the right.
        """
        count_pass(ids.numel())
        if mask is None:
            return self._read(ids, None, gradient_checkpointing), torch.ones_like(ids)
        length = ids.shape[-1]
        moved = (torch.arange(length, device=ids.device) - mask.sum(-1, keepdim=True)) % length
        right = mask.gather(-1, moved)
        if self.findings.pads is None:
            with own_forward.aside(self.device):
                self.findings.pads = self.holds_padded()
        if self.findings.pads:
            return self._read(ids.gather(-1, moved), right, gradient_checkpointing), right
        states = one_length_at_a_time(lambda some: self._read(some, None, gradient_checkpointing), ids, mask)
        return states.gather(1, moved[:, :, None].expand_as(states)), right

    def _read(self, ids: Tensor, mask: Tensor | None = None, gradient_checkpointing: bool = False) -> Tensor:
        """Return the encoder's states (rows, length, width) of prompts (rows, length), padded on the right.

        :raises TypeError: if it computes another number of states.
        """
        encoder: Any = self._converted(self.network.get_encoder())
        given = accepted(encoder, {"input_ids": ids, "attention_mask": mask})
        states: Tensor = (checkpointed(encoder) if gradient_checkpointing else encoder)(**given).last_hidden_state
        if states.shape[:-1] != ids.shape:
            raise TypeError(
                f"the encoder of {self.name} computes {states.shape[1]} states of {ids.shape[1]} tokens: hand in a "
                "network of tokens alone"
            )
        return states
