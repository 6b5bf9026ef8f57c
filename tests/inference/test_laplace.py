"""Laplace's approximation against closed forms, quadrature and NUTS."""

from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy.special import gammaln, log_expit, logsumexp
from scipy.stats import multivariate_normal
from support.statistics import assert_estimate, assert_evidence

from bayeslm import diagnostics
from bayeslm.inference import NUTS, EvidenceError, ImportanceSampling, Laplace, ProgramError
from bayeslm.models.preferences import BradleyTerry, Comparisons


def expect(posterior, values):
    """The posterior mean of values (chain, draw), and its standard error."""
    mean, stderr = diagnostics.expectation(posterior, values[..., None])
    return float(np.squeeze(mean)), float(np.squeeze(stderr))


@pytest.mark.parametrize("seed", range(4))
def test_a_normal_posterior_is_exact(seed):
    """Linear regression: log Z has no error at all, since every weight is Z, and draws have the known distribution."""
    rng = np.random.default_rng(seed)
    x = torch.tensor(rng.normal(size=(8, 3)), dtype=torch.float32)
    y = torch.tensor(rng.normal(size=8), dtype=torch.float32)

    def model():
        w = pyro.sample("w", dist.Normal(0.0, 2.0).expand([3]).to_event(1))
        with pyro.plate("rows", 8):
            pyro.sample("y", dist.Normal((w @ x.T).squeeze(-2) if w.ndim > 1 else x @ w, 0.5), obs=y)

    posterior = Laplace(num_samples=4000, seed=seed).run(model)
    covariance = 4.0 * x @ x.T + 0.25 * torch.eye(8)
    log_z = multivariate_normal.logpdf(y.numpy(), np.zeros(8), covariance.numpy())
    assert posterior.log_evidence[0] == pytest.approx(log_z, abs=1e-3)
    assert np.ptp(posterior.log_weights) < 1e-2
    precision = (x.T @ x / 0.25 + torch.eye(3) / 4.0).double()
    mean = torch.linalg.solve(precision, (x.T @ y / 0.25).double()).numpy()
    distribution = torch.linalg.inv(precision).numpy()
    w = posterior.samples["w"][0]
    assert_estimate(w.mean(0), np.sqrt(np.diag(distribution) / 4000), mean)
    assert np.cov(w.T) == pytest.approx(distribution, abs=6 * distribution.max() / math.sqrt(2000))
    assert posterior.stats["steps"] <= 2


@pytest.mark.parametrize("seed", range(4))
def test_bradley_terry_against_quadrature(seed):
    """One feature, some answers: skewed, so the weights matter. Evidence and mean within their standard errors."""
    rng = np.random.default_rng(seed)
    gaps = rng.normal(0.5, 1.0, size=12).astype(np.float32)
    data = Comparisons(["p"] * 12, [str(i) for i in range(12)], [f"-{i}" for i in range(12)])

    def features(prompts, completions):
        return torch.tensor([[0.0 if c[0] == "-" else gaps[int(c)]] for c in completions])

    posterior = Laplace(num_samples=20_000, seed=seed).run(BradleyTerry(features, scale=1.5), data)
    grid = np.linspace(-40, 40, 200_001)
    log_joint = -0.5 * (grid / 1.5) ** 2 - math.log(1.5 * math.sqrt(2 * math.pi))
    log_joint = log_joint + log_expit(grid[:, None] * gaps).sum(1) + math.log(grid[1] - grid[0])
    log_z = logsumexp(log_joint)
    mean = float(np.exp(log_joint - log_z) @ grid)
    assert_evidence(posterior, log_z)
    got, stderr = expect(posterior, posterior.samples["weights"][..., 0])
    assert_estimate(got, stderr, mean)
    assert stderr < 0.05
    assert posterior.stats["khat"][0] < 0.7


def test_constrained_latents():
    """Poisson counts with a gamma rate: log Z in closed form, through the bijection and its Jacobian."""
    counts = torch.tensor([3.0, 5.0, 4.0])

    def model():
        rate = pyro.sample("rate", dist.Gamma(2.0, 0.5))
        with pyro.plate("rows", 3):
            pyro.sample("count", dist.Poisson(rate), obs=counts)

    posterior = Laplace(num_samples=4000, seed=0).run(model)
    a, b = 2.0 + 12.0, 0.5 + 3.0
    log_z = 2 * math.log(0.5) - gammaln(2.0) + gammaln(a) - a * math.log(b) - gammaln(counts.numpy() + 1).sum()
    assert_evidence(posterior, log_z)
    assert posterior.log_evidence_stderr[0] < 0.01
    got, stderr = expect(posterior, posterior.samples["rate"])
    assert_estimate(got, stderr, a / b)


def test_two_sites_in_a_plate():
    """A scale and what it scales: funnel-shaped, so the weights matter; against importance sampling from the prior."""
    y = torch.tensor([0.4, -1.0, 2.0])

    def model():
        scale = pyro.sample("scale", dist.LogNormal(0.0, 0.3))
        with pyro.plate("rows", 3):
            x = pyro.sample("x", dist.Normal(0.0, scale))
            pyro.sample("y", dist.Normal(x, 1.0), obs=y)

    laplace = Laplace(num_samples=10_000, seed=0).run(model)
    prior = ImportanceSampling(num_particles=200_000, seed=0, progress=False).run(model)
    assert laplace.samples["x"].shape == (1, 10_000, 3)
    assert laplace.dims == prior.dims
    for name, pick in (("scale", ()), ("x", (0,)), ("x", (2,))):
        (mine, stderr), (theirs, other) = (expect(p, p.samples[name][(..., *pick)]) for p in (laplace, prior))
        assert_estimate(mine, math.hypot(stderr, other), theirs)
        assert stderr < 0.03
    gap = laplace.log_evidence[0] - prior.log_evidence[0]
    assert_estimate(gap, math.hypot(laplace.log_evidence_stderr[0], prior.log_evidence_stderr[0]), 0.0)


@pytest.mark.long
def test_bradley_terry_agrees_with_nuts():
    x = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
    data = Comparisons(["p"] * 20, [str(i) for i in range(20)], [str(i) for i in range(20, 40)])
    model = BradleyTerry(lambda prompts, completions: x[[int(c) for c in completions]], scale=2.0)
    laplace = Laplace(num_samples=20_000, seed=0).run(model, data)
    nuts = NUTS(num_samples=1000, warmup=300, num_chains=2, seed=0, progress=False).run(model, data)
    for i in range(4):
        mine, stderr = expect(laplace, laplace.samples["weights"][..., i])
        theirs = nuts.samples["weights"][..., i]
        assert_estimate(mine, math.hypot(stderr, theirs.std() / math.sqrt(1000)), theirs.mean())


def test_newton_comes_back_from_afar():
    """The curvature at 0 is almost none, and a full step from there overshoots by far."""

    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1e3))
        pyro.factor("cosh", -torch.log(torch.cosh((x - 20.0) * 2.0)))

    posterior = Laplace(num_samples=100, seed=0).run(model)
    assert np.median(posterior.samples["x"]) == pytest.approx(20.0, abs=0.3)


def test_a_saddle_on_the_way_is_left():
    """Two modes with a barrier at 0, where the start is (and the slope not quite 0)."""

    def model():
        x = pyro.sample("x", dist.Normal(0.0, 10.0))
        pyro.factor("modes", torch.stack([-8.0 * (x - 2.0) ** 2, -8.0 * (x + 2.0) ** 2 - 1e-2]).logsumexp(0))

    posterior = Laplace(num_samples=200, seed=0).run(model)
    assert abs(np.abs(posterior.samples["x"]) - 2.0).max() < 1.5


def test_seeds():
    def model():
        pyro.sample("x", dist.Normal(0.0, 1.0))

    first, same, other = (Laplace(num_samples=5, seed=s).run(model).samples["x"] for s in (1, 1, 2))
    assert (first == same).all()
    assert (first != other).all()


def test_without_weights_draws_are_of_the_normal_distribution():
    """Of a gamma's logarithm: mode log(a / b), variance 1 / a; log Z is as with weights."""

    def model():
        pyro.sample("rate", dist.Gamma(4.0, 2.0))

    plain = Laplace(20_000, weighted=False, seed=0).run(model)
    weighed = Laplace(20_000, seed=0).run(model)
    assert (plain.kind, weighed.kind) == ("uncorrected", "weighted")
    assert (plain.log_weights == 0).all()
    assert plain.log_evidence == weighed.log_evidence
    assert_evidence(plain, 0.0)
    logs = np.log(plain.samples["rate"][0])
    assert_estimate(logs.mean(), 0.5 / math.sqrt(20_000), math.log(2.0))
    assert logs.var() == pytest.approx(0.25, rel=4.5 * math.sqrt(2 / 20_000))


def test_refusals():
    def flat():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.factor("takes the prior away", 0.5 * x**2)

    def kinked():
        pyro.sample("x", dist.Laplace(0.0, 1.0))

    def discrete():
        pyro.sample("x", dist.Bernoulli(0.5))

    def apart():
        with pyro.plate("prompts", 2):
            pyro.sample("x", dist.Normal(0.0, 1.0))

    def unsteady():  # the second derivative of torch.logaddexp overflows
        x = pyro.sample("x", dist.Normal(3.0, 10.0))
        pyro.factor("modes", torch.logaddexp(-80.0 * (x - 3.0) ** 2, -80.0 * (x + 3.0) ** 2))

    def impossible():
        pyro.factor("f", pyro.sample("x", dist.Normal(0.0, 1.0)) * 0 - math.inf)

    for model, says in (
        (flat, "proper prior"),
        (kinked, "proper prior"),
        (discrete, "discrete"),
        (apart, "one at a time"),
        (unsteady, "second derivative"),
    ):
        with pytest.raises(ProgramError, match=says):
            Laplace().run(model)
    with pytest.raises(EvidenceError):
        Laplace().run(impossible)
    with pytest.raises(ProgramError, match="max_steps=1"):
        Laplace(max_steps=1, tolerance=1e-12).run(lambda: pyro.sample("x", dist.Gamma(2.0, 3.0)))
    for settings in ({"num_samples": 0}, {"max_steps": 0}, {"tolerance": 0.0}):
        with pytest.raises(ValueError, match="must be"):
            Laplace(**settings)
