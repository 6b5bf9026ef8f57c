r"""Bradley-Terry and Plackett-Luce against quadrature, enumeration and simulation-based calibration.

Means by sampling are compared within 4 standard errors by effective sample size: each comparison fails by chance once
in 16,000.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import arviz as az
import numpy as np
import pyro
import pytest
import torch
from pyro.infer import autoguide
from support.statistics import LIMIT, assert_drawn_from, assert_evidence, assert_moments, assert_uniform
from support.trainings import Killed, killer
from torch import Tensor

from bayeslm import Posterior, diagnostics
from bayeslm.inference import NUTS, SVI, ImportanceSampling, ProgramError, predict
from bayeslm.inference.training import Adam, Checkpointing
from bayeslm.models.preferences import BradleyTerry, Comparisons, PlackettLuce, Question, Rankings
from bayeslm.models.preferences.plackett_luce import ABSENT, RankingDistribution

WORDS = ["aaa", "b", "banana", "cab", "zebra", "quiz", "aardvark", "bb"]


def counts(prompts: list[str], completions: list[str]) -> Tensor:
    """Return two features of each word."""
    return torch.tensor([[c.count("a") - 1.0, len(c) / 2.0 - 2.0] for c in completions])


PAIRS = [(0, 1), (2, 1), (2, 3), (6, 5), (3, 4), (5, 7), (1, 7), (6, 0), (4, 2), (0, 3)]
DATA = Comparisons([""] * len(PAIRS), [WORDS[i] for i, _ in PAIRS], [WORDS[j] for _, j in PAIRS])
MODEL = BradleyTerry(counts, scale=1.0)


def log_odds(weights: Any) -> Tensor:
    """Return log P(chosen preferred) - log P(rejected preferred), (*, comparison), under weights (*, 2)."""
    return MODEL.reward(DATA.prompts, DATA.chosen, weights) - MODEL.reward(DATA.prompts, DATA.rejected, weights)


def quadrature(log_likelihood: Callable[[Tensor], Tensor], scale: float) -> tuple[np.ndarray, np.ndarray, float]:
    """Return mean (2,), covariance (2, 2) and log Z of two weights, by a fine grid."""
    axis = torch.linspace(-9, 9, 721, dtype=torch.float64)
    w = torch.cartesian_prod(axis, axis)
    prior = torch.distributions.Normal(0.0, scale / math.sqrt(2)).log_prob(w).sum(-1)
    log_p = prior + log_likelihood(w)
    log_z = log_p.logsumexp(0) + 2 * (axis[1] - axis[0]).log()
    mass = (log_p - log_p.logsumexp(0)).exp()
    mean = mass @ w
    return mean.numpy(), ((w - mean).T @ ((w - mean) * mass[:, None])).numpy(), float(log_z)


@functools.cache
def truth() -> tuple[np.ndarray, np.ndarray, float]:
    x = (counts([], DATA.chosen) - counts([], DATA.rejected)).double()
    return quadrature(lambda w: torch.nn.functional.logsigmoid(w @ x.T).sum(-1), 1.0)


def test_the_program_is_the_formula():
    x = counts([], DATA.chosen) - counts([], DATA.rejected)
    with pyro.plate("particles", 5, dim=-2):
        trace = pyro.poutine.trace(MODEL).get_trace(DATA)
    trace.compute_log_prob()
    w = trace.nodes["weights"]["value"]
    assert w.shape == (5, 1, 2)
    torch.testing.assert_close(
        trace.nodes["weights"]["log_prob"].squeeze(-1),
        torch.distributions.Normal(0.0, 1.0 / math.sqrt(2)).log_prob(w[:, 0]).sum(-1),
    )
    expected = torch.log(1 / (1 + torch.exp(-(w[:, 0] @ x.T))))
    torch.testing.assert_close(trace.nodes["preferred"]["log_prob"], expected)
    torch.testing.assert_close(log_odds(w[:, 0]), w[:, 0] @ x.T)
    rewards = MODEL.reward(["", ""], ["banana", "quiz"], w.numpy())  # an array of any leading shape
    torch.testing.assert_close(rewards, w @ torch.tensor([[2.0, 1.0], [-1.0, 0.0]]).T)


def test_features_are_computed_once_a_data_set():
    calls: list[int] = []

    def counted(prompts: list[str], completions: list[str]) -> Tensor:
        calls.append(len(prompts))
        return counts(prompts, completions)

    model = BradleyTerry(counted)
    NUTS(num_samples=5, warmup=5, num_chains=1, seed=0, progress=False).run(model, DATA)
    assert calls == [2 * len(DATA)]
    fewer = DATA.take(range(4))
    posterior = ImportanceSampling(num_particles=10, progress=False).run(model, fewer)
    assert calls == [2 * len(DATA), 8]
    assert posterior.pointwise["preferred"].shape == (1, 10, 4)


@pytest.mark.long
@pytest.mark.parametrize("seed", [0, 1])
def test_nuts_against_quadrature(seed: int):
    mean, covariance, _ = truth()
    posterior = NUTS(num_samples=75, warmup=60, num_chains=2, seed=seed, progress=False).run(MODEL, DATA)
    assert posterior.samples["weights"].shape == (2, 75, 2)
    assert_moments(posterior, posterior.samples["weights"], mean, covariance)


FULL = autoguide.AutoMultivariateNormal
GUIDES = {
    "default": None,
    "normal": autoguide.AutoNormal,
    "full": FULL,
    "low-rank": autoguide.AutoLowRankMultivariateNormal,
    "laplace": autoguide.AutoLaplaceApproximation,
}


@pytest.mark.parametrize("name", GUIDES)
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.long)])
def test_guides_against_quadrature(name: str, seed: int):
    """Weighted draws of each guide agree, and so do those of importance sampling with it as the proposal."""
    mean, covariance, log_z = truth()
    guide = None if GUIDES[name] is None else GUIDES[name](MODEL)
    svi = SVI(
        num_steps=120, num_particles=8, optimizer=Adam(0.1), num_samples=3000, seed=seed, progress=False, guide=guide
    )
    posterior = svi.run(MODEL, DATA)
    assert_moments(posterior, posterior.samples["weights"], mean, covariance)
    assert_evidence(posterior, log_z)
    assert diagnostics.ess(posterior.log_weights)[0] > 1200
    if guide is not None:
        again = ImportanceSampling(num_particles=3000, guide=guide, seed=seed + 7, progress=False).run(MODEL, DATA)
        assert_moments(again, again.samples["weights"], mean, covariance)
        assert_evidence(again, log_z)
        assert diagnostics.ess(again.log_weights)[0] > 1200


def test_a_class_of_guides_is_made_for_each_chain():
    """Two chains start differently, and leave no parameters in Pyro's store to a guide of another program."""
    mean, covariance, log_z = truth()
    settings = {"num_steps": 100, "num_samples": 2000, "seed": 0, "progress": False}
    svi = SVI(num_chains=2, optimizer=Adam(latent_learning_rate=0.1), guide=FULL, **settings)
    posterior = svi.run(MODEL, DATA)
    assert_moments(posterior, posterior.samples["weights"], mean, covariance)
    assert posterior.stats["elbo"].shape == (2, 100, 1)
    assert (posterior.stats["elbo"][0, -1] != posterior.stats["elbo"][1, -1]).all()
    assert log_z - posterior.log_weights.mean() < 0.15
    assert not list(pyro.get_param_store())
    one = BradleyTerry(lambda p, c: counts(p, c)[:, :1])
    assert dataclasses.replace(svi, num_steps=2).run(one, DATA).samples["weights"].shape == (2, 2000, 1)
    with pytest.raises(ValueError, match="a class of guides, a LanguageModel, or none"):
        SVI(num_chains=2, guide=FULL(MODEL))


def test_a_class_of_guides_resumes_from_a_checkpoint(tmp_path: Any):
    """A training that was stopped after 20 of 40 steps resumes bit-identically."""
    settings = {
        "num_steps": 40,
        "num_samples": 10,
        "seed": 0,
        "progress": False,
        "guide": autoguide.AutoMultivariateNormal,
    }
    complete = SVI(**settings).run(MODEL, DATA)
    with pytest.raises(Killed):
        SVI(**settings, checkpoint=Checkpointing(tmp_path, every=10), callbacks=[killer(20)]).run(MODEL, DATA)
    resumed = SVI(**settings, checkpoint=Checkpointing(tmp_path, every=10)).run(MODEL, DATA)
    np.testing.assert_array_equal(resumed.samples["weights"], complete.samples["weights"])
    with pytest.raises(
        ValueError, match="is the class AutoMultivariateNormal, not an instance: make one, and train it"
    ):
        ImportanceSampling(guide=FULL)


# -- posterior predictive checks, ArviZ ------------------------------------------------------------------------


def test_predicted_comparisons():
    posterior = ImportanceSampling(num_particles=20_000, seed=0, progress=False).run(MODEL, DATA)
    checked = predict(posterior, MODEL, DATA, seed=0)
    drawn, log_p = checked.predictive["preferred"], checked.pointwise["preferred"]
    assert drawn.shape == log_p.shape == (1, 20_000, len(DATA))
    assert set(np.unique(drawn)) == {0.0, 1.0}
    np.testing.assert_allclose(log_p.sum(-1, keepdims=True), checked.log_likelihood["preferred"], atol=1e-4)
    odds = log_odds(checked.samples["weights"])
    np.testing.assert_allclose(log_p, torch.nn.functional.logsigmoid(odds), atol=1e-5)
    z = (drawn - np.exp(log_p)).mean((0, 1)) / np.sqrt((np.exp(log_p) * (1 - np.exp(log_p))).mean((0, 1)) / 20_000)
    assert (np.abs(z) < LIMIT).all(), z
    held_out = Comparisons([""] * 2, ["banana", "quiz"], ["bb", "cab"])
    other = predict(posterior, MODEL, held_out, num_draws=50, seed=0)
    assert other.pointwise["preferred"].shape == other.predictive["preferred"].shape == (1, 50, 2)
    assert other.observed["preferred"].shape == (2,)
    with pytest.raises(ProgramError, match="has no 'weights' of shape"):
        predict(posterior, BradleyTerry(lambda p, c: counts(p, c)[:, :1]), DATA)


def test_arviz_compares_models():
    """Pareto-smoothed leave-one-out cross-validation agrees with exact leave-one-out by quadrature."""
    posterior = ImportanceSampling(num_particles=20_000, seed=0, progress=False).run(MODEL, DATA)
    found = az.loo(predict(posterior, MODEL, DATA, seed=0).to_arviz(), var_name="preferred", pointwise=True)
    x = (counts([], DATA.chosen) - counts([], DATA.rejected)).double()
    expected = []
    for i in range(len(DATA)):
        rest = x[[j for j in range(len(DATA)) if j != i]]
        without = quadrature(lambda w, rest=rest: torch.nn.functional.logsigmoid(w @ rest.T).sum(-1), 1.0)[2]
        expected.append(truth()[2] - without)
    np.testing.assert_allclose(found.loo_i, expected, atol=0.03)


def test_arviz_and_saved_folders_have_pointwise_log_likelihoods(tmp_path: Any):
    posterior = ImportanceSampling(num_particles=50, seed=0, progress=False).run(MODEL, DATA)
    resampled = posterior.to_arviz()  # pointwise terms are resampled with their draws
    odds = log_odds(resampled.posterior["weights"].to_numpy())
    np.testing.assert_allclose(
        resampled.log_likelihood["preferred"], torch.nn.functional.logsigmoid(odds), rtol=1e-4, atol=1e-5
    )
    checked = predict(posterior, MODEL, DATA, seed=0)
    idata = checked.to_arviz()
    for group in ("log_likelihood", "posterior_predictive"):
        assert idata[group]["preferred"].dims == ("chain", "draw", "comparisons")
    assert idata["observed_data"]["preferred"].dims == ("comparisons",)
    loaded = Posterior.load(checked.save(tmp_path / "kept"))
    np.testing.assert_array_equal(loaded.pointwise["preferred"], checked.pointwise["preferred"])
    np.testing.assert_array_equal(loaded.predictive["preferred"], checked.predictive["preferred"])


# -- simulation-based calibration ------------------------------------------------------------------------------


class Replications(BradleyTerry):
    """Many data sets with weights of their own, inferred in one run of NUTS."""

    def __init__(self, features: Any, number: int) -> None:
        super().__init__(features)
        self.number = number

    def prepare(self, data: Comparisons) -> Tensor:
        return super().prepare(data).unflatten(0, (self.number, -1))

    def observe(self, prepared: Tensor) -> None:
        with pyro.plate("replications", self.number, dim=-2):
            super().observe(prepared)


def simulate(replications: int, pairs: int, seed: int) -> tuple[Tensor, Comparisons, Callable[..., Tensor]]:
    """Return weights from the prior (replication, 2), comparisons of random texts under them, and their features."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn((replications, 2), generator=generator) / math.sqrt(2)
    x = 1.5 * torch.randn((replications, pairs, 2, 2), generator=generator)  # two texts a pair, two features
    rewards = (x * weights[:, None, None]).sum(-1)
    first = torch.rand((replications, pairs), generator=generator) < torch.sigmoid(rewards[..., 0] - rewards[..., 1])
    x, first = x.reshape(-1, 2, 2), first.flatten().int().tolist()
    names = [[f"{i} {1 - chosen}", f"{i} {chosen}"] for i, chosen in enumerate(first)]

    def features(prompts: list[str], completions: list[str]) -> Tensor:
        return torch.stack([x[int(i), int(j)] for i, j in map(str.split, completions)])

    return weights, Comparisons([""] * len(x), *map(list, zip(*names, strict=True))), features


def assert_calibrated(draws: Tensor, true: Tensor, differences: Tensor) -> None:
    """Assert that true values have uniform ranks among draws (draw, replication, 2): false alarm 4 in 10,000.

    The values are both weights, their product, and the log-likelihood, which detects unused data (Modrak et al.
    2023).

    :param differences: f(chosen) - f(rejected), (replication, pair, 2).
    """

    def quantities(w: Tensor) -> Tensor:
        log_likelihood = torch.nn.functional.logsigmoid((differences * w[..., None, :]).sum(-1)).sum(-1, keepdim=True)
        return torch.cat([w, w.prod(-1, keepdim=True), log_likelihood], -1)

    for ranks in (quantities(draws) < quantities(true)).sum(0).T:
        assert_uniform(ranks, len(draws) + 1, bins=8)


@pytest.mark.long
def test_simulation_based_calibration():
    """96 data sets at once, each with 12 comparisons."""
    weights, data, features = simulate(96, 12, seed=0)
    model = Replications(features, 96)
    nuts = NUTS(num_samples=62, warmup=60, num_chains=1, max_tree_depth=4, seed=0, progress=False)
    draws = torch.as_tensor(nuts.run(model, data).samples["weights"])[0, 1::2].squeeze(-2)  # (31, replication, 2)
    assert_calibrated(draws, weights, model.prepare(data))


@pytest.mark.long
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_simulation_based_calibration_of_single_runs(seed: int):
    """200 runs of NUTS on `BradleyTerry` itself."""
    weights, data, features = simulate(200, 12, seed)
    model = BradleyTerry(features)
    nuts = NUTS(num_samples=126, warmup=100, num_chains=1, seed=seed, progress=False)
    each = [data.take(range(12 * i, 12 * (i + 1))) for i in range(200)]
    draws = [torch.as_tensor(nuts.run(model, one).samples["weights"])[0, 2::4] for one in each]  # (31, 2)
    assert_calibrated(torch.stack(draws, 1), weights, torch.stack([model.prepare(one) for one in each]))


# -- rankings --------------------------------------------------------------------------------------------------


def test_rankings_are_a_distribution():
    """Probabilities of all permutations sum to 1, draws have these probabilities, and padding comes last."""
    scores = torch.tensor([[0.3, -1.0, 2.0, 0.5], [1.0, 0.0, ABSENT, ABSENT]])
    permutations = torch.tensor(list(itertools.permutations(range(4))))
    log_p = RankingDistribution(scores).log_prob(permutations[:, None])  # (24, 2)
    torch.testing.assert_close(log_p[:, 0].logsumexp(0), torch.tensor(0.0), atol=1e-6, rtol=0)
    two = [permutations.tolist().index(order) for order in ([0, 1, 2, 3], [1, 0, 2, 3])]
    torch.testing.assert_close(log_p[two, 1], torch.nn.functional.logsigmoid(torch.tensor([1.0, -1.0])))
    draws = RankingDistribution(scores).sample((20_000,))
    codes = (permutations * 4 ** torch.arange(4)).sum(-1)
    drawn = (draws[:, 0] * 4 ** torch.arange(4)).sum(-1)
    assert_drawn_from((drawn[:, None] == codes).sum(0), log_p[:, 0])
    assert (draws[:, 1, 2:] == torch.tensor([2, 3])).all()
    assert RankingDistribution(scores).expand((3, 2)).sample().shape == (3, 2, 4)


def test_rankings_of_two_are_comparisons():
    ranked = Rankings(DATA.prompts, [list(pair) for pair in zip(DATA.chosen, DATA.rejected, strict=True)])
    one = ImportanceSampling(num_particles=100, seed=3, progress=False).run(MODEL, DATA)
    other = ImportanceSampling(num_particles=100, seed=3, progress=False).run(PlackettLuce(counts, scale=1.0), ranked)
    np.testing.assert_array_equal(one.samples["weights"], other.samples["weights"])
    np.testing.assert_allclose(one.pointwise["preferred"], other.pointwise["ranking"], atol=1e-5)


def test_rankings_of_different_lengths_against_quadrature():
    rows = [[WORDS[i] for i in row] for row in [(2, 0, 1, 5), (6, 3), (0, 4, 7), (3, 1, 5, 7), (2, 6)]]
    model = PlackettLuce(counts, scale=1.0)
    data = Rankings([""] * len(rows), rows)

    def by_hand(w: Tensor) -> Tensor:
        total = torch.zeros(len(w), dtype=w.dtype)
        for row in rows:
            rewards = w @ counts([], row).to(w).T
            for j in range(len(row) - 1):
                total = total + rewards[:, j] - rewards[:, j:].logsumexp(-1)
        return total

    mean, covariance, log_z = quadrature(by_hand, 1.0)
    posterior = ImportanceSampling(num_particles=20_000, seed=0, progress=False).run(model, data)
    assert_moments(posterior, posterior.samples["weights"], mean, covariance)
    assert_evidence(posterior, log_z)
    chain = NUTS(num_samples=100, num_chains=1, warmup=60, max_tree_depth=4, seed=0, progress=False).run(model, data)
    assert_moments(chain, chain.samples["weights"], mean, covariance)
    drawn = predict(posterior, model, data, num_draws=20, seed=0).predictive["ranking"]
    assert drawn.shape == (1, 20, 5, 4)
    assert (np.sort(drawn, -1) == np.arange(4)).all()
    assert (drawn[:, :, 1, 2:] == [2, 3]).all()  # two items were ranked: padding comes last in every draw


# -- errors -------------------------------------------------------------------------------------------


def test_bad_features_and_scales():
    with pytest.raises(ValueError, match="scale must be positive"):
        BradleyTerry(counts, scale=0.0)
    for features, says in [
        (lambda p, c: [1.0] * len(c), "must be a tensor .20, d., one row a completion, got list"),
        (lambda p, c: torch.ones(len(c)), "got .20,."),
        (lambda p, c: torch.ones(3, 2), "got .3, 2."),
        (lambda p, c: torch.full((len(c), 1), torch.nan), "features of 'aaa' are not finite"),
    ]:
        with pytest.raises(ValueError, match=says):
            ImportanceSampling(num_particles=2).run(BradleyTerry(features), DATA)


@pytest.mark.parametrize("probability", [float("nan"), -1, 1.5, "0.5", None, True])
def test_probabilities_of_questions_are_probabilities(probability):
    with pytest.raises((TypeError, ValueError), match=r"Question: probability must be .*, got"):
        Question("p", "a", "b", probability)
