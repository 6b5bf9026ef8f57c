"""A file or folder is complete or absent, whatever happens to its writer, and nothing of an attempt stays."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.disks import full_disk

from bayeslm import files
from bayeslm.files import (
    atomic_file,
    atomic_folder,
    read_header,
    read_json,
    recover,
    replacing_folder,
    require_memory,
    sweep,
    write_file,
)

KILLED = """
import os, sys
from bayeslm.files import atomic_file, atomic_folder

with globals()[sys.argv[1]](sys.argv[2]) as unfinished:
    ((unfinished / "first") if unfinished.is_dir() else unfinished).write_text("1")
    os._exit(9)  # as if killed: nothing is cleaned up
"""
KINDS = {"atomic_file": atomic_file, "atomic_folder": atomic_folder}


@pytest.mark.parametrize("existing", [False, True])
def test_the_folder_appears_at_the_end(tmp_path: Path, existing: bool) -> None:
    place = tmp_path / "new" / "run"
    if existing:
        place.mkdir(parents=True)
    with atomic_folder(place) as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "file").write_text("1")
        assert place.exists() == existing
    assert (place / "inner" / "file").read_text() == "1"
    assert list(place.parent.iterdir()) == [place]


def test_the_file_is_replaced_at_the_end(tmp_path: Path) -> None:
    place, link = tmp_path / "new" / "a[b].txt", tmp_path / "link"
    write_file(place, "é")
    place.chmod(0o640)
    link.symlink_to(place)
    with atomic_file(link) as unfinished:
        unfinished.write_text("2")
        assert place.read_text(encoding="utf-8") == "é"
        assert unfinished.name == place.name
    assert place.read_text() == "2"
    assert link.is_symlink()
    assert place.stat().st_mode & 0o777 == 0o640
    assert list(place.parent.iterdir()) == [place]


@pytest.mark.parametrize("error", [OSError("refused"), KeyboardInterrupt(), ValueError("mine")])
@pytest.mark.parametrize("kind", KINDS)
def test_an_error_leaves_nothing(tmp_path: Path, error: BaseException, kind: str) -> None:
    def write() -> None:
        with KINDS[kind](tmp_path / "run") as unfinished:
            (unfinished / "first" if unfinished.is_dir() else unfinished).write_text("1")
            raise error

    with pytest.raises(type(error), match=str(error) or None) as caught:
        write()
    assert (caught.value is error) == (not isinstance(error, OSError))
    assert not list(tmp_path.iterdir())


def _tensors(path: Path) -> None:
    save_file({"x": torch.zeros(30_000)}, path)


WRITERS: dict[str, Callable[[Path], object]] = {
    "python": lambda path: path.write_bytes(b"x" * 100_000),
    "rust": _tensors,
    "nested": lambda path: write_file(path, "x" * 100_000),
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_full_disk_names_the_file_and_leaves_what_was_there(
    tmp_path: Path, write: Callable[[Path], object], kind: str
) -> None:
    place = tmp_path / "run"
    if kind == "atomic_file":
        place.write_text("before")

    def attempt() -> None:
        with full_disk(50_000), KINDS[kind](place) as unfinished:
            write(unfinished / "first" if unfinished.is_dir() else unfinished)

    with pytest.raises(OSError, match=f"{place} could not be written: File too large$") as caught:
        attempt()
    assert caught.value.errno == errno.EFBIG
    assert [path.read_text() for path in tmp_path.iterdir()] == ["before"] * (kind == "atomic_file")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_device_is_written_directly() -> None:
    with pytest.raises(OSError, match="/dev/full could not be written: No space left"):
        write_file("/dev/full", "1")
    write_file("/dev/null", "1")
    assert not Path("/dev/null").is_file()


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_killed_writer_left_is_swept_by_the_next(tmp_path: Path, kind: str) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, kind, str(tmp_path / "run")], check=False)
    assert done.returncode == 9
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".run.")
    mine = tmp_path / ".run.backup"
    mine.mkdir()
    with atomic_folder(tmp_path / "other") as folder:
        assert not left.exists()
        (folder / "second").write_text("2")
        sweep(tmp_path)  # a writer that lives is in no way
        assert folder.is_dir()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".run.backup", "other"]


def test_writers_at_once_do_not_sweep_each_other(tmp_path: Path) -> None:
    def write(name: int) -> None:
        for i in range(20):
            write_file(tmp_path / f"{name}-{i}", str(i))

    threads = [threading.Thread(target=write, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        f"{n}-{i}": str(i) for n in range(4) for i in range(20)
    }


# -- replaced folders --------------------------------------------------------------------------------------------

STEPS = ((os, "mkdir"), (os, "link"), (os, "rename"), (os, "rmdir"), (os, "unlink"))
OLD = {"model": "old", "removed": "old", "notes": "mine", "kept/inside": "mine"}
NEW = {"model": "new", "added": "new", "notes": "mine", "kept/inside": "mine"}


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, act: Callable[[], object]) -> Callable[[], int]:
    """Do something in the place of the ``step``-th change of a folder; return the number of steps so far."""
    count = 0

    def counted(change: Callable[..., object]) -> Callable[..., object]:
        def run(*args: object, **kwargs: object) -> object:
            nonlocal count
            count += 1
            if count == step:
                act()
            return change(*args, **kwargs)

        return run

    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # for the sake of speed
    for module, name in STEPS:
        monkeypatch.setattr(module, name, counted(getattr(module, name)))
    return lambda: count


def older(place: Path) -> None:
    for name, text in OLD.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(text)


def replace(place: Path) -> None:
    with replacing_folder(place, lambda name: name in ("model", "removed")) as folder:
        for name in ("model", "added"):
            (folder / name).write_text("new")


def texts(place: Path) -> dict[str, str]:
    files = (path for path in place.rglob("*") if path.is_file() and path.name != "SHA256SUMS")
    return {path.relative_to(place).as_posix(): path.read_text() for path in files}


def test_a_kill_at_any_step_of_a_replacement_leaves_a_whole_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader finds the old or the new one, the user's own files in it, and the next writer leaves nothing else."""
    found = []
    for step in range(1, 100):
        place = tmp_path / str(step) / "run"
        older(place)
        process = os.fork()
        if process == 0:
            at_step(monkeypatch, step, lambda: os._exit(9))
            replace(place)
            os._exit(0)
        if os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0:
            break
        recover(place)
        found.append(texts(place))
        assert found[-1] in (OLD, NEW)
        with atomic_folder(place.parent / "other") as folder:
            (folder / "file").write_text("1")
        assert sorted(path.name for path in place.parent.iterdir()) == ["other", "run"]
        assert texts(place) == found[-1]
        replace(place)
        assert texts(place) == NEW
    assert found.count(OLD) > 5
    assert found.count(NEW) > 3
    assert step < 99


def test_a_kill_between_the_renamings_is_mended_where_there_are_no_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not before a writer that lives would have ended; a reader and a writer both put the new one in its place."""
    waited: list[float] = []
    monkeypatch.setattr(files, "_lock", lambda folder: None)
    monkeypatch.setattr(files.time, "sleep", waited.append)
    for step, use in enumerate((recover, replace)):
        place = tmp_path / str(step) / "run"
        older(place)
        process = os.fork()
        if process == 0:
            rename = Path.rename

            def killed(path: Path, target: Path, rename: Any = rename) -> None:
                if path.parent.name == "new":
                    os._exit(9)
                rename(path, target)

            monkeypatch.setattr(Path, "rename", killed)
            replace(place)
        assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 9
        assert not place.exists()
        use(place)
        assert texts(place) == NEW
        assert sum(waited) > 0.9
        waited.clear()


@pytest.mark.parametrize("error", [OSError("refused"), KeyboardInterrupt()])
def test_an_error_at_any_step_of_a_replacement_leaves_a_whole_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def fail() -> None:
        raise error

    step, failed = 0, True
    while failed:
        step += 1
        place = tmp_path / str(step) / "run"
        older(place)
        failed = False
        with monkeypatch.context() as patched:
            counted = at_step(patched, step, fail)
            try:
                replace(place)
            except type(error):
                failed = True
            failed = failed or counted() >= step  # links and removals have other ways
        recover(place)
        assert texts(place) in (OLD, NEW)
        sweep(place.parent)
        assert list(place.parent.iterdir()) == [place]
    assert step > 10


def test_a_folder_that_cannot_be_put_back_is_not_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk refuses every renaming after the first."""
    place = tmp_path / "run"
    older(place)
    rename, calls = os.rename, []

    def refuse(*args: str) -> None:
        calls.append(args)
        if len(calls) > 1:
            raise OSError("refused")
        rename(*args)

    with monkeypatch.context() as patched:
        patched.setattr(os, "rename", refuse)
        with pytest.raises(OSError, match="run could not be written: refused"):
            replace(place)
    assert not place.exists()
    recover(tmp_path / "another")
    assert not place.exists()
    (tmp_path / "link").symlink_to(place)
    recover(tmp_path / "link")
    assert texts(place) == NEW
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "run"]


def test_a_writers_own_folders_are_not_put_in_a_place(tmp_path: Path) -> None:
    """A killed `atomic_folder` whose content looks like that of a replacement."""
    left = tmp_path / f".run.unfinished-{'0' * 16}"
    for age in ("old", "new"):
        (left / age / "run").mkdir(parents=True)
    recover(tmp_path / "run")
    sweep(tmp_path)
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    def write(place: Path) -> None:
        with atomic_folder(place) as folder:
            (folder / "first").write_text("1")

    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for place in (tmp_path / "full", tmp_path / "file"):
        with pytest.raises(FileExistsError, match="choose another name"):
            write(place)
    assert (tmp_path / "full" / "mine").read_text() == (tmp_path / "file").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "full"]


BAD_JSON = {
    "deep": b"[" * 100_000,
    "no UTF-8": b'"\xff"',
    "cut": b'{"format":',
    "long number": b"1" * 5000,
    "large": b'"' + b"x" * 2000 + b'"',
}


@pytest.mark.parametrize("content", BAD_JSON.values(), ids=BAD_JSON)
def test_bad_json_is_an_error_with_the_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{path} is damaged"):
        read_json(path, max_bytes=1000 if len(content) < 5000 else 200_000)


def test_a_huge_file_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    with path.open("wb") as file:
        file.truncate(2**42)  # no block of it is on the disk
    with pytest.raises(ValueError, match="4398046511104 bytes"):
        read_header(tmp_path, "x.json", "format", "thing")
    with pytest.raises(ValueError, match=r"x needs 1e\+18 bytes"):
        require_memory(1e18, "x")
    require_memory(1e6, "x")


# -- modes -----------------------------------------------------------------------------------------------------


def private(path: Path) -> None:
    """Write a file that its owner alone may read, as safetensors does."""
    save_file({"x": torch.zeros(1)}, path)
    path.chmod(0o600)


def in_folders(make: Callable[[Path], object], path: Path) -> None:
    with make(path) as folder:  # type: ignore[attr-defined]
        private(folder / "weights")
        (folder / "inner").mkdir()
        private(folder / "inner" / "weights")


def one_file(path: Path) -> None:
    path.mkdir()
    with atomic_file(path / "weights") as unfinished:
        private(unfinished)


def replaced(path: Path) -> None:
    path.mkdir()
    private(path / "mine")
    in_folders(lambda place: replacing_folder(place, lambda name: name != "mine"), path)


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077, 0o002])
@pytest.mark.parametrize("write", [partial(in_folders, atomic_folder), replaced, one_file])
def test_files_have_the_modes_that_the_umask_gives(tmp_path: Path, write: Callable[[Path], None], umask: int) -> None:
    before = os.umask(umask)
    try:
        write(tmp_path / "run")
        modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "run").rglob("*")}
    finally:
        os.umask(before)
    assert modes.pop("inner", 0o777 & ~umask) == 0o777 & ~umask
    assert modes.pop("mine", 0o600) == 0o600  # the user's own
    assert set(modes.values()) == {0o666 & ~umask}
