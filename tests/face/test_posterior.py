"""Posterior: shapes, weights and resampling."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.toys import TARGET, WORDS, Gaussian, RandomWalk, discrete, enumerated, from_prior, shared, shared_weighted

from bayeslm import diagnostics
from bayeslm.weights import normalise

# ---- shapes ----


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "posterior"}, "kind must be one of enumerated, exact"),
        ({"prompts": ["one"]}, "log_weights must be"),
        ({"log_weights": np.zeros((4, 0, 2))}, "not empty"),
        ({"log_weights": np.full((4, 250, 2), np.nan)}, r"log_weights must be finite or -inf"),
        ({"log_joint": np.zeros((4, 250, 1))}, "log_joint must have shape"),
        ({"log_likelihood": {"reward": np.zeros((4, 250))}}, r"log_likelihood\['reward'\] must have shape"),
        ({"log_likelihood": {"reward": np.full((4, 250, 2), np.inf)}}, r"log_likelihood\['reward'\] must be finite"),
        ({"log_evidence": np.zeros(1)}, "log_evidence must have shape"),
        ({"log_evidence_upper": np.zeros(3)}, "log_evidence_upper must have shape"),
        ({"samples": {"completion": np.zeros((4, 250, 2))}}, r"samples\['completion'\] must be \(4, 250\) \+ dims"),
        ({"rewards": {"reward": np.zeros((4, 250, 3))}}, r"rewards\['reward'\] must have shape \(4, 250, 2\)"),
        ({"rewards": {"reward": np.full((4, 250, 2), np.nan)}}, r"rewards\['reward'\] must be finite"),
        ({"rewards": {"completion": np.zeros((4, 250, 2))}}, "'completion' names a reward and a sample"),
        ({"prior_rewards": {"reward": np.zeros((4, 250, 3))}}, r"prior_rewards\['reward'\] must be"),
        ({"samples": {"completion": WORDS[np.zeros((4, 250, 2), dtype=int)]}}, "must hold numbers"),
        ({"samples": {"z": np.zeros((4, 250))}}, 'no axis "prompt"'),
        ({"dims": {"completion": ("prompt", "prompt")}}, "different names"),
        ({"texts": {"reply": WORDS[np.zeros((4, 250, 2), dtype=int)]}}, r"texts\['reply'\] has no token ids"),
        ({"lengths": {"completion": np.zeros((4, 250), dtype=int)}}, r"lengths\['completion'\] must have shape"),
        ({"prior": {"mood": np.zeros((2, 3, 2)), "reward": np.zeros((2, 4, 2))}}, r"prior\['reward'\] is not"),
        ({"roots": np.zeros((4, 250, 2), dtype=int)}, "roots belong to particles"),
        ({"kind": "particles"}, "roots belong to particles"),
        ({"kind": "particles", "roots": np.zeros((4, 250, 1), dtype=int)}, "roots must have shape"),
        ({"kind": "particles", "roots": np.full((4, 250, 2), 250)}, "roots must be indices"),
        ({"kind": "particles", "roots": np.zeros((4, 250, 2))}, "roots must be indices"),
    ],
)
def test_contradictions_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_prior(0, **change)


def test_repr_fits_a_screen() -> None:
    """Figures before and after, the best text, and never more than a screen, whatever the prompts."""
    lines = repr(enumerated()).splitlines()
    assert lines[0] == "Posterior(Toy, enumerated: 1 x 4 draws of completion for 2 prompts)"
    mean = np.sum(TARGET[0] * [0.0, 0.1, -0.1, 0.2])
    assert lines[1:4] == ["  Is it good?", f"    reward 0.05 → {mean:.2f}  log Z 0.71", "    best 0.2: 'sure'"]
    assert "for 1 prompt)" in repr(Gaussian().posterior(0, prompts=1))
    many = Gaussian().posterior(0, prompts=200)
    many.prompts = ["word\n" * 500] * 200
    assert max(map(len, repr(many).splitlines())) <= 96
    assert len(repr(many).splitlines()) < 24
    assert "and 195 more prompts" in repr(many)
    for odd in (from_prior(0, log_weights=np.full((4, 250, 2), -np.inf)), shared(), RandomWalk().posterior(0, 2)):
        assert "nan" not in repr(odd) + odd._repr_html_()


HOSTILE = "<script>alert(1)</script>&<img src=x onerror=alert(2)>\x1b[31m\u202e"


def test_no_text_breaks_out_of_the_html() -> None:
    posterior = from_prior(0, engine=HOSTILE)
    posterior.prompts = [HOSTILE, "plain"]
    posterior.texts["completion"][...] = HOSTILE
    for shown in (posterior._repr_html_(), repr(posterior)):
        assert "\x1b" not in shown
        assert "\u202e" not in shown
    page = posterior._repr_html_()
    tags = {tag.split()[0].strip("/") for tag in re.findall(r"<([^>]*)>", page)}
    assert tags == {"div", "p", "b", "table", "thead", "tbody", "tr", "th", "td", "br"} | (tags & {"small", "code"})
    assert "&lt;script&gt;" in page


def test_prompts_of_chats_have_names() -> None:
    posterior = from_prior(0, prompt_names=["Is it\ngood?", "bad"])
    assert posterior.prompt_labels == ["Is it good?", "bad"]
    with pytest.raises(ValueError, match="prompt_names has 1 names for 2 prompts"):
        from_prior(0, prompt_names=["one"])


def test_prompt_labels_are_short_and_different() -> None:
    long = "word " * 40
    posterior = Gaussian().posterior(0, prompts=3)
    posterior.prompts = ["two\n lines", long, "c"]
    assert posterior.prompt_labels == ["two lines", long[:59] + "…", "c"]
    posterior.prompts = [long + "a", long + "b", "c"]
    labels = posterior.prompt_labels
    assert len(set(labels)) == 3
    assert [label[:3] for label in labels] == ["[0]", "[1]", "[2]"]


def test_draws_are_measured_by_the_reward_or_else_by_the_log_likelihood() -> None:
    posterior = from_prior(0)
    assert posterior.measure == "reward"
    np.testing.assert_array_equal(posterior.measured, posterior.rewards["reward"])
    np.testing.assert_array_equal(posterior.prior_measured, posterior.prior_rewards["reward"])
    terms = {"a": np.full((4, 250, 2), 2.0), "b": np.full((4, 250, 2), -1.0)}
    prior = {"a": np.ones((1, 5, 2))}
    plain = from_prior(0, samples={}, texts={}, lengths={}, log_likelihood=terms, prior=prior, rewards={})
    assert plain.measure == "log-likelihood"
    np.testing.assert_array_equal(plain.measured, np.ones((4, 250, 2)))
    assert plain.prior_measured is None  # "b" is missing
    plain.prior["b"] = np.ones((1, 5, 2))
    np.testing.assert_array_equal(plain.prior_measured, np.full((1, 5, 2), 2.0))
    assert shared().measured.shape == (1, 2, 3)
    several = from_prior(0, rewards={"a": np.ones((4, 250, 2)), "b": np.full((4, 250, 2), 3.0)})
    assert several.measure == "log-likelihood"  # two rewards have no common unit
    np.testing.assert_array_equal(several.measured, several.log_likelihood["reward"])
    table = diagnostics.summary(several)
    np.testing.assert_allclose(table[["reward_a", "reward_b"]], [[1.0, 3.0], [1.0, 3.0]])
    assert "log_likelihood" in table
    assert "reward" not in table


# ---- weights and resampling ----


def test_weights_by_kind() -> None:
    np.testing.assert_allclose(enumerated().weights()[0].T, TARGET)
    markov = Gaussian().posterior(0, "markov", prompts=2)
    np.testing.assert_array_equal(markov.weights(), np.full((4, 250, 2), 0.001))
    smoothed = Gaussian(scale=0.7).posterior(0, prompts=2)
    weights, khat = diagnostics.psis(smoothed.log_weights)
    assert (khat < 0.7).all()
    np.testing.assert_allclose(smoothed.weights(), np.exp(weights))
    assert not np.allclose(smoothed.weights(), np.exp(normalise(smoothed.log_weights)))
    unreliable = Gaussian(scale=0.2).posterior(0, prompts=2)
    assert (diagnostics.psis(unreliable.log_weights)[1] > 0.7).all()
    np.testing.assert_allclose(unreliable.weights(), np.exp(normalise(unreliable.log_weights)))


def test_particles_keep_their_weights_and_lose_their_roots_when_resampled() -> None:
    filtered = RandomWalk().posterior(0, prompts=2)
    np.testing.assert_allclose(filtered.weights(), np.exp(normalise(filtered.log_weights)))
    picked = filtered.resample()
    assert (picked.kind, picked.roots) == ("uncorrected", None)
    assert not picked.log_weights.any()
    mean, stderr = diagnostics.expectation(filtered, filtered.samples["x"][..., -1])
    np.testing.assert_allclose(picked.samples["x"][..., -1].mean((0, 1)), mean, atol=0.5 * stderr.min())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("num_draws", [None, 30, 1111])
def test_systematic_resampling_copies_every_draw_as_often_as_its_weight_says(seed: int, num_draws: int | None) -> None:
    """The number of copies is the expected one rounded up or down, always."""
    posterior = from_prior(0)
    posterior.samples["id"] = np.broadcast_to(np.arange(1000).reshape(4, 250, 1), (4, 250, 2))
    posterior.dims["id"] = ("prompt",)
    picked = posterior.resample(num_draws, seed)
    draws = num_draws or 250
    assert picked.log_weights.shape == (4, draws, 2)
    for prompt in range(2):
        copies = np.bincount(picked.samples["id"][..., prompt].ravel(), minlength=1000)
        expected = 4 * draws * posterior.weights()[..., prompt].ravel()
        assert np.all(np.abs(copies - expected) < 1)
    assert not picked.log_weights.any()
    assert picked.kind == "uncorrected"


def test_resampling_picks_all_arrays_of_a_draw_together() -> None:
    picked = from_prior(0).resample(seed=4)
    index = picked.samples["completion"][..., 0]
    reference = discrete(index, None, "exact")
    for name in ("samples", "log_likelihood", "lengths", "texts"):
        for key, values in getattr(reference, name).items():
            np.testing.assert_array_equal(getattr(picked, name)[key], values)
    np.testing.assert_array_equal(picked.log_joint, reference.log_joint)
    assert picked.prior is not None
    assert not np.array_equal(index[..., 0], index[..., 1])  # each prompt on its own


def test_a_shared_latent_moves_with_all_its_prompts() -> None:
    posterior = shared_weighted()
    picked = posterior.resample()
    where = picked.samples["completion"][..., 0, 0]
    np.testing.assert_array_equal(picked.samples["completion"][..., 1, 0], where)
    np.testing.assert_array_equal(picked.lengths["completion"], np.stack([where, where], axis=2))
    for values, original in (
        (picked.samples["theta"], posterior.samples["theta"]),
        (picked.log_likelihood["reward"], posterior.log_likelihood["reward"]),
    ):
        np.testing.assert_array_equal(values, original.reshape(100, -1)[where])
    assert len(np.unique(where)) < 100


def test_equal_weights_leave_the_draws_in_place() -> None:
    markov = Gaussian().posterior(0, "markov", prompts=2)
    np.testing.assert_array_equal(markov.resample().samples["x"], markov.samples["x"])
    equal = discrete(np.zeros((4, 50, 2), dtype=int), np.zeros((4, 50, 2)), "weighted")
    equal.samples["id"] = np.random.default_rng(0).normal(size=(4, 50, 2))
    equal.dims["id"] = ("prompt",)
    np.testing.assert_array_equal(equal.resample(seed=1).samples["id"], equal.samples["id"])


def test_draws_of_an_enumeration_are_exact_and_shuffled() -> None:
    picked = enumerated().resample(2000, seed=1)
    assert picked.kind == "exact"
    for prompt in range(2):
        share = np.bincount(picked.samples["completion"][..., prompt, 0].ravel(), minlength=4) / 2000
        np.testing.assert_allclose(share, TARGET[prompt], atol=1 / 2000)
    assert np.all(diagnostics.rhat(picked.measured) < 1.02)
    assert enumerated().resample().log_weights.shape == (1, 1000, 2)


def test_ess_of_resampled_draws_shows_unequal_weights() -> None:
    """Copies of a draw are adjacent, so ArviZ's ESS of the result is near Kish's of the weights."""
    posterior = Gaussian(mean=-1.0).posterior(0, prompts=20)
    kish = diagnostics.ess(posterior.log_weights).mean()
    assert kish < 400
    assert diagnostics.ess_bulk(posterior.resample().samples["x"]).mean() == pytest.approx(kish, rel=0.5)


def test_resample_refuses_no_draws_and_no_weight() -> None:
    with pytest.raises(ValueError, match="num_draws"):
        enumerated().resample(0)
    posterior = from_prior(0)
    posterior.log_weights[..., 1] = -np.inf
    for call in (posterior.resample, posterior.weights, posterior.to_arviz):
        with pytest.raises(ValueError, match="prompt 1 has weight zero"):
            call()


def test_best_texts_are_distinct_and_sorted() -> None:
    posterior = from_prior(0)
    assert posterior.best(0, k=3) == [("sure", 0.2), ("yes", 0.1), ("no", 0.0)]
    assert posterior.best(1)[-1] == ("yes", -np.inf)
    joint = shared_weighted()
    text, reward = joint.best(prompt=1, k=1)[0]
    assert reward == joint.log_likelihood["reward"][..., 1].max()
    assert joint.log_likelihood["reward"][..., 1].ravel()[int(text)] == reward
    with pytest.raises(ValueError, match="site must be one of"):
        posterior.best(site="reply")
    with pytest.raises(IndexError):
        posterior.best(prompt=2)


# ---- imports ----


def test_the_face_loads_a_posterior_without_torch_and_without_arviz(tmp_path: Path) -> None:
    """Loading a posterior needs no torch, and does not wait for ArviZ, whose import takes seconds."""
    code = (
        "import sys\n"
        "sys.modules.update(dict.fromkeys(['torch', 'pyro', 'transformers', 'arviz', 'matplotlib']))\n"
        "import bayeslm, bayeslm.plots, bayeslm.storage\n"
        "print(sorted(bayeslm.__all__), bayeslm.Posterior.load(sys.argv[1]).kind)"
    )
    saved = enumerated().save(tmp_path / "run")
    done = subprocess.run([sys.executable, "-c", code, str(saved)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    names = ["DiagnosticsWarning", "Posterior", "PosteriorDraws", "__version__", "diagnostics"]
    assert done.stdout.strip() == f"{names} enumerated"
