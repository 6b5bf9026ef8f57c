"""Prompts, completions and columns of any shape to flat lists, by numpy's broadcasting."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from numbers import Integral
from typing import Any

import numpy as np
from torch import Tensor

from bayeslm.characters import check_characters, texts_in
from bayeslm.chats import is_chat
from bayeslm.validation import validated

Flat = tuple[list[Any], list[str], dict[str, Any]]  # prompts, completions, columns
RESERVED = ("prompts", "completions", "self")  # arguments of every reward


@validated
def check_columns(names: Iterable[str]) -> None:
    """Refuse names of columns by which rewards have other arguments.

    :raises ValueError: with the name.
    """
    if taken := [name for name in names if name in RESERVED]:
        raise ValueError(f"a column is called {taken[0]!r}, as an argument of every reward is: rename it")


@validated
def with_trainer_arguments(
    columns: Mapping[str, Any], completion_ids: np.ndarray, truncated: np.ndarray
) -> dict[str, Any]:
    """Return columns with the other arguments that TRL's trainers pass to every reward, and ``truncated``.

    What a reward logs is dropped, and ``trainer_state`` is None: the target of inference does not depend on how far a
    training is.

    :param columns: of the prompts; a reward's own ``log_extra``, ``log_metric`` or ``trainer_state`` is passed on.
    :param completion_ids: lists of token ids, an object array of the completions' shape.
    :param truncated: whether completions were cut at the limit, bool, of the same shape; a column of this name is
        passed on instead.
    :raises ValueError: if a column has a reserved name.
    """
    check_columns(columns)
    ignored = dict.fromkeys(("log_extra", "log_metric"), _ignore)
    return {"trainer_state": None, "truncated": truncated, **ignored, **columns, "completion_ids": completion_ids}


def _ignore(name: str, value: Any) -> None:
    """Log nothing."""


def broadcast(
    prompts: Any, completions: Any, columns: Mapping[str, Any]
) -> tuple[tuple[int, ...], tuple[int, ...], Flat]:
    """Broadcast prompts, completions and columns.

    :returns: the common shape, the shape of the completions, and flat lists of equal length.
    :raises TypeError: for one prompt or text instead of a list of them, or a completion is not a text.
    :raises ValueError: if shapes do not broadcast, nested completions are ragged, or a column has a reserved name.
    """
    check_columns(columns)
    prompt_array, text_array = _prompts(prompts), _completions(completions)
    check_texts("prompts", prompt_array)
    check_texts("completions", text_array)
    try:
        shape = np.broadcast_shapes(prompt_array.shape, text_array.shape)
    except ValueError:
        raise ValueError(
            f"shapes of prompts {prompt_array.shape} and completions {text_array.shape} do not broadcast"
        ) from None

    def flat(array: np.ndarray) -> list[Any]:
        return list(np.broadcast_to(array, shape).flat)

    flat_columns = {}
    for name, values in columns.items():
        if isinstance(values, (str, bytes)):
            raise TypeError(f"column {name!r} must hold one value a prompt, got one string: write [{values!r}]")
        if not isinstance(values, (Tensor, np.ndarray)) and (
            not hasattr(values, "__len__") or isinstance(values, Mapping)
        ):
            flat_columns[name] = values  # a callback or a setting, which TRL passes to every reward
            continue
        column = _objects(values)
        if column.ndim <= 1:
            check_texts(f"column {name!r}", column)
        if column.ndim and prompt_array.ndim and column.shape[-1] == 1 < prompt_array.shape[-1]:
            raise ValueError(f"column {name!r} has 1 value for {prompt_array.shape[-1]} prompts: give one a prompt")
        try:
            flat_columns[name] = flat(column)
        except ValueError:
            raise ValueError(f"column {name!r} of shape {column.shape} does not broadcast to {shape}") from None
    return shape, text_array.shape, (flat(prompt_array), flat(text_array), flat_columns)


def check_texts(what: str, values: np.ndarray) -> None:
    """Refuse texts that have no encoding, also in lists and messages.

    :raises ValueError: with the place.
    """
    for index, value in np.ndenumerate(values):
        for text in texts_in(value):
            check_characters(f"{what}{list(index)}", text)


def take(rows: Sequence[int] | np.ndarray, flat: Flat) -> Flat:
    """Return some of the entries; a column that is not a list is passed on unchanged."""
    prompts, completions, columns = flat

    def some(values: list[Any]) -> list[Any]:
        return [values[i] for i in rows]

    return some(prompts), some(completions), {k: some(v) if isinstance(v, list) else v for k, v in columns.items()}


def _objects(values: Any) -> np.ndarray:
    """Return an object array; the elements of other sequences than arrays and tensors become its elements."""
    if isinstance(values, Tensor):
        values = values.detach().cpu().numpy()
    if isinstance(values, Set):
        raise TypeError(f"prompts and columns must be lists, got a {type(values).__name__}, which has no order")
    if isinstance(values, np.ma.MaskedArray):
        values = np.array(values.tolist(), dtype=object)  # with None where an entry is missing
    if isinstance(values, np.ndarray):
        return values.astype(object)
    return np.fromiter(values, dtype=object, count=len(values))


def _prompts(prompts: Any) -> np.ndarray:
    if isinstance(prompts, str):
        raise TypeError(f"prompts must be a list of prompts, got one string: write [{prompts[:40]!r}]")
    array = _objects(list(prompts) if isinstance(prompts, Tensor) else prompts)  # a tensor's rows are prompts
    for prompt in array.flat:
        if isinstance(prompt, (Mapping, Integral)):
            raise TypeError("prompts must be a list of prompts, got one chat or one prompt's token ids: write [prompt]")
    return array


def _completions(completions: Any) -> np.ndarray:
    if isinstance(completions, str):
        raise TypeError(f"completions must be a list of texts, got one string: write [{completions[:40]!r}]")
    array = _nested(completions)
    texts = np.empty(array.shape, dtype=object)
    for index, completion in np.ndenumerate(array):
        texts[index] = _text(completion)
    return texts


def _nested(value: Any) -> np.ndarray:
    """Return nested lists as an object array whose elements are texts or conversations."""
    if isinstance(value, np.ndarray):
        return value.astype(object)
    if isinstance(value, str) or is_chat(value) or not isinstance(value, Sequence):
        leaf = np.empty((), dtype=object)
        leaf[()] = value
        return leaf
    rows = [_nested(row) for row in value]
    if len({row.shape for row in rows}) > 1:
        raise ValueError(f"nested completions are ragged: rows of shapes {sorted({row.shape for row in rows})}")
    return np.stack(rows) if rows else np.empty(0, dtype=object)


def _text(completion: Any) -> str:
    """Return a completion's text; TRL writes those of a conversation as messages."""
    if isinstance(completion, str):
        return completion
    contents = [message.get("content") for message in completion] if is_chat(completion) else [None]
    if not all(isinstance(content, str) for content in contents):
        raise TypeError(
            f"completions must hold texts, got {type(completion).__name__}; lm.decode turns token ids into texts"
        )
    return "".join(map(str, contents))
