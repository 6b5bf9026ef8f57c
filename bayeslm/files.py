"""Folders of our own: whole or not there, never in the place of something else, and read by who knows the format."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

try:
    import fcntl
except ImportError:  # on Windows, where nobody else can open what is being written anyway
    fcntl = None  # type: ignore[assignment]


def refuse_taken(folder: Path, choose: str = "another name") -> None:
    """:raises FileExistsError: if there is something of this name, other than an empty folder."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is not empty: choose {choose}, or remove it first")


def hold(file: int, taken: str) -> None:
    """Keep other processes from an open file (its descriptor) until it is closed, however this one ends.

    (Where there are no locks, as on some network disks, nothing is kept from anybody.)

    :raises BlockingIOError: if another has it, with ``taken`` as what is said.
    """
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise BlockingIOError(f"{taken}: end that first") from None
    except OSError:
        return


@contextlib.contextmanager
def lock(path: Path, taken: str) -> Iterator[None]:
    """`hold` a file that is made for it, where it can be."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError:  # what cannot be written needs no lock
        yield
        return
    try:
        hold(descriptor, taken)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def whole(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A hidden folder beside ``path`` to write into. The end of the block gives it its name; an error removes it.

    :raises FileExistsError: if there is something of this name, other than an empty folder.
    """
    folder = Path(path).absolute()
    refuse_taken(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = folder.with_name(f".{folder.name}.{uuid4().hex[:8]}")
    try:
        unfinished.mkdir()
        yield unfinished
        _sync(unfinished, *(path for path in unfinished.rglob("*")))
        if folder.exists():
            folder.rmdir()  # empty; Windows does not rename onto it
        unfinished.rename(folder)
        _sync(folder.parent)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def read_header(folder: str | os.PathLike[str], name: str, known: object, what: str) -> dict[str, Any]:
    """The JSON object in a folder's file ``name``, which says by ``format`` how the rest is written.

    :param known: the format that can be read.
    :param what: the folder should hold, for the error.
    :raises FileNotFoundError: if there is no such file.
    :raises ValueError: if it is of another format.
    """
    path = Path(folder) / name
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no {what}: {name} is missing")
    header = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(header, dict) or header.get("format") != known:
        raise ValueError(f"{path} was not written by a version of bayeslm that this one reads ({known})")
    return header


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """What of two JSON objects is not the same, each by its name."""

    def shown(value: Any) -> str:
        text = json.dumps(value)
        return text if len(text) <= 60 else f"{text[:57]}..."

    found = []
    for name in [*here, *(name for name in there if name not in here)]:
        was, is_ = there.get(name), here.get(name)
        if was == is_:
            continue
        if isinstance(was, dict) and isinstance(is_, dict):
            found += [f"{name}: {inside}" for inside in differences(was, is_)]
        else:
            found.append(f"{name} was {shown(was)} and is {shown(is_)}")
    return found


def _sync(*paths: Path) -> None:
    """Bring files and folders to the disk, where the system can: a name must not outlive its content."""
    for path in paths if os.name == "posix" else ():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
