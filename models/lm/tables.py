"""Tables of prompts: a mapping of columns, a list of rows, a ``datasets.Dataset`` (or a slice of one), a DataFrame."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from typing import Any

import numpy as np

from bayeslm.validation import show

PROMPT, COMPLETION, TEXT = "prompt", "completion", "text"  # names of columns, as in TRL's data sets


def is_table(value: Any) -> bool:
    """Return whether a value has columns, so that it is no plain list of prompts."""
    if isinstance(value, Mapping) or _names(value) is not None:
        return True
    return (
        isinstance(value, list | tuple) and bool(value) and all(isinstance(x, Mapping) and PROMPT in x for x in value)
    )


def read_table(value: Any) -> tuple[Any, dict[str, list[Any]]]:
    """Return the prompts of a table, and its other columns.

    :param value: a table, or anything else, which is returned unchanged, without columns.
    :raises ValueError: if a table has no column ``prompt``, no rows, or columns of different lengths.
    """
    if not is_table(value):
        return value, {}
    columns = _columns(value)
    if PROMPT not in columns:
        raise ValueError(f"the table has the columns {list(columns)}, and none of them is {PROMPT!r}: rename one")
    size = len(columns[PROMPT])
    if not size:
        raise ValueError("the table has no rows: give at least one prompt")
    for name, column in columns.items():
        if len(column) != size:
            raise ValueError(f"column {name!r} has {len(column)} values for {size} prompts")
    return columns.pop(PROMPT), columns


def read_texts(value: Any, prompts: Any = None) -> tuple[Any, Any]:
    """Return texts to be learned, and the prompts that they complete, or None.

    :param value: texts, which are returned as a list; or a table with a column ``text``, or ``prompt`` and
        ``completion``, as in TRL's data sets. Other columns are ignored.
    :raises TypeError: if there are prompts beside a table, it is neither texts nor a table, or a text is no string.
    :raises ValueError: if a table has none of these columns, or its columns have different lengths.
    """
    is_rows = isinstance(value, list | tuple) and bool(value) and all(isinstance(row, Mapping) for row in value)
    if not is_rows and not is_table(value):
        return _strings(value), prompts
    if prompts is not None:
        raise TypeError("prompts are given twice: as an argument, and by the table of texts, as its column 'prompt'")
    try:
        columns = _columns(value)
    except ValueError as error:
        raise ValueError(f"the table of texts: {error}") from error
    if COMPLETION in columns and PROMPT in columns:
        if len(columns[PROMPT]) != len(columns[COMPLETION]):
            raise ValueError(f"{len(columns[PROMPT])} prompts have {len(columns[COMPLETION])} completions")
        return _strings(columns[COMPLETION]), columns[PROMPT]
    if TEXT in columns:
        return _strings(columns[TEXT]), None
    raise ValueError(
        f"the table of texts has the columns {list(columns)}: name them 'prompt' and 'completion', or 'text'"
    )


def _strings(texts: Any) -> list[str]:
    """Return texts as a list.

    :raises TypeError: if they are no list, or one is no string.
    """
    if isinstance(texts, str | bytes) or not isinstance(texts, Iterable) or getattr(texts, "ndim", 1) != 1:
        raise TypeError(f"texts must be a list of texts, or a table of them, got {show(texts)}")
    found = list(texts)
    if wrong := [i for i, text in enumerate(found) if not isinstance(text, str)]:
        raise TypeError(f"texts[{wrong[0]}] must be a string, got {show(found[wrong[0]])}")
    return found


def without_index(name: str, column: Any) -> Any:
    """Return a column of pandas, whose index need not be the position, as a list; anything else unchanged.

    An array with missing entries (NumPy's masked arrays) is a list with None for them.

    :raises TypeError: if it is a set, which has no order, or a table.
    """
    if isinstance(column, Set):
        raise TypeError(f"{name} must be a list, got a {type(column).__name__}, which has no order")
    if hasattr(column, "iloc") and getattr(column, "ndim", 1) != 1:
        raise TypeError(f"{name} must be a list, got a table: give one of its columns")
    return column.tolist() if hasattr(column, "iloc") or isinstance(column, np.ma.MaskedArray) else column


def _names(value: Any) -> list[str] | None:
    """Return the names of the columns of a data set or a DataFrame; None of anything else."""
    for attribute in ("column_names", "columns"):  # of `datasets`; of pandas and polars
        names = getattr(value, attribute, None)
        if names is not None and hasattr(value, "__getitem__") and not callable(names):
            return [str(name) for name in names]
    return None


def _columns(table: Any) -> dict[str, list[Any]]:
    if isinstance(table, list | tuple):
        first = table[0]
        for i, row in enumerate(table):
            if row.keys() != first.keys():
                raise ValueError(f"row {i} has the columns {list(row)}, and the first row has {list(first)}")
        return {str(name): [row[name] for row in table] for name in first}
    if isinstance(table, Mapping):
        if PROMPT in table and _names(table[PROMPT]) is not None:  # the splits of a DatasetDict are tables
            raise ValueError(f"a dictionary of data sets ({list(table)}) is no table: give one of them")
        found = dict(table)
    else:
        plain = table.with_format(None) if hasattr(table, "with_format") else table  # lists, not tensors
        found = {name: plain[name] for name in _names(table) or ()}
    return {str(name): _as_list(name, column) for name, column in found.items()}


def _as_list(name: Any, column: Any) -> list[Any]:
    if isinstance(column, str | bytes) or not hasattr(column, "__iter__"):
        raise ValueError(f"column {name!r} must hold one value a prompt, got {column!r:.60}: write [{column!r:.60}]")
    cells = column.tolist() if hasattr(column, "tolist") else list(column)
    return [cell.tolist() if isinstance(cell, np.ndarray) else cell for cell in cells]  # pandas' lists of Parquet


def refuse_table(value: Any) -> None:
    """Check that a value is a sequence of prompts.

    :raises TypeError: if it is a table, with what to write.
    """
    if is_table(value):
        names = list(value) if isinstance(value, Mapping) else _names(value) or list(value[0])
        raise TypeError(
            f"prompts must be a list of prompts, got a table ({type(value).__name__}) with the columns {names}: give "
            f"its prompts, table[{PROMPT!r}] or [row[{PROMPT!r}] for row in table]; TiltedLM takes the complete table"
        )
