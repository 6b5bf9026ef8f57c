"""Unknown worlds: closed forms against Bayes' rule, and the same posterior inferred by engines."""

from __future__ import annotations

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from support.statistics import assert_estimate, assert_evidence, assert_mean

from bayeslm import diagnostics
from bayeslm.inference import NUTS, SVI, ImportanceSampling
from bayeslm.inference.training import Adam
from bayeslm.models.control import Dirichlet, Experience, NormalGamma, UnknownMDP, Worlds

REWARD = (0.3, 1.5, 3.0, 2.0)


def draws(*shape: int) -> torch.Tensor:
    return torch.rand(shape, dtype=torch.float64) + 0.5


def log_normal_gamma(distribution: NormalGamma, mean: torch.Tensor, precision: torch.Tensor) -> torch.Tensor:
    m, k, a, b = distribution.parameters
    return dist.Gamma(a, b).log_prob(precision) + dist.Normal(m, (k * precision).rsqrt()).log_prob(mean)


def log_evidence_of_rewards(prior: NormalGamma, posterior: NormalGamma, rewards: torch.Tensor) -> torch.Tensor:
    """Return log prior + log-likelihood - log posterior at 50 points, which by Bayes' rule are equal."""
    mean, precision = torch.randn(50, dtype=torch.float64), draws(50)
    like = dist.Normal(mean[:, None], precision[:, None].rsqrt()).log_prob(rewards).sum(-1)
    return log_normal_gamma(prior, mean, precision) + like - log_normal_gamma(posterior, mean, precision)


def test_normal_gamma_is_bayes_rule():
    for n in (0, 1, 7):
        rewards = 3 * torch.randn(n, dtype=torch.float64) - 1
        prior = NormalGamma(*(draws() for _ in range(4)))
        posterior = prior.update(torch.tensor(float(n)), rewards.sum(), (rewards**2).sum())
        constant = log_evidence_of_rewards(prior, posterior, rewards)
        torch.testing.assert_close(constant, constant[:1].expand(50), atol=1e-9, rtol=0)


def test_dirichlet_is_bayes_rule():
    prior, observed = Dirichlet(draws(4)), torch.tensor([2, 0, 5, 1])
    posterior = prior.update(observed)
    p = dist.Dirichlet(torch.ones(4, dtype=torch.float64)).sample((50,))
    prior_term = dist.Dirichlet(prior.concentration).log_prob(p)
    constant = prior_term + (observed * p.log()).sum(-1) - dist.Dirichlet(posterior.concentration).log_prob(p)
    torch.testing.assert_close(constant, constant[:1].expand(50), atol=1e-9, rtol=0)


@pytest.mark.parametrize("seed", range(3))
def test_draws_have_the_exact_moments(seed):
    torch.manual_seed(seed)
    c = draws(2, 3)
    p, total = Dirichlet(c).sample((20_000,)), c.sum(-1, keepdim=True)
    assert_mean(p, c / total)
    assert_mean(p**2, c * (c + 1) / total / (total + 1))
    m, k, a, b = torch.randn(2, dtype=torch.float64), draws(2), 3 + draws(2), draws(2)
    mean, precision = NormalGamma(m, k, a, b).sample((20_000,))
    assert_mean(precision, a / b)
    assert_mean(mean, m)
    assert_mean((mean - m) ** 2, b / (k * (a - 1)))
    assert_mean(precision * (mean - m) ** 2, 1 / k)  # the mean varies less where the precision is higher


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_small_concentrations_are_drawn_exactly(dtype):
    """Nearly all of the probability is that of one category; gamma variates underflow to 0."""
    torch.manual_seed(0)
    for c in (torch.full((4,), 2.5e-4, dtype=dtype), torch.tensor([3e-4, 1e-4], dtype=dtype)):
        p, total = Dirichlet(c).sample((20_000,)), c.sum()
        assert p.dtype == dtype
        assert_mean(p, c / total)
        assert_mean(p**2, c * (c + 1) / total / (total + 1))
        assert (p.amax(-1) > 0.99).double().mean() > 0.99


def episode() -> Experience:
    """Return two runs in 3 states with 2 actions; the second ends early and is padded."""
    return Experience(
        states=torch.tensor([[0, 1, 1, 0], [0, 1, 2, 2]]),
        actions=torch.tensor([[1, 0, 0, 1], [1, 1, 0, 0]]),
        rewards=torch.tensor([[0.5, 1.0, -2.0, 1.5], [0.25, 4.0, 99.0, 99.0]], dtype=torch.float64),
        next_states=torch.tensor([[1, 1, 0, 1], [1, 2, 2, 2]]),
        terminated=torch.tensor([[False] * 4, [False, True, True, False]]),
        valid=torch.tensor([[True] * 4, [True, True, False, False]]),
    )


def test_an_update_counts_transitions():
    prior = Worlds.prior(3, 2, concentration=0.5, reward=REWARD)
    belief = prior.expand(2).update(episode())
    counts = torch.zeros(2, 3, 2, 3, dtype=torch.float64)
    counts[0, 0, 1, 1], counts[0, 1, 0, 1], counts[0, 1, 0, 0] = 2, 1, 1
    counts[1, 0, 1, 1] = counts[1, 1, 1, 2] = 1
    torch.testing.assert_close(belief.transitions.concentration, 0.5 + counts)
    assert belief.terminal.tolist() == [[False] * 3, [False, False, True]]
    torch.testing.assert_close(belief.initial.concentration[:, 0], torch.full((2,), 4 / 3, dtype=torch.float64))
    for run, s, a, rewards in ((0, 0, 1, [0.5, 1.5]), (0, 1, 0, [1.0, -2.0]), (1, 1, 1, [4.0]), (1, 2, 0, [])):
        observed = torch.tensor(rewards, dtype=torch.float64)
        one = NormalGamma(*torch.tensor(REWARD, dtype=torch.float64))
        one = one.update(torch.tensor(float(len(observed))), observed.sum(), (observed**2).sum())
        for mine, expected in zip(belief.rewards.parameters, one.parameters, strict=True):
            torch.testing.assert_close(mine[run, s, a], expected)
    assert episode().returns.tolist() == [1.0, 4.25]
    again = belief.update(episode())  # a posterior is the next prior
    torch.testing.assert_close(again.transitions.concentration, 0.5 + 2 * counts)


def test_drawn_worlds_have_the_mean_world():
    belief = Worlds.prior(3, 2, concentration=0.5, reward=REWARD).expand(2).update(episode())
    worlds, mean = belief.sample((5_000,)), belief.mean
    assert worlds.transitions.shape == (5_000, 2, 3, 2, 3)
    live = ~belief.terminal
    assert_mean(worlds.transitions[:, live], mean.transitions[live])
    assert_mean(worlds.expected_rewards[:, live], mean.expected_rewards[live])
    assert_mean(worlds.initial, mean.initial)
    assert (worlds.transitions[:, 1, 2, :, 2] == 1).all()  # a terminal state is absorbing
    assert (worlds.expected_rewards[:, 1, 2] == 0).all()


def problem(seed: int) -> tuple[Worlds, Experience, Worlds]:
    """Return a prior of 2 states and 2 actions, 40 steps, and the posterior in closed form."""
    generator = torch.Generator().manual_seed(seed)
    walk = torch.randint(2, (41,), generator=generator)
    steps = Experience(
        states=walk[:-1],
        actions=torch.randint(2, (40,), generator=generator),
        rewards=torch.randn(40, generator=generator, dtype=torch.float64) + walk[:-1],
        next_states=walk[1:],
        terminated=torch.zeros(40, dtype=torch.bool),
        valid=torch.arange(40) < 30,
    )
    prior = Worlds.prior(2, 2, concentration=0.8, reward=REWARD)
    return prior, steps, prior.update(steps)


def moments(belief: Worlds) -> dict[str, np.ndarray]:
    """Return first and second moments of the posterior of `UnknownMDP`, (pair,)."""
    c = belief.transitions.concentration.flatten(0, 1)
    total = c.sum(-1)
    m, k, a, b = (x.flatten() for x in belief.rewards.parameters)
    of = {
        "p": c[:, 0] / total,
        "p^2": c[:, 0] * (c[:, 0] + 1) / total / (total + 1),
        "mean": m,
        "precision (mean - m)^2": 1 / k,  # mean^2 is too heavy-tailed for a normal guide
        "precision": a / b,
        "precision^2": a * (a + 1) / b**2,
    }
    return {name: x.numpy() for name, x in of.items()}


def assert_closed_form(posterior, belief: Worlds) -> None:
    s = posterior.samples
    p, mean, precision = s["transitions"][..., 0], s["reward"], s["precision"]
    spread = precision * (mean - belief.rewards.location.flatten().numpy()) ** 2
    values = {"p": p, "p^2": p**2, "mean": mean, "precision (mean - m)^2": spread}
    values |= {"precision": precision, "precision^2": precision**2}
    for name, expected in moments(belief).items():
        for pair in range(4):
            estimate, stderr = diagnostics.expectation(posterior, values[name][..., pair, None])
            assert_estimate(estimate[0], stderr[0], expected[pair])
            assert stderr[0] < 0.35 * values[name][..., pair].std(), (name, pair, "too few draws to tell anything")


@pytest.mark.long
@pytest.mark.parametrize("seed", range(3))
def test_nuts_agrees_with_the_closed_form(seed):
    prior, steps, belief = problem(seed)
    nuts = NUTS(num_samples=100, warmup=40, num_chains=1, max_tree_depth=4, seed=seed, progress=False)
    assert_closed_form(nuts.run(UnknownMDP(prior), steps), belief)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.long) for seed in (1, 2))])
def test_svi_agrees_with_the_closed_form(seed):
    """Weighted draws of an automatic guide agree, and the ELBO is below log Z by the KL of a mean-field guide."""
    prior, steps, belief = problem(seed)
    settings = {"num_steps": 160, "num_particles": 16, "num_samples": 4_000, "seed": seed, "progress": False}
    posterior = SVI(optimizer=Adam(latent_learning_rate=0.08), **settings).run(UnknownMDP(prior), steps)
    assert_closed_form(posterior, belief)
    log_z = log_evidence(prior, belief, steps)
    assert_evidence(posterior, log_z)
    assert posterior.log_evidence_stderr[0] < 0.5 / 4.5
    assert -1.0 < posterior.stats["elbo"][0, -50:].mean() - log_z < 0.05


def log_evidence(prior: Worlds, belief: Worlds, steps: Experience) -> float:
    """Return log Z in closed form: for each pair, Polya's urn of next states and `log_evidence_of_rewards`."""
    total = 0.0
    pair = (2 * steps.states + steps.actions)[steps.valid]
    before, after = (x.transitions.concentration.flatten(0, 1) for x in (prior, belief))
    for i in range(4):
        total += float(torch.lgamma(before[i].sum()) - torch.lgamma(after[i].sum()))
        total += float((torch.lgamma(after[i]) - torch.lgamma(before[i])).sum())
        distributions = [NormalGamma(*(x.flatten()[i] for x in world.rewards.parameters)) for world in (prior, belief)]
        total += float(log_evidence_of_rewards(*distributions, steps.rewards[steps.valid][pair == i])[0])
    return total


def test_importance_sampling_finds_the_evidence():
    prior, steps, belief = problem(0)
    few = Experience(*(x[:4] for x in vars(steps).values()))
    belief = prior.update(few)
    posterior = ImportanceSampling(num_particles=20_000, seed=0, progress=False).run(UnknownMDP(prior), few)
    assert_evidence(posterior, log_evidence(prior, belief, few))
    assert posterior.log_evidence_stderr[0] < 0.2 / 4.5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Worlds.prior(0, 2), "num_states must be a positive whole number"),
        (lambda: Worlds.prior(2, 2, concentration=0.0), "must be positive"),
        (lambda: Worlds.prior(2, 2, reward=(0.0, 1.0, 0.0, 1.0)), "must be positive"),
        (lambda: UnknownMDP(Worlds.prior(2, 2).expand(3)), "one world"),
    ],
)
def test_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
