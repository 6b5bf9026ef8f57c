"""Small tokenizers of every kind: how they join tokens to texts, and what they put around a text."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from bayeslm.models.lm import word_tokenizer

BYTES = [f"<0x{i:02X}>" for i in range(256)]
WORDS = ["My", "food", "good", "is", "the", "a", "not", "do", "I"]


def metaspace(*, before: bool = True, after: bool = False) -> Any:
    """Like Llama 2's: "▁food" holds its space, the decoder strips the first one, unknown characters are bytes."""
    words = ["<unk>", "<s>", "</s>", *BYTES, "▁", *(f"▁{word}" for word in WORDS), *WORDS, ".", ","]
    return _fast(
        Tokenizer(models.Unigram([(word, -1.0) for word in dict.fromkeys(words)], unk_id=0, byte_fallback=True)),
        normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
        None,
        decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        ),
        ("<s>" if before else None, "</s>" if after else None),
        {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    )


def byte_level(*, before: bool = False, after: bool = False) -> Any:
    """Like GPT-2's: a token a byte, and some words with the space before them."""
    spellings = [[*start, *word] for word in WORDS for start in ("", "Ġ")]
    return _fast(
        _bpe(["<|end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())], spellings),
        None,
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
        ("<|end|>" if before else None, "<|end|>" if after else None),
        {"bos_token": "<|end|>", "eos_token": "<|end|>"},
    )


def word_piece(*, before: bool = True, after: bool = True) -> Any:
    """Like BERT's: the decoder writes the spaces, but before "##ing"; [CLS] and [SEP] stand around a text."""
    words = ["[UNK]", "[CLS]", "[SEP]", *WORDS, "##ing", "##s", ".", ",", "'", "n", "t"]
    return _fast(
        Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]")),
        None,
        pre_tokenizers.BertPreTokenizer(),
        decoders.WordPiece(),
        ("[CLS]" if before else None, "[SEP]" if after else None),
        {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "eos_token": "[SEP]"},
    )


def word_ends(*, before: bool = False, after: bool = False) -> Any:
    """Like GPT-1's: "food</w>" holds the space after it, and the last one is dropped."""
    spellings = [[*word[:-1], f"{word[-1]}</w>"] for word in WORDS]
    return _fast(
        _bpe(["<unk>", "<end>"], spellings, unk_token="<unk>", end_of_word_suffix="</w>"),
        None,
        pre_tokenizers.WhitespaceSplit(),
        decoders.BPEDecoder(),
        ("<end>" if before else None, "<end>" if after else None),
        {"unk_token": "<unk>", "eos_token": "<end>"},
    )


def words(*, before: bool = False, after: bool = False) -> Any:
    """`word_tokenizer`, of words between spaces."""
    tokenizer = word_tokenizer(["<end>", *WORDS], "<end>")
    _around(tokenizer.backend_tokenizer, "<end>" if before else None, "<end>" if after else None)
    return tokenizer


TOKENIZERS = {f.__name__: f for f in (metaspace, byte_level, word_piece, word_ends, words)}


def _bpe(first: list[str], spellings: list[list[str]], **settings: str) -> Tokenizer:
    """Return a tokenizer that merges the parts of some words, from the left."""
    merges = [("".join(parts[:n]), parts[n]) for parts in spellings for n in range(1, len(parts))]
    tokens = [*first, *(part for parts in spellings for part in parts), *("".join(pair) for pair in merges)]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    return Tokenizer(models.BPE(vocabulary, list(dict.fromkeys(merges)), **settings))


def _fast(
    tokenizer: Tokenizer, normalizer: Any, split: Any, decoder: Any, around: Any, special: dict[str, str]
) -> PreTrainedTokenizerFast:
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if split is not None:
        tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoder
    _around(tokenizer, *around)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def _around(tokenizer: Tokenizer, before: str | None, after: str | None) -> None:
    """Let a tokenizer put tokens before and after a text."""
    tokens = [token for token in (before, after) if token is not None]
    if tokens:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=" ".join([*([before] if before else []), "$A", *([after] if after else [])]),
            special_tokens=[(token, tokenizer.token_to_id(token)) for token in dict.fromkeys(tokens)],
        )
