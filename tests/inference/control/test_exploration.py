"""Exploration: each strategy's probabilities against its formula, and Thompson's against P(action is best)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from support.statistics import assert_drawn_from

from bayeslm.inference.control import PSRL, Boltzmann, EpsilonGreedy, Random, SoftValueIteration, Thompson
from bayeslm.models.control import BernoulliArms, Dirichlet, GaussianArms, NormalGamma

DRAWS = torch.tensor([[0.0, 1.0, 3.0], [4.0, 1.0, 0.0]])  # means 2, 1, 1.5
STRATEGIES = [Random(), EpsilonGreedy(0.3), Boltzmann(0.5), Thompson()]


def test_probabilities():
    weights = np.exp(np.array([2.0, 1.0, 1.5]) / 0.5)
    expected = {
        Random(): [1 / 3] * 3,
        EpsilonGreedy(0.0): [1.0, 0.0, 0.0],
        EpsilonGreedy(0.3): [0.8, 0.1, 0.1],
        EpsilonGreedy(1.0): [1 / 3] * 3,
        Boltzmann(0.5): weights / weights.sum(),
        Thompson(): [0.5, 0.0, 0.5],
    }
    for strategy, distribution in expected.items():
        np.testing.assert_allclose(strategy.probabilities(DRAWS), distribution, rtol=1e-6, err_msg=str(strategy))
    assert [s.needs_draws for s in STRATEGIES] == [False, False, False, True]


def test_ties_share_their_probability():
    values = torch.tensor([[1.0, 1.0, 0.0], [-torch.inf, -torch.inf, -torch.inf]])[None]
    for strategy in (EpsilonGreedy(0.0), Thompson()):
        expected = [[0.5, 0.5, 0.0], [1 / 3] * 3]
        np.testing.assert_allclose(strategy.probabilities(values), expected, rtol=1e-6)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_elements_of_a_batch_are_independent(strategy):
    values = torch.randn(7, 4, 5, 3, dtype=torch.float64)
    distribution = strategy.probabilities(values)
    assert distribution.shape == (4, 5, 3)
    torch.testing.assert_close(distribution.sum(-1), torch.ones(4, 5, dtype=torch.float64))
    for i in range(4):
        torch.testing.assert_close(distribution[i], strategy.probabilities(values[:, i]))
    assert strategy.choose(values).shape == (4, 5)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_actions_are_drawn_with_their_probabilities(strategy):
    chosen = strategy.choose(DRAWS[:, None].expand(-1, 20_000, -1))
    assert chosen.dtype == torch.int64
    assert_drawn_from(torch.bincount(chosen, minlength=3), strategy.probabilities(DRAWS).log())


@pytest.mark.parametrize("seed", range(3))
def test_thompson_is_the_probability_that_an_arm_is_best(seed):
    """P(arm is best) by quadrature, for Beta and Student's t posteriors, within 4.5 standard errors."""
    torch.manual_seed(seed)
    n = 40_000
    a, b = torch.tensor([2.0, 8.0, 3.0]), torch.tensor([1.0, 5.0, 3.0])
    arms = BernoulliArms(Dirichlet(torch.stack([a, b], -1).double()))
    betas = [stats.beta(x, y) for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    m, k, shape, rate = torch.tensor([[0.0, 0.5, 0.2], [3.0, 5.0, 1.0], [2.0, 4.0, 3.0], [2.0, 1.0, 1.0]]).double()
    normals = GaussianArms(NormalGamma(m, k, shape, rate))
    students = [
        stats.t(2 * x, loc, np.sqrt(y / (x * c)))
        for loc, c, x, y in zip(*(p.tolist() for p in (m, k, shape, rate)), strict=True)
    ]
    for belief, distributions, limits in ((arms, betas, (0, 1)), (normals, students, (-np.inf, np.inf))):
        distribution = Thompson().probabilities(belief.sample((n,))[:, None])[0]
        for i, own in enumerate(distributions):
            others = [other for j, other in enumerate(distributions) if j != i]
            p, _ = integrate.quad(
                lambda x, own=own, others=others: own.pdf(x) * np.prod([o.cdf(x) for o in others]), *limits
            )
            assert abs(distribution[i] - p) < 4.5 * np.sqrt(p * (1 - p) / n), (belief, i, distribution, p)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EpsilonGreedy(1.5), "epsilon must be a number in"),
        (lambda: EpsilonGreedy(float("nan")), "epsilon must be a number in"),
        (lambda: Boltzmann(0.0), "temperature must be positive"),
        (lambda: Thompson().probabilities(torch.zeros(3)), r"a mean is one draw: mean\[None\]"),
        (lambda: Thompson().probabilities(torch.zeros(1, 3, dtype=torch.int64)), "must be floats"),
        (lambda: Random().probabilities(torch.tensor([[0.0, float("nan")]])), "NaN"),
    ],
)
def test_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("run", "says"),
    [
        (lambda: PSRL(num_episodes=2).run(3, 4), "PSRL.run: task must be a Task, got 3"),
        (lambda: SoftValueIteration(1.0, 3).run(3), "SoftValueIteration.run: mdp must be"),
    ],
)
def test_runs_of_something_else_name_it(run, says):
    with pytest.raises(TypeError, match=says):
        run()
