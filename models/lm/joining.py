"""Prompts that are made of texts and of what was drawn, token for token.

A completion becomes part of a prompt as it was drawn: its ids without its end and its padding. (Decoded and encoded
again, the same text may have other ids, and other probabilities.) Texts between have ids of their own. In a chat a
completion is the assistant's turn, and the template is applied around it: to the chat with a mark in the place of each
turn that was drawn, whose text is cut at the marks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .chats import chat_text, plain_message
from .completions import text_ids
from .encoding import Base, Encoded, Vocabulary

_MARK = "@drawn{}@"


def join(prompts: Encoded, parts: tuple[Any, ...], tokenizer: Any, vocabulary: Vocabulary) -> Encoded:
    """Return prompts continued by parts; see `LanguageModel.join`."""
    mask = torch.ones_like(prompts.ids) if prompts.mask is None else prompts.mask
    segments, chats = [(prompts.ids, mask)], prompts.chats
    for number, part in enumerate(parts, start=1):
        name = f"part {number}"
        if isinstance(part, Tensor):
            segments.append(_drawn(name, part, vocabulary))
            continue
        if tokenizer is None:
            raise TypeError(f"{name} is a text, and this LanguageModel has no tokenizer: join token ids")
        if isinstance(part, Mapping):
            between, chats = _next_turns(name, chats, part, tokenizer)
            segments.append(_padded(between, lambda x: list(tokenizer(x, add_special_tokens=False)["input_ids"])))
        else:
            segments.append(_padded(_array(name, part), partial(text_ids, name, tokenizer=tokenizer)))
    base = prompts.base or Base(
        prompts.ids.reshape(-1, prompts.ids.shape[-1]),
        None if prompts.mask is None else mask.reshape(-1, mask.shape[-1]),
        torch.arange(prompts.ids.shape[:-1].numel(), device=mask.device).reshape(prompts.ids.shape[:-1]),
    )
    return _side_by_side(segments, base, chats)


def _drawn(name: str, value: Tensor, vocabulary: Vocabulary) -> tuple[Tensor, Tensor]:
    """Return ids and mask (*batch, length) of completions, without what ends them."""
    if value.dtype != torch.long or value.dim() == 0:
        raise TypeError(f"{name} is a tensor of {value.dtype} and shape {tuple(value.shape)}: give completions")
    kept = vocabulary.is_live(value) & ~vocabulary.is_eos(value) & (value >= 0) & (value < vocabulary.size)
    return value, kept.long()


def _array(name: str, part: Any) -> np.ndarray:
    """Return one text, or an array or a list of them, as an object array; None is no text."""
    if isinstance(part, np.ndarray):
        array = part.astype(object)
    else:
        texts = [part] if isinstance(part, str) else list(part) if isinstance(part, list | tuple) else None
        if texts is None:
            raise TypeError(
                f"{name} is {part!r:.60}: it must be completions, a text, an array of texts or a chat's message"
            )
        array = np.empty(len(texts), dtype=object)
        array[:] = texts
    for text in array.reshape(-1).tolist():
        if not isinstance(text, str | None):
            raise TypeError(f"{name} holds {text!r:.60}, and no text")
    return array


def _padded(texts: np.ndarray, encode: Callable[[str], list[int]]) -> tuple[Tensor, Tensor]:
    """Return ids and mask (*batch, length) of texts, each encoded once."""
    flat = [text or "" for text in texts.reshape(-1).tolist()]
    known = {text: encode(text) if text else [] for text in dict.fromkeys(flat)}
    longest = max(map(len, known.values()), default=0)
    rows = {text: row + [-1] * (longest - len(row)) for text, row in known.items()}
    ids = torch.tensor([rows[text] for text in flat], dtype=torch.long).reshape(*texts.shape, longest)
    return ids, (ids >= 0).long()


def _side_by_side(segments: list[tuple[Tensor, Tensor]], base: Base, chats: np.ndarray | None) -> Encoded:
    """Return segments one after another, left-padded, in the batch that they broadcast to."""
    try:
        shape = torch.broadcast_shapes(*(ids.shape[:-1] for ids, _ in segments))
    except RuntimeError:
        shapes = ", ".join(str(tuple(ids.shape[:-1])) for ids, _ in segments)
        raise ValueError(f"prompts and parts have batches of different shapes: {shapes}") from None
    columns = ([x.to(base.ids.device).expand(*shape, -1) for x in column] for column in zip(*segments, strict=True))
    ids, mask = (torch.cat(column, -1) for column in columns)
    order = mask.argsort(stable=True)  # what is not kept goes to the left
    mask = mask.gather(-1, order)
    longest = max(int(mask.sum(-1).max()), 1)
    ids = ids.gather(-1, order).masked_fill(mask == 0, 0)[..., -longest:]
    mask = mask[..., -longest:]
    chats = None if chats is None else np.broadcast_to(chats, tuple(shape))
    base = base._replace(rows=base.rows.expand(shape))
    return Encoded(ids.contiguous(), None if bool(mask.all()) else mask.contiguous(), chats, base)


def _next_turns(
    name: str, chats: np.ndarray | None, message: Mapping[str, Any], tokenizer: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Return the text from the end of the assistant's turn to the beginning of its next one, and the chats up to there.

    :param message: whose content is a text, or an array of texts; a chat whose text is None does not go on.
    """
    if chats is None:
        raise TypeError(f"{name} is a chat's message, and the prompts are no chats")
    contents = _array(f"{name}'s content", message.get("content"))
    shape = np.broadcast_shapes(chats.shape, contents.shape)
    between, longer = np.empty(shape, dtype=object), np.empty(shape, dtype=object)
    known: dict[tuple[int, str | None], tuple[Any, Any]] = {}
    pairs = zip(np.broadcast_to(chats, shape).flat, np.broadcast_to(contents, shape).flat, strict=True)
    for i, (chat, content) in enumerate(pairs):
        key = (id(chat), content)
        if key not in known:
            if chat is None:
                raise TypeError(f"{name} is a chat's message, and prompt {i} is no chat")
            new = {**message, "content": content}
            known[key] = (None, chat) if content is None else _turn(name, chat, new, tokenizer)
        between.flat[i], longer.flat[i] = known[key]
    return between, longer


def _turn(
    name: str, chat: tuple[Mapping[str, Any], ...], message: Mapping[str, Any], tokenizer: Any
) -> tuple[str, tuple[Mapping[str, Any], ...]]:
    """Return the text between a turn that was drawn and the next, and the chat with both messages.

    :raises ValueError: if the template writes what was before in another way than before.
    """
    mark = _MARK.format(len(chat))
    *before, last = (plain_message(name, turn) for turn in chat)
    if last.get("role") == "assistant":  # what was drawn goes on with it
        answered = (*before, {**last, "content": f"{last.get('content', '')}{mark}"})
    else:
        answered = (*before, last, {"role": "assistant", "content": mark})
    longer = (*answered, message)
    begun, whole = (chat_text(name, turns, tokenizer) for turns in (chat, longer))
    beginning, found, between = whole.partition(mark)
    if not found or beginning.rstrip() != begun.rstrip():  # some write a space that a completion begins with itself
        raise ValueError(
            f"{name}: the tokenizer's chat template writes earlier turns in another way once others follow, so that "
            "what was drawn would not stand after the prompt it was drawn from. Join texts instead of messages, with "
            "the template's words around them"
        )
    return between, longer
