"""Prompts and their columns in files: JSON lines, JSON, CSV, TSV, Parquet or text.

The suffix, in any case, says what a file is; all others than ``.jsonl``, ``.ndjson``, ``.json``, ``.csv``, ``.tsv`` and
``.parquet`` are text with a prompt a line, but for those of other formats (`OTHERS`), which are refused. (Parquet under
a suffix that says nothing is read as what it is.) Files are UTF-8, or begin with the mark of UTF-16 or UTF-32. Only
line feeds and carriage returns end a line. Blank lines are skipped, and count in the numbers of errors. A missing cell
is None.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .characters import check_characters, texts_in

MARKS = {codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32"}  # before those of UTF-16, which begin them
MARKS |= {codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16", codecs.BOM_UTF8: "utf-8-sig"}
OTHERS: tuple[str, ...] = (".gz", ".bz2", ".xz", ".zst", ".zip", ".7z", ".xlsx", ".xls", ".ods", ".arrow", ".feather")
OTHERS += (".pkl", ".pickle", ".npy", ".npz", ".h5", ".yaml", ".yml", ".toml", ".xml", ".html", ".ipynb", ".docx")
OTHERS += (".pdf", ".db", ".sqlite")
KNOWN = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt")  # suffixes, but for Parquet's
# As in JSON, so that 007 is a text; and so is 1.50, which a number would write as 1.5.
NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.(0|[0-9]*[1-9]))?([eE][+-]?[0-9]+)?")
LEVELS = 64  # of lists and objects inside each other, in one value
Rows = list[tuple[str, Any]]  # the place of each row in the file, and its value


def read_prompt_file(path: str | os.PathLike[str]) -> tuple[list[Any], dict[str, list[Any]]]:
    """Return the prompts in a file, and its other columns.

    A prompt is a text, a chat (a list of messages), or a list of token ids. In JSON a row is an object with "prompt",
    or a prompt alone; an object of lists is columns. A column of CSV or TSV whose cells are numbers, or true and false,
    is read as such; one without a name is left out.

    :raises ValueError: if there are no prompts, or a row is malformed; with its place in the file.
    :raises ImportError: for Parquet without pyarrow.
    :raises OSError: if the file cannot be read.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: give a file of prompts")
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: give a file of prompts")
    return prompt_table(str(path), _rows(path))


def prompt_table(path: str, rows: Rows) -> tuple[list[Any], dict[str, list[Any]]]:
    """Return the prompts in rows, and their other columns.

    :param path: where the rows are from, for errors.
    :param rows: the place of each, and its value: an object with "prompt", or a prompt alone.
    :raises ValueError: if there are none, or one is malformed; with its place.
    """
    if not rows:
        raise ValueError(f"{path} holds no prompts")
    table: list[Mapping[str, Any]] = []
    for place, row in rows:
        row = row if isinstance(row, Mapping) else {"prompt": row}
        if "prompt" not in row:
            found = ", ".join(map(repr, row)) or "nothing"
            raise ValueError(f'{path}, {place} must be an object with a "prompt", and has {found}')
        if table and row.keys() != table[0].keys():
            first = f"{rows[0][0]} has {sorted(table[0])}"
            raise ValueError(f"{path}, {place} has columns {sorted(row)}, but {first}: every row needs all of them")
        check_prompt(f"{path}, {place}: the prompt", row["prompt"])
        table.append(row)
    for (place, _), row in zip(rows, table, strict=True):
        if deep := next((name for name in row if not _is_flat(row[name], LEVELS)), None):
            raise ValueError(f"{path}, {place}: {deep!r} has more than {LEVELS} lists or objects inside each other")
        for name in row.keys() - {"prompt"}:
            check_characters(f"{path}, {place}: {name!r}", "\n".join(texts_in(row[name])))
    columns = {str(name): [_as_json(row[name]) for row in table] for name in table[0]}
    return columns.pop("prompt"), columns


def check_prompt(what: str, prompt: Any) -> None:
    """Check that a prompt is a text, a chat or token ids.

    :param what: the prompt, for the error.
    :raises ValueError: otherwise, or if it holds a lone surrogate.
    """
    if prompt is None or (isinstance(prompt, float) and math.isnan(prompt)):
        raise ValueError(f"{what} is missing")
    if isinstance(prompt, str):
        check_characters(what, prompt)
        return
    items = prompt if isinstance(prompt, list) and prompt else [None]
    if all(isinstance(item, Mapping) and "role" in item for item in items):
        check_characters(what, json.dumps(prompt, ensure_ascii=False, default=str))
    elif not all(isinstance(item, int) and not isinstance(item, bool) for item in items):
        raise ValueError(
            f"{what} is {prompt!r:.60}: it must be a text in quotes, a chat (a list of messages with role and content) "
            "or a list of token ids"
        )


def json_lines(data: bytes) -> Iterator[tuple[int, Any]]:
    """Yield the number, from 1, and the JSON value of each line that is not blank; a `ValueError` if it is none."""
    for number, line in enumerate(_lines(_utf8(data)), start=1):
        if line.strip():
            yield number, _value(line)


def _rows(path: Path) -> Rows:
    kind = path.suffix.lower()
    if kind in OTHERS:
        raise ValueError(f"{path} is a file of another kind: give {', '.join(KNOWN)} or .parquet")
    data = path.read_bytes()
    is_parquet = data.startswith(b"PAR1") and data.endswith(b"PAR1") and b"\0" in data  # as no text has
    if is_parquet and kind in KNOWN:
        raise ValueError(f"{path} is Parquet, and its suffix {kind} says otherwise: rename it to .parquet")
    if is_parquet or kind == ".parquet":
        return _parquet(path)
    try:
        data = _utf8(data)
    except ValueError as error:
        raise ValueError(f"{path} {error}") from None
    if kind in (".json", ".jsonl", ".ndjson"):
        return _json(path, data)
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        at = data[: error.start].count(b"\n") + 1
        raise ValueError(
            f"{path}, line {at} is not UTF-8 (byte {data[error.start]:#04x}): save the file as UTF-8 text"
        ) from None
    if "\0" in text:
        raise ValueError(f"{path} holds NUL characters, so it is no text in UTF-8: save it as such")
    if kind in (".csv", ".tsv"):
        return _delimited(path, text, "\t" if kind == ".tsv" else ",")
    lines = enumerate(_lines(text.encode()), start=1)
    return [(f"line {number}", line.decode()) for number, line in lines if line.decode().strip()]


def _utf8(data: bytes) -> bytes:
    """Return the text of a file in UTF-8, without the mark that it may begin with."""
    for mark, encoding in MARKS.items():
        if data.startswith(mark):
            try:
                return data.removeprefix(mark) if encoding == "utf-8-sig" else data.decode(encoding).encode()
            except UnicodeError as error:
                raise ValueError(f"begins as {encoding.upper()}, and is none: {error}") from None
    return data


def _lines(data: bytes) -> list[bytes]:
    return data.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")


# -- JSON --------------------------------------------------------------------------------------------------------


def _value(data: bytes) -> Any:
    """Return a JSON value, or what is wrong as a `ValueError`."""
    try:
        return json.loads(data.decode(), object_pairs_hook=_object)
    except UnicodeDecodeError:
        return ValueError("is not UTF-8: write the file in that encoding")
    except json.JSONDecodeError as error:
        at = f"line {error.lineno} column {error.colno}" if error.lineno > 1 else f"column {error.colno}"
        return ValueError(f"is no JSON ({error.msg}: {at}): write one JSON object a line")
    except (ValueError, RecursionError) as error:  # a number of too many digits, lists in lists in lists
        return ValueError(f"is no JSON ({error}): write one JSON object a line")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is repeated")
    return found


def _json(path: Path, data: bytes) -> Rows:
    """Return the rows of JSON lines or of one JSON document, whichever the file is."""
    rows: Rows = [(f"line {number}", value) for number, value in json_lines(data)]
    whole = _value(data) if rows else ValueError()
    if isinstance(whole, ValueError):
        if len(rows) > 1 and isinstance(rows[0][1], ValueError) and path.suffix.lower() == ".json":
            raise ValueError(f"{path} {whole}")
    elif len(rows) > 1 or path.suffix.lower() == ".json":
        rows = _document(path, whole)
    for place, value in rows:
        if isinstance(value, ValueError):
            raise ValueError(f"{path}, {place} {value}")
    return rows


def _document(path: Path, value: Any) -> Rows:
    """Return the rows of a JSON value: a list of rows, an object of columns, or one row."""
    if isinstance(value, list):
        return [(f"row {number}", row) for number, row in enumerate(value, start=1)]
    columns = value if isinstance(value, dict) else {}
    prompts = columns.get("prompt")
    if isinstance(prompts, dict) and "role" not in prompts:  # columns by the names of rows, as pandas writes them
        for name, x in columns.items():
            if not isinstance(x, dict) or x.keys() != prompts.keys():
                names = ", ".join(prompts)
                raise ValueError(f"{path}: column {name!r} has other rows than 'prompt', which has {names:.60}")
        columns = {name: [x[row] for row in prompts] for name, x in columns.items()}
        prompts = columns["prompt"]
    if not (isinstance(prompts, list) and all(isinstance(prompt, str | list) for prompt in prompts)):
        return [("row 1", value)]
    lengths = {name: len(x) if isinstance(x, list) else None for name, x in columns.items()}
    if wrong := next((name for name, length in lengths.items() if length != len(prompts)), None):
        raise ValueError(f"{path}: column {wrong!r} is no list of {len(prompts)} values, one for each prompt")
    return [(f"row {i + 1}", {name: x[i] for name, x in columns.items()}) for i in range(len(prompts))]


# -- tables ------------------------------------------------------------------------------------------------------


def _delimited(path: Path, text: str, delimiter: str) -> Rows:
    """Return the rows of CSV or TSV."""
    csv.field_size_limit(max(len(text), csv.field_size_limit()))  # the process's: a cell may be as long as the file
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    cells: list[list[str]] = []
    places: list[str] = []
    end = 0
    try:
        for row in reader:
            if row:
                cells.append(row)
                places.append(f"line {end + 1}")
            end = reader.line_num
    except csv.Error as error:
        raise ValueError(f"{path}, line {end + 1}: {error}") from None
    if not cells:
        return []
    names = _names(path, [name.strip() for name in cells.pop(0)])
    for place, row in zip(places[1:], cells, strict=True):
        if len(row) != len(names):
            raise ValueError(f"{path}, {place} has {len(row)} cells, but there are {len(names)} columns")
    columns = {}
    for i, name in enumerate(names):
        column = [row[i] for row in cells]
        if name:
            columns[name] = [cell or None for cell in column] if name == "prompt" else _typed(column)
    return [(place, {name: x[i] for name, x in columns.items()}) for i, place in enumerate(places[1:])]


def _names(path: Path, names: list[str]) -> list[str]:
    """Return the names of columns.

    :raises ValueError: if there is no "prompt", or one name twice.
    """
    if twice := next((name for name in names if name and names.count(name) > 1), None):
        raise ValueError(f"{path} has two columns {twice!r}: rename one")
    if "prompt" not in names:
        raise ValueError(f"{path} has no column 'prompt'; its columns are {', '.join(map(repr, names))}")
    return names


def _typed(cells: Sequence[str]) -> list[Any]:
    """Return a column's cells as numbers or truth values if all are, else as texts; empty ones are None."""
    filled = [cell for cell in cells if cell]
    read: Any = str
    if filled and all(NUMBER.fullmatch(cell) and math.isfinite(float(cell)) for cell in filled):
        read = float if any(set(cell) & set(".eE") for cell in filled) else int
    elif filled and all(cell.lower() in ("true", "false") for cell in filled):
        read = "true".__eq__
        cells = [cell.lower() for cell in cells]
    return [read(cell) if cell else None for cell in cells]


def _parquet(path: Path) -> Rows:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise ImportError(f'{path} is Parquet, which needs pyarrow: pip install "bayeslm[parquet]"') from error
    try:
        table = parquet.read_table(path)
    except ArrowException as error:
        raise ValueError(f"{path} is no readable Parquet file: {error}") from None
    _names(path, table.column_names)
    return [(f"row {number}", row) for number, row in enumerate(table.to_pylist(), start=1)]


def _is_flat(value: Any, levels: int) -> bool:
    """Return whether a value has at most so many levels of lists and objects."""
    if not isinstance(value, Mapping | list | tuple):
        return True
    inside = value.values() if isinstance(value, Mapping) else value
    return levels > 0 and all(_is_flat(x, levels - 1) for x in inside)


def _as_json(value: Any) -> Any:
    """Return a value as JSON can hold it: None for NaN, and the text of a date or another object."""
    if isinstance(value, Mapping):
        return {str(name): _as_json(x) for name, x in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(x) for x in value]
    if value is None or isinstance(value, str | int) or (isinstance(value, float) and not math.isnan(value)):
        return value
    return None if isinstance(value, float) else str(value)
