"""Objectives over whole draws: each gradient against enumeration, for its claimed bias.

Tolerances are `gradients.assert_unbiased`'s.
"""

from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from safetensors.torch import load_file
from support.enumerated import BETA, PROMPTS, Problem, T, kl_to
from support.gradients import COPIES, assert_unbiased, gradient_of, gradients, perturbed, policy_guide
from support.models import table_lm
from support.programs import rewarded
from support.statistics import assert_mean
from torch import nn

from bayeslm.inference import SVI, BestOfN, Exact, ProgramError
from bayeslm.inference.program import inspect
from bayeslm.inference.training import (
    Adam,
    Divergence,
    ExponentialAverage,
    FDivergence,
    ForwardKL,
    FromPosterior,
    LogVariance,
    Renyi,
    Replay,
    ReverseKL,
    StatefulLoss,
    alpha_divergence,
    of_prior,
)
from bayeslm.inference.training.divergences import DIVERGENCES, LogDensities
from bayeslm.inference.training.sources import of_guide


def divergence(f):
    """E_{pi*}[ f(q / pi*) ], (prompt,)."""
    return lambda small: (small.log_posterior.exp() * f((small.log_q - small.log_posterior).exp())).sum(0)


def bound_of_two(order):
    """-E[L] of the variational Renyi bound on two particles."""

    def loss(small):
        log_w = (1 - order) * (small.log_target - small.log_q)
        both = torch.logaddexp(log_w[:, None], log_w) - math.log(2.0)
        return -((small.log_q[:, None] + small.log_q).exp() * both).sum((0, 1)) / (1 - order)

    return loss


def variance_under_prior(small):
    f, share = small.log_target - small.log_q, small.log_p.exp()
    return 0.5 * ((share * f**2).sum(0) - (share * f).sum(0) ** 2)


def truncated_variance_under_prior(small):
    """The weights are powers of min(1, q / p), the power being the variance with these weights, 1 at most."""
    f, ratio = small.log_target - small.log_q, (small.log_q.detach() - small.log_p).clamp_max(0.0)

    def variance(power):
        share = (small.log_p + power * ratio).softmax(0)
        return (share * f**2).sum(0) - (share * f).sum(0) ** 2

    return 0.5 * variance(variance(1.0).detach().clamp_max(1.0))


UNBIASED = {
    "leave-one-out": (lambda z: ReverseKL(4), Problem.reverse_kl),
    "average": (lambda z: ReverseKL(4, ExponentialAverage()), Problem.reverse_kl),
    "stock Trace_ELBO": (lambda z: Trace_ELBO(16, vectorize_particles=True), Problem.reverse_kl),
    "log-variance": (lambda z: LogVariance(4), Problem.reverse_kl),
    "log-variance, prior's draws": (lambda z: LogVariance(4, of_prior), variance_under_prior),
    "reverse KL as an f-divergence": (lambda z: FDivergence("reverse-kl", 4, log_evidence=z), Problem.reverse_kl),
    "forward KL as an f-divergence": (
        lambda z: FDivergence("forward-kl", 4, log_evidence=z),
        divergence(lambda t: -t.log()),
    ),
    "Jensen-Shannon": (
        lambda z: FDivergence(num_particles=4, log_evidence=z),
        divergence(lambda t: 0.5 * (t * t.log() - (1 + t) * ((1 + t) / 2).log())),
    ),
    "total variation": (
        lambda z: FDivergence("total-variation", 4, log_evidence=z),
        divergence(lambda t: 0.5 * (t - 1).abs()),
    ),
    "alpha 0.5": (
        lambda z: FDivergence(alpha_divergence(0.5), 4, log_evidence=z),
        divergence(lambda t: (t**0.5 - 0.5 * t - 0.5) / (0.5 * -0.5)),
    ),
    "IWELBO": (lambda z: Renyi(num_particles=2), bound_of_two(0.0)),
    "Renyi 0.5": (lambda z: Renyi(0.5, num_particles=2), bound_of_two(0.5)),
    "Renyi -1": (lambda z: Renyi(-1.0, num_particles=2), bound_of_two(-1.0)),
}


OTHERS = ("alpha 0.5", "Renyi -1")  # other settings of objectives that are there


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.long] * (name in OTHERS)) for name in UNBIASED])
@pytest.mark.parametrize("seed", [0, pytest.param(2, marks=pytest.mark.long)])
def test_gradient_is_unbiased(name, seed):
    small = Problem(seed)
    make, loss = UNBIASED[name]
    torch.manual_seed(seed)
    objective = make(small.log_z.repeat(COPIES))
    estimates = small.estimates(objective, repeats=64 if isinstance(objective, Renyi) else 32)  # which is noisier
    assert_unbiased(estimates, small.gradient(loss(small)))


@pytest.mark.parametrize("source", [of_guide, of_prior], ids=["policy", "prior"])
@pytest.mark.parametrize(
    ("make", "loss"),
    [
        (lambda n, source: ForwardKL(n, source), divergence(lambda t: -t.log())),
        pytest.param(
            lambda n, source: FDivergence("jensen-shannon", n, source),
            UNBIASED["Jensen-Shannon"][1],
            marks=pytest.mark.long,
        ),
    ],
    ids=["forward KL", "Jensen-Shannon"],
)
def test_self_normalised_gradients_are_biased_by_one_over_n(make, loss, source):
    """2 particles are visibly wrong; the bias of 4000 is a third of a standard error of 40 groups (chi^2 is 9)."""
    small = Problem(scale=0.3)
    expected = small.gradient(loss(small))
    torch.manual_seed(0)
    many = gradients(make(4000, source), small.model, small.guide, small.parameters, (PROMPTS,), repeats=40)
    assert_unbiased(COPIES * many, expected)
    few = small.estimates(make(2, source), repeats=25) @ expected
    assert abs(few.mean() - expected @ expected) > 6 * few.std() / 25**0.5


def test_log_variance_of_own_draws_is_reverse_kl_with_the_leave_one_out_baseline():
    small = Problem()
    found = []
    truncated = LogVariance(8, truncated=True)  # as q / s is 1, it does nothing
    for objective in (LogVariance(8), ReverseKL(8), FDivergence("reverse-kl", 8), truncated):
        torch.manual_seed(3)
        found.append(small.estimates(objective, repeats=2))
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(found[2], found[1])
    torch.testing.assert_close(found[3], found[1])


@pytest.mark.parametrize(
    "make",
    [LogVariance, ForwardKL, lambda n: FDivergence("reverse-kl", n), lambda n: Renyi(0.0, n)],
    ids=["log-variance", "forward KL", "f", "IWELBO"],
)
def test_at_the_posterior_gradients_vanish(make):
    """Not only on average: each estimate, since every particle then says the same."""
    lm = table_lm(order=2, seed=3, vocab=4)
    policy = perturbed(lm, scale=1.0)  # the reward is its log q - log p, so that it is the posterior

    def model(prompts):
        with pyro.plate("prompts", len(prompts)):
            prior = lm(prompts, max_new_tokens=T)
            x = pyro.sample("completion", prior)
            with torch.no_grad():
                reward = policy(prompts, max_new_tokens=T).log_prob(x) - prior.log_prob(x)
            pyro.factor("reward", reward + 2.0)

    parameters = list(policy.network.parameters())
    estimates = gradients(make(16), model, policy_guide(policy, T), parameters, (PROMPTS,), repeats=3)
    assert estimates.abs().max() < 1e-5


def test_values_of_the_losses():
    """What `pyro.infer.SVI.step` returns: of 20,000 particles 2,000 are effective, and standard errors 0.02."""
    small = Problem(scale=0.3)
    exact = {
        LogVariance(20_000): reverse_kl_variance(small),
        LogVariance(20_000, of_prior, truncated=True): truncated_variance_under_prior(small),
        ForwardKL(20_000): divergence(lambda t: -t.log())(small),
        Renyi(0.0, 20_000): -small.log_z,
        FDivergence("reverse-kl", 20_000): small.reverse_kl(),
        FDivergence("jensen-shannon", 20_000, of_prior): UNBIASED["Jensen-Shannon"][1](small),
    }
    for objective, expected in exact.items():
        torch.manual_seed(0)
        found = float(objective(small.model, small.guide, PROMPTS))
        assert found == pytest.approx(float(expected.detach().sum()), abs=0.08), type(objective).__name__


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.long) for seed in (1, 2))])
@pytest.mark.parametrize("name", [name for name, (make, _) in UNBIASED.items() if type(make(0.0)) is FDivergence])
def test_the_value_of_an_f_divergence_is_unbiased(name, seed):
    """With log Z known, the mean of the estimates is the enumerated divergence."""
    small = Problem(seed)
    make, loss = UNBIASED[name]
    objective = make(small.log_z.repeat(COPIES))
    torch.manual_seed(seed)
    program = inspect(small.model, PROMPTS * COPIES)
    found = torch.stack([objective.step(program, small.guide).loss.detach() for _ in range(40)]) / COPIES
    assert_mean(found, loss(small).sum().detach())
    assert found.std() / 40**0.5 < 0.1 * loss(small).sum()


@pytest.mark.parametrize("name", DIVERGENCES)
def test_f_prime_and_f_are_of_one_function(name):
    """f' is the derivative of f up to a constant, which no gradient sees; f(1) = 0; where the posterior is nothing,
    the bounded ones are finite.
    """
    f_prime, f_over_t = DIVERGENCES[name]
    u = torch.linspace(-4, 4, 41, dtype=torch.float64).requires_grad_()
    (derivative,) = torch.autograd.grad((f_over_t(u) * u.exp()).sum(), u)
    difference = derivative * (-u).exp() - f_prime(u)
    keep = u.detach().abs() > 1e-6  # total variation has a corner
    torch.testing.assert_close(difference[keep], difference[keep][:1].expand(int(keep.sum())))
    assert float(f_over_t(torch.zeros(()))) == pytest.approx(0.0, abs=1e-7)
    never = torch.tensor(torch.inf)
    bounded = {"jensen-shannon": 0.5 * math.log(2.0), "total-variation": 0.5, "forward-kl": 0.0}
    if name in bounded:
        assert float(f_over_t(never)) == pytest.approx(bounded[name])
        assert math.isfinite(f_prime(never))


def reverse_kl_variance(small):
    f, share = small.log_target - small.log_q, small.log_q.exp()
    return 0.5 * ((share * f**2).sum(0) - (share * f).sum(0) ** 2)


@pytest.mark.parametrize(
    "objective",
    [ReverseKL(400), LogVariance(400), FDivergence("reverse-kl", 400)],
    ids=["reverse KL", "log-variance", "f"],
)
def test_latents_of_all_prompts(objective):
    """theta ~ N(0, 1) and mood ~ Bernoulli shared, beside completions; the ELBO is closed, and so is its gradient."""
    lm = table_lm(order=2, seed=5, vocab=4)
    policy, prompts = perturbed(lm), PROMPTS
    m, log_s, logit = (nn.Parameter(torch.tensor(v)) for v in (0.8, -0.5, 0.4))

    def c(x, mood):
        return (x == 1).sum(-1) * (0.5 + mood)

    def model(prompts):
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        mood = pyro.sample("mood", dist.Bernoulli(0.3))
        with pyro.plate("prompts", len(prompts)):
            x = pyro.sample("completion", lm(prompts, max_new_tokens=T))
            pyro.factor("reward", 0.5 * theta * c(x, mood))

    def guide(prompts):
        pyro.module("policy", policy)
        pyro.sample("theta", dist.Normal(pyro.param("m", m), pyro.param("log_s", log_s).exp()))
        pyro.sample("mood", dist.Bernoulli(logits=pyro.param("logit", logit)))
        with pyro.plate("prompts", len(prompts)):
            pyro.sample("completion", policy(prompts, max_new_tokens=T))

    q = policy(prompts, max_new_tokens=T)
    x = q.enumerate_support()
    score, log_p = q.log_prob(x), lm(prompts, max_new_tokens=T).log_prob(x)
    local = [(score.exp() * (log_p - score + 0.5 * m * c(x, mood))).sum() for mood in (0, 1)]
    kl = torch.distributions.kl_divergence(dist.Normal(m, log_s.exp()), dist.Normal(0.0, 1.0))
    kl = kl + torch.distributions.kl_divergence(dist.Bernoulli(logits=logit), dist.Bernoulli(0.3))
    on = logit.sigmoid()
    parameters = [*policy.network.parameters(), m, log_s, logit]
    expected = gradient_of(kl - ((1 - on) * local[0] + on * local[1]), parameters)
    torch.manual_seed(0)
    assert_unbiased(gradients(objective, model, guide, parameters, (prompts,)), expected)


@pytest.mark.parametrize(
    ("objective", "steps", "rate"),
    [
        (LogVariance(16), 120, 0.15),
        pytest.param(LogVariance(32, Replay(every=4)), 900, 0.05, marks=pytest.mark.long),  # a quarter have new samples
        pytest.param(LogVariance(64, of_prior), 120, 0.15, marks=pytest.mark.long),
        (ForwardKL(64), 120, 0.15),
        pytest.param(FDivergence("jensen-shannon", 64), 300, 0.05, marks=pytest.mark.long),
        (FDivergence("reverse-kl", 64, Replay(every=2)), 120, 0.15),
        pytest.param(Renyi(0.5, 4), 300, 0.05, marks=pytest.mark.long),
    ],
    ids=["log-variance", "replay", "prior", "forward KL", "Jensen-Shannon", "reverse KL, replay", "Renyi"],
)
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.long)])
def test_svi_reaches_the_posterior_by(objective, steps, rate, seed):
    """KL(q || pi*) under 0.01 nats by enumeration, from 0.5 to 2; Renyi's own gradient is noisier."""
    small = Problem(seed, order=4)
    assert (kl_to(small.lm, small) > 0.4).all()
    engine = SVI(objective=objective, num_steps=steps, optimizer=Adam(rate), num_samples=500, seed=seed, progress=False)
    reached = kl_to(engine.run(small.model, PROMPTS).policy, small)
    assert (reached < (0.05 if isinstance(objective, Renyi) else 0.01)).all()


def test_hard_constraints_are_for_those_that_stay_finite():
    lm = table_lm(order=4, seed=0, vocab=4)
    model = rewarded(lm, T, lambda x: torch.where((x == 1).any(-1), 0.0, -torch.inf))
    guide = policy_guide(perturbed(lm), T)
    for objective in (LogVariance(64), FDivergence("reverse-kl", 64), Renyi(0.0, 64)):
        with pytest.raises(ProgramError, match="ForwardKL"):
            objective(model, guide, [[1]])
    exact = Exact().run(model, [[1]])
    for objective in (ForwardKL(64), FDivergence("jensen-shannon", 64)):
        engine = SVI(objective=objective, num_steps=60, optimizer=Adam(0.1), num_samples=500, seed=0, progress=False)
        posterior = engine.run(model, [[1]])
        share = float((posterior.log_weights > -np.inf).mean())
        passed = float(np.exp(exact.log_evidence[0]))
        assert share > max(0.9, passed + 0.2)
    texts = torch.tensor(posterior.samples["completion"][0, :, 0])[posterior.log_weights[0, :, 0] > -np.inf]
    assert (texts == 1).any(-1).all()


def test_a_group_without_any_weight_teaches_nothing():
    lm = table_lm(order=2, seed=0, vocab=4)
    model = rewarded(lm, T, lambda x: torch.full(x.shape[:-1], -torch.inf))
    policy = perturbed(lm)
    for objective in (ForwardKL(8), FDivergence("jensen-shannon", 8)):
        found = gradients(objective, model, policy_guide(policy, T), list(policy.network.parameters()), (PROMPTS,), 1)
        assert (found == 0).all()


@pytest.mark.parametrize(
    "objective",
    [ReverseKL(20_000), LogVariance(20_000), LogVariance(20_000, of_prior)],
    ids=["reverse KL", "log-variance", "prior's draws"],
)
def test_figures_of_the_particles(objective):
    """The ELBO and its parts, whichever distribution the particles come from."""
    small = Problem()
    elbo = (small.log_q.exp() * (small.log_target - small.log_q)).sum(0)
    objective = StatefulLoss(objective)
    torch.manual_seed(0)
    objective.loss(small.model, small.guide, PROMPTS)
    last = objective.last.figures
    torch.testing.assert_close(last["elbo"], elbo.detach(), atol=0.06, rtol=0)
    torch.testing.assert_close(last["log_likelihood"] - last["kl"], last["elbo"])
    torch.testing.assert_close(last["reward"] / BETA, last["log_likelihood"])


def test_weights_of_other_draws_are_truncated():
    """At sqrt(n) times their mean: q / s is (9, 1, 1, 1) / 3 here, and 9 becomes 6."""
    ratio, log_q = torch.tensor([9.0, 1.0, 1.0, 1.0])[:, None] / 3, torch.zeros(4, 1, requires_grad=True)
    log_target = -torch.tensor([1.0, 2.0, 3.0, 4.0])[:, None]
    scores = LogDensities(log_q, log_target, -ratio.log(), 4)
    loss = FDivergence(Divergence(lambda u: u, lambda u: u + 1.0), 4, log_evidence=0.0).loss(scores).sum()
    loss.backward()
    weight = torch.tensor([6.0, 1.0, 1.0, 1.0]) / 3
    f = weight * -log_target[:, 0]
    others = (f.sum() - f) / 3
    torch.testing.assert_close(log_q.grad[:, 0], weight * (-log_target[:, 0] - others) / 4)
    torch.testing.assert_close(loss.detach(), (weight * (1.0 - log_target[:, 0])).mean())


@pytest.mark.parametrize(
    "objective", [LogVariance(8, Replay()), ReverseKL(2, baseline=ExponentialAverage())], ids=["replay", "average"]
)
def test_chains_learn_nothing_from_one_another(objective, tmp_path):
    """A chain is what it is without the one before. (Runs are tested in test_state.py.)"""
    small = Problem()
    settings = {"objective": objective, "num_steps": 5, "num_samples": 10, "seed": 0, "progress": False}
    alone = SVI(**settings).run(small.model, PROMPTS)
    chains = SVI(num_chains=2, checkpoint=tmp_path, **settings).run(small.model, PROMPTS)
    for name in ("elbo", "gradient_norm"):
        assert (alone.stats[name][0] == chains.stats[name][0]).all()
    if isinstance(objective, LogVariance):  # what is remembered is the second chain's alone: steps 0 and 4
        kept = load_file(tmp_path / "chain-1-step-5" / "tensors.safetensors")
        assert len(kept["objective.source.kept.log_prior"]) == 2 * 8


def test_what_is_refused():
    for make in (LogVariance, ForwardKL):
        with pytest.raises(ValueError, match="num_particles must be at least 2"):
            make(1)
    with pytest.raises(ValueError, match="jensen-shannon"):
        FDivergence("hellinger")
    with pytest.raises(ValueError, match=r"order must be a number in \(-inf, 1\)"):
        Renyi(1.0)
    with pytest.raises(ValueError, match="every"):
        Replay(every=0)
    with pytest.raises(ValueError, match="capacity"):
        Replay(capacity=0)
    small = Problem()
    best = BestOfN(n=2, num_samples=2, seed=0, progress=False).run(small.model, PROMPTS)
    with pytest.raises(ValueError, match="no known distribution"):
        FromPosterior(best)
    other = Exact().run(small.model, PROMPTS[:1])
    with pytest.raises(ProgramError, match="other prompts"):
        LogVariance(8, FromPosterior(other))(small.model, small.guide, PROMPTS)


def test_the_gradient_of_the_truncated_variance_is_that_of_its_weights():
    """Of draws of the prior; of 4000 the bias of normalised weights is small beside the error of 40 groups."""
    small = Problem(scale=0.3)
    expected = small.gradient(truncated_variance_under_prior(small))
    torch.manual_seed(0)
    objective = LogVariance(4000, of_prior, truncated=True)
    many = gradients(objective, small.model, small.guide, small.parameters, (PROMPTS,), repeats=40)
    assert_unbiased(COPIES * many, expected)
    assert (small.gradient(variance_under_prior(small)) - expected).norm() > 0.1 * expected.norm()


@pytest.mark.parametrize("size", [0.3, 3.0])
def test_near_the_posterior_all_draws_count_alike(size):
    """The power of the weights is the variance, and 1 at most."""
    x, log_q, log_s = torch.randn(3, 50, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = LogVariance(50, truncated=True).loss(LogDensities(log_q, log_q + size * x, log_s, 50))

    def variance(power):
        weights = np.minimum(1.0, np.exp((log_q - log_s).numpy())) ** power
        return float(np.cov(size * x[:, 0], aweights=weights[:, 0], ddof=0)) * 50 / 49

    power = min(1.0, variance(1.0))
    assert (power == 1.0) == (size == 3.0)
    assert float(found) == pytest.approx(0.5 * variance(power))
