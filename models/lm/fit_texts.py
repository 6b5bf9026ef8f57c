"""Texts to be learned, as token ids: each with the prompt that it completes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from bayeslm.characters import check_characters

from .completions import completion_ids
from .encoding import Prompts, Vocabulary
from .tables import read_texts
from .token_model import TokenModel


class Pair(NamedTuple):
    """Token ids of a prompt, and of a completion with its end."""

    prompt: Sequence[int]
    completion: Sequence[int]


def read(
    lm: TokenModel, texts: Any, prompts: Prompts | None, held_out: Any, max_tokens: int, seed: int
) -> tuple[list[Pair], list[Pair]]:
    """Return what is to be learned, and what is to be held out; see `LanguageModel.fit`."""
    pairs = _pairs(lm, texts, prompts, max_tokens)
    if isinstance(held_out, float | int):
        return split(pairs, held_out, seed)
    return pairs, [] if held_out is None else _pairs(lm, held_out, None, max_tokens)


def _pairs(lm: TokenModel, texts: Any, prompts: Prompts | None, max_tokens: int) -> list[Pair]:
    texts, prompts = read_texts(texts, prompts)
    if prompts is not None:
        known = completions_of(texts, lm.tokenizer, lm.decoder_start_ids, lm.vocabulary, max_tokens)
        sources = lm.encode_prompts(prompts, max(map(len, known))).rows()
        if len(sources) != len(known):
            raise ValueError(f"fit needs a prompt of each text: got {len(known)} texts and {len(sources)} prompts")
        return [Pair(*pair) for pair in zip(sources, known, strict=True)]
    if lm.decoder_start_ids:
        raise TypeError("fit of an encoder-decoder network needs the sources of the texts: fit(texts, sources)")
    return to_sequences(texts, lm.tokenizer, lm.bos_token_id, lm.vocabulary, max_tokens)


def split(pairs: Sequence[Pair], share: float, seed: int) -> tuple[list[Pair], list[Pair]]:
    """Return pairs to learn, and a share of them to hold out, one at least, chosen at random.

    :raises ValueError: if the share is not between 0 and 1, or nothing is left to learn.
    """
    if not 0.0 < share < 1.0:
        raise ValueError(f"held_out must be a share between 0 and 1, or texts, got {share}")
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed)).tolist()
    size = max(1, round(share * len(pairs)))
    if size == len(pairs):
        raise ValueError(f"held_out={share} of {len(pairs)} texts leaves none to learn")
    return [pairs[i] for i in sorted(order[size:])], [pairs[i] for i in sorted(order[:size])]


def completions_of(
    texts: Sequence[str], tokenizer: Any, start: tuple[int, ...], vocabulary: Vocabulary, max_tokens: int
) -> list[list[int]]:
    """Return the tokens and EOS of texts that complete prompts, cut after ``max_tokens``.

    :param start: the tokens with which the decoder of an encoder-decoder network starts; none of a causal network.
    :raises ValueError: if there are no texts, or one has no token, or tokens that the network has not.
    """
    rows = []
    for i, row in _encoded(texts, lambda name, text: completion_ids(name, text, tokenizer, start), vocabulary):
        end = next((t for t, token in enumerate(row) if token in vocabulary.eos_token_ids), None)
        row = [*row, *vocabulary.eos_token_ids[:1]] if end is None else row[: end + 1]
        if not row:
            raise ValueError(f"texts[{i}] is empty, and no token ends it")
        rows.append(row[:max_tokens])
    return rows


def _encoded(
    texts: Sequence[str], encode: Callable[[str, str], list[int]], vocabulary: Vocabulary
) -> Iterator[tuple[int, list[int]]]:
    """Give the number and the token ids of each text, by a function of its name and itself."""
    if not texts:
        raise ValueError("texts is empty: give at least one text to fit")
    for i, text in enumerate(texts):
        tokens = encode(f"texts[{i}]", text)
        if tokens and max(tokens) >= vocabulary.size:
            raise ValueError(
                f"texts[{i}] has the token id {max(tokens)}, and the network's are 0..{vocabulary.size - 1}: give it "
                "its own tokenizer"
            )
        yield i, tokens


def to_sequences(
    texts: Sequence[str], tokenizer: Any, bos: int | None, vocabulary: Vocabulary, max_tokens: int
) -> list[Pair]:
    """Return BOS as the prompt, and the tokens and EOS of each text, cut after ``max_tokens`` with BOS.

    A text that begins with BOS, or ends with an EOS, itself gets no second one. Without BOS the first token is the
    prompt.

    :raises ValueError: if there are no texts, or one has no token to predict, or tokens that the network has not.
    """

    def encode(name: str, text: str) -> list[int]:
        check_characters(name, text)
        if not (tokens := list(tokenizer(text, add_special_tokens=False)["input_ids"])):
            raise ValueError(f"{name} is empty")
        return tokens

    sequences = []
    for i, tokens in _encoded(texts, encode, vocabulary):
        before = [] if bos is None or tokens[0] == bos else [bos]
        after = [] if tokens[-1] in vocabulary.eos_token_ids else vocabulary.eos_token_ids[:1]
        row = [*before, *tokens, *after][:max_tokens]
        if len(row) < 2:
            raise ValueError(f"texts[{i}] has one token in {max_tokens}, and nothing to predict it from")
        sequences.append(Pair(row[:1], row[1:]))
    return sequences
