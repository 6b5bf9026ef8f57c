r"""Texts of completions: what each adds to the text of its prompt.

    text(x | c)  =  D(c x)  without its beginning  D(c)

D decodes token ids. D(x) alone may be another text, since decoders look at what comes before a token: many drop the
space at the beginning of a text (SentencePiece's, as of Llama 2), some write the spaces themselves (WordPiece), and the
bytes of one character may belong to two tokens. A tokenizer without a decoder is one of words, whose ids stand for
words between spaces: there the text of a completion is D(x), its words.

In a run (`remembered`) a completion that has grown, x = y v, is not decoded anew. With w the last tokens of y, as many
as of a prompt are decoded with a completion,

    text(x | c)  =  text(y | c)  with  D(w v)  without its beginning  D(w)

where D(w) is its beginning and does not end inside a character; else x is decoded from its own beginning.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Size

from .encoding import Encoded
from .remembered import recalled, remembered

CONTEXT = 8  # tokens of the prompt that are decoded with a completion; more where they begin inside a character
MISSING = "\ufffd"  # what decoders write for the bytes of an incomplete character


Pair = tuple[int, tuple[int, ...]]  # the index of a context, and the token ids of a completion
Texts = dict[Pair, str | None]


class Context(NamedTuple):
    """The tokens before a completion, as far as its text depends on them, and their own text."""

    ids: tuple[int, ...]
    text: str


def decode(tokenizer: Any, rows: Sequence[Sequence[int]]) -> list[str]:
    """Return the text of each row of token ids, without special tokens."""
    return list(tokenizer.batch_decode([list(row) for row in rows], skip_special_tokens=True)) if rows else []


def context_of(tokenizer: Any, prompt: Sequence[int]) -> Context:
    """Return the end of a prompt that completions are decoded with."""
    size = CONTEXT
    while True:
        ids = tuple(prompt[-size:])
        (text,) = decode(tokenizer, [ids])
        if len(ids) == len(prompt) or (text.strip() and not text.startswith(MISSING)):
            return Context(ids, text)
        size *= 2


def any_context(tokenizer: Any) -> Context:
    """Return the context of completions whose prompt is not known: a word in the middle of a text."""
    candidates = ([token] for token in range(len(tokenizer) if hasattr(tokenizer, "__len__") else 0))
    for ids in (list(tokenizer("a", add_special_tokens=False)["input_ids"]), *candidates):
        (text,) = decode(tokenizer, [ids])
        if text.isalnum():
            return Context(tuple(ids), text)
    return Context((), "")


def completion_texts(tokenizer: Any, rows: Sequence[Sequence[int]], batch: Size, prompts: Encoded | None) -> np.ndarray:
    """Return the text that each completion adds to its prompt, an object array of the batch's shape.

    :param rows: token ids of completions, flat.
    :param batch: the shape of the batch.
    :param prompts: their shape broadcasts with the batch. None: not known, as where several prompts share a completion.
    :raises ValueError: if the shapes do not broadcast.
    """
    if prompts is not None:
        shape = prompts.ids.shape[:-1]
        try:
            covered = torch.broadcast_shapes(shape, batch) == batch
        except RuntimeError:
            raise ValueError(f"prompts of shape {tuple(shape)} do not fit completions of {tuple(batch)}") from None
    texts = np.empty(len(rows), dtype=object)
    if _joins_words(tokenizer):
        texts[:] = _added_texts(tokenizer, [Context((), "")], [0] * len(rows), rows)
    elif prompts is not None and covered:
        of = torch.arange(shape.numel()).reshape(shape).expand(batch).reshape(-1).tolist()
        texts[:] = _added_texts(tokenizer, _contexts(tokenizer, prompts), of, rows)
    else:
        texts[:] = _added_texts(tokenizer, [any_context(tokenizer)], [0] * len(rows), rows)
    return texts.reshape(tuple(batch))


def _contexts(tokenizer: Any, prompts: Encoded) -> list[Context]:
    """Return what completions of each prompt are decoded with."""
    memory = remembered()

    def made() -> tuple[Encoded, list[Context]]:  # with the tensors, whose ids nothing else has as long as this is kept
        return prompts, [context_of(tokenizer, prompt) for prompt in prompts.rows()]

    return recalled(memory.contexts, (memory.of(tokenizer), id(prompts.ids), id(prompts.mask)), made)[1]


def _added_texts(
    tokenizer: Any, contexts: Sequence[Context], of: Sequence[int], rows: Sequence[Sequence[int]]
) -> list[str]:
    """Return the text that each row of token ids adds to its context, ``of`` being its index."""
    keys = [(i, tuple(row)) for i, row in zip(of, rows, strict=True)]
    pairs = list(dict.fromkeys(keys))  # draws of a sharp posterior repeat themselves
    memory = remembered()
    by = memory.of(tokenizer)
    memory.texts.size = max(memory.texts.size, 4 * len(pairs))

    def known(i: int, row: tuple[int, ...]) -> str | None:
        text: str | None = memory.texts.get((by, contexts[i], row))
        return text

    texts: Texts = {pair: known(*pair) for pair in pairs}
    texts |= _grown(tokenizer, [pair for pair, text in texts.items() if text is None], known)
    anew = [pair for pair, text in texts.items() if text is None]
    wholes = decode(tokenizer, [(*contexts[i].ids, *row) for i, row in anew])
    texts |= {pair: _added(contexts[pair[0]].text, whole) for pair, whole in zip(anew, wholes, strict=True)}
    if lost := [pair for pair, text in texts.items() if text is None]:
        # an incomplete character at the end makes some decoders give up the bytes before it, the prompt's too
        other = any_context(tokenizer)
        alone = decode(tokenizer, [(*other.ids, *row) for _, row in lost])
        texts |= {pair: text.removeprefix(other.text) for pair, text in zip(lost, alone, strict=True)}
    for (i, row), text in texts.items():
        memory.texts.put((by, contexts[i], row), text)
    return [str(texts[key]) for key in keys]


def _grown(tokenizer: Any, pairs: Sequence[Pair], known: Callable[[int, tuple[int, ...]], str | None]) -> Texts:
    """Return the texts of rows that have grown by a few tokens, None of those that are to be decoded anew.

    :param known: the text of a row of a context, None if it is not known.
    """
    found: Texts = dict.fromkeys(pairs)
    beginnings = []
    for i, row in pairs:
        for size in range(len(row) - 1, max(2 * CONTEXT, len(row) - CONTEXT) - 1, -1):
            text = known(i, row[:size])
            if text and not text.endswith(MISSING):  # else its last character may not be complete
                beginnings.append(((i, row), size, text))
                break
    befores = decode(tokenizer, [row[size - CONTEXT : size] for (_, row), size, _ in beginnings])
    afters = decode(tokenizer, [row[size - CONTEXT :] for (_, row), size, _ in beginnings])
    for (pair, _, text), before, after in zip(beginnings, befores, afters, strict=True):
        if before.strip() and after.startswith(before) and not before.endswith(MISSING):
            found[pair] = text + after[len(before) :]
    return found


def _added(before: str, whole: str) -> str | None:
    """Return what a text has more than its beginning; None if it has another beginning."""
    if whole.startswith(before):
        return whole[len(before) :]
    if before.endswith(MISSING):  # the completion's first bytes complete a character of the prompt
        return whole[_agree(before, whole) :]
    return None


def _agree(one: str, other: str) -> int:
    """Return the number of characters that two texts begin with in common."""
    differ = (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(differ, min(len(one), len(other)))


def _joins_words(tokenizer: Any) -> bool:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return backend is not None and backend.decoder is None


def token_ends(
    tokenizer: Any, rows: Sequence[Sequence[int]], texts: np.ndarray, length: int, before: Context | None = None
) -> np.ndarray:
    """Return where each token of a completion ends in its text, in characters, int32 (*batch, token).

    A token without characters of its own (a special token, one byte of several of a character) ends where the one
    before it does, or where its character does; all after the completion's end have the length of the text.

    :param rows: token ids of completions, up to their end, flat.
    :param texts: their texts, by `completion_texts`, (*batch).
    :param length: tokens of a completion with its padding.
    :param before: the context of each; None: a text that ends in a word.
    """
    keys = list(zip(map(tuple, rows), texts.reshape(-1).tolist(), strict=True))
    tokens = sorted({token for row in rows for token in row})
    pieces = dict(zip(tokens, token_texts(tokenizer, [[token] for token in tokens]), strict=True))
    heads = sorted({row[0] for row in rows if row})
    first = dict(zip(heads, token_texts(tokenizer, [[token] for token in heads], before), strict=True))
    found = {key: np.full(length, len(key[1]), dtype=np.int32) for key in keys}
    for (row, text), ends in found.items():
        parts = [first[row[0]], *(pieces[token] for token in row[1:])] if row else []
        if "".join(parts) == text:
            ends[: len(row)] = np.cumsum([len(part) for part in parts])
        else:  # a decoder that looks at neighbours, or a character of several tokens
            beginnings = token_texts(tokenizer, [row[: t + 1] for t in range(len(row) - 1)], before)
            common = [_agree(text, beginning) for beginning in beginnings]
            ends[: len(common)] = np.maximum.accumulate(common)
    return np.array([found[key] for key in keys], dtype=np.int32).reshape(*texts.shape, length)


def token_texts(tokenizer: Any, rows: Sequence[Sequence[int]], before: Context | None = None) -> list[str]:
    """Return the text that each row adds to its context; of a tokenizer of words, the words alone.

    :param before: the context; None: a text that ends in a word.
    """
    if _joins_words(tokenizer):
        return decode(tokenizer, rows)
    return _added_texts(tokenizer, [before or any_context(tokenizer)], [0] * len(rows), rows)
