"""Folders of posteriors that somebody else wrote: what a file claims is checked before it is read."""

from __future__ import annotations

import json
import os
import resource
import shutil
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from support.toys import from_prior

from bayeslm import Posterior
from bayeslm.checksums import write_checksums

NAME = "proposal/reward"  # of rewards, in posterior.nc


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return from_prior(0).save(tmp_path_factory.mktemp("original") / "run")


@pytest.fixture
def saved(original: Path, tmp_path: Path) -> Iterator[Path]:
    """A saved posterior; a test that takes over 300 MB fails."""
    folder = shutil.copytree(original, tmp_path / "run")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield folder
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000


def change(folder: Path, field: str, array: str, **settings: Any) -> None:
    """Change the mark of an array in posterior.json."""
    path = folder / "posterior.json"
    header = json.loads(path.read_text())
    header["fields"][field][array] |= settings
    path.write_text(json.dumps(header))


def _array(folder: Path, make: Callable[[Any], object]) -> None:
    """Put something else in the place of an array of posterior.nc."""
    with h5py.File(folder / "posterior.nc", "a") as file:
        del file[NAME]
        make(file)


def _huge(file: Any) -> None:
    file.create_dataset(NAME, shape=(2**40, 8), dtype="f8", chunks=(2**10, 8))


def _external_link(file: Any) -> None:
    with h5py.File(Path(file.filename).with_name("other.nc"), "w") as other:
        other["x"] = np.zeros((4, 250, 2))
    file[NAME] = h5py.ExternalLink("other.nc", "x")


def _external_storage(file: Any) -> None:
    Path(file.filename).with_name("secret").write_bytes(bytes(8 * 2000))
    place = str(Path(file.filename).with_name("secret"))
    file.create_dataset(NAME, shape=(2000,), dtype="f8", external=[(place, 0, h5py.h5f.UNLIMITED)])


def _virtual(file: Any) -> None:
    layout = h5py.VirtualLayout(shape=(2000,), dtype="f8")
    layout[:] = h5py.VirtualSource("other.nc", "x", shape=(2000,))
    file.create_virtual_dataset(NAME, layout)


def _soft_link(file: Any) -> None:
    file[NAME] = h5py.SoftLink(f"/{NAME}")


def _group(file: Any) -> None:
    file.create_group(NAME)


def _strings(file: Any) -> None:
    file.create_dataset(NAME, data=["a"] * 2000)


ARRAYS = [_huge, _external_link, _external_storage, _virtual, _soft_link, _group, _strings]


@pytest.mark.parametrize("make", ARRAYS)
def test_an_array_that_is_not_what_the_metadata_say(saved: Path, make: Callable[[Any], object]) -> None:
    _array(saved, make)
    if make is _huge:
        change(saved, "rewards", "reward", shape=[2**40, 8])
    elif make is not _external_link:
        change(saved, "rewards", "reward", shape=[2000])
    with pytest.raises(ValueError, match=rf"posterior\.nc is damaged or missing: .*{NAME}"):
        Posterior.load(saved)


MARKS: list[tuple[str, str, dict[str, Any]]] = [
    ("rewards", "reward", {"dtype": "O"}),
    ("rewards", "reward", {"dtype": "V1000000000"}),
    ("rewards", "reward", {"dtype": "<U1000000"}),
    ("rewards", "reward", {"dtype": "no such type"}),
    ("rewards", "reward", {"dtype": None, "shape": [2**60]}),
    ("rewards", "reward", {"shape": [2**70]}),
    ("rewards", "reward", {"shape": ["a"]}),
    ("rewards", "reward", {"name": "proposal"}),
    ("rewards", "reward", {"name": "../x"}),
    ("rewards", "reward", {"name": 5}),
    ("texts", "completion", {"dtype": "<U1000000000"}),
    ("texts", "completion", {"dtype": "V1000000000"}),
    ("texts", "completion", {"shape": [2**60]}),
    ("texts", "completion", {"name": "none"}),
]


@pytest.mark.parametrize(("field", "array", "settings"), MARKS)
def test_a_mark_that_is_not_what_the_file_holds(saved: Path, field: str, array: str, settings: dict[str, Any]) -> None:
    change(saved, field, array, **settings)
    with pytest.raises(ValueError, match=r"(posterior\.nc|texts\.json) is damaged or missing: "):
        Posterior.load(saved)


@pytest.mark.parametrize("texts", [[], {"texts.completion": 5}, {"texts.completion": [[1]]}])
def test_texts_that_are_none(saved: Path, texts: Any) -> None:
    (saved / "texts.json").write_text(json.dumps(texts))
    with pytest.raises(ValueError, match=r"texts\.json is damaged"):
        Posterior.load(saved)


@pytest.mark.parametrize("name", ["texts.json", "posterior.json"])
def test_a_huge_file_is_not_read(saved: Path, name: str) -> None:
    with (saved / name).open("ab") as file:
        file.truncate(2**43)
    with pytest.raises(ValueError, match=f"{name} is damaged: it has 8796093022208 bytes"):
        Posterior.load(saved)


def test_what_nothing_names_is_not_read(original: Path, saved: Path) -> None:
    with h5py.File(saved / "posterior.nc", "a") as file:
        file.create_dataset("unnamed", shape=(2**31,), dtype="f8", chunks=(2**20,), compression=9)
        file["unnamed"][: 2**20] = 0.0
    write_checksums(saved)
    np.testing.assert_array_equal(Posterior.load(saved).rewards["reward"], Posterior.load(original).rewards["reward"])


# -- sizes are checked before anything is allocated ------------------------------------------------------------


def _unwritten(file: Any) -> None:
    """Values that are in no chunk take no place in the file."""
    file.create_dataset(NAME, shape=(2**24,), dtype="f8", chunks=(2**10,))


def _inflated(file: Any) -> None:
    """Chunks of zeros, deflated to a thousandth."""
    array = file.create_dataset(NAME, shape=(2**24,), dtype="f8", chunks=(2**20,), compression=9, shuffle=False)
    chunk = zlib.compress(bytes(8 * 2**20), 9)
    for start in range(0, 2**24, 2**20):
        array.id.write_direct_chunk((start,), chunk)


@pytest.mark.parametrize(
    ("make", "shape", "says"),
    [
        (_unwritten, [2**24], f"{NAME} would grow to"),
        (_inflated, [2000], rf"{NAME} is float64 \(16777216,\), not float64 \[2000\]"),
    ],
)
def test_an_array_that_grows_when_it_is_read(
    saved: Path, make: Callable[[Any], object], shape: list[int], says: str
) -> None:
    _array(saved, make)
    change(saved, "rewards", "reward", shape=shape)
    with pytest.raises(ValueError, match=says):
        Posterior.load(saved)


@pytest.mark.parametrize(("memory", "what"), [(10**5, "texts.completion"), (10**6, NAME)])
def test_what_does_not_fit_in_memory(saved: Path, monkeypatch: pytest.MonkeyPatch, memory: int, what: str) -> None:
    """Texts of 0.5 MB and an array of 1.6 MB, on a machine with less."""
    _array(saved, lambda file: file.create_dataset(NAME, data=np.zeros(200_000)))
    change(saved, "rewards", "reward", shape=[200_000])
    monkeypatch.setattr(os, "sysconf", lambda name: memory if name == "SC_PHYS_PAGES" else 1)
    with pytest.raises(ValueError, match=f"{what} needs"):
        Posterior.load(saved)
