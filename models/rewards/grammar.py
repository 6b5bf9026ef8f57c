r"""Texts of a formal language: regular expressions, context-free grammars and JSON schemas, by llguidance.

`Grammar` is the likelihood 1[x in L] of a completion x, as a reward: 0 in the language, -inf outside. `TokenGrammar`
is the same language over the tokens of a vocabulary: after the tokens so far,

    mask(v) = 1[ some continuation of x_{1:t} v is in L ],     EOS is allowed where x_{1:t} is in L.

`Grammar.least_tokens` is a lower bound of the tokens that a text of the language takes. Let all texts begin with some
bytes: no spelling of these is shorter than one found by dynamic programming. Let all texts of a regular expression R
have m characters or more, and no token with characters of R alone more than L: a text takes m / L tokens or more.
m and the characters of R are found by asking whether R & S is empty, which is decided exactly.

A text has many spellings by tokens, and a language model gives probability to each. So llguidance's option to force the
one spelling that its tokenizer would choose is off: the mask is that of the texts, whatever their tokens.
"""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any
from weakref import WeakValueDictionary

import numpy as np

from bayeslm.validation import show, validated

from .reward import Reward
from .scorer import Scores

BYTES = tuple(bytes([i]) for i in range(256))
MISSING = "\ufffd"  # what decoders write for bytes that are no character
MOST_CHARACTERS = 1 << 14  # that are looked for in a text
EVERY_SPELLING = '%llguidance {"no_forcing": true}\n'


@validated
@dataclass(eq=False)
class Grammar(Reward):
    r"""0 where the completion is a text of a language, -inf where it is not; exactly one of the three is given.

    An unfinished text scores -inf as soon as no continuation of it is in the language. A text with bytes that are no
    character is in no language. `SMC` takes it as its twist, `ImportanceSampling` as its guide and `RejectionSampling`
    as its constraint: they then propose by the mask of the tokens that the language allows next.

    :param regex: a regular expression that the whole completion matches, in the syntax of Rust's crate ``regex``.
    :param lark: a context-free grammar in llguidance's variant of Lark's syntax, with the rule ``start``.
    :param json_schema: a JSON schema. Space between the parts of a text is free, unless the schema says otherwise:
        ``{"x-guidance": {"whitespace_flexible": False}, ...}``.
    :raises ImportError: if llguidance is not installed.
    :raises ValueError: if none or several are given, or the one that is given is malformed.
    """

    regex: str | None = None
    lark: str | None = None
    json_schema: Mapping[str, Any] | str | None = None
    upper_bound = 0.0

    def __post_init__(self) -> None:
        given = [name for name in ("regex", "lark", "json_schema") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"Grammar needs one of regex, lark and json_schema, got {' and '.join(given) or 'none'}")
        llguidance = _library()
        if self.regex is not None:
            source = f"start: /{llguidance.regex_to_lark(self.regex)}/"
        elif self.lark is not None:
            source = self.lark
        else:
            source = f"start: %json {_schema(self.json_schema)}"
        self._source = EVERY_SPELLING + source
        self._over: dict[tuple[bytes, ...], TokenGrammar] = {}
        if error := llguidance.LLMatcher.validate_grammar(llguidance.LLMatcher.grammar_from_lark(self._source)):
            raise ValueError(f"Grammar: {given[0]} is malformed: {error.strip()}")

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_over": {}}  # what llguidance has made can be neither copied nor stored

    def identity(self) -> Mapping[str, Any]:
        return {"source": self._source}

    def over(self, tokens: tuple[bytes, ...]) -> TokenGrammar:
        """Return the same language over tokens.

        :param tokens: the bytes of each token of a vocabulary; b"" of tokens without text.
        """
        if tokens not in self._over:
            self._over[tokens] = TokenGrammar(self._source, tokens)
        return self._over[tokens]

    def least_tokens(self, tokens: tuple[bytes, ...], limit: int) -> float:
        """Return a lower bound of the number of tokens that a text of the language takes.

        :param tokens: the bytes of each token of a vocabulary; b"" of tokens without text.
        :param limit: the bound is sharp only above so many tokens, and costs little below.
        :returns: inf if no tokens spell a text.
        """
        forced = fewest_tokens(self.over(tokens).root.forced, tokens)
        if self.regex is None or self._meets(f"(?s:.{{0,{limit}}})"):  # as a token may have a character alone
            return forced
        letters = self._letters(bytes(range(128)))
        others = self._meets(r"(?s:.*[^\x00-\x7F].*)")
        fits = [token for token in tokens if all(byte in letters if byte < 128 else others for byte in token)]
        longest = max((sum(byte & 0xC0 != 0x80 for byte in token) for token in fits), default=0)  # in characters
        low, high = limit, 2 * limit + 1  # every text has more than `low` characters, and some text at most `high`
        while high < MOST_CHARACTERS and not self._meets(f"(?s:.{{0,{high}}})"):
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self._meets(f"(?s:.{{0,{middle}}})") else (middle, high)
        return max(forced, math.ceil((low + 1) / longest) if longest else math.inf)

    def _letters(self, some: bytes) -> bytes:
        """Return those of some ASCII characters that a text of the regular expression has."""
        written = "".join(rf"\x{byte:02X}" for byte in some)
        if not some or not self._meets(f"(?s:.*[{written}].*)"):
            return b""
        half = len(some) // 2
        return some if not half else self._letters(some[:half]) + self._letters(some[half:])

    def _meets(self, other: str) -> bool:
        """Return whether a text of the regular expression is one of another; True where that takes too long to tell."""
        mine, others = (_library().regex_to_lark(x) for x in (self.regex or "", other))
        try:
            root = TokenGrammar(f"{EVERY_SPELLING}start: T\nT: /{mine}/ & /{others}/", BYTES).root
            return root.accepts or bool(root.mask.any())
        except ValueError:  # llguidance has given up
            return True

    def score(self, prompts: list[Any], completions: list[str], **columns: Any) -> Scores:
        return [0.0 if state is not None and state.accepts else -math.inf for state in self._read(completions)]

    def prefix(self, prompts: list[Any], completions: list[str], **columns: Any) -> Scores:
        return [0.0 if state is not None else -math.inf for state in self._read(completions)]

    def _read(self, texts: list[str]) -> list[GrammarState | None]:
        """Return the state after each text, or None where no continuation of it is in the language."""
        known = dict.fromkeys(texts)
        for text in known:
            known[text] = None if MISSING in text else self.over(BYTES).root.after_all(text.encode("utf-8", "replace"))
        return [known[text] for text in texts]


class TokenGrammar:
    """A language over the tokens of a vocabulary.

    :param source: in llguidance's variant of Lark's syntax.
    :param tokens: the bytes of each token; b"" of tokens without text, which are allowed anywhere.
    """

    def __init__(self, source: str, tokens: tuple[bytes, ...]) -> None:
        self.size = len(tokens)
        self.invisible = np.array([not token for token in tokens])
        llguidance = _library()
        grammar = llguidance.LLMatcher.grammar_from_lark(source)
        self.root = GrammarState(self, llguidance.LLMatcher(_tokenizer(tokens), grammar, log_level=0))


class GrammarState:
    """A text so far. All rows with one text share its state, which lives as long as one of them is there.

    :param grammar: the language.
    :param matcher: llguidance's, which has read the text.
    """

    def __init__(self, grammar: TokenGrammar, matcher: Any) -> None:
        _check(matcher)
        self.accepts = bool(matcher.is_accepting())
        """Whether the text is in the language."""
        self._grammar = grammar
        self._matcher = matcher
        self._next: WeakValueDictionary[int, GrammarState] = WeakValueDictionary()

    @cached_property
    def mask(self) -> np.ndarray:
        """The tokens that some text of the language continues with, bool (token,)."""
        bits = np.zeros(-(-(self._grammar.size + 1) // 32), dtype=np.int32)
        if not self._matcher.is_stopped():
            matcher = self._matcher.deep_copy()  # as it gives up where no token continues the text
            matcher.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes)
            if not matcher.get_error().startswith("NoExtensionBias"):
                _check(matcher)
        allowed = np.unpackbits(bits.view(np.uint8), bitorder="little")[: self._grammar.size].astype(bool)
        return allowed | self._grammar.invisible

    def after(self, token: int) -> GrammarState | None:
        """Return the state after one more token; None if the mask does not have it."""
        if self._grammar.invisible[token]:
            return self
        found = self._next.get(token)
        if found is None and (found := self.after_all([token])) is not None:
            self._next[token] = found
        return found

    def after_all(self, tokens: Sequence[int] | bytes) -> GrammarState | None:
        """Return the state after several tokens, none of them without text; None if no text continues with them."""
        tokens = list(tokens)
        matcher = self._matcher
        if matcher.validate_tokens(tokens) < len(tokens):
            return None
        matcher = matcher.deep_copy()
        matcher.consume_tokens(tokens)
        return GrammarState(self._grammar, matcher)

    @property
    def forced(self) -> bytes:
        """The bytes that all texts of the language continue with."""
        return b"" if self._matcher.is_stopped() else bytes(self._matcher.compute_ff_bytes())


@validated
def fewest_tokens(text: bytes, tokens: tuple[bytes, ...]) -> float:
    """Return the least number of tokens that a text which begins with ``text`` takes; inf if none spell it.

    :param tokens: the bytes of each token of a vocabulary; b"" of tokens without text.
    """
    if not text:
        return 0
    words, beginnings = _words(tokens)
    longest = max(map(len, words), default=0)
    least = [0.0] + [math.inf] * len(text)  # of the tokens that spell its first bytes
    for end in range(1, len(text) + 1):
        starts = range(max(0, end - longest), end)
        least[end] = min((least[i] + 1 for i in starts if text[i:end] in words), default=math.inf)
    over = [least[i] + 1 for i in range(len(text)) if text[i:] in beginnings]  # the last token goes further
    return min([least[-1], *over])


@lru_cache(maxsize=8)
def _words(tokens: tuple[bytes, ...]) -> tuple[frozenset[bytes], frozenset[bytes]]:
    """Return the texts of tokens, and what they begin with."""
    words = frozenset(token for token in tokens if token)
    return words, frozenset(word[:n] for word in words for n in range(1, len(word) + 1))


def _schema(schema: Mapping[str, Any] | str | None) -> str:
    """Return a JSON schema as a text."""
    try:
        return json.dumps(json.loads(schema) if isinstance(schema, str) else dict(schema or {}))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"Grammar: json_schema is no JSON, got {show(schema)}: {error}") from error


def _check(matcher: Any) -> None:
    """Refuse a matcher that has given up: it would call a text wrong that it has not read.

    :raises ValueError: with its reason.
    """
    if matcher.is_error():
        raise ValueError(f"the grammar cannot be matched: {matcher.get_error().splitlines()[0]}")


def _library() -> Any:
    try:
        return importlib.import_module("llguidance")
    except ModuleNotFoundError as error:
        raise ImportError('Grammar needs llguidance: pip install "bayeslm[grammar]"') from error


@lru_cache(maxsize=8)
def _tokenizer(tokens: tuple[bytes, ...]) -> Any:
    """Return llguidance's form of a vocabulary, with one more token that ends a text."""
    llguidance = _library()
    return llguidance.LLTokenizer(llguidance.TokenizerWrapper(_Vocabulary(tokens)), n_vocab=len(tokens) + 1)


class _Vocabulary:
    """A vocabulary as llguidance reads it."""

    bos_token_id = None

    def __init__(self, tokens: tuple[bytes, ...]) -> None:
        self.eos_token_id = len(tokens)
        self.tokens = [*tokens, b"<eos>"]
        self.special_token_ids = [self.eos_token_id]

    def __call__(self, text: bytes) -> list[int]:
        """Return a spelling of a text, for which nobody asks while `EVERY_SPELLING` is allowed."""
        return []
