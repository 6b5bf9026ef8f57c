"""Which token ids end a completion of a network, begin a text, and fill what comes after the end."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import nn


class SpecialTokens(NamedTuple):
    """Token ids of a network: the ends of a text, its beginning (None if there is none), and its padding."""

    eos: tuple[int, ...]
    bos: int | None
    pad: int


def find_special_tokens(network: nn.Module, tokenizer: Any, eos: int | Iterable[int] | None = None) -> SpecialTokens:
    """Find the special tokens of a network.

    The ends are all those of the first of these that names a token of the network: its generation config, its config,
    the tokenizer. An id outside the vocabulary is no token: GPT2Config, for example, has 50256 for any vocabulary.
    The beginning is the tokenizer's, else the config's. The padding, which need not be a token of the network, is the
    tokenizer's, else the config's, else the first end, else 0.

    :param tokenizer: None if there is none.
    :param eos: the ends, where a user names them.
    :raises TypeError: if the network has no config with a vocabulary, or ``eos`` is no token id.
    :raises ValueError: if ``eos`` names an id outside the vocabulary, or a config or tokenizer one that is none.
    """
    size = vocab_size(network)
    config: Any = network.config
    configs = (config, config.get_text_config())
    folder = str(getattr(config, "name_or_path", None) or "")
    if eos is not None:
        try:
            ends = _ids(eos)
        except TypeError as error:
            raise TypeError(f"eos_token_ids must be a token id or several, got {eos!r}") from error
        if not all(0 <= end < size for end in ends):
            raise ValueError(f"eos_token_ids {sorted(ends)} are not all in 0..{size - 1}")
    else:
        sources = (getattr(network, "generation_config", None), *configs, tokenizer)
        named = ([i for i in ids_of(source, "eos_token_id", folder) if 0 <= i < size] for source in sources)
        ends = next((ids for ids in named if ids), [])
    begins = (i for source in (tokenizer, *configs) for i in ids_of(source, "bos_token_id", folder) if 0 <= i < size)
    pads = (i for source in (tokenizer, *configs) for i in ids_of(source, "pad_token_id", folder))
    unique = tuple(sorted(set(ends)))
    return SpecialTokens(unique, next(begins, None), next(pads, unique[0] if unique else 0))


def vocab_size(network: nn.Module) -> int:
    """Return the number of tokens of a network.

    :raises TypeError: if it has no config that says so.
    """
    config: Any = getattr(network, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else None
    size = getattr(text, "vocab_size", None)
    if size is None:
        raise TypeError(
            f"the network, a {type(network).__name__}, has no config with a vocab_size: give it the attribute "
            "config of a causal language model of transformers"
        )
    return int(size)


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
