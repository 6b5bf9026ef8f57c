"""A tokenizer of words between spaces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bayeslm.validation import validated


@validated
def word_tokenizer(vocabulary: Sequence[str], eos: str) -> Any:
    """Return a tokenizer of words between spaces.

    :param vocabulary: the words; any other word of a prompt is read as ``eos``.
    :param eos: the word before and after a text, and its padding; one of the vocabulary.
    :raises ValueError: if a word is in the vocabulary twice, is empty or has a space in it, or ``eos`` is none of them.
    """
    if len(set(vocabulary)) != len(vocabulary):
        raise ValueError("vocabulary holds a token twice")
    if (wrong := next((word for word in vocabulary if word.split() != [word]), None)) is not None:
        raise ValueError(f"vocabulary holds {wrong!r}: a word is not empty, and has no space in it")
    if eos not in vocabulary:
        raise ValueError(f"vocabulary has no {eos!r}: texts could not end")
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast  # takes a second or more to import

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token=eos))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token=eos, eos_token=eos, pad_token=eos)
