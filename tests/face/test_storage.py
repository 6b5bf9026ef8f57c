"""A posterior on disk: equal after loading, complete or absent, never over existing files."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import arviz
import h5py
import numpy as np
import pytest
import xarray
from support.toys import MAKERS, enumerated, from_prior

from bayeslm import Posterior
from bayeslm.checksums import write_checksums


class Policy:
    def __init__(self, error: Exception | None = None) -> None:
        self.error = error

    def save_pretrained(self, path: Path) -> None:
        path.mkdir()
        (path / "weights").write_text("w")
        if self.error:
            raise self.error


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_saved_and_loaded_is_the_same(make: Callable[[], Posterior], tmp_path: Path) -> None:
    posterior = make()
    posterior.stats |= {"acceptance": np.float64(0.25), "best": -np.inf, "trace": {"a": [1, None, "é"]}}
    posterior.stats |= {
        "none": np.zeros((2, 0, 3)),
        "one": np.array(3.5, dtype=np.float32),
        "words": np.array([["a", "\0ü"]]),
        "alive": np.array([True, False]),
        "not finite": np.array([np.nan, -np.inf, np.inf]),
        "large": np.array([2**63 + 1], dtype=np.uint64),
        "half": np.array([0.1, -2.0], dtype=np.float16),
        "a/b": np.arange(3),
        "a.b": np.arange(4),
    }
    posterior.observed["answers"] = np.array(["a", "été"])
    posterior.conditional = True
    posterior.log_evidence_lower = np.full(posterior.log_evidence.shape, np.nan)
    loaded = Posterior.load(posterior.save(tmp_path / "new" / "run"))
    for name, value in vars(posterior).items():
        other = getattr(loaded, name)
        if isinstance(value, dict):
            assert list(other) == list(value), name
            for key in value:
                np.testing.assert_array_equal(other[key], value[key], err_msg=f"{name}[{key}]")
                if isinstance(value[key], np.ndarray):
                    assert other[key].dtype == value[key].dtype
        else:
            np.testing.assert_array_equal(other, value, err_msg=name)
    assert loaded.policy is None
    assert loaded.policy_path is None
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["run"]
    arviz.from_netcdf(str(tmp_path / "new" / "run" / "posterior.nc")).close()


def test_fields_that_are_missing_have_their_defaults(tmp_path: Path) -> None:
    """A posterior that was saved before a field with a default was added loads."""
    saved = from_prior(0).save(tmp_path / "run")
    header = json.loads((saved / "posterior.json").read_text())
    del header["fields"]["conditional"]
    (saved / "posterior.json").write_text(json.dumps(header))
    write_checksums(saved)
    loaded = Posterior.load(saved)
    assert (loaded.conditional, loaded.roots) == (False, None)


def test_texts_come_back_exactly(tmp_path: Path) -> None:
    posterior = from_prior(0)
    posterior.texts["completion"][0, 0] = ["nul\0", "lone \ud800\n"]
    loaded = Posterior.load(posterior.save(tmp_path / "run"))
    assert loaded.texts["completion"][0, 0].tolist() == ["nul\0", "lone \ud800\n"]


def test_policy_that_cannot_save_itself(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="a object, has no method save_pretrained"):
        from_prior(0, policy=object()).save(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_policy_is_saved_by_itself(tmp_path: Path) -> None:
    loaded = Posterior.load(from_prior(0, policy=Policy()).save(tmp_path / "run"))
    assert loaded.policy is None
    assert loaded.policy_path == tmp_path / "run" / "policy"
    assert (loaded.policy_path / "weights").read_text() == "w"
    assert loaded.resample(3).policy_path == loaded.policy_path


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    saved = from_prior(0).save(tmp_path / "empty")
    before = (saved / "posterior.nc").read_bytes()
    (tmp_path / "file").write_text("mine")
    for target in (saved, tmp_path / "file"):
        with pytest.raises(FileExistsError, match="choose another name"):
            from_prior(1).save(target)
    assert (saved / "posterior.nc").read_bytes() == before
    assert (tmp_path / "file").read_text() == "mine"


def test_a_failed_save_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="disk full"):
        from_prior(0, policy=Policy(OSError("disk full"))).save(tmp_path / "run")
    with pytest.raises(TypeError, match="stats holds"):
        from_prior(0, stats={"model": object()}).save(tmp_path / "run")
    with pytest.raises(TypeError, match="Python objects"):
        from_prior(0, stats={"objects": np.array([object()])}).save(tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    """The limit allows all files but posterior.nc; if HDF5 wrote that itself, the process would crash."""
    resource = pytest.importorskip("resource")
    posterior = from_prior(0)
    whole = posterior.save(tmp_path / "whole")
    sizes = {path.name: path.stat().st_size for path in whole.iterdir()}
    limit = sizes.pop("posterior.nc") - 1
    assert max(sizes.values()) < limit
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            posterior.save(tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == [whole]


def test_a_posterior_without_any_weight_can_still_be_saved(tmp_path: Path) -> None:
    posterior = from_prior(0)
    posterior.log_weights[..., 0] = -np.inf
    with pytest.warns(UserWarning, match="without groups for ArviZ: every draw of prompt 0 has weight zero"):
        saved = posterior.save(tmp_path / "run")
    with xarray.open_datatree(saved / "posterior.nc") as tree:
        assert list(tree.children) == ["bayeslm"]
    np.testing.assert_array_equal(Posterior.load(saved).log_weights, posterior.log_weights)


def test_load_refuses_other_folders_and_formats(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no posterior"):
        Posterior.load(tmp_path)
    saved = enumerated().save(tmp_path / "run")
    meta = json.loads((saved / "posterior.json").read_text())
    (saved / "posterior.json").write_text(json.dumps(meta | {"format": "bayeslm.posterior/99"}))
    with pytest.raises(ValueError, match=r"posterior/99', and this version of bayeslm reads"):
        Posterior.load(saved)


def test_each_array_is_stored_once(tmp_path: Path) -> None:
    """Raw draws are those of the group "proposal"; without weights, of "posterior" and "texts"."""
    for name, groups in {"weighted": {"proposal"}, "exact": {"posterior", "texts"}}.items():
        posterior = from_prior(0) if name == "weighted" else enumerated().resample(50)
        saved = posterior.save(tmp_path / name)
        fields = json.loads((saved / "posterior.json").read_text())["fields"]
        places = [fields[field][key]["name"] for field in ("samples", "lengths") for key in posterior.__dict__[field]]
        assert {place.split("/")[0] for place in places} == groups
        with xarray.open_datatree(saved / "posterior.nc") as tree:
            assert "log_joint" not in tree["bayeslm"]
            assert "rewards.reward" not in tree["bayeslm"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return from_prior(0).save(tmp_path_factory.mktemp("whole") / "run")


@pytest.mark.parametrize("file", ["posterior.json", "texts.json", "posterior.nc"])
@pytest.mark.parametrize("damage", ["cut", "gone", "one bit"])
def test_a_damaged_file_is_named(whole: Path, tmp_path: Path, file: str, damage: str) -> None:
    saved = shutil.copytree(whole, tmp_path / "run")
    content = (saved / file).read_bytes()
    (saved / file).unlink()
    if damage == "cut":
        (saved / file).write_bytes(content[: len(content) // 2])
    elif damage == "one bit" and file == "posterior.nc":  # in the compressed values of an array that is loaded
        with h5py.File(io.BytesIO(content)) as opened:
            start = opened["proposal/reward"].id.get_chunk_info(0).byte_offset
        (saved / file).write_bytes(content[: start + 9] + bytes([content[start + 9] ^ 4]) + content[start + 10 :])
    elif damage == "one bit":
        (saved / file).write_bytes(bytes([content[0] ^ 0x80]) + content[1:])
    error = FileNotFoundError if (file, damage) == ("posterior.json", "gone") else ValueError
    with pytest.raises(error, match=file):
        Posterior.load(saved)
