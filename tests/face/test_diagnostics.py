"""Diagnostics against closed forms. A tolerance is 4.5 standard errors unless a comment says otherwise."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from support.toys import (
    LOG_Z,
    PRIOR,
    REWARD,
    TARGET,
    Gaussian,
    RandomWalk,
    assert_calibrated,
    autoregression,
    discrete,
    enumerated,
    from_prior,
    shared,
)

from bayeslm import Posterior, diagnostics
from bayeslm.arviz_versions import statistic
from bayeslm.weights import standard_error

TOY = Gaussian()
KL_TARGET_PRIOR = TOY.kl(TOY.y / 2, 0.5, 0.0, 1.0)
KL_Q_PRIOR = TOY.kl(TOY.mean, TOY.scale**2, 0.0, 1.0)
KL_Q_TARGET = TOY.kl(TOY.mean, TOY.scale**2, TOY.y / 2, 0.5)

ESTIMATORS: dict[str, tuple[Callable[[Posterior], diagnostics.Estimate], float]] = {
    "log evidence": (lambda p: diagnostics.log_evidence(p.log_weights), TOY.log_z),
    "mean": (lambda p: diagnostics.expectation(p, p.samples["x"]), TOY.y / 2),
    "mean under q": (lambda p: diagnostics.expectation(p, p.samples["x"], weighted=False), TOY.mean),
    "KL(target, prior)": (diagnostics.kl_to_prior, KL_TARGET_PRIOR),
    "KL(q, prior)": (lambda p: diagnostics.kl_to_prior(p, weighted=False), KL_Q_PRIOR),
    "KL(q, target)": (diagnostics.kl_to_posterior, KL_Q_TARGET),
    "KL(q, target), log Z known": (lambda p: diagnostics.kl_to_posterior(p, TOY.log_z), KL_Q_TARGET),
    "entropy of target": (diagnostics.entropy, TOY.entropy(0.5)),
    "entropy of q": (lambda p: diagnostics.entropy(p, weighted=False), TOY.entropy(TOY.scale**2)),
}


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("seed", [0, 1])
def test_weighted_draws_give_the_truth_with_honest_standard_errors(name: str, seed: int) -> None:
    estimator, truth = ESTIMATORS[name]
    assert_calibrated(*estimator(TOY.posterior(seed)), truth)


def test_a_good_policy_s_divergence_is_known_far_better_than_its_two_terms() -> None:
    """log Z and E_q[log w] come from the same draws: here their errors cancel to a quarter of either's."""
    toy = Gaussian(scale=0.75)
    truth = toy.kl(toy.mean, toy.scale**2, toy.y / 2, 0.5)
    assert_calibrated(*diagnostics.kl_to_posterior(toy.posterior(0)), truth)


@pytest.mark.parametrize("name", ["mean", "KL(target, prior)", "entropy of target"])
def test_exact_draws_give_the_truth_with_honest_standard_errors(name: str) -> None:
    estimator, truth = ESTIMATORS[name]
    assert_calibrated(*estimator(TOY.posterior(2, "exact")), truth)


@pytest.mark.parametrize("scale", [0.25, 0.4, 0.6, 0.9, 1.5], ids=lambda scale: f"scale {scale}")
def test_all_estimates_are_by_the_same_weights(scale: float) -> None:
    """KL = E[l] - log Z for the estimates too, and by the raw weights, whatever k-hat is (here 0.9 to -0.5)."""
    posterior = Gaussian(scale=scale).posterior(0, prompts=20)
    likelihood = posterior.log_likelihood["y"]
    weights = np.exp(posterior.log_weights)
    mean = (weights * likelihood).sum((0, 1)) / weights.sum((0, 1))
    np.testing.assert_allclose(diagnostics.expectation(posterior, likelihood)[0], mean)
    np.testing.assert_allclose(diagnostics.kl_to_prior(posterior)[0], mean - posterior.log_evidence)
    joint = diagnostics.expectation(posterior, posterior.log_joint)[0]
    np.testing.assert_allclose(diagnostics.entropy(posterior)[0], posterior.log_evidence - joint)


@pytest.mark.parametrize("level", [5.0, 15.0, 40.0])
def test_rare_successes_keep_their_weight_and_divergences_are_positive(level: float) -> None:
    """Success 1 or 0 with probability 0.02, 300 draws: the estimate is that of the raw weights, and KL(., p) >= 0."""
    rng = np.random.default_rng(1)
    reward = (rng.random((1, 300, 50)) < 0.02) + 1e-3 * rng.normal(size=(1, 300, 50))  # nearly tied
    posterior = TOY.posterior(0, prompts=50)
    fields = {"log_weights": level * reward, "log_joint": level * reward, "log_likelihood": {"reward": level * reward}}
    posterior = replace(posterior, **fields, samples={"x": reward}, prior={})
    hits = (reward > 0.5).sum((0, 1))
    odds = hits / (300 - hits) * np.exp(level)
    np.testing.assert_allclose(diagnostics.expectation(posterior, reward)[0], odds / (1 + odds), atol=0.02)
    assert (diagnostics.kl_to_prior(posterior)[0] > 0).all()


WALK = RandomWalk()
FILTERED: dict[str, tuple[Callable[[Posterior], diagnostics.Estimate], float]] = {
    "first state": (lambda p: diagnostics.expectation(p, p.samples["x"][..., 0]), WALK.mean[0]),
    "last state": (lambda p: diagnostics.expectation(p, p.samples["x"][..., -1]), WALK.mean[-1]),
    "log evidence": (lambda p: diagnostics.log_evidence(p.log_weights, p.roots), WALK.log_z),
    "KL(target, prior)": (diagnostics.kl_to_prior, WALK.kl_to_prior),
    "entropy of target": (diagnostics.entropy, WALK.entropy),
}


@pytest.mark.parametrize("name", FILTERED)
def test_particles_give_the_truth_with_honest_standard_errors(name: str) -> None:
    """As independent draws they would not: z-scores of the first state and of log Z have sd 1.5 and 2.2."""
    estimator, truth = FILTERED[name]
    assert_calibrated(*estimator(WALK.posterior(0)), truth)


@pytest.mark.parametrize("name", FILTERED)
def test_standard_errors_under_multinomial_resampling_are_honest_or_too_large(name: str) -> None:
    """Right for expectations; for log Z too large by resampling equal weights: 3 / 1000 here, where 0.002 is right."""
    estimator, truth = FILTERED[name]
    estimate, stderr = estimator(WALK.posterior(0, multinomial=True))
    if name.endswith("state"):
        assert_calibrated(estimate, stderr, truth)
    else:
        z = (estimate - truth) / stderr
        assert abs(z.mean()) < 4.5 * 0.071
        assert z.std() < 1 + 4.5 * 0.05
        assert np.mean(stderr**2) < estimate.var() * (1 + 4.5 * 0.1) + 3 / 1000


def test_particles_that_share_no_root_are_independent_draws() -> None:
    posterior = TOY.posterior(0, prompts=3)
    roots = np.broadcast_to(np.arange(250)[:, None], (4, 250, 3))
    filtered = TOY.posterior(0, prompts=3)
    filtered.kind, filtered.roots = "particles", roots
    for estimator in (
        lambda p: diagnostics.log_evidence(p.log_weights, p.roots),
        lambda p: diagnostics.expectation(p, p.samples["x"], weighted=False),
    ):
        np.testing.assert_allclose(estimator(filtered), estimator(posterior))


def test_standard_error_by_root_by_hand() -> None:
    """Two chains of three particles: the cluster sums of w / mean(w) are (4, 0, 0) and (1, 0, 1), mean 1, K = 3."""
    log_weights, roots = np.log([[1.0, 2.0, 1.0], [1.0, 0.5, 0.5]])[..., None], [[0, 0, 0], [0, 2, 2]]
    stderr = diagnostics.log_evidence(log_weights, np.array(roots)[..., None])[1]
    assert stderr == pytest.approx(np.sqrt(3 / 2 * (9 + 1 + 1 + 0 + 1 + 0) / 36))
    assert diagnostics.num_roots(np.array(roots)[..., None]) == 3


def test_chains_of_one_root_each_are_the_draws() -> None:
    """The error is that of independent estimates, one a chain: the means of w / mean(w), 4 / 3 and 2 / 3."""
    log_weights, roots = (
        np.log([[1.0, 2.0, 1.0], [1.0, 0.5, 0.5]])[..., None],
        np.array([[0, 0, 0], [1, 1, 1]])[..., None],
    )
    means = np.exp(log_weights).mean(1)[:, 0]
    expected = np.std(means / means.mean(), ddof=1) / np.sqrt(2)
    assert diagnostics.log_evidence(log_weights, roots)[1] == pytest.approx(expected)


def test_one_root_serves_all_values_where_prompts_share_a_posterior() -> None:
    rng = np.random.default_rng(0)
    influence, roots = rng.normal(size=(2, 30, 3)), rng.integers(0, 30, (2, 30, 1))
    together = standard_error(np.zeros(3), influence, roots=roots)
    alone = [standard_error(np.zeros(1), influence[..., i : i + 1], roots=roots)[0] for i in range(3)]
    np.testing.assert_allclose(together, alone)


def test_the_error_of_a_single_root_is_unknown() -> None:
    log_weights = np.random.default_rng(0).normal(size=(1, 9, 2))
    roots = np.stack([np.full((1, 9), 4), np.arange(9)[None] // 4], axis=2)
    np.testing.assert_array_equal(np.isinf(diagnostics.log_evidence(log_weights, roots)[1]), [True, False])


def test_single_particles_have_no_known_distribution() -> None:
    filtered, conditional = WALK.posterior(0, prompts=2), TOY.posterior(0, prompts=2)
    conditional.conditional = True
    for posterior in (filtered, conditional):
        with pytest.raises(ValueError, match="of a known distribution"):
            diagnostics.kl_to_posterior(posterior)
        for function in (diagnostics.kl_to_prior, diagnostics.entropy, diagnostics.summary):
            with pytest.raises(ValueError, match="no known distribution"):
                function(posterior, weighted=False)


def test_standard_error_of_a_markov_chain_includes_autocorrelation() -> None:
    """AR(1) with correlation 0.6: for independent draws the z-scores would have sd 2."""
    posterior = TOY.posterior(0, "markov")
    x = autoregression(np.random.default_rng(3), posterior.log_weights.shape)
    assert_calibrated(*diagnostics.expectation(posterior, x), 0.0)


def test_engine_s_uncertainty_of_the_evidence_is_added() -> None:
    posterior = TOY.posterior(0, "exact", prompts=1)
    own = diagnostics.kl_to_prior(posterior)[1]
    posterior.log_evidence_stderr = np.array([0.5])
    assert diagnostics.kl_to_prior(posterior)[1] == pytest.approx(np.hypot(own, 0.5))


def test_enumeration_is_exact() -> None:
    posterior = enumerated()
    reward, log_target = np.where(TARGET > 0, REWARD, 0.0), np.log(np.where(TARGET > 0, TARGET, 1.0))
    cases = [
        (diagnostics.expectation(posterior, posterior.measured), np.sum(TARGET * 0.1 * reward, axis=1)),
        (diagnostics.kl_to_prior(posterior), np.sum(TARGET * (log_target - np.log(PRIOR)), axis=1)),
        (diagnostics.entropy(posterior), -np.sum(TARGET * log_target, axis=1)),
        (diagnostics.log_evidence(posterior.log_weights), LOG_Z),
    ]
    for (estimate, _), truth in cases:
        np.testing.assert_allclose(estimate, truth, rtol=1e-12)
    for (_, stderr), _ in cases[:3]:
        assert not stderr.any()
    with pytest.raises(ValueError, match="enumeration"):
        diagnostics.expectation(posterior, posterior.measured, weighted=False)


def test_prompts_that_share_a_latent_are_one_posterior() -> None:
    """KL and entropy are those of z, whose odds are exp(1 + 2 + 3)."""
    posterior = shared()
    target = 1 / (1 + np.exp(-6.0))
    entropy = -target * np.log(target) - (1 - target) * np.log(1 - target)
    np.testing.assert_allclose(diagnostics.entropy(posterior)[0], [entropy])
    np.testing.assert_allclose(diagnostics.kl_to_prior(posterior)[0], [np.log(2) - entropy])
    np.testing.assert_allclose(diagnostics.expectation(posterior, posterior.measured)[0], target * np.arange(1, 4))
    np.testing.assert_allclose(diagnostics.summary(posterior)["kl_to_prior"], [np.log(2) - entropy] * 3)


@pytest.mark.parametrize("seed", range(3))
def test_draws_that_break_a_constraint(seed: int) -> None:
    """Weights of −inf never become NaN; an estimate is inf if they make it infinite, NaN if they make it unknown."""
    posterior = from_prior(seed)
    weights = posterior.weights()
    assert np.isneginf(posterior.log_weights).any()
    np.testing.assert_allclose(weights.sum(axis=(0, 1)), 1.0)
    assert not weights[np.isneginf(posterior.log_weights)].any()

    value, stderr = diagnostics.log_evidence(posterior.log_weights)
    assert np.all(np.abs(value - LOG_Z) < 4.5 * stderr)
    for estimate, error in (diagnostics.expectation(posterior, posterior.measured), diagnostics.kl_to_prior(posterior)):
        assert np.isfinite([estimate, error]).all()
    reward, stderr = diagnostics.expectation(posterior, posterior.measured, weighted=False)
    assert np.isneginf(reward[1])
    assert stderr[1] == np.inf
    assert diagnostics.kl_to_posterior(posterior)[0][1] == np.inf
    for estimator in (diagnostics.kl_to_prior, diagnostics.entropy):
        hidden = estimator(posterior, weighted=False)[0]
        assert np.isfinite(hidden[0])
        assert np.isnan(hidden[1])


def test_all_weights_zero_is_an_error_or_infinite_and_never_nan() -> None:
    dead = np.zeros((2, 50, 3))
    dead[..., 1] = -np.inf
    estimate, stderr = diagnostics.log_evidence(dead)
    np.testing.assert_array_equal(estimate, [0.0, -np.inf, 0.0])
    np.testing.assert_array_equal(stderr, [0.0, np.inf, 0.0])
    np.testing.assert_array_equal(diagnostics.ess(dead), [100.0, 0.0, 100.0])
    with pytest.raises(ValueError, match="every draw of prompt 1 has weight zero"):
        diagnostics.psis(dead)


@pytest.mark.parametrize("chains", [1, 2])
@pytest.mark.parametrize("draws", [1, 2, 3])
@pytest.mark.parametrize("kind", ["weighted", "exact", "uncorrected", "markov"])
def test_few_draws_have_a_summary_whose_unknown_columns_are_nan(kind: str, draws: int, chains: int) -> None:
    whole = TOY.posterior(0) if kind == "weighted" else replace(TOY.posterior(0).resample(), kind=kind)
    few = cut(whole, chains, draws)
    table = diagnostics.summary(few)
    assert table["rhat_log_likelihood"].isna().all()
    if kind != "weighted":
        assert table["ess"].isna().all()
    np.testing.assert_allclose(table["log_likelihood"], (few.weights() * few.measured).sum((0, 1)))
    few.to_arviz()
    diagnostics.compare({"a": few})


def cut(posterior: Posterior, chains: int, draws: int) -> Posterior:
    """Return the first draws of some chains."""

    def some(x: np.ndarray) -> np.ndarray:
        return x.reshape(-1, *x.shape[2:])[: chains * draws].reshape(chains, draws, *x.shape[2:])

    by_name = {
        name: {k: some(x) for k, x in getattr(posterior, name).items()} for name in ("samples", "log_likelihood")
    }
    arrays = {name: some(getattr(posterior, name)) for name in ("log_weights", "log_joint")}
    return replace(posterior, **by_name, **arrays, prior={})


def test_one_draw_has_an_unknown_standard_error() -> None:
    assert diagnostics.log_evidence(np.array([[[2.0]]]))[1] == np.inf


def test_bounds_on_the_evidence_bound_the_divergence() -> None:
    posterior = TOY.posterior(0, prompts=3)
    low, high = diagnostics.kl_to_posterior(posterior, (TOY.log_z - 1.0, np.full(3, TOY.log_z + 0.5)))[0]
    point, stderr = diagnostics.kl_to_posterior(posterior, np.full(3, TOY.log_z))
    np.testing.assert_allclose([low, high], [point - 1.0, point + 0.5])
    assert stderr.shape == (3,)


def test_draws_of_an_unknown_distribution_have_no_divergence() -> None:
    posterior = from_prior(0).resample()
    assert posterior.kind == "uncorrected"
    for function in (diagnostics.kl_to_prior, diagnostics.entropy):
        with pytest.raises(ValueError, match="unknown"):
            function(posterior)
    with pytest.raises(ValueError, match="weighted draws"):
        diagnostics.kl_to_posterior(enumerated())


def test_expectation_refuses_other_shapes() -> None:
    posterior = from_prior(0)
    for shape in [(4, 250), (4, 249, 2), (4, 250, 3)]:
        with pytest.raises(ValueError, match="values must be"):
            diagnostics.expectation(posterior, np.zeros(shape))


@pytest.mark.parametrize("n", [1, 2, 3])
def test_distinct_n_by_counting(n: int) -> None:
    rng = np.random.default_rng(0)
    tokens, lengths = rng.integers(0, 3, (2, 3, 2, 5)), rng.integers(0, 6, (2, 3, 2))
    for prompt, ratio in enumerate(diagnostics.distinct_n(tokens, lengths, n)):
        grams = [
            tuple(tokens[chain, draw, prompt, start : start + n])
            for chain, draw in itertools.product(range(2), range(3))
            for start in range(lengths[chain, draw, prompt] - n + 1)
        ]
        assert ratio == pytest.approx(len(set(grams)) / len(grams))


def test_distinct_n_without_n_grams_and_on_bad_input() -> None:
    tokens, lengths = np.zeros((1, 2, 1, 3), dtype=int), np.ones((1, 2, 1), dtype=int)
    assert np.isnan(diagnostics.distinct_n(tokens, lengths, 2))
    assert np.isnan(diagnostics.distinct_n(tokens, lengths, 9))
    with pytest.raises(ValueError, match="at least one token"):
        diagnostics.distinct_n(tokens, lengths, 0)
    with pytest.raises(ValueError, match=r"lengths \(chain, draw, prompt\)"):
        diagnostics.distinct_n(tokens, lengths[..., None])


@pytest.mark.parametrize("n", [1, 2, 16])
def test_best_of_n_bound_is_tight_without_ties_and_a_bound_with_them(n: int) -> None:
    for values, tight in ((20_000, True), (5, n == 1)):
        below = np.arange(values) / values
        p = (below + 1 / values) ** n - below**n  # of the best of n draws, uniform on ranked values
        kl = np.sum(p * np.log(p * values))
        assert kl <= diagnostics.best_of_n_kl_bound(n) + 1e-12
        assert (kl == pytest.approx(diagnostics.best_of_n_kl_bound(n), abs=1e-3)) == tight
    with pytest.raises(ValueError, match="n >= 1"):
        diagnostics.best_of_n_kl_bound(0)


def test_summary_repeats_the_single_functions() -> None:
    posterior = from_prior(0)
    table = diagnostics.summary(posterior, LOG_Z)
    assert list(table.index) == posterior.prompts
    assert table["reward_prior"].tolist() == pytest.approx([0.05, 0.05])
    picked = posterior.resample()
    expected = {
        "reward": diagnostics.expectation(posterior, posterior.measured)[0],
        "kl_to_prior_se": diagnostics.kl_to_prior(posterior)[1],
        "kl_to_posterior": diagnostics.kl_to_posterior(posterior, LOG_Z)[0],
        "log_evidence": posterior.log_evidence,
        "ess": diagnostics.ess(posterior.log_weights),
        "entropy": diagnostics.entropy(posterior)[0],
        "rhat_reward": diagnostics.rhat(picked.measured),
        "rhat_length": diagnostics.rhat(picked.lengths["completion"]),
        "distinct_2": diagnostics.distinct_n(picked.samples["completion"], picked.lengths["completion"]),
        "seconds": 2.0,
        "tokens_per_second": 50.0,
    }
    for name, values in expected.items():
        np.testing.assert_allclose(table[name], values, err_msg=name)

    raw = diagnostics.summary(posterior, (LOG_Z - 1, LOG_Z), weighted=False)
    np.testing.assert_allclose(raw["reward"], posterior.rewards["reward"].mean(axis=(0, 1)))
    np.testing.assert_allclose(raw["kl_to_prior"], [0.0, np.nan], atol=1e-12)  # q is the prior
    np.testing.assert_allclose((raw["kl_to_posterior_upper"] - raw["kl_to_posterior_lower"]).iloc[0], 1.0)


def test_summary_leaves_out_what_a_kind_cannot_have() -> None:
    posteriors = {
        "enumerated": enumerated(),
        "exact": enumerated().resample(),
        "markov": TOY.posterior(0, "markov", prompts=2),
        "uncorrected": from_prior(0).resample(),
        "particles": WALK.posterior(0, prompts=2),
    }
    absent = {
        "enumerated": {"ess", "khat", "rhat_reward", "kl_to_posterior"},
        "exact": {"khat", "kl_to_posterior"},
        "markov": {"khat", "kl_to_posterior", "rhat_length", "seconds"},
        "uncorrected": {"khat", "kl_to_posterior", "kl_to_prior", "entropy"},
        "particles": {"khat", "kl_to_posterior"},
    }
    assert set().union(*absent.values()) <= set(diagnostics.summary(from_prior(0)))
    for kind, posterior in posteriors.items():
        assert posterior.kind == kind
        assert not absent[kind] & set(diagnostics.summary(posterior))
    filtered = posteriors["particles"]
    np.testing.assert_array_equal(diagnostics.summary(filtered)["roots"], diagnostics.num_roots(filtered.roots))


def test_a_chain_without_evidence_has_no_divergence() -> None:
    posterior = TOY.posterior(0, "markov", prompts=2)
    posterior.log_evidence = posterior.log_evidence_stderr = np.full(2, np.nan)
    table = diagnostics.summary(posterior)
    assert table[["kl_to_prior", "entropy", "log_evidence"]].isna().all(axis=None)
    assert np.isfinite(table["log_likelihood"]).all()


def test_compare_stacks() -> None:
    table = diagnostics.compare({"oracle": enumerated(), "IS": from_prior(0)})
    assert table.index.names == ["posterior", "prompt"]
    assert table.loc["oracle", "khat"].isna().all()
    gap = table.loc["IS", "reward"] - table.loc["oracle", "reward"]
    assert np.all(np.abs(gap) < 4.5 * table.loc["IS", "reward_se"])


def test_two_completions_have_columns_of_their_own() -> None:
    first = enumerated()
    dims = first.dims | {"reply": ("prompt", "token")}
    samples = first.samples | {"reply": first.samples["completion"][..., :1]}
    lengths = first.lengths | {"reply": np.ones((1, 4, 2), dtype=int)}
    index = first.samples["completion"][..., 0]
    both = discrete(index, np.log(PRIOR)[index], "weighted", samples=samples, lengths=lengths, dims=dims)
    table = diagnostics.summary(both)
    assert table["distinct_2_completion"].notna().all()
    assert table["distinct_2_reply"].isna().all()  # one token long


@pytest.mark.parametrize("estimate", ["log Z", "E[l]", "KL", "entropy"])
@pytest.mark.parametrize("spread", [0.5, 2.0, 4.0])
def test_errors_of_a_small_ess_are_those_of_leaving_each_draw_out(estimate: str, spread: float) -> None:
    rng = np.random.default_rng(0)
    lw = spread * rng.normal(size=(2, 20, 3))
    fields = {"log_weights": lw, "log_joint": lw - rng.random(lw.shape), "log_likelihood": {"y": lw}, "prior": {}}
    posterior = replace(TOY.posterior(0, prompts=3), **fields, samples={"x": lw})
    functions: dict[str, Callable[[Posterior], diagnostics.Estimate]] = {
        "log Z": lambda p: diagnostics.log_evidence(p.log_weights),
        "E[l]": lambda p: diagnostics.expectation(p, p.log_likelihood["y"]),
        "KL": diagnostics.kl_to_prior,
        "entropy": diagnostics.entropy,
    }

    def without(i: int) -> np.ndarray:
        rest = {
            name: np.delete(x.reshape(1, 40, 3), i, axis=1) for name, x in fields.items() if isinstance(x, np.ndarray)
        }
        likelihood = {"y": rest["log_weights"]}
        part = replace(posterior, **rest, log_likelihood=likelihood, samples={"x": rest["log_weights"]})
        return functions[estimate](part)[0]

    each = np.array([without(i) for i in range(40)])
    expected = np.sqrt(39 / 40 * ((each - each.mean(0)) ** 2).sum(0))
    np.testing.assert_allclose(functions[estimate](posterior)[1], expected, rtol=1e-6)
    needs_one = np.r_[0.0, np.full(39, -2000.0)].reshape(1, 40, 1)
    assert diagnostics.log_evidence(needs_one)[1] == np.inf


@pytest.mark.parametrize("shape", [(4, 64, 30), (1, 9, 3), (2, 5, 4), (1, 7, 2), (3, 4), (4, 11, 2, 3), (2, 3, 2)])
def test_rhat_of_all_quantities_at_once_is_arvizs_of_each(shape):
    values = np.random.default_rng(0).normal(size=shape)
    for x in (values, np.round(values)):  # with ties, and constants
        chains = x
        if shape[0] == 1:
            half = shape[1] // 2
            chains = np.concatenate([x[:, :half], x[:, half : 2 * half]])
        np.testing.assert_allclose(diagnostics.rhat(x), statistic("rhat", chains), rtol=1e-12)


def test_rhat_of_unusual_quantities_is_arvizs():
    x = np.random.default_rng(0).normal(size=(4, 16, 6))
    x[..., 0], x[0, 0, 1], x[0, :3, 2], x[:, :8, 3], x[..., 5] = 1.0, np.nan, -np.inf, -np.inf, -np.inf
    found = diagnostics.rhat(x)
    np.testing.assert_allclose(found, statistic("rhat", x), rtol=1e-12)
    assert np.isnan(found).tolist() == [True, True, False, False, False, True]
