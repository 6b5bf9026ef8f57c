"""ArviZ's container, in whichever of its two versions is installed."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import arviz
import numpy as np
import pytest
from support.toys import MAKERS, PRIOR, TARGET, Gaussian, discrete, from_prior, shared_weighted

from bayeslm import Posterior


def group(container: Any, name: str) -> Any:
    """A group as a data set, in either version of ArviZ."""
    found = container[name]
    return found.to_dataset() if hasattr(found, "to_dataset") else found


def groups(container: Any) -> set[str]:
    names = container.groups() if callable(container.groups) else container.groups
    return {name.strip("/") for name in names} - {""}


def test_arviz_groups_dims_and_coordinates() -> None:
    idata = from_prior(0).to_arviz()
    assert groups(idata) == {
        "posterior", "sample_stats", "log_likelihood", "texts", "prior", "observed_data", "proposal"
    }  # fmt: skip
    draws = group(idata, "posterior")
    assert draws["completion"].dims == ("chain", "draw", "prompt", "token")
    assert draws["completion_length"].dims == ("chain", "draw", "prompt")
    assert draws["prompt"].values.tolist() == ["Is it good?", "Is it bad?"]
    assert group(idata, "log_likelihood")["reward"].dims == ("chain", "draw", "prompt")
    assert group(idata, "prior")["reward"].dims == ("chain", "draw", "prompt")
    assert group(idata, "observed_data")["label"].dims == ("prompt",)
    assert idata.attrs["engine"] == "Toy"
    assert idata.attrs["kind"] == "weighted"
    assert "resampled by weight" in idata.attrs["alignment"]


def test_arviz_groups_are_aligned_draw_by_draw() -> None:
    posterior = from_prior(0)
    idata = posterior.to_arviz(num_draws=77, seed=3)
    index = group(idata, "posterior")["completion"].values[..., 0]
    picked = discrete(index, np.log(PRIOR)[index], "weighted")
    np.testing.assert_allclose(group(idata, "sample_stats")["log_weight"], picked.log_weights)
    np.testing.assert_allclose(group(idata, "sample_stats")["lp"], picked.log_joint)
    np.testing.assert_array_equal(group(idata, "log_likelihood")["reward"], picked.log_likelihood["reward"])
    np.testing.assert_array_equal(group(idata, "texts")["completion"], picked.texts["completion"])
    raw = group(idata, "proposal")
    np.testing.assert_array_equal(raw["log_weight"], posterior.log_weights)
    np.testing.assert_array_equal(raw["completion"], posterior.samples["completion"])
    share = [np.mean(index[..., 1] == value) for value in range(4)]
    np.testing.assert_allclose(share, TARGET[1], atol=4.5 * 0.02)  # 1000 draws, weights at most 2


def test_arviz_has_no_proposal_where_weights_are_equal() -> None:
    assert "proposal" not in groups(Gaussian().posterior(0, "exact", prompts=2).to_arviz())


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_arviz_summary_works_out_of_the_box(make: Callable[[], Posterior]) -> None:
    posterior = make()
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore", RuntimeWarning)  # R-hat of constants, ArviZ's own
        table = arviz.summary(posterior.to_arviz())
    for name, values in posterior.samples.items():
        rows = [label for label in table.index if label.split("[")[0] == name]
        assert len(rows) == values[0, 0].size


def test_arviz_summary_gives_the_posterior_mean() -> None:
    table = arviz.summary(from_prior(0).to_arviz(), var_names=["score"], round_to="none")
    truth = np.sum(TARGET * np.where(TARGET > 0, [[0.0, 0.1, -0.1, 0.2], [0.05, 0.0, 0.0, 0.1]], 0.0), axis=1)
    error = 0.1 / np.sqrt(300)  # the scores' sd is under 0.1, their ESS over 300
    np.testing.assert_allclose(table["mean"].astype(float), truth, atol=4.5 * error)


def test_arviz_with_a_shared_latent_and_odd_names() -> None:
    joint = shared_weighted()
    joint.samples["auto/loc"] = joint.samples.pop("theta") > 0
    joint.dims["auto/loc"] = ("auto/loc_dim_0",)
    idata = joint.to_arviz()
    assert group(idata, "posterior")["auto.loc"].dims == ("chain", "draw", "auto.loc_dim_0")
    assert group(idata, "sample_stats")["lp"].dims == ("chain", "draw")
    assert group(idata, "log_likelihood")["reward"].dims == ("chain", "draw", "prompt")


def test_arviz_completions_of_two_lengths() -> None:
    posterior = from_prior(0)
    posterior.samples["reply"] = posterior.samples["completion"][..., :1]
    posterior.dims["reply"] = ("prompt", "token")
    draws = group(posterior.to_arviz(), "posterior")
    assert draws["reply"].dims[2:] == ("prompt", "reply_token")
    assert draws["completion"].dims[2:] == ("prompt", "completion_token")


def test_netcdf_round_trip_with_any_text(tmp_path: Path) -> None:
    posterior = from_prior(0)
    posterior.prompts = ["nul \0 in it", "Ünï \ud800 ✓"]
    posterior.texts["completion"][...] = "a\0b \udcff 漢字 " + "x" * 300
    idata = posterior.to_arviz()
    idata.to_netcdf(str(tmp_path / "arviz.nc"))
    saved = posterior.save(tmp_path / "run")
    for file, own in {tmp_path / "arviz.nc": set(), saved / "posterior.nc": {"bayeslm"}}.items():
        back = arviz.from_netcdf(str(file))
        assert groups(back) == groups(idata) | own
        for name in groups(idata):
            for variable, values in group(idata, name).items():
                np.testing.assert_array_equal(group(back, name)[variable].values, values.values)
        assert back.attrs["alignment"] == idata.attrs["alignment"]
        assert str(group(back, "texts")["completion"].values[0, 0, 0]).startswith("a␀b ? 漢字 x")
        back.close()
