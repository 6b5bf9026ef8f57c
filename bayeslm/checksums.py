"""Checksums of a folder's files, in a file that ``sha256sum -c SHA256SUMS`` reads too."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator
from pathlib import Path

NAME = "SHA256SUMS"
TENSORS = (".safetensors", ".bin")


def checksums(folder: Path) -> dict[str, str]:
    """Return the checksums of all files in a folder, those of its folders among them, by name."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / NAME)
    return {path.relative_to(folder).as_posix(): digest_of(path) for path in files}


def write_checksums(folder: Path) -> None:
    """Write the checksums of a folder's files into it."""
    lines = [f"{digest}  {name}\n" for name, digest in checksums(folder).items()]
    (folder / NAME).write_text("".join(lines), encoding="utf-8")


def verify(folder: Path) -> None:
    """Check that the files of a folder are as they were when `write_checksums` was called; others are ignored.

    :raises ValueError: if one is changed or missing, or there are no checksums; with its name.
    """
    for _, damage in _damages(folder, _expected(folder)):
        raise ValueError(damage)


def verify_model(folder: Path) -> None:
    """Check the folder of a model, if it has checksums, or is part of one that has them, as a posterior's policy is.

    Of a model that was saved alone people edit the settings, and other programs add files: weights must be as they were
    written, and a warning names what else is not.

    :raises ValueError: if weights, or a file of a posterior, are changed or missing; with the name.
    """
    alone = (folder / NAME).is_file()
    if (folder.parent / NAME).is_file():
        try:
            expected = _expected(folder.parent)
        except ValueError:  # it may be somebody else's
            if not alone:
                raise
            expected = {}
        part = {name: digest for name, digest in expected.items() if name.startswith(f"{folder.name}/")}
        for _, damage in _damages(folder.parent, part):
            raise ValueError(damage)
        alone = alone and not part
    if not alone:
        return
    remedy = f"If you have changed it yourself, remove {folder / NAME}"
    expected = {name: digest for name, digest in _expected(folder).items() if name != "README.md"}  # people edit it
    for name, damage in _damages(folder, expected):
        if name.endswith(TENSORS):
            raise ValueError(f"{damage}. {remedy}")
        warnings.warn(f"{damage}. It is used all the same. {remedy}", stacklevel=2)


def _expected(folder: Path) -> dict[str, str]:
    """Return the checksums in a folder by name."""
    try:
        lines = (folder / NAME).read_text(encoding="utf-8").splitlines()
        expected = {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
    except (OSError, ValueError) as error:  # of UTF-8 too
        raise ValueError(f"{folder / NAME} is damaged or missing: {error}") from error
    if not expected:
        raise ValueError(f"{folder / NAME} is damaged: it is empty")
    if outside := next((name for name in expected if name.startswith("/") or ".." in name.split("/")), None):
        raise ValueError(f"{folder / NAME} is damaged: {outside!r} is not in the folder")
    return expected


def _damages(folder: Path, expected: dict[str, str]) -> Iterator[tuple[str, str]]:
    """Give the name of each file that is not what its checksum says, and what is wrong with it."""
    for name, digest in expected.items():
        path = folder / name
        try:
            if not path.is_file():
                raise FileNotFoundError("there is no such file")
            if digest_of(path) != digest:
                yield name, f"{path} is damaged: it is not what was written (its checksum in {NAME} differs)"
        except (OSError, ValueError) as error:  # a damaged name may hold NUL
            yield name, f"{path}, named in {NAME}, cannot be read: {error}"


def digest_of(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
