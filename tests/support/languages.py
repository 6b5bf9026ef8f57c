"""Small vocabularies of characters, by tokenizers of several kinds, and languages over them with an oracle for each."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jsonschema
import torch
from support.models import table_lm
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from bayeslm.models import LanguageModel, rewards

TOKENS = 4
PROMPTS = [[2, 3, 4], [5, 1]]


class Language(NamedTuple):
    """A grammar, whether a text is in its language by another way, and the words of a vocabulary for it.

    Among these are several spellings of a text, and a word without a text.
    """

    settings: dict[str, Any]
    contains: Callable[[str], bool]
    words: tuple[str, ...]

    @property
    def grammar(self) -> rewards.Grammar:
        return rewards.Grammar(**self.settings)


SCHEMA = {"type": "array", "items": {"enum": ["a", 1]}, "minItems": 1}  # of its texts, no word here continues '["'


def _is_json(text: str) -> bool:
    try:
        jsonschema.validate(json.loads(text), SCHEMA)
    except (ValueError, jsonschema.ValidationError):
        return False
    return True


def _is_balanced(text: str) -> bool:
    half = len(text) // 2
    return half > 0 and text == "a" * half + "b" * half


AB = ("<eos>", "a", "b", "ab", "ba", "<hidden>")
LANGUAGES = {
    "regex": Language({"regex": "a(b|ab)*"}, lambda text: re.fullmatch("a(b|ab)*", text) is not None, AB),
    "lark": Language({"lark": 'start: "a" start "b" | "ab"'}, _is_balanced, AB),
    "json": Language({"json_schema": SCHEMA}, _is_json, ("<eos>", "[", "]", '"a"', "1", ",1", '["')),
}


def characters(words: tuple[str, ...]) -> PreTrainedTokenizerFast:
    """Byte-level: tokens are joined without spaces. Words in angles are special."""
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    tokenizer.decoder = decoders.ByteLevel()
    return _special(tokenizer, words)


def pieces(words: tuple[str, ...]) -> PreTrainedTokenizerFast:
    """SentencePiece: the decoder drops the first space of a text; no word here has one."""
    tokenizer = Tokenizer(models.Unigram([(word, -1.0) for word in words], unk_id=0))
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    return _special(tokenizer, words)


def word_ends(words: tuple[str, ...]) -> PreTrainedTokenizerFast:
    """GPT-1: a decoder that looks at more than one token, whose tokens have no bytes of their own."""
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    tokenizer.decoder = decoders.BPEDecoder()
    return _special(tokenizer, words)


def _special(tokenizer: Tokenizer, words: tuple[str, ...]) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens([word for word in words if word.startswith("<")])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", bos_token="<eos>")


TOKENIZERS = {f.__name__: f for f in (characters, pieces, word_ends)}


def spelling_lm(language: str, tokenizer: str = "characters", seed: int = 1) -> LanguageModel:
    """A random table over the words of a language."""
    words = LANGUAGES[language].words
    return LanguageModel(table_lm(order=3, seed=seed, vocab=len(words)).network, TOKENIZERS[tokenizer](words))


def local_distribution(lm: LanguageModel, contains: Callable[[str], bool], prompt: list[int]) -> dict[str, float]:
    """What the masked, renormalised tokens draw, by enumeration: of texts that are complete, the rest left out."""
    distribution = lm([prompt], TOKENS)
    x = distribution.enumerate_support()[:, 0]
    texts = distribution.decode(x[:, None])[:, 0].tolist()
    known = {text for text in texts if contains(text)}
    beginnings = {text[:n] for text in known for n in range(len(text) + 1)}
    step = distribution.next_token_log_prob(x[:, None])[:, 0].exp()  # (text, token, vocabulary)
    total: dict[str, float] = {}
    for row, text in enumerate(texts):
        if text not in known:
            continue
        probability = 1.0
        for t, token in enumerate(x[row].tolist()):
            so_far = lm.decode(x[row, :t])[()] if t else ""
            after = [lm.decode(torch.tensor([*x[row, :t].tolist(), v]))[()] for v in range(lm.vocab_size)]
            allowed = [v for v, each in enumerate(after) if (so_far in known if v == 0 else each in beginnings)]
            probability *= float(step[row, t, token] / step[row, t, allowed].sum())
            if token == 0:
                break
        total[text] = total.get(text, 0.0) + probability
    return {text: each / sum(total.values()) for text, each in total.items()}
