"""A tokenizer of words between spaces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bayeslm.validation import validated


@validated
def word_tokenizer(vocabulary: Sequence[str], eos: str) -> Any:
    """Return a tokenizer of words between spaces.

    :param vocabulary: the words.
    :param eos: the word before and after a text, and its padding.
    :raises ValueError: if a word is in the vocabulary twice.
    """
    if len(set(vocabulary)) != len(vocabulary):
        raise ValueError("vocabulary holds a token twice")
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast  # takes a second or more to import

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token=eos))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token=eos, eos_token=eos, pad_token=eos)
