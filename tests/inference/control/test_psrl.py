"""PSRL: its regret against an exact computation, its tasks against exact values, and RiverSwim."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from support.processes import random_mdp
from support.statistics import LIMIT, assert_mean

from bayeslm.inference.control import PSRL, Boltzmann, EpisodicTask, EpsilonGreedy, Random, SoftValueIteration, Thompson
from bayeslm.models.control import (
    MDP,
    Bandit,
    BernoulliArms,
    GaussianArms,
    GymEnvironment,
    TabularEnvironment,
    Worlds,
    river_swim,
)
from bayeslm.plots import plot_regret

ARMS = (0.8, 0.5)


# -- bandits ---------------------------------------------------------------------------------------------------------


@functools.cache
def first_is_best(a: float, b: float, c: float, d: float) -> float:
    """Return P(p_1 > p_2) for p_1 ~ Beta(a, b) and p_2 ~ Beta(c, d)."""
    return integrate.quad(lambda x: stats.beta.pdf(x, a, b) * stats.beta.cdf(x, c, d), 0, 1)[0]


def exact_probabilities(strategy, counts: tuple[int, ...]) -> np.ndarray:
    """Return the strategy's probabilities at Beta(1 + wins, 1 + losses), from its definition."""
    a, b, c, d = (1 + n for n in counts)
    means = np.array([a / (a + b), c / (c + d)])
    if isinstance(strategy, Thompson):
        return np.array([p := first_is_best(a, b, c, d), 1 - p])
    if isinstance(strategy, EpsilonGreedy):
        top = np.isclose(means, means.max())
        return (1 - strategy.epsilon) * top / top.sum() + strategy.epsilon / 2
    if isinstance(strategy, Boltzmann):
        return (x := np.exp(means / strategy.temperature)) / x.sum()
    return np.array([0.5, 0.5])


def exact_regret(strategy, steps: int) -> list[float]:
    """Return the expected regret of each step, from the probabilities of wins and losses (w1, l1, w2, l2)."""
    states, regret = {(0, 0, 0, 0): 1.0}, []
    for _ in range(steps):
        following: dict[tuple[int, ...], float] = {}
        loss = 0.0
        for counts, p in states.items():
            distribution = exact_probabilities(strategy, counts)
            loss += p * (max(ARMS) - distribution @ ARMS)
            for arm in (0, 1):
                for lost in (0, 1):
                    after = list(counts)
                    after[2 * arm + lost] += 1
                    q = p * distribution[arm] * (1 - ARMS[arm] if lost else ARMS[arm])
                    following[tuple(after)] = following.get(tuple(after), 0.0) + q
        states = following
        regret.append(loss)
    return regret


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("strategy", [Thompson(), EpsilonGreedy(0.2), Boltzmann(0.1), Random()])
def test_the_regret_of_a_bernoulli_bandit_is_the_exact_one(strategy, seed):
    psrl = PSRL(7, strategy, num_runs=20_000, seed=seed, progress=False)
    learning = psrl.run(Bandit(torch.tensor(ARMS, dtype=torch.float64)), BernoulliArms.prior(2))
    assert learning.regret.shape == learning.returns.shape == (20_000, 7)
    expected = exact_regret(strategy, 7)
    assert_mean(learning.regret, expected)
    assert_mean(learning.returns, max(ARMS) - np.array(expected))
    assert_mean(learning.belief.rewards.concentration.sum((1, 2)) - 7, 4.0)  # every pull is counted once


def test_gaussian_arms_learn_from_their_own_pulls():
    bandit = Bandit(torch.tensor([1.0, 0.0, -3.0]), scale=torch.tensor([0.5, 2.0, 1.0]))
    learning = PSRL(300, Random(), num_runs=200, seed=0, progress=False).run(bandit, GaussianArms.prior(3))
    distribution = learning.belief.rewards
    assert_mean(distribution.count.sum(1), 303.0)
    assert_mean(
        distribution.mean * distribution.count / (distribution.count - 1), bandit.means
    )  # without the prior's mean of 0
    np.testing.assert_allclose((distribution.rate / distribution.shape).mean(0), [0.25, 4.0, 1.0], rtol=0.1)
    torch.testing.assert_close(learning.regret, torch.full_like(learning.regret, 1 + 2 / 3))


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.long)])
def test_regret_of_thompson_sampling_is_near_the_bound_of_lai_and_robbins(seed):
    r"""Regret grows by \sum_a gap / KL(p_a, p_*) a unit of log t (Lai and Robbins 1985, Kaufmann et al. 2012).

    Between t = 200 and 2000 that slope is met within a factor of 2; that of a fixed epsilon is linear.
    """
    p = torch.tensor([0.9, 0.7, 0.6])
    bandit = Bandit(p)
    slope = {}
    for strategy in (Thompson(), EpsilonGreedy(0.1)):
        learning = PSRL(2000, strategy, num_runs=300, seed=seed, progress=False).run(bandit, BernoulliArms.prior(3))
        slope[strategy] = float(learning.regret[:, 200:].sum(1).mean()) / np.log(2000 / 200)
    bernoulli = torch.distributions.Bernoulli
    kl = torch.distributions.kl_divergence(bernoulli(p[1:]), bernoulli(p[0]))
    bound = float(((p[0] - p[1:]) / kl).sum())
    assert 0.5 * bound < slope[Thompson()] < 2 * bound, (slope, bound)
    assert slope[EpsilonGreedy(0.1)] > 2 * slope[Thompson()]


# -- processes -------------------------------------------------------------------------------------------------------


def random_world(seed: int) -> MDP:
    return random_mdp(seed, actions=3)


def test_the_regret_of_an_episode_is_that_of_dynamic_programming():
    for seed in range(3):
        mdp = random_world(seed)
        task, planner = EpisodicTask(TabularEnvironment(mdp), 6), SoftValueIteration(beta=0.0, horizon=6)
        torch.manual_seed(seed)
        policies = torch.rand(5, 6, 4, 3, dtype=torch.float64).softmax(-1)
        best = planner.run(mdp)
        expected = [mdp.initial @ (best.values - planner.evaluate(mdp, policy))[0] for policy in policies]
        torch.testing.assert_close(task.regret(policies), torch.stack(expected))
        assert (torch.stack(expected) > 0).all()
        torch.testing.assert_close(task.regret(best.policy[None]), torch.zeros(1, dtype=torch.float64))
        torch.testing.assert_close(task.action_values(mdp_batch(mdp))[0], best.action_values)


def mdp_batch(mdp: MDP) -> MDP:
    return MDP(*(x[None] for x in (mdp.transitions, mdp.rewards, mdp.terminal, mdp.initial)))


@pytest.mark.parametrize("seed", range(3))
def test_episodes_pay_what_their_policy_is_worth(seed):
    mdp = random_world(seed)
    task = EpisodicTask(TabularEnvironment(mdp), 6)
    torch.manual_seed(seed)
    policy = torch.rand(6, 4, 3, dtype=torch.float64).softmax(-1).expand(20_000, -1, -1, -1)
    steps = task.play(policy)
    assert_mean(steps.returns, task.optimum - task.regret(policy[:1])[0])
    assert torch.equal(steps.terminated, steps.valid & mdp.terminal[steps.next_states])
    for t in range(5):  # a step follows the one before, until a terminal state is entered
        go_on = steps.valid[:, t + 1]
        torch.testing.assert_close(steps.states[go_on, t + 1], steps.next_states[go_on, t])
        torch.testing.assert_close(go_on, steps.valid[:, t] & ~steps.terminated[:, t])


def test_worlds_are_learned_from_gymnasium_episodes():
    """Transitions of FrozenLake under a random policy agree with its table, and so do terminal states."""
    gymnasium = pytest.importorskip("gymnasium")
    mdp = MDP.from_gymnasium(gymnasium.make("FrozenLake-v1"))
    task = EpisodicTask(GymEnvironment("FrozenLake-v1"), 100)
    learning = PSRL(5, Random(), num_runs=50, seed=0, progress=False).run(task, Worlds.prior(16, 4))
    assert learning.regret.isnan().all()
    ended = learning.belief.terminal.any(0)
    assert torch.equal(ended & ~mdp.terminal, torch.zeros(16, dtype=torch.bool))
    assert ended[[5, 7]].all()  # the two nearest holes
    observed = learning.belief.transitions.concentration.sum(0) - 50 / 16
    impossible = (mdp.transitions == 0) & ~mdp.terminal[:, None, None]
    assert observed[impossible].abs().max() < 1e-9
    counts = observed[0, 2]  # from the start, right: a third each of staying, right and down
    assert stats.chisquare(counts[[0, 1, 4]]).pvalue > 1e-6
    known = EpisodicTask(GymEnvironment("FrozenLake-v1"), 100, truth=mdp)
    learning = PSRL(2, Random(), num_runs=4, seed=0, progress=False).run(known, Worlds.prior(16, 4))
    uniform = SoftValueIteration(beta=0.0, horizon=100).evaluate(mdp, torch.full((16, 4), 0.25))
    expected = known.optimum - mdp.initial @ uniform[0]
    torch.testing.assert_close(learning.regret, expected.expand(4, 2))


@pytest.mark.parametrize("limit", ["wrapper", "its own"])
def test_a_state_in_which_an_episode_was_truncated_is_not_terminal(limit):
    """A ring without terminal states, and a limit of three steps that the environment does not declare."""
    gymnasium = pytest.importorskip("gymnasium")

    class Ring(gymnasium.Env):
        action_space, observation_space = gymnasium.spaces.Discrete(2), gymnasium.spaces.Discrete(5)

        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            self.at = self.taken = 0
            return self.at, {}

        def step(self, action):
            self.at, self.taken = (self.at + int(action)) % 5, self.taken + 1
            return self.at, 0.0, False, limit == "its own" and self.taken == 3, {}

    make = Ring if limit == "its own" else lambda: gymnasium.wrappers.TimeLimit(Ring(), 3)
    task = EpisodicTask(GymEnvironment(make), 6)
    observed = task.play(torch.full((20, 6, 5, 2), 0.5))
    assert not observed.terminated.any()
    assert torch.equal(observed.valid, torch.arange(6).expand(20, 6) < 3)
    learning = PSRL(4, Random(), num_runs=20, seed=0, progress=False).run(task, Worlds.prior(5, 2))
    assert not learning.belief.terminal.any()
    torch.testing.assert_close(
        learning.belief.transitions.concentration.sum((1, 2, 3)) - 10, torch.full((20,), 12.0).double()
    )


@pytest.mark.long
def test_posterior_sampling_solves_river_swim():
    """PSRL finds the right bank of RiverSwim; epsilon-greedy and random exploration do not."""
    task = EpisodicTask(TabularEnvironment(river_swim()), 20)
    prior = Worlds.prior(6, 2, reward=(0.0, 1.0, 1.0, 0.01))
    regret = {}
    for strategy in (Thompson(), EpsilonGreedy(0.0), EpsilonGreedy(0.1), Random()):
        regret[strategy] = PSRL(120, strategy, num_runs=16, seed=0, progress=False).run(task, prior).regret
    total = {strategy: float(each.sum(1).mean()) for strategy, each in regret.items()}
    assert total[Thompson()] < 0.5 * min(total[strategy] for strategy in regret if strategy != Thompson()), total
    assert regret[Thompson()][:, -20:].mean() < 0.05 * task.optimum


def test_the_posterior_finds_the_true_world():
    mdp = random_world(1)
    learning = PSRL(200, Random(), num_runs=50, seed=0, progress=False).run(
        EpisodicTask(TabularEnvironment(mdp), 6), Worlds.prior(4, 3, concentration=1e-6)
    )
    assert torch.equal(learning.belief.terminal, mdp.terminal.expand(50, 4))
    distributions = learning.belief.transitions, learning.belief.initial
    for distribution, p in zip(distributions, (mdp.transitions[:3], mdp.initial[:3]), strict=True):
        counts = distribution.concentration.sum(0)[: len(p)]  # sums over all runs
        n = counts.sum(-1, keepdim=True)
        assert n.min() > 100
        assert ((counts - n * p) / (n * p * (1 - p)).sqrt()).abs().max() < LIMIT


def test_a_seed_reproduces():
    task = EpisodicTask(TabularEnvironment(random_world(0)), 4)
    prior = Worlds.prior(4, 3)
    a, b, c = (PSRL(5, num_runs=3, seed=s, progress=False).run(task, prior) for s in (0, 0, 1))
    assert torch.equal(a.returns, b.returns)
    assert torch.equal(a.belief.transitions.concentration, b.belief.transitions.concentration)
    assert not torch.equal(a.returns, c.returns)
    assert not torch.equal(a.returns[0], a.returns[1])


def test_an_interrupt_keeps_what_was_learned():
    class Interrupted(EpisodicTask):
        played = 0

        def play(self, policy):
            if self.played == 3:
                raise KeyboardInterrupt
            self.played += 1
            return super().play(policy)

    learning = PSRL(10, num_runs=2, progress=False).run(
        Interrupted(TabularEnvironment(random_world(0)), 4), Worlds.prior(4, 3)
    )
    assert learning.regret.shape == (2, 3)
    torch.testing.assert_close(learning.belief.initial.concentration.sum(-1), torch.full((2,), 4.0).double())


def test_refused():
    with pytest.raises(ValueError, match="num_episodes must be a positive whole number"):
        PSRL(0)
    with pytest.raises(ValueError, match="probabilities, in"):
        Bandit(torch.tensor([0.5, 1.5]))
    with pytest.raises(ValueError, match="scale must be a Tensor, positive and finite"):
        Bandit(torch.tensor([0.5, 1.5]), scale=0.0)
    with pytest.raises(ValueError, match=r"means must be \(arm,\)"):
        Bandit(torch.zeros(2, 2))
    with pytest.raises(ValueError, match="num_states must be a whole number of at least 3"):
        river_swim(2)
    pytest.importorskip("gymnasium")
    with pytest.raises(ValueError, match="observations must be discrete"):
        EpisodicTask(GymEnvironment("CartPole-v1"), 10)
    with pytest.raises(ValueError, match="use at most 100"):
        EpisodicTask(GymEnvironment("FrozenLake-v1"), 101)


def test_the_picture_has_the_mean_and_the_interval():
    matplotlib = pytest.importorskip("matplotlib")
    regret = np.arange(12.0).reshape(3, 4)
    figure = plot_regret({"PSRL": regret, "random": 2 * regret}, interval=1.0)
    (axis,) = figure.axes
    line, band = axis.lines[1], axis.collections[1].get_paths()[0].vertices
    np.testing.assert_allclose(line.get_ydata(), 2 * regret.cumsum(1).mean(0))
    assert band[:, 1].min() == 0
    assert band[:, 1].max() == 2 * regret[2].sum()
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["PSRL", "random"]
    matplotlib.pyplot.close("all")
    with pytest.raises(ValueError, match="not empty"):
        plot_regret({})
    with pytest.raises(ValueError, match=r"must be \(run, episode\)"):
        plot_regret({"PSRL": [1.0, 2.0]})
    with pytest.raises(ValueError, match="interval"):
        plot_regret({"PSRL": regret}, interval=0.0)
