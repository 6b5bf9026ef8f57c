r"""Ratings against the closed form (Gaussian, a conjugate model) and quadrature (ordinal).

Means by sampling are compared within 4 standard errors by effective sample size: each comparison fails by chance once
in 16,000.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from pyro.infer.autoguide import AutoLaplaceApproximation, AutoMultivariateNormal
from scipy import special, stats
from support.statistics import assert_estimate, assert_evidence, assert_moments
from torch import Tensor

from bayeslm import Posterior, diagnostics
from bayeslm.inference import NUTS, SVI, ImportanceSampling, predict
from bayeslm.inference.training import Adam
from bayeslm.models.preferences import GaussianRatings, OrdinalRatings, PreferenceError, Ratings
from bayeslm.models.preferences.ratings import log_level_probs

WORDS = ["aaa", "b", "banana", "cab", "zebra", "quiz", "aardvark", "bb"]
DATA = Ratings([""] * 8, WORDS, [3.0, 2.0, 5.0, 4.0, 2.0, 1.0, 4.0, 2.0])
NOISE, LEVEL, SCALE = 0.8, 3.0, 1.5


def counts(prompts: list[str], completions: list[str]) -> Tensor:
    """Return two features of each word."""
    return torch.tensor([[c.count("a") - 1.0, len(c) / 2.0 - 2.0] for c in completions])


GAUSSIAN = GaussianRatings(counts, SCALE, noise=NOISE, level_scale=LEVEL)


def closed_form() -> tuple[np.ndarray, np.ndarray, float]:
    """Return mean (3,) and covariance (3, 3) of weights and level, and log Z, by Bayesian linear regression."""
    x = np.column_stack([counts([], WORDS).numpy(), np.ones(8)])
    y, prior = np.array(DATA.ratings), np.diag([SCALE**2 / 2, SCALE**2 / 2, LEVEL**2])
    covariance = np.linalg.inv(x.T @ x / NOISE**2 + np.linalg.inv(prior))
    log_z = stats.multivariate_normal(np.zeros(8), x @ prior @ x.T + NOISE**2 * np.eye(8)).logpdf(y)
    return covariance @ x.T @ y / NOISE**2, covariance, float(log_z)


def assert_closed_form(posterior: Posterior) -> None:
    theta = np.concatenate([posterior.samples["weights"], posterior.samples["level"][..., None]], -1)
    assert_moments(posterior, theta, *closed_form()[:2])


@pytest.mark.long
@pytest.mark.parametrize("seed", [0, 1])
def test_nuts_agrees_with_the_closed_form(seed: int):
    assert_closed_form(NUTS(num_samples=75, warmup=60, num_chains=2, seed=seed, progress=False).run(GAUSSIAN, DATA))


@pytest.mark.parametrize(
    "guide", [AutoMultivariateNormal, pytest.param(AutoLaplaceApproximation, marks=pytest.mark.long)]
)
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.long)])
def test_svi_agrees_with_the_closed_form(guide: type, seed: int):
    """The posterior is normal, so that both guides can represent it, and their unweighted draws are exact too."""
    guide = guide(GAUSSIAN)
    svi = SVI(
        num_steps=200, optimizer=Adam(0.1, clip_norm=None), num_samples=3000, seed=seed, progress=False, guide=guide
    )
    posterior = svi.run(GAUSSIAN, DATA)
    mean, covariance, log_z = closed_form()
    assert_closed_form(posterior)
    assert_estimate(posterior.log_evidence, posterior.log_evidence_stderr, log_z, rounding=1e-3)
    assert log_z - posterior.log_weights.mean() < 0.02  # KL(q || posterior)
    assert_closed_form(
        ImportanceSampling(num_particles=3000, guide=guide, seed=seed, progress=False).run(GAUSSIAN, DATA)
    )
    draws = np.concatenate([posterior.samples["weights"][0], posterior.samples["level"][0, :, None]], -1)
    np.testing.assert_allclose(draws.mean(0), mean, atol=0.15 * math.sqrt(covariance.max()))


def test_predicted_ratings():
    """They have the exact posterior predictive distribution, Normal(x m, x V x^T + noise^2)."""
    posterior = ImportanceSampling(num_particles=40_000, seed=0, progress=False).run(GAUSSIAN, DATA)
    assert_closed_form(posterior)
    assert_evidence(posterior, closed_form()[2])
    checked = predict(posterior, GAUSSIAN, DATA, seed=1)
    drawn = checked.predictive["rating"][0]
    mean, covariance, _ = closed_form()
    x = np.column_stack([counts([], WORDS).numpy(), np.ones(8)])
    variance = np.einsum("ni,ij,nj->n", x, covariance, x) + NOISE**2
    n = float(diagnostics.ess(posterior.log_weights)[0])
    assert_estimate(drawn.mean(0), np.sqrt(variance / n), x @ mean)
    assert_estimate(drawn.var(0) / variance, np.sqrt(2 / n), 1.0)
    assert checked.pointwise["rating"].shape == (1, 40_000, 8)


def test_an_unknown_noise_is_inferred():
    """Checked by quadrature over the noise: conditional on it, log Z is that of the conjugate model."""
    posterior = ImportanceSampling(num_particles=40_000, seed=0, progress=False).run(
        GaussianRatings(counts, SCALE, level_scale=LEVEL), DATA
    )
    x = np.column_stack([counts([], WORDS).numpy(), np.ones(8)])
    prior = np.diag([SCALE**2 / 2, SCALE**2 / 2, LEVEL**2])
    grid = np.linspace(0.02, 6, 600)
    log_p = [
        stats.multivariate_normal(np.zeros(8), x @ prior @ x.T + s**2 * np.eye(8)).logpdf(DATA.ratings) for s in grid
    ]
    log_p = np.array(log_p) + stats.halfnorm.logpdf(grid)
    mass = np.exp(log_p - special.logsumexp(log_p))
    found, stderr = diagnostics.expectation(posterior, posterior.samples["noise"][..., None])
    assert_estimate(found[0], stderr[0], mass @ grid)
    assert stderr[0] < 0.1
    log_z = special.logsumexp(log_p) + np.log(grid[1] - grid[0])
    assert_evidence(posterior, log_z)


# -- ordered levels --------------------------------------------------------------------------------------------

CDF = {"logit": special.expit, "probit": special.ndtr}


@pytest.mark.parametrize("link", CDF)
def test_probabilities_of_levels(link: str):
    """They are differences of F near the middle, and accurate where such differences underflow in float32."""
    rewards, cutpoints = np.linspace(-4, 4, 9), np.array([-1.0, 0.2, 2.0])
    cdf = CDF[link](cutpoints - rewards[:, None])
    edges = np.column_stack([np.zeros(9), cdf, np.ones(9)])
    found = log_level_probs(torch.tensor(rewards).float(), torch.tensor(cutpoints).float(), link)
    np.testing.assert_allclose(found, np.log(np.diff(edges)), rtol=1e-4, atol=1e-4)
    far = torch.tensor([-30.0, 30.0], requires_grad=True)
    log_p = log_level_probs(far, torch.tensor([-1.0, 0.2, 2.0]), link)
    (slope,) = torch.autograd.grad(log_p[:, 1].sum(), far)
    assert log_p.isfinite().all()
    assert slope.isfinite().all()
    assert (slope.sign() == torch.tensor([1.0, -1.0])).all()  # towards the observed level
    if link == "logit":  # log(F(0.2 - r) - F(-1 - r)) -> log(e^{0.2} - e^{-1}) - r far above, and likewise below
        expected = [math.log(math.exp(1.0) - math.exp(-0.2)) - 30.0, math.log(math.exp(0.2) - math.exp(-1.0)) - 30.0]
        np.testing.assert_allclose(log_p[:, 1].detach(), expected, rtol=1e-5)


@pytest.mark.parametrize("link", [pytest.param(x, marks=[pytest.mark.long] * (x == "logit")) for x in CDF])
def test_ordinal_against_quadrature(link: str):
    """Quadrature for one weight and three levels, over the weight and the simplex of shares."""

    def one(prompts: list[str], completions: list[str]) -> Tensor:
        return counts(prompts, completions)[:, :1]

    data = Ratings([""] * 8, WORDS, [2.0, 1.0, 3.0, 2.0, 1.0, 1.0, 3.0, 2.0])
    model = OrdinalRatings(one, (1, 2, 3), link=link)
    w = np.linspace(-5, 5, 81)
    edges = np.linspace(0, 1, 61)
    middle = (edges[1:] + edges[:-1]) / 2
    p1, p2 = np.meshgrid(middle, middle, indexing="ij")
    inside = p1 + p2 < 1
    p1, p2 = p1[inside], p2[inside]
    inverse = special.logit if link == "logit" else special.ndtri
    cutpoints = np.stack([inverse(p1), inverse(p1 + p2)], -1)  # (grid, 2)
    log_p = np.zeros((len(w), len(p1)))
    for x, rating in zip(one([], WORDS).numpy()[:, 0], data.ratings, strict=True):
        cdf = CDF[link](cutpoints[None] - (w * x)[:, None, None])
        edges_of = np.concatenate([np.zeros_like(cdf[..., :1]), cdf, np.ones_like(cdf[..., :1])], -1)
        with np.errstate(divide="ignore"):  # cells of probability 0
            log_p += np.log(np.diff(edges_of, axis=-1)[..., int(rating) - 1])
    log_p += stats.norm.logpdf(w)[:, None]
    mass = np.exp(log_p - special.logsumexp(log_p))
    expected = [(mass.sum(1) * w).sum(), (mass.sum(1) * w**2).sum(), (mass.sum(0) * p1).sum(), (mass.sum(0) * p2).sum()]
    nuts = NUTS(num_samples=60, warmup=50, num_chains=1, max_tree_depth=3, seed=0, progress=False)
    for posterior in (
        ImportanceSampling(num_particles=30_000, seed=0, progress=False).run(model, data),
        nuts.run(model, data),
    ):
        weights, shares = posterior.samples["weights"], posterior.samples["shares"]
        found, stderr = diagnostics.expectation(posterior, np.concatenate([weights, weights**2, shares[..., :2]], -1))
        assert_estimate(found, stderr, expected, rounding=0.003)
        np.testing.assert_allclose(
            CDF[link](posterior.samples["cutpoints"]), np.cumsum(shares, -1)[..., :2], rtol=1e-3, atol=1e-4
        )
    drawn = predict(posterior, model, data, seed=0).predictive["rating"]
    assert drawn.shape == (1, 60, 8)
    assert set(np.unique(drawn)) == {0, 1, 2}


def test_invalid_ratings_and_settings_are_refused():
    with pytest.raises(
        PreferenceError, match=r"row 2 has the rating 5, which is none of the levels \[1.0, 2.0, 3.0, 4"
    ):
        ImportanceSampling().run(OrdinalRatings(counts, range(1, 5)), DATA)
    for levels in ([1], [2, 1], [1, 1, 2]):
        with pytest.raises(ValueError, match="two or more different numbers"):
            OrdinalRatings(counts, levels)
    with pytest.raises(ValueError, match="link must be"):
        OrdinalRatings(counts, [1, 2], link="cauchit")
    with pytest.raises(ValueError, match="noise must be positive"):
        GaussianRatings(counts, noise=0.0)
