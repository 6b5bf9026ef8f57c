"""Sizes and kinds of networks, as their configs say."""

from __future__ import annotations

from typing import Any

from torch import nn

TABLE = "bayeslm-ngram"  # the kind of network of `LanguageModel.tabular`


def is_encoder_decoder(network: Any) -> bool:
    """Return whether a network reads a prompt by an encoder, and writes a completion by a decoder."""
    return bool(getattr(getattr(network, "config", None), "is_encoder_decoder", False))


def is_table(network: Any) -> bool:
    """Return whether a network is a table of the next token by the last ones, as `LanguageModel.tabular` makes it."""
    return getattr(getattr(network, "config", None), "model_type", None) == TABLE


def vocab_size(network: nn.Module) -> int:
    """Return the number of tokens of a network.

    :raises TypeError: if it has no config that says so.
    """
    config: Any = getattr(network, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else None
    size = getattr(text, "vocab_size", None)
    if is_encoder_decoder(network):  # prompts may have tokens of their own
        size = getattr(text, "decoder_vocab_size", None) or getattr(text, "tgt_vocab_size", None) or size
    if size is None:
        raise TypeError(
            f"the network, a {type(network).__name__}, has no config with a vocab_size: give it the attribute "
            "config of a causal language model of transformers"
        )
    return int(size)


def size(network: Any, name: str) -> int:
    """Return a size that a network's config has, the largest where it has one for each layer; 0 for none."""
    config = network.config.get_text_config()
    try:
        return int(getattr(config, name, 0) or 0)
    except RuntimeError:  # of transformers, where layers differ
        return max(int(getattr(layer, name, 0) or 0) for layer in config.per_layer_config)


def context_length(network: Any) -> int | None:
    """Return the most tokens that a text can have, None if the config does not say.

    Where longer texts change the scores of their first tokens, which then have no one distribution, the limit is
    where that begins: rotary frequencies for long texts ("longrope"), and masks that keep so many tokens (Doge).
    """
    config = network.config.get_text_config()
    limits = [getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)]
    ropes = getattr(config, "rope_parameters", None) or {}
    each = [rope for rope in (ropes, *ropes.values()) if isinstance(rope, dict)]  # one, or one a type of layer
    limits += [r.get("original_max_position_embeddings") for r in each if r.get("rope_type") == "longrope"]
    limits.append(getattr(config, "keep_window_size", None))
    return min((x for x in limits if x and x > 0), default=None)  # -1 is none, as of XLNet
