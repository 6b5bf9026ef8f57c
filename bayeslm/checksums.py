"""Checksums of a folder's files, in a file that ``sha256sum -c SHA256SUMS`` reads too."""

from __future__ import annotations

import hashlib
from pathlib import Path

NAME = "SHA256SUMS"


def checksums(folder: Path) -> dict[str, str]:
    """Return the checksums of all files in a folder, those of its folders among them, by name."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / NAME)
    return {path.relative_to(folder).as_posix(): _digest(path) for path in files}


def write_checksums(folder: Path) -> None:
    """Write the checksums of a folder's files into it."""
    lines = [f"{digest}  {name}\n" for name, digest in checksums(folder).items()]
    (folder / NAME).write_text("".join(lines), encoding="utf-8")


def verify(folder: Path, part: str = "") -> None:
    """Check that the files of a folder are as they were when `write_checksums` was called; others are ignored.

    :param part: only files whose names begin so.
    :raises ValueError: if one is changed or missing, or there are no checksums; with its name.
    """
    try:
        lines = (folder / NAME).read_text(encoding="utf-8").splitlines()
        expected = {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
    except (OSError, ValueError) as error:  # of UTF-8 too
        raise ValueError(f"{folder / NAME} is damaged or missing: {error}") from error
    if not expected:
        raise ValueError(f"{folder / NAME} is damaged: it is empty")
    for name, digest in expected.items():
        if not name.startswith(part):
            continue
        path = folder / name
        try:
            if not path.is_file():
                raise FileNotFoundError("there is no such file")
            found = _digest(path)
        except (OSError, ValueError) as error:  # a damaged name may hold NUL
            raise ValueError(f"{path}, named in {NAME}, cannot be read: {error}") from error
        if found != digest:
            raise ValueError(f"{path} is damaged: it is not what was written (its checksum in {NAME} differs)")


def verify_within(folder: Path) -> None:
    """Check the files of a folder that is part of one with checksums, as a posterior's policy is.

    :raises ValueError: as `verify`.
    """
    if (folder.parent / NAME).is_file():
        verify(folder.parent, f"{folder.name}/")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
