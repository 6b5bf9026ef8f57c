"""ArviZ's container, in whichever of its two versions is installed."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import arviz
import numpy as np
import pytest
from scipy.stats import norm
from support.toys import MAKERS, PRIOR, TARGET, Gaussian, discrete, enumerated, from_prior, shared_weighted

from bayeslm import Posterior
from bayeslm.arviz_versions import LEGACY


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
        "posterior", "texts", "sample_stats", "log_prior", "prior", "observed_data", "proposal"
    }  # fmt: skip
    draws = group(idata, "posterior")
    assert set(draws) == {"reward", "completion_length"}  # no token ids, which have no mean
    assert set(group(idata, "prior")) == {"reward"}
    assert group(idata, "texts")["completion_ids"].dims == ("chain", "draw", "prompt", "token")
    assert draws["completion_length"].dims == ("chain", "draw", "prompt")
    assert draws["prompt"].values.tolist() == ["Is it good?", "Is it bad?"]
    assert draws["reward"].dims == ("chain", "draw", "prompt")
    assert group(idata, "prior")["reward"].dims == ("chain", "draw", "prompt")
    assert group(idata, "observed_data")["label"].dims == ("prompt",)
    assert idata.attrs["engine"] == "Toy"
    assert idata.attrs["kind"] == "weighted"
    assert "resampled by weight" in idata.attrs["alignment"]


def test_arviz_groups_are_aligned_draw_by_draw() -> None:
    posterior = from_prior(0)
    idata = posterior.to_arviz(num_draws=77, seed=3)
    index = group(idata, "texts")["completion_ids"].values[..., 0]
    picked = discrete(index, np.log(PRIOR)[index], "weighted")
    np.testing.assert_allclose(group(idata, "sample_stats")["log_weight"], picked.log_weights)
    np.testing.assert_allclose(group(idata, "sample_stats")["lp"], picked.log_joint)
    np.testing.assert_array_equal(group(idata, "posterior")["reward"], picked.rewards["reward"])
    np.testing.assert_allclose(group(idata, "log_prior")["latents"], np.log(PRIOR)[index])
    np.testing.assert_array_equal(group(idata, "texts")["completion"], picked.texts["completion"])
    raw = group(idata, "proposal")
    np.testing.assert_array_equal(raw["log_weight"], posterior.log_weights)
    np.testing.assert_array_equal(raw["completion_ids"], posterior.samples["completion"])
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
    numbers = {name: x for name, x in posterior.samples.items() if name not in posterior.lengths}
    for name, values in (numbers | posterior.rewards).items():
        rows = [label for label in table.index if label.split("[")[0] == name]
        assert len(rows) == values[0, 0].size


def test_arviz_summary_gives_the_posterior_mean() -> None:
    table = arviz.summary(from_prior(0).to_arviz(), var_names=["reward"], round_to="none")
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
    assert group(idata, "log_prior")["latents"].dims == ("chain", "draw")


def test_arviz_completions_of_two_lengths() -> None:
    posterior = from_prior(0)
    posterior.samples["reply"] = posterior.samples["completion"][..., :1]
    posterior.dims["reply"] = ("prompt", "token")
    posterior.lengths["reply"] = np.ones((4, 250, 2), dtype=int)
    texts = group(posterior.to_arviz(), "texts")
    assert texts["reply_ids"].dims[2:] == ("prompt", "reply_ids_token")
    assert texts["completion_ids"].dims[2:] == ("prompt", "completion_ids_token")


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


# ---- ArviZ's own functions, without arguments ----


def one_chain(posterior: Posterior) -> Posterior:
    """The same draws, in one chain."""

    def flat(x: Any) -> Any:
        return (
            {name: flat(value) for name, value in x.items()} if isinstance(x, dict) else x.reshape(1, -1, *x.shape[2:])
        )

    names = ("samples", "log_weights", "log_joint", "log_likelihood", "rewards", "texts", "lengths")
    return replace(posterior, **{name: flat(getattr(posterior, name)) for name in names})


@pytest.mark.parametrize(("draws", "chains"), [(1000, 4), (50, 2), (63, 3), (997, 4), (12, 3), (3, 1)])
def test_independent_draws_of_one_run_are_divided_into_chains(draws: int, chains: int) -> None:
    """In their order, so that log-weights, rewards, and texts stay those of the same draw."""
    index = np.random.default_rng(0).choice(4, size=(1, draws, 2), p=PRIOR)
    posterior = discrete(index, np.log(PRIOR)[index], "weighted")
    idata = posterior.to_arviz()
    picked = posterior._resampled(None, 0)
    assert group(idata, "posterior").sizes["chain"] == chains
    for name, values in (("posterior", picked.rewards), ("proposal", posterior.rewards)):
        kept = chains * (draws // chains)  # all, unless nothing divides them
        assert kept == (996 if draws == 997 else draws)
        np.testing.assert_array_equal(group(idata, name)["reward"].values.reshape(1, -1, 2), values["reward"][:, :kept])
    again = posterior.to_arviz(num_draws=4 * draws)
    assert group(again, "posterior").sizes["chain"] == (4 if draws > 3 else 3)


@pytest.mark.parametrize("kind", ["exact", "weighted", "uncorrected", "enumerated", "markov"])
def test_rhat_of_one_run_is_a_number_unless_it_is_one_markov_chain(kind: str) -> None:
    several = from_prior(0, kind="weighted" if kind == "weighted" else "exact")
    posterior = enumerated() if kind == "enumerated" else replace(one_chain(several), kind=kind)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        table = arviz.summary(posterior.to_arviz(), round_to="none")
    (column,) = [name for name in table if name.startswith("r_hat")]
    assert table[column].isna().any() == (kind == "markov")
    assert any("hape" in str(warning.message) for warning in caught) <= (kind == "markov")


PLOTS = ["plot_trace", "plot_forest", "plot_rank", "plot_ess", *(["plot_posterior"] if LEGACY else ["plot_dist"])]


@pytest.fixture
def canvas() -> Iterator[None]:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("Agg")
    yield
    pyplot.close("all")


@pytest.mark.parametrize("name", PLOTS)
@pytest.mark.parametrize("make", ["weighted", "enumerated", pytest.param("shared latent", marks=pytest.mark.long)])
def test_plots_need_no_arguments(make: str, name: str, canvas: None) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # of shapes, or of variables that are too many
        getattr(arviz, name)(MAKERS[make]().to_arviz())


def observed(seed: int = 0) -> Posterior:
    """theta ~ N(0, 1), five observations N(theta, 1), and exact draws of the posterior, N(sum y / 6, 1 / 6)."""
    rng = np.random.default_rng(seed)
    data = np.array([0.5, 1.0, -0.3, 2.0, 0.1])
    theta = rng.normal(data.sum() / 6, np.sqrt(1 / 6), (4, 500))
    pointwise = norm.logpdf(data, theta[..., None], 1.0)
    total = pointwise.sum(-1, keepdims=True)
    return Posterior(
        samples={"theta": theta},
        log_weights=np.zeros((4, 500, 1)),
        log_joint=norm.logpdf(theta)[..., None] + total,
        log_likelihood={"y": total, "reward": np.zeros((4, 500, 1))},
        rewards={"reward": np.zeros((4, 500, 1))},
        log_evidence=np.zeros(1),
        log_evidence_stderr=np.zeros(1),
        kind="markov",
        engine="Toy",
        dims={"theta": (), "y": ("data",)},
        prompts=["a"],
        pointwise={"y": pointwise},
        predictive={"y": rng.normal(theta[..., None], 1.0, (4, 500, 5))},
        observed={"y": data},
        sample_stats={"energy": rng.normal(size=(4, 500)), "diverging": np.zeros((4, 500), dtype=bool)},
    )


def test_loo_is_that_of_the_data_alone(canvas: None) -> None:
    """The closed form: y_i given the others is N(sum of the others / 5, 6 / 5). A reward beside it changes nothing."""
    posterior = observed()
    idata = posterior.to_arviz()
    assert set(group(idata, "log_likelihood")) == {"y"}
    data = posterior.observed["y"]
    truth = norm.logpdf(data, (data.sum() - data) / 5, np.sqrt(6 / 5)).sum()
    found = arviz.loo(idata)
    assert float(getattr(found, "elpd_loo", None) or found.elpd) == pytest.approx(truth, abs=0.05)
    few = posterior.to_arviz(num_draws=5)
    getattr(arviz, "plot_ppc" if LEGACY else "plot_ppc_dist")(few)
    arviz.plot_energy(few)
    assert group(idata, "sample_stats")["diverging"].dtype in (bool, np.int8)


@pytest.mark.parametrize("name", ["loo", "plot_ppc" if LEGACY else "plot_ppc_dist"])
def test_without_data_there_is_a_reason(name: str) -> None:
    """A reward is no data: ArviZ says which group is missing, and gives no number."""
    with pytest.raises((TypeError, KeyError), match=r"log likelihood not found|posterior_predictive"):
        getattr(arviz, name)(from_prior(0).to_arviz())


def test_sensitivity_to_the_prior(canvas: None) -> None:
    """log_prior is that of the draws: scaling its power gives weights that ArviZ's measure needs."""
    idata = observed().to_arviz()
    theta = group(idata, "posterior")["theta"].values
    np.testing.assert_allclose(group(idata, "log_prior")["latents"][..., 0], norm.logpdf(theta))
    found = arviz.psens(idata, component="prior") if LEGACY else arviz.psense_summary(idata)
    assert np.isfinite(np.asarray(found["theta"] if LEGACY else found.loc["theta", "prior"], dtype=float)).all()


def test_observed_texts_are_no_numbers() -> None:
    posterior = observed()
    posterior.observed["text"] = np.array([[1, 2], [3, 0]])
    posterior.dims["text"] = ("prompt", "token")
    assert set(group(posterior.to_arviz(), "observed_data")) == {"y"}


def test_what_a_sampler_saw_moves_with_the_draws() -> None:
    posterior = observed()
    posterior.sample_stats["id"] = np.arange(2000.0).reshape(4, 500)
    posterior.samples["id"] = posterior.sample_stats["id"]
    picked = posterior.resample(77, seed=1)
    np.testing.assert_array_equal(picked.sample_stats["id"], picked.samples["id"])
    by_prompt = replace(Gaussian().posterior(0, "markov", prompts=2), sample_stats={"energy": np.zeros((4, 250))})
    assert by_prompt.resample(33).sample_stats["energy"].shape == (4, 33, 2)
    with pytest.raises(ValueError, match=r"sample_stats\['energy'\] must be \(4, 250\)"):
        replace(by_prompt, sample_stats={"energy": np.zeros((4, 249))})
