"""Atomic, versioned output folders: complete or absent, never over existing files, readable in one format only."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4


def require_empty(folder: Path, choose: str = "another name") -> None:
    """Check that a folder is absent or empty.

    :param choose: the way out, for the error.
    :raises FileExistsError: if it is a file or not empty.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is not empty: choose {choose}, or remove it first")


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a hidden folder next to ``path`` to write into; at the end of the block it is renamed to ``path``.

    After an error it is removed. Files are flushed to the disk before the renaming.

    :raises FileExistsError: if ``path`` is a file or not empty.
    """
    folder = Path(path).absolute()
    require_empty(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = folder.with_name(f".{folder.name}.{uuid4().hex[:8]}")
    try:
        unfinished.mkdir()
        yield unfinished
        _flush(unfinished, *unfinished.rglob("*"))
        if folder.exists():
            folder.rmdir()  # it is empty; Windows cannot rename onto it
        unfinished.rename(folder)
        _flush(folder.parent)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


@contextlib.contextmanager
def reading(path: Path) -> Iterator[Path]:
    """Raise whatever a damaged or missing file causes in the block as a `ValueError` with its name.

    Readers of formats raise many types of errors: of zip archives, of pickles, of lookups in what they have read.
    """
    try:
        yield path
    except Exception as error:
        if isinstance(error, ValueError) and str(path) in str(error):
            raise
        if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "memory" in str(error)):
            raise
        reason = f"it has no {error}" if isinstance(error, KeyError) else str(error).strip() or type(error).__name__
        raise ValueError(f"{path} is damaged or missing: {' '.join(reason.split())[:300]}") from error


def read_header(folder: str | os.PathLike[str], name: str, expected: object, what: str) -> dict[str, Any]:
    """Return the JSON object in the file ``name`` of a folder; its entry ``format`` is that of all files there.

    :param expected: the format that the caller reads.
    :param what: the folder should hold, for the error.
    :raises FileNotFoundError: if there is no such file.
    :raises ValueError: if it is not JSON, or of another format.
    """
    path = Path(folder) / name
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no {what}: {name} is missing")
    try:
        header = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # of JSON or of UTF-8; nested too deeply
        raise ValueError(f"{path} is damaged: {error}") from error
    found = header.get("format") if isinstance(header, dict) else None
    if found != expected:
        raise ValueError(f"{path} has format {found!r}, and this version of bayeslm reads {expected!r} only")
    return dict(header)


def differences(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """Describe each entry in which two JSON objects differ, by name."""

    def shortened(value: Any) -> str:
        text = json.dumps(value)
        return text if len(text) <= 60 else f"{text[:57]}..."

    found = []
    for name in [*current, *(name for name in saved if name not in current)]:
        old, new = saved.get(name), current.get(name)
        if old == new:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            found += [f"{name}: {inside}" for inside in differences(old, new)]
        else:
            found.append(f"{name} was {shortened(old)} and is {shortened(new)}")
    return found


def _flush(*paths: Path) -> None:
    """Bring files and folders to the disk, where the system can: a name must not outlast its content in a crash."""
    for path in paths if os.name == "posix" else ():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
