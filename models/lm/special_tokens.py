"""Which token ids end a completion of a network, begin a text, and fill what comes after the end."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import nn

from .configs import is_encoder_decoder, vocab_size


class SpecialTokens(NamedTuple):
    """Token ids of a network: the ends of a text, its beginning (None if there is none), and its padding.

    ``start`` are the tokens before a completion, where an encoder reads the prompt: that with which the decoder starts,
    and the first one where that is always the same (``forced_bos_token_id``, such as the language of the completion).
    """

    eos: tuple[int, ...]
    bos: int | None
    pad: int
    start: tuple[int, ...] = ()


def find_special_tokens(
    network: nn.Module, tokenizer: Any, eos: int | Iterable[int] | None = None, start: int | Iterable[int] | None = None
) -> SpecialTokens:
    """Find the special tokens of a network.

    The ends are all those of the first of these that names a token of the network: its generation config, its config,
    the tokenizer. An id outside the vocabulary is no token: GPT2Config, for example, has 50256 for any vocabulary.
    The beginning is the tokenizer's, else the config's. The padding, which need not be a token of the network, is the
    tokenizer's, else the config's, else the first end, else 0.

    :param tokenizer: None if there is none.
    :param eos: the ends, where a user names them.
    :param start: likewise the tokens before a completion of an encoder-decoder network.
    :raises TypeError: if the network has no config with a vocabulary, ``eos`` or ``start`` is no token id, or a network
        with ``start`` is no encoder-decoder network.
    :raises ValueError: if one of them names an id outside the vocabulary, or a config or tokenizer one that is none.
    """
    size = vocab_size(network)
    config: Any = network.config
    configs = (config, config.get_text_config())
    folder = str(getattr(config, "name_or_path", None) or "")
    if eos is not None:
        ends = _given("eos_token_ids", eos, size)
    else:
        sources = (getattr(network, "generation_config", None), *configs, tokenizer)
        named = ([i for i in ids_of(source, "eos_token_id", folder) if 0 <= i < size] for source in sources)
        ends = next((ids for ids in named if ids), [])
    begins = (i for source in (tokenizer, *configs) for i in ids_of(source, "bos_token_id", folder) if 0 <= i < size)
    pads = (i for source in (tokenizer, *configs) for i in ids_of(source, "pad_token_id", folder))
    unique = tuple(sorted(set(ends)))
    bos = next(begins, None)
    before: tuple[int, ...] = ()
    if is_encoder_decoder(network):
        before = _start(network, folder, bos) if start is None else tuple(_given("decoder_start_ids", start, size))
    elif start is not None:
        raise TypeError(
            f"decoder_start_ids are for encoder-decoder networks, and {type(network).__name__} is none: its "
            "completions follow the prompt at once"
        )
    return SpecialTokens(unique, bos, next(pads, unique[0] if unique else 0), before)


def _given(name: str, ids: int | Iterable[int], size: int) -> list[int]:
    """Return token ids that a user names as a list, checked."""
    try:
        tokens = _ids(ids)
    except TypeError as error:
        raise TypeError(f"{name} must be a token id or several, got {ids!r}") from error
    if not all(0 <= token < size for token in tokens):
        raise ValueError(f"{name} {sorted(tokens)} are not all in 0..{size - 1}")
    return tokens


def _start(network: Any, folder: str, bos: int | None) -> tuple[int, ...]:
    """Return the tokens before a completion of an encoder-decoder network."""
    sources = (getattr(network, "generation_config", None), network.config, network.config.get_text_config())
    named = [
        next((i for source in sources for i in ids_of(source, name, folder)), None)
        for name in ("decoder_start_token_id", "forced_bos_token_id")
    ]
    start, forced = (bos if named[0] is None else named[0]), named[1]
    return tuple(i for i in (start, forced) if i is not None)


def ids_of(source: Any, name: str, folder: str) -> list[int]:
    """Return the token ids that a config or tokenizer names.

    :param folder: where it comes from, for the error.
    :raises ValueError: if what it names is none.
    """
    named = getattr(source, name, None)
    try:
        return [] if named is None else _ids(named)
    except TypeError as error:
        of = f" of {folder}" if folder else ""
        raise ValueError(
            f"the {type(source).__name__}{of} has the {name} {named!r:.60}: it must be a token id, or several in a list"
        ) from error


def _ids(ids: int | Iterable[int]) -> list[int]:
    """Return one or several token ids as a list."""
    try:
        return [_id(ids)]
    except TypeError:  # not a single integer
        return [_id(i) for i in ids]  # type: ignore[union-attr]


def _id(value: Any) -> int:
    """Return a token id; a truth value is none, though Python and torch count it as 0 or 1."""
    if isinstance(value, bool) or "bool" in str(getattr(value, "dtype", "")):
        raise TypeError(f"{value!r} is no token id")
    return operator.index(value)
