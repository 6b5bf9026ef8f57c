"""Files and folders that appear whole or not at all, and JSON files that are read with care.

Everything is written into a hidden folder next to its final name, flushed to the disk, and renamed. The writer holds a
lock on that folder, by which the next writer in the same place recognises what killed processes left, and removes it.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

from bayeslm.checksums import write_checksums

HIDDEN = re.compile(r"\..*\.(unfinished|replacing)-[0-9a-f]{16}")  # names of hidden folders
IN_RUST = re.compile(r"\(os error (\d+)\)")  # in errors of the disk from safetensors and tokenizers
MAX_JSON = 2**28  # bytes of a JSON file; in memory it takes up to 30 times as much


def require_empty(folder: Path, choose: str = "another name") -> None:
    """Check that a folder is absent or empty.

    :param choose: the way out, for the error.
    :raises FileExistsError: if it is a file or not empty.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is not empty: choose {choose}, or remove it first")


def require_writable(folder: Path) -> None:
    """Check that files can be made in a folder, or it itself be made, before the work whose results are to go there.

    :raises PermissionError: if not, as on a disk that is read-only.
    :raises NotADirectoryError: if it, or one above it, is a file.
    """
    place = folder.absolute()
    while not place.exists() and place.parent != place:
        place = place.parent
    if not place.is_dir():
        raise NotADirectoryError(f"{folder} could not be written: {place} is a file")
    effective = {"effective_ids": True} if os.access in os.supports_effective_ids else {}
    if not os.access(place, os.W_OK | os.X_OK, **effective):
        raise PermissionError(f"{folder} could not be written: {place} is read-only for you. Choose another place")


# -- writing -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a hidden folder next to ``path`` to write into; at the end of the block it is renamed to ``path``.

    After an error it is removed. Before the renaming `checksums` are added.

    :raises FileExistsError: if ``path`` is a file or not empty.
    :raises OSError: if the disk refuses, with ``path``.
    """
    folder = Path(path).absolute()
    require_empty(folder)
    with _unfinished(folder) as unfinished:
        yield unfinished
        _set_modes(unfinished)
        write_checksums(unfinished)
        _flush(unfinished, *unfinished.rglob("*"))
        if folder.exists():
            folder.rmdir()  # it is empty; Windows cannot rename onto it
        unfinished.rename(folder)
        _flush(folder.parent)


@contextlib.contextmanager
def replacing_folder(path: str | os.PathLike[str], replaced: Callable[[str], bool]) -> Iterator[Path]:
    """Yield a hidden folder to write into, as `atomic_folder`; at the end of the block it takes the place of ``path``.

    After an error ``path`` is as it was before. A process that is killed between the two renamings leaves no ``path``,
    but both folders, whole: `recover`, and the next writer in the same place, put the new one there.

    :param replaced: whether a file or folder in ``path``, by its name, goes with what it held. Others stay in ``path``.
    :raises FileExistsError: if ``path`` is a file.
    :raises OSError: if the disk refuses, with ``path``.
    """
    final = Path(path).absolute()
    recover(final)
    if not final.is_dir() or not any(final.iterdir()):
        with atomic_folder(final) as folder:
            yield folder
        return
    with _unfinished(final, "replacing") as hidden:
        old, new = (hidden / age / final.name for age in ("old", "new"))
        old.parent.mkdir()
        new.mkdir(parents=True)
        yield new
        _set_modes(new)
        write_checksums(new)
        for kept in final.iterdir():
            if not replaced(kept.name) and not (new / kept.name).exists():
                _link(kept, new / kept.name)
        _flush(new, *(kept for kept in new.rglob("*") if not kept.is_symlink()))
        try:
            final.rename(old)
            new.rename(final)
        except BaseException:
            if old.exists() and not final.exists():
                old.rename(final)
            raise
        _flush(final.parent)


def recover(path: Path) -> None:
    """Put a folder in its place whose replacement by `replacing_folder` was killed; wait for one that goes on."""
    path = path.resolve() if path.is_symlink() else path.absolute()
    for _ in range(100):
        hidden = [*path.parent.glob(f".{glob.escape(path.name[:50])}.replacing-*")]
        if path.exists() or not any((folder / "old" / path.name).is_dir() for folder in hidden):
            return
        sweep(path.parent)
        time.sleep(0.01)
    for folder in hidden:
        with contextlib.suppress(OSError):
            if (lock := _lock(folder)) is None:  # no locks here; but a writer that lives takes no second to rename
                _remove(folder)
            else:
                os.close(lock)


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a hidden path of the same file name to write; at the end of the block that file replaces ``path``.

    After an error ``path`` is as it was before. A device or a pipe is written directly.

    :raises OSError: if the disk refuses, with ``path``.
    """
    final = Path(path).resolve()  # a link stays a link
    if final.exists() and not final.is_file():
        with _naming(final):
            yield final
        return
    with _unfinished(final) as folder:
        unfinished = folder / final.name
        yield unfinished
        _set_modes(folder)
        if final.exists():
            shutil.copymode(final, unfinished)
        _flush(unfinished)
        unfinished.replace(final)
        _flush(final.parent)


def write_file(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Write a file, text in UTF-8, or leave what was there before.

    :raises OSError: if the disk refuses, with ``path``.
    """
    with atomic_file(path) as unfinished:
        unfinished.write_bytes(content.encode() if isinstance(content, str) else content)


def sweep(folder: Path) -> None:
    """Remove what processes that were killed while they wrote into a folder have left in it; finish a replacement."""
    for path in folder.glob(".*"):
        if HIDDEN.fullmatch(path.name):
            with contextlib.suppress(OSError):  # a writer that lives has locked it, or another process sweeps too
                if (lock := _lock(path)) is not None:
                    try:
                        _remove(path)
                    finally:
                        os.close(lock)


@contextlib.contextmanager
def _unfinished(final: Path, kind: str = "unfinished") -> Iterator[Path]:
    """Yield a hidden folder next to ``final``; at the end it is removed if it is still there."""
    with _naming(final):
        final.parent.mkdir(parents=True, exist_ok=True)
        sweep(final.parent)
        folder, lock = _locked_folder(final, kind)
        try:
            yield folder
        finally:
            try:
                _remove(folder)
            finally:
                if lock is not None:
                    os.close(lock)


def _set_modes(folder: Path) -> None:
    """Give the files in a folder that was made by `mkdir` the mode that the umask gives to new files.

    Writers of safetensors make theirs readable by their owner alone.
    """
    mode = folder.stat().st_mode & 0o666
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(mode)


def _remove(hidden: Path) -> None:
    """Remove a hidden folder, if no folder has to be put in its place from it, or can be."""
    for old in hidden.glob("old/*") if ".replacing-" in hidden.name else ():
        new, final = hidden / "new" / old.name, hidden.parent / old.name
        if new.is_dir() and not final.exists():  # killed between the two renamings: otherwise one of them is elsewhere
            try:
                new.rename(final)
            except OSError:
                return
    shutil.rmtree(hidden, ignore_errors=True)


def _link(source: Path, target: Path) -> None:
    """Give a file or folder a second name, without a copy where the system can."""

    def link(one: str, other: str) -> None:
        try:
            os.link(one, other, follow_symlinks=False)
        except OSError:
            shutil.copy2(one, other, follow_symlinks=False)

    if source.is_dir() and not source.is_symlink():
        shutil.copytree(source, target, symlinks=True, copy_function=link)
    else:
        link(str(source), str(target))


def _locked_folder(final: Path, kind: str) -> tuple[Path, int | None]:
    """Make a hidden folder next to ``final``; return it, and its lock."""
    while True:
        folder = final.with_name(f".{final.name[:50]}.{kind}-{uuid4().hex[:16]}")
        folder.mkdir()
        with contextlib.suppress(BlockingIOError, FileNotFoundError):  # swept before it was locked
            lock = _lock(folder)
            if folder.is_dir():
                return folder, lock
            if lock is not None:
                os.close(lock)


def _lock(folder: Path) -> int | None:
    """Lock a folder until the descriptor that is returned is closed or the process ends.

    :returns: None where the system has no such locks, and nothing is swept.
    :raises BlockingIOError: if it is locked.
    """
    if os.name != "posix":
        return None
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            raise
        return None
    return descriptor


@contextlib.contextmanager
def _naming(final: Path) -> Iterator[None]:
    """Raise each error of the disk as an `OSError` with the path that could not be written."""
    try:
        yield
    except OSError as error:
        raise _os_error(final, error.errno, str(error)) from error
    except Exception as error:
        if found := IN_RUST.search(str(error)):
            raise _os_error(final, int(found[1]), "") from error
        raise


def _os_error(final: Path, number: int | None, text: str) -> OSError:
    message = f"{final} could not be written"
    return OSError(f"{message}: {text}") if number is None else OSError(number, f"{message}: {os.strerror(number)}")


def _flush(*paths: Path) -> None:
    """Bring files and folders to the disk, where the system can: a name must not outlast its content in a crash."""
    for path in paths if os.name == "posix" else ():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


# -- reading -------------------------------------------------------------------------------------------------


def read_json(path: Path, max_bytes: int = MAX_JSON) -> Any:
    """Return the value in a JSON file.

    :raises OSError: if it cannot be read.
    :raises ValueError: if it is not JSON, nested too deeply, or larger than ``max_bytes``; with its path.
    """
    require_size(path, max_bytes)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # of JSON or of UTF-8
        raise ValueError(f"{path} is damaged: {error}") from error


def reason_of(error: BaseException) -> str:
    """Return the first line of an error's message, or its type where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def require_size(path: Path, max_bytes: int) -> None:
    """Check the size of a file before it is read.

    :raises OSError: if there is no such file.
    :raises ValueError: if it has more bytes than it can have, or is a device or a pipe, whose size nobody knows.
    """
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is no file: a folder, a device or a pipe is in its place")
    if (size := path.stat().st_size) > max_bytes:
        raise ValueError(f"{path} is damaged: it has {size} bytes, and at most {max_bytes} are read")


def require_memory(num_bytes: float, what: str) -> None:
    """Check that something fits in the memory of this machine, before it is allocated.

    :param what: for the error.
    :raises ValueError: if it does not.
    """
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if os.name == "posix" else 2**40
    if num_bytes > memory:
        raise ValueError(f"{what} needs {num_bytes:.3g} bytes, and this machine has {memory:.3g}")


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
    header = read_json(path)
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
        nested = isinstance(new, list) and any(isinstance(x, list | dict) for x in new)
        if nested and isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
            old, new = ({str(i): x for i, x in enumerate(each)} for each in (old, new))
        if isinstance(old, dict) and isinstance(new, dict):
            found += [f"{name}: {inside}" for inside in differences(old, new)]
        else:
            found.append(f"{name} was {shortened(old)} and is {shortened(new)}")
    return found
