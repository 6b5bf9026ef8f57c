"""New folders: whole or not there, and never in the place of something else."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4


def refuse_taken(folder: Path, choose: str = "another name") -> None:
    """:raises FileExistsError: if there is something of this name, other than an empty folder."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is not empty: choose {choose}, or remove it first")


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


def _sync(*paths: Path) -> None:
    """Bring files and folders to the disk, where the system can: a name must not outlive its content."""
    for path in paths if os.name == "posix" else ():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
