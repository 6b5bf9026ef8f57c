"""An output folder is complete or absent, whatever happens to its writer."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from bayeslm.files import atomic_folder

KILLED = """
import os, sys
from bayeslm.files import atomic_folder

with atomic_folder(sys.argv[1]) as folder:
    (folder / "first").write_text("1")
    os._exit(9)  # as if killed: nothing is cleaned up
"""


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


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_an_error_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    def write() -> None:
        with atomic_folder(tmp_path / "run") as folder:
            (folder / "first").write_text("1")
            raise error

    with pytest.raises(error):
        write()
    assert not list(tmp_path.iterdir())


def test_a_killed_writer_leaves_no_folder_of_that_name(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "run")], check=False)
    assert done.returncode == 9
    assert not (tmp_path / "run").exists()
    assert [path.name[:5] for path in tmp_path.iterdir()] == [".run."]
    with atomic_folder(tmp_path / "run") as folder:  # its hidden folder is in no way
        (folder / "second").write_text("2")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["second"]


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
