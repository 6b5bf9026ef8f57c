"""Texts that are known, as completions: token ids of what a model might have written, to be observed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bayeslm.characters import check_characters
from bayeslm.validation import show

from .encoding import UNOBSERVED, Vocabulary
from .texts import any_context, decode


def encode_completions(
    texts: Sequence[str] | np.ndarray,
    tokenizer: Any,
    vocabulary: Vocabulary,
    max_new_tokens: int,
    ends: bool,
    start: tuple[int, ...] = (),
) -> Tensor:
    """Return the completions that are these texts, (*batch, max_new_tokens); see `LanguageModel.encode`.

    :param start: the tokens with which the decoder of an encoder-decoder network starts; none of a causal network.
    """
    if isinstance(texts, str):
        raise TypeError(f"texts must be a list of texts, got one string: write [{texts[:40]!r}]")
    if not hasattr(texts, "__len__") or getattr(texts, "ndim", 1) == 0:
        raise TypeError(f"texts must be a list of texts, got {show(texts)}")
    if tokenizer is None:
        raise TypeError("this LanguageModel has no tokenizer to encode with: observe token ids, padded as it pads them")
    if ends and not vocabulary.eos_token_ids:
        raise ValueError("this LanguageModel has no end token, so that no text ends: encode with eos=False")
    array = np.empty(len(texts), dtype=object) if not isinstance(texts, np.ndarray) else texts
    if array is not texts:
        array[:] = list(texts)
    after = [vocabulary.eos_token_ids[0]] if ends else []
    filler = vocabulary.pad_token_id if ends else UNOBSERVED
    values = torch.full((array.size, max_new_tokens), filler)
    for i, text in enumerate(array.reshape(-1).tolist()):
        name = f"texts[{i}]"
        if not isinstance(text, str):
            raise TypeError(f"{name} is {text!r:.60}, and no string")
        row = [*completion_ids(name, text, tokenizer, start), *after]
        if early := [token for token in row[: len(row) - len(after)] if token in vocabulary.eos_token_ids]:
            raise ValueError(f"{name} ({text!r:.60}) holds the end token {early[0]}: the text would end there")
        if len(row) > max_new_tokens:
            count = f"{len(row)} tokens" + (", of which one is its end" if ends else "")
            raise ValueError(f"{name} ({text!r:.60}) has {count}, and max_new_tokens is {max_new_tokens}: raise that")
        values[i, : len(row)] = torch.tensor(row, dtype=torch.long)
    return values.reshape(*array.shape, max_new_tokens)


def completion_ids(name: str, text: str, tokenizer: Any, start: tuple[int, ...]) -> list[int]:
    """Return the token ids of a text as a completion, without its end.

    That of an encoder-decoder network is a text of its own, as the tokenizer writes those that are to be learned
    (``text_target``): without what it appends, and without the ``start``, which is given.
    """
    if not start:
        return text_ids(name, text, tokenizer)
    check_characters(name, text)
    around = list(tokenizer(text_target="a", return_special_tokens_mask=True)["special_tokens_mask"])
    row = list(tokenizer(text_target=text)["input_ids"])
    row = row[: len(row) - around[::-1].index(0)]
    sizes = range(min(len(start), around.index(0)), 0, -1)
    given = next((size for size in sizes if tuple(row[:size]) == start[-size:]), 0)
    return row[given:]


def text_ids(name: str, text: str, tokenizer: Any) -> list[int]:
    """Return the token ids of a text that continues another one, so that it is what they add to that.

    These are the text's own, or, of tokenizers that write another beginning for texts of their own (a space, as Llama
    2's), those that it has after a word.

    :param name: of the text, for errors.
    :raises ValueError: if the tokenizer has no tokens that read as this text.
    """
    check_characters(name, text)
    if not text:
        return []
    context = any_context(tokenizer)
    before = list(context.ids)
    alone, after = (list(tokenizer(x, add_special_tokens=False)["input_ids"]) for x in (text, context.text + text))
    candidates = [alone] + ([after[len(before) :]] if after[: len(before)] == before else [])
    read = [whole.removeprefix(context.text) for whole in decode(tokenizer, [[*before, *row] for row in candidates])]
    for exactly in (lambda x: x, lambda x: "".join(x.split())):  # tokenizers of words know no spaces
        for row, again in zip(candidates, read, strict=True):
            if exactly(again) == exactly(text):
                return row
    if any(special in text for special in getattr(tokenizer, "all_special_tokens", ())):
        return alone  # which are not read
    raise ValueError(f"{name} ({text!r:.60}) cannot be written in the tokenizer's tokens: they read {read[0]!r:.60}")
