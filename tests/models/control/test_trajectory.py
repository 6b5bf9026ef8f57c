"""Trajectories: against all episodes of a small process, and in Gymnasium's environments."""

from __future__ import annotations

import itertools
import math
import sys
from collections import Counter

import numpy as np
import pyro
import pytest
import torch
from pyro import poutine
from support.processes import all_episodes, random_mdp, random_policy
from support.statistics import assert_drawn_from, assert_estimate, assert_mean

from bayeslm.inference.control import SoftValueIteration
from bayeslm.inference.program import inspect, run_particles, seeded
from bayeslm.models.control import (
    MDP,
    Control,
    CountdownPolicy,
    GymEnvironment,
    TabularEnvironment,
    TabularPolicy,
    Trajectory,
    UniformPolicy,
    actions,
    observations,
    returns,
    river_swim,
    step_rewards,
)

gymnasium = pytest.importorskip("gymnasium")


def small(seed: int = 0, horizon: int = 3, starts=None) -> tuple[MDP, torch.Tensor, Trajectory]:
    mdp = random_mdp(seed)
    logits = random_policy(mdp, seed, horizon)
    return mdp, logits, Trajectory(TabularEnvironment(mdp), TabularPolicy(logits), horizon, starts)


def as_value(steps, horizon: int) -> torch.Tensor:
    """Return an episode as a value of `Trajectory`."""
    value = torch.zeros(horizon, 3)
    value[:, 0] = -1
    for t, (s, a, r) in enumerate(steps):
        value[t] = torch.tensor([a, r, s])
    return value


# -- tables ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_frequencies_of_episodes_are_their_probabilities(seed):
    """Chi-squared test over all episodes of two steps with random starts; their rewards are those of the process."""
    mdp, logits, distribution = small(seed, horizon=2)
    policy = logits.double().softmax(-1)
    expected: Counter = Counter()
    for start in range(3):
        for chance, steps in all_episodes(mdp, start, 2):
            p = float(mdp.initial[start]) * chance
            p *= math.prod(float(policy[t, s, a]) for t, (s, a, _) in enumerate(steps))
            expected[tuple((s, a, round(r, 3)) for s, a, r in steps)] += p
    with seeded(seed):
        drawn = distribution.sample((20_000,)).tolist()
    found = Counter(tuple((int(s), int(a), round(r, 3)) for a, r, s in steps if a >= 0) for steps in drawn)
    assert set(found) <= set(expected)
    log_p = torch.tensor(list(expected.values())).log()
    assert_drawn_from(torch.tensor([found[episode] for episode in expected]), log_p)


def test_probabilities_are_the_actions_and_normalised():
    mdp, logits, distribution = small(1, starts=torch.tensor(0))
    policy = logits.double().softmax(-1)
    total = 0.0
    for chance, steps in all_episodes(mdp, 0, 3):
        log_p = distribution.log_prob(as_value(steps, 3)).detach()
        assert float(log_p) == pytest.approx(
            sum(math.log(policy[t, s, a]) for t, (s, a, _) in enumerate(steps)), abs=1e-5
        )
        total += chance * math.exp(log_p)
    assert total == pytest.approx(1.0, abs=1e-5)


def test_a_trajectory_is_a_value():
    """Its score under any policy and its return are known without playing it again."""
    mdp, _, distribution = small(2, horizon=6, starts=torch.tensor([0, 1, 2]))
    with seeded(0):
        value = distribution.sample((500,))
    assert value.shape == (500, 3, 6, 3)
    lengths = distribution.lengths(value)
    assert lengths.min() < 6 == lengths.max()
    assert (observations(value)[:, :, 0, 0] == torch.tensor([0.0, 1.0, 2.0])).all()
    after = torch.arange(6) >= lengths[..., None]
    assert (actions(value)[after] == -1).all()
    assert (value[after][:, 1:] == 0).all()
    assert (actions(value)[~after] >= 0).all()
    state, action = observations(value)[..., 0].long(), actions(value)
    following = torch.where(lengths[..., None] > torch.arange(1, 7), state.roll(-1, -1), 3)[..., :-1]
    paid = mdp.rewards[state[..., :-1], action[..., :-1], following].float()
    inner = ~after[..., 1:]
    torch.testing.assert_close(step_rewards(value)[..., :-1][inner], paid[inner])
    torch.testing.assert_close(returns(value), step_rewards(value).sum(-1))
    other = distribution.with_policy(UniformPolicy(2))
    torch.testing.assert_close(other.log_prob(value), -math.log(2) * lengths.float())
    assert distribution.support.check(value).all()
    torch.testing.assert_close(distribution.expand((500, 3)).log_prob(value), distribution.log_prob(value))
    scores, known = distribution.token_log_prob_and_hidden(value)
    assert known.shape == (500, 3, 6, 4 + 2)
    assert not scores.requires_grad
    torch.testing.assert_close(known[..., -1], step_rewards(value).cumsum(-1) - step_rewards(value))
    torch.testing.assert_close(known[..., -2], torch.arange(6).expand(500, 3, 6) / 6)
    assert (known[..., :4].argmax(-1)[~after] == state[~after]).all()


def test_malformed_trajectories_have_no_probability():
    _, _, distribution = small(0)
    value = distribution.sample()
    value[:, 0] = torch.tensor([0.0, 1.0, 0.0])
    assert distribution.log_prob(value).isfinite()
    for wrong in ([0.0, -1.0, 1.0], [2.0, 0.0, 0.0], [0.5, 0.0, 0.0], [-2.0, -1.0, -1.0]):
        value[:, 0] = torch.tensor(wrong)
        assert distribution.log_prob(value) == -torch.inf, wrong
        assert not distribution.support.check(value)
    with pytest.raises(ValueError, match="expected trajectories"):
        distribution.log_prob(value[:2])
    with pytest.raises(ValueError, match="horizon"):
        Trajectory(distribution.environment, distribution.policy, 0)


def test_gradients_reach_the_policy():
    _, logits, distribution = small(3, starts=torch.tensor([0, 1]))
    with seeded(0):
        value = distribution.sample((200,))
    distribution.log_prob(value).sum().backward()
    wanted = logits.clone().requires_grad_()
    state, action = observations(value)[..., 0].long(), actions(value)
    steps = torch.arange(3).expand_as(action)
    scores = wanted.log_softmax(-1)[steps, state, action.clamp_min(0)]
    scores.masked_fill(action < 0, 0.0).sum().backward()
    torch.testing.assert_close(distribution.policy.logits.grad, wanted.grad, rtol=1e-5, atol=1e-4)


def test_the_factors_of_all_steps_sum_to_the_return():
    """The plate of steps sums to return / beta for each particle and prompt, in stock Pyro too."""
    _, _, distribution = small(4)
    control = Control(distribution.environment, 0.5, 3, prior=distribution.policy)
    program = inspect(control, torch.tensor([0, 1]))
    with seeded(0):
        particles = run_particles(program, None, 7)
    score = returns(particles.values["trajectory"])
    assert score.shape == (7, 2)
    torch.testing.assert_close(particles.log_likelihood["reward"], score / 0.5)
    torch.testing.assert_close(particles.rewards["reward"], score)
    torch.testing.assert_close(particles.log_prior, distribution.log_prob(particles.values["trajectory"]).detach())
    with seeded(0), pyro.plate("outer", 4, dim=-3):
        trace = poutine.trace(control).get_trace(torch.tensor([0, 1]))
    value = trace.nodes["trajectory"]["value"]
    factor = trace.nodes["reward"]["fn"].log_factor
    torch.testing.assert_close(factor.sum(-2), returns(value).squeeze(-2) / 0.5)
    assert trace.log_prob_sum().isfinite()


def test_policies_as_tables():
    policy = CountdownPolicy(4, 2, horizon=8, num_tables=3)
    torch.testing.assert_close(policy.probabilities, torch.full((8, 4, 2), 0.5, dtype=torch.float64))
    with torch.no_grad():
        policy.logits[:] = torch.randn(3, 4, 2)
    observed, steps = torch.arange(4)[None, :, None].expand(8, 4, 1).float(), torch.arange(8)[:, None].expand(8, 4)
    torch.testing.assert_close(policy(observed, steps).double().softmax(-1), policy.probabilities)
    torch.testing.assert_close(policy(observed, steps)[0], policy.logits[2])  # 8 steps to go
    torch.testing.assert_close(policy(observed, steps)[7], policy.logits[0])  # 1 step to go
    halfway = policy(observed, steps)[8 - 4]  # 4 steps to go: log2 4 is 2/3 of log2 8, position 4/3 of the tables
    torch.testing.assert_close(halfway, (2 * policy.logits[1] + policy.logits[2]) / 3)
    assert TabularPolicy.uniform(4, 2, 8).probabilities.shape == (8, 4, 2)
    with pytest.raises(ValueError, match="logits"):
        TabularPolicy(torch.zeros(3))
    with pytest.raises(ValueError, match="num_tables and horizon must be at least 2"):
        CountdownPolicy(4, 2, horizon=8, num_tables=1)
    with pytest.raises(ValueError, match=r"horizon of 8.*step 8 was"):
        Trajectory(TabularEnvironment(river_swim()), CountdownPolicy(6, 2, horizon=8), 9).sample()


# -- Gymnasium ---------------------------------------------------------------------------------------------------------


def test_gymnasium_plays_as_its_table_says():
    """The mean return and length under a non-uniform policy have their exact values."""
    env = gymnasium.make("FrozenLake-v1", is_slippery=True, desc=["SFG", "FHF", "FFG"])
    mdp = MDP.from_gymnasium(env)
    logits = random_policy(mdp, 0)
    gym = GymEnvironment("FrozenLake-v1", is_slippery=True, desc=["SFG", "FHF", "FFG"])
    assert (gym.num_states, gym.num_actions, gym.observation_size) == (9, 4, 1)
    exact = SoftValueIteration(0.0, 6)
    ones = MDP(mdp.transitions, torch.ones_like(mdp.rewards), mdp.terminal, mdp.initial)
    wanted = [float(mdp.initial @ exact.evaluate(m, logits.softmax(-1))[0]) for m in (mdp, ones)]
    with seeded(0):
        distribution = Trajectory(gym, TabularPolicy(logits), 6)
        value = distribution.sample((1500,))
    for x, mean in zip((returns(value), distribution.lengths(value).float()), wanted, strict=True):
        assert_mean(x, mean)


def test_seeds_reproduce_episodes_and_starts_fix_first_observations():
    lake = GymEnvironment("FrozenLake-v1")
    pole = GymEnvironment("CartPole-v1")
    for gym in (lake, pole):
        distribution = Trajectory(gym, UniformPolicy(gym.num_actions), 20)
        draws = []
        for seed in (0, 0, 1):
            with seeded(seed):
                draws.append(distribution.sample((8,)))
        assert torch.equal(draws[0], draws[1])
        assert not torch.equal(draws[0], draws[2])
    distribution = Trajectory(pole, UniformPolicy(2), 5, torch.tensor([3, 4]))
    first = observations(distribution.sample((6,)))[:, :, 0]
    assert (first == first[:1]).all()
    assert not torch.equal(first[0, 0], first[0, 1])
    expected, _ = gymnasium.make("CartPole-v1").reset(seed=4)
    torch.testing.assert_close(first[0, 1], torch.from_numpy(expected))


def test_episodes_of_one_start_differ_after_it():
    """A start fixes the first state only: moving right on ice leads to different states."""
    right = TabularPolicy(torch.tensor([0.0, 0.0, 50.0, 0.0]).expand(16, 4))
    distribution = Trajectory(GymEnvironment("FrozenLake-v1"), right, 6, torch.tensor([3]))
    with seeded(0):
        assert len(observations(distribution.sample((20,))).unique(dim=0)) > 3


def test_vectorised_and_copied_environments_agree():
    """CartPole under the uniform policy has the same mean length in both, and every step is paid, also in episodes
    that follow one another.
    """
    pole = GymEnvironment("CartPole-v1")
    distribution = Trajectory(pole, UniformPolicy(2), 60)
    with seeded(0):
        vector = torch.cat([distribution.sample((200,)) for _ in range(2)])
        copied = distribution.expand((200,)).rollout()
        while not copied.done:
            copied.append(torch.randint(2, (200,)), torch.zeros(200))
    for value in (vector, copied.values):
        torch.testing.assert_close(returns(value), distribution.lengths(value).float())
    ours, theirs = (distribution.lengths(value).float() for value in (vector, copied.values))
    stderr = (ours.var() / len(ours) + theirs.var() / len(theirs)).sqrt()
    assert_estimate(ours.mean(), stderr, theirs.mean())


def test_copies_are_independent():
    """A copy has the steps of its original, and random numbers of its own after them."""
    distribution = Trajectory(GymEnvironment("FrozenLake-v1", map_name="8x8"), UniformPolicy(4), 40).expand((30,))
    with seeded(0):
        rollout = distribution.rollout()
        for _ in range(3):
            rollout.append(torch.full((30,), 2), torch.zeros(30))
        before = rollout.values.clone()
        rollout.select(torch.tensor([4] * 29 + [7]))
        assert torch.equal(rollout.values[:29], before[4].expand(29, -1, -1))
        assert torch.equal(rollout.values[29], before[7])
        for _ in range(10):
            rollout.append(torch.full((30,), 2), torch.zeros(30))
    observed = observations(rollout.values)[:, :13, 0]
    assert len(observed[:29].unique(dim=0)) > 20
    legal = MDP.from_gymnasium(gymnasium.make("FrozenLake-v1", map_name="8x8")).transitions[:, 2]
    for row, length in itertools.islice(
        zip(observed.long().tolist(), distribution.lengths(rollout.values).tolist(), strict=True), 30
    ):
        for here, there in itertools.pairwise(row[:length]):
            assert legal[here, there] > 0


def test_copies_share_no_state_and_no_random_generator():
    """This environment's state has the name of other environments' tables, and it has a generator of its own."""

    class Walk(gymnasium.Env):
        action_space = gymnasium.spaces.Discrete(2)
        observation_space = gymnasium.spaces.Box(-100.0, 100.0, (2,))

        def __init__(self):
            self.P = np.zeros(1)
            self.rng = np.random.default_rng(0)

        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            self.P[:] = 0.0
            self.desc = [0.0]
            return self.observed(), {}

        def observed(self):
            return np.array([self.P[0], self.desc[0]], dtype=np.float32)

        def step(self, action):
            self.P += action
            self.desc[0] += self.rng.normal()
            return self.observed(), 0.0, False, False, {}

    right = torch.tensor([0, 1, 0, 1])
    draws = []
    for _ in range(2):
        with seeded(0):
            episodes = GymEnvironment(Walk).play(torch.full((4,), -1), copies=True)
            episodes.step(right)
            assert torch.equal(episodes.observations[:, 0], right.float())
            episodes.select(torch.tensor([1, 1, 1, 0]))
            episodes.step(right)
        assert episodes.observations[:, 0].tolist() == [1.0, 2.0, 1.0, 1.0]
        draws.append(episodes.observations[:, 1])
    assert len(draws[0].unique()) == 4
    assert torch.equal(draws[0], draws[1])


def test_an_episode_ends_at_a_time_limit_and_spaces_may_not_start_at_0():
    class Shifted(gymnasium.Env):
        action_space = gymnasium.spaces.Discrete(2, start=5)
        observation_space = gymnasium.spaces.Discrete(10, start=3)

        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            self.at = 3
            return self.at, {}

        def step(self, action):
            assert action in (5, 6)
            self.at += 1
            return self.at, float(action), False, False, {}

    gym = GymEnvironment(lambda: gymnasium.wrappers.TimeLimit(Shifted(), 4))
    value = Trajectory(gym, UniformPolicy(2), 9).sample((5,))
    assert (Trajectory(gym, UniformPolicy(2), 9).lengths(value) == 4).all()
    assert (observations(value)[:, :4, 0] == torch.arange(4)).all()
    torch.testing.assert_close(step_rewards(value)[:, :4], actions(value)[:, :4].float() + 5)


def test_a_time_limit_truncates_and_a_fall_terminates():
    """CartPole pushed one way falls; pushed both ways in turn it reaches a limit of 12. Copies keep both flags."""
    pole = GymEnvironment("CartPole-v1", max_episode_steps=12)
    one_way, in_turn = torch.zeros(12, dtype=torch.long), torch.arange(12) % 2
    pushes = torch.stack([one_way, one_way, in_turn, in_turn])
    for copies in (False, True):
        with seeded(0):
            episodes = pole.play(torch.full((4,), -1), copies=copies)
            for t in range(12):
                episodes.step(pushes[:, t])
        assert episodes.ended.all()
        assert episodes.terminated.tolist() == [True, True, False, False]
    episodes.select(torch.tensor([2, 0, 0, 3]))
    assert episodes.terminated.tolist() == [False, True, True, False]
    table = TabularEnvironment(random_mdp()).play(torch.tensor([0, 3]))
    assert table.terminated.tolist() == [False, True]


def test_unsupported_environments_are_refused(monkeypatch):
    with pytest.raises(ValueError, match=r"Pendulum-v1 has actions Box.*Discrete"):
        GymEnvironment("Pendulum-v1")
    with pytest.raises(ValueError, match="FlattenObservation"):
        GymEnvironment("Blackjack-v1")
    one = random_mdp()
    two = MDP(*(torch.stack([part, part]) for part in (one.transitions, one.rewards, one.terminal, one.initial)))
    with pytest.raises(ValueError, match=r"one process.*shape \(2,\)"):
        TabularEnvironment(two)
    with pytest.raises(ValueError, match="beta"):
        Control(TabularEnvironment(random_mdp()), 0.0, 3)
    rollout = Trajectory(GymEnvironment("CartPole-v1"), UniformPolicy(2), 3).environment.play(torch.tensor([-1]))
    with pytest.raises(NotImplementedError, match="copies=True"):
        rollout.select(torch.tensor([0]))
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    with pytest.raises(ImportError, match=r"bayeslm\[gym\]"):
        GymEnvironment("CartPole-v1")


# -- what environments give for a number -----------------------------------------------------------------------------

SHAPES = {
    "array (1,)": lambda x: np.array([x]),
    "array (1, 1)": lambda x: np.array([[x]], dtype=np.float32),
    "array ()": lambda x: np.array(x),
    "numpy number": np.float32,
    "tensor (1,)": lambda x: torch.tensor([x]),
    "tensor with a gradient": lambda x: torch.tensor(float(x), requires_grad=True) * 1.0,
    "list": lambda x: [x],
}


class Countdown(gymnasium.Env):
    """Pays 0.25 times the action, and ends after three steps; numbers of any shape."""

    observation_space = gymnasium.spaces.Discrete(4)
    action_space = gymnasium.spaces.Discrete(3)

    def __init__(self, shape=float):
        self.shape = shape

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.left = 3
        return self.left, {}

    def step(self, action):
        self.left -= 1
        ended = (
            self.shape(self.left == 0)
            if self.shape in (SHAPES["array (1,)"], SHAPES["tensor (1,)"])
            else self.left == 0
        )
        return self.left, self.shape(0.25 * float(action)), ended, False, {}


@pytest.mark.parametrize("shape", SHAPES)
def test_rewards_of_any_shape_with_one_element(shape):
    environment = GymEnvironment(Countdown, shape=SHAPES[shape])
    episodes = environment.play(torch.full((2,), -1))
    rewards = [episodes.step(torch.tensor(a)).tolist() for a in ([0, 1], [2, 2], [1, 0], [1, 1])]
    assert rewards == [[0.0, 0.25], [0.5, 0.5], [0.25, 0.0], [0.0, 0.0]]
    assert episodes.ended.tolist() == episodes.terminated.tolist() == [True, True]


@pytest.mark.parametrize("bad", [[1.0, 2.0], np.zeros(0), math.nan, math.inf, None, "1", np.array([math.nan])])
def test_rewards_that_are_no_finite_number_are_refused(bad):
    episodes = GymEnvironment(Countdown, shape=lambda x: bad).play(torch.full((1,), -1))
    with pytest.raises(ValueError, match="rewards of a step must be 1 finite numbers"):
        episodes.step(torch.tensor([0]))


@pytest.mark.parametrize("column", [False, True])
def test_rewards_of_vector_environments_as_a_column(column, monkeypatch):
    """Of shape (row, 1) as of shape (row,)."""
    environment = GymEnvironment("CartPole-v1")

    def totals():
        with seeded(0):
            episodes = environment.play(torch.full((3,), -1))
            if column:
                step = episodes._vector.step

                def as_column(actions):
                    observations, *numbers, info = step(actions)
                    return observations, *(x[:, None] for x in numbers), info

                monkeypatch.setattr(episodes._vector, "step", as_column)
            return sum(episodes.step(torch.tensor([0, 1, t % 2])) for t in range(30)), episodes.ended

    total, ended = totals()
    assert total.shape == (3,)
    assert ended.tolist() == [True, True, False]
    assert total[:2].max() < 15 < total[2] == 30


def test_tables_with_rewards_of_shape_1():
    lake = gymnasium.make("FrozenLake-v1")
    expected = MDP.from_gymnasium(lake)
    table = lake.unwrapped.P
    for row in table.values():
        for a, outcomes in row.items():
            row[a] = [(p, s, np.array([r]), t) for p, s, r, t in outcomes]
    assert torch.equal(MDP.from_gymnasium(lake).rewards, expected.rewards)
