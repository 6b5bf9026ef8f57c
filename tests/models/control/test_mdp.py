"""Processes read from Gymnasium, and soft value iteration against the enumeration of every episode."""

from __future__ import annotations

import math

import pytest
import torch
from support.processes import all_episodes, random_mdp, random_policy

from bayeslm.inference.control import SoftValueIteration
from bayeslm.models.control import MDP

gymnasium = pytest.importorskip("gymnasium")

LAKE = [
    ("FrozenLake-v1", {"is_slippery": slippery, "map_name": name}) for slippery in (0, 1) for name in ("4x4", "8x8")
]
TABULAR = [*LAKE, ("CliffWalking-v1", {}), ("CliffWalking-v1", {"is_slippery": True}), ("Taxi-v4", {})]


@pytest.mark.parametrize(("name", "kwargs"), TABULAR)
def test_tables_are_the_environments_own(name, kwargs):
    env = gymnasium.make(name, **kwargs)
    mdp, table = MDP.from_gymnasium(env), env.unwrapped.P
    assert torch.equal(mdp.initial, torch.as_tensor(env.unwrapped.initial_state_distrib))
    for s in range(0, mdp.num_states, 7):
        for a in range(mdp.num_actions):
            if mdp.terminal[s]:
                continue
            chance = torch.zeros(mdp.num_states, dtype=torch.float64)
            for p, following, _, _ in table[s][a]:
                chance[following] += p
            torch.testing.assert_close(mdp.transitions[s, a], chance)
            mean = sum(p * r for p, _, r, _ in table[s][a])
            assert float(mdp.expected_rewards[s, a]) == pytest.approx(mean)


def test_episodes_end_where_gymnasium_ends_them():
    lake = MDP.from_gymnasium(gymnasium.make("FrozenLake-v1"))
    assert lake.terminal.nonzero().squeeze(-1).tolist() == [5, 7, 11, 12, 15]
    cliff = MDP.from_gymnasium(gymnasium.make("CliffWalking-v1"))
    assert cliff.terminal.nonzero().squeeze(-1).tolist() == [47]  # though its own row in the table continues
    assert (cliff.transitions.amax(-1) == 1).all()  # every action has one outcome
    assert not (lake.transitions.amax(-1) == 1).all()
    assert (cliff.transitions[47, :, 47] == 1).all()
    assert (cliff.rewards[47] == 0).all()
    taxi = MDP.from_gymnasium(gymnasium.make("Taxi-v4"))
    assert int(taxi.terminal.sum()) == 4  # the passenger has left the taxi at one of four places


def test_rewards_that_vary_are_means_and_mark_the_process_as_mixed():
    """On slippery cliffs an agent that is at the start again has walked, for -1, or fallen, for -100. The mean of these
    is enough for expected returns, but not for log Z.
    """
    mixed = {name: MDP.from_gymnasium(gymnasium.make(name)).mixed for name, kwargs in TABULAR if not kwargs}
    assert mixed == {"CliffWalking-v1": False, "Taxi-v4": False}
    assert not MDP.from_gymnasium(gymnasium.make("FrozenLake-v1")).mixed
    cliff = MDP.from_gymnasium(gymnasium.make("CliffWalking-v1", is_slippery=True))
    assert cliff.mixed

    class Ends(gymnasium.Env):
        P = {0: {0: [(1.0, 1, 1.0, True)]}, 1: {0: [(0.5, 1, 0.0, True), (0.5, 1, 1.0, True)]}}
        initial_state_distrib = [1.0, 0.0]

    assert not MDP.from_gymnasium(Ends()).mixed  # a terminal state pays nothing
    assert float(cliff.rewards[36, 1, 36]) == pytest.approx(-50.5)  # right: down is a wall, ahead is the cliff
    assert SoftValueIteration(1.0, 3).run(cliff).values.isfinite().all()
    with pytest.raises(ValueError, match=r"MDP\.mixed.*fixed"):
        SoftValueIteration(1.0, 3, "tilted").run(cliff)


def test_invalid_processes_are_refused():
    mdp = random_mdp()
    for name, wrong in {
        "transitions": mdp.transitions * 0.9,
        "rewards": mdp.rewards[:, :, :2],
        "terminal": mdp.terminal[:2],
        "initial": torch.tensor([2.0, -1.0, 0.0, 0.0]),
    }.items():
        with pytest.raises(ValueError, match=name):
            MDP(**{**vars(mdp), name: wrong})
    with pytest.raises(ValueError, match="finite"):
        MDP(mdp.transitions, mdp.rewards * math.nan, mdp.terminal, mdp.initial)
    with pytest.raises(ValueError, match=r"\(S, A, S\)"):
        MDP(mdp.transitions[0], mdp.rewards, mdp.terminal, mdp.initial)
    with pytest.raises(ValueError, match="GymEnvironment"):
        MDP.from_gymnasium(gymnasium.make("CartPole-v1"))


def test_a_state_that_ends_only_some_episodes_is_refused():
    class Odd(gymnasium.Env):
        P = {0: {0: [(0.5, 1, 0.0, True), (0.5, 1, 0.0, False)]}, 1: {0: [(1.0, 0, 0.0, False)]}}
        initial_state_distrib = [1.0, 0.0]

    with pytest.raises(ValueError, match="state 1"):
        MDP.from_gymnasium(Odd())


# -- soft value iteration ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("beta", [0.3, 2.0])
@pytest.mark.parametrize("horizon", [None, 3], ids=["one prior", "one a step"])
def test_tilted_dynamics_are_the_posterior_over_episodes(seed, beta, horizon):
    """V_0 / beta = log E_p[exp(return / beta)], and pi_0 the posterior of the first action, by enumeration."""
    mdp = random_mdp(seed)
    prior = random_policy(mdp, seed, horizon).double().softmax(-1)
    found = SoftValueIteration(beta, 3, "tilted").run(mdp, prior)
    prior = prior.expand(3, -1, -1)
    for start in range(3):
        mass = torch.zeros(mdp.num_actions, dtype=torch.float64)
        for chance, steps in all_episodes(mdp, start, 3):
            p = chance * math.prod(float(prior[t, s, a]) for t, (s, a, _) in enumerate(steps))
            mass[steps[0][1]] += p * math.exp(sum(r for _, _, r in steps) / beta)
        assert float(found.values[0, start]) / beta == pytest.approx(float(mass.sum().log()), abs=1e-9)
        torch.testing.assert_close(found.policy[0, start], mass / mass.sum())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("beta", [0.0, 0.5])
@pytest.mark.parametrize("horizon", [None, 3], ids=["one prior", "one a step"])
def test_a_policy_is_worth_its_return_less_its_kl(seed, beta, horizon):
    mdp = random_mdp(seed)
    prior = random_policy(mdp, seed, horizon).double().softmax(-1)
    policy = random_policy(mdp, seed + 10, horizon=3).double().softmax(-1)
    values = SoftValueIteration(beta, 3).evaluate(mdp, policy, prior)
    prior = prior.expand(3, -1, -1)
    for start in range(3):
        worth = 0.0
        for chance, steps in all_episodes(mdp, start, 3):
            q = math.prod(float(policy[t, s, a]) for t, (s, a, _) in enumerate(steps))
            log_ratio = sum(math.log(policy[t, s, a] / prior[t, s, a]) for t, (s, a, _) in enumerate(steps))
            worth += chance * q * (sum(r for _, _, r in steps) - beta * log_ratio)
        assert float(values[0, start]) == pytest.approx(worth, abs=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_no_policy_is_better_than_the_soft_optimal_one(seed):
    """Its value is that of the recursion and stationary, and nearby policies have lower ones; the value is concave in
    each step's probabilities.
    """
    mdp, solver = random_mdp(seed), SoftValueIteration(0.5, 4)
    best = solver.run(mdp)
    torch.testing.assert_close(solver.evaluate(mdp, best.policy), best.values)
    logits = best.policy.log().requires_grad_()
    worth = mdp.initial @ solver.evaluate(mdp, logits.softmax(-1))[0]
    (gradient,) = torch.autograd.grad(worth, logits)
    worth = float(worth.detach())
    assert gradient.abs().max() < 1e-9
    for other in range(5):
        near = (logits.detach() + 0.3 * random_policy(mdp, other, horizon=4)).softmax(-1)
        assert float(mdp.initial @ solver.evaluate(mdp, near)[0]) < worth - 1e-4


def test_fixed_and_tilted_dynamics_agree_for_deterministic_processes_only():
    deterministic, random = random_mdp(1, deterministic=True), random_mdp(1)
    fixed, tilted = SoftValueIteration(0.5, 5), SoftValueIteration(0.5, 5, "tilted")
    torch.testing.assert_close(fixed.run(deterministic).values, tilted.run(deterministic).values)
    torch.testing.assert_close(fixed.run(deterministic).policy, tilted.run(deterministic).policy)
    assert (tilted.run(random).values[0, :3] > fixed.run(random).values[0, :3] + 1e-3).all()


def test_beta_0_is_value_iteration():
    mdp = random_mdp(2)
    plain, cold = SoftValueIteration(0.0, 6).run(mdp), SoftValueIteration(1e-4, 6).run(mdp)
    torch.testing.assert_close(plain.values, cold.values, atol=6e-4, rtol=0)  # off by up to T beta log A
    torch.testing.assert_close(plain.values[:-1], plain.action_values.amax(-1))
    assert set(plain.policy[:, :3].unique().tolist()) == {0.0, 1.0}
    nothing = MDP(mdp.transitions, torch.zeros_like(mdp.rewards), mdp.terminal, mdp.initial)
    prior = torch.tensor([[0.2, 0.8], [1.0, 0.0], [0.5, 0.5], [0.5, 0.5]], dtype=torch.float64)
    torch.testing.assert_close(SoftValueIteration(0.0, 1).run(nothing, prior).policy[0], prior)  # ties keep the prior
    banned = SoftValueIteration(0.0, 6).run(mdp, prior)
    assert (banned.policy[:, 1, 1] == 0).all()  # an action of prior probability 0 is never chosen
    assert (banned.values[0, 1] <= plain.values[0, 1]).all()


def test_a_discount_is_the_probability_that_the_episode_continues():
    mdp, discount = random_mdp(3), 0.8
    alive = torch.zeros(5, 2, 5, dtype=torch.float64)
    alive[:4, :, :4] = discount * mdp.transitions
    alive[:4, :, 4] = 1 - discount
    rewards = torch.zeros_like(alive)
    rewards[:4] = mdp.expected_rewards[..., None]  # the last step is paid
    mortal = MDP(alive, rewards, torch.tensor([*mdp.terminal, True]), torch.tensor([*mdp.initial, 0.0]))
    found = SoftValueIteration(0.5, 6, discount=discount).run(mdp)
    torch.testing.assert_close(found.values, SoftValueIteration(0.5, 6).run(mortal).values[:, :4])


@pytest.mark.parametrize("dynamics", ["fixed", "tilted"])
def test_many_processes_are_solved_at_once(dynamics):
    parts = [random_mdp(seed) for seed in range(3)]
    tensors = ("transitions", "rewards", "terminal", "initial")
    many = MDP(*(torch.stack([getattr(p, name) for p in parts]) for name in tensors))
    solver = SoftValueIteration(0.5, 4, dynamics)
    together = solver.run(many)
    assert together.policy.shape == (4, 3, 4, 2)
    for i, part in enumerate(parts):
        torch.testing.assert_close(together.values[:, i], solver.run(part).values)
    if dynamics == "fixed":
        torch.testing.assert_close(solver.evaluate(many, together.policy), together.values)


def test_settings_out_of_range_are_refused():
    for kwargs, match in (
        ({"beta": -1.0}, "beta"),
        ({"horizon": 0}, "horizon"),
        ({"dynamics": "warped"}, "fixed"),
        ({"discount": 1.5}, "discount"),
        ({"beta": 0.0, "dynamics": "tilted"}, "tilted"),
        ({"discount": 0.9, "dynamics": "tilted"}, "tilted"),
    ):
        with pytest.raises(ValueError, match=match):
            SoftValueIteration(**{"beta": 1.0, "horizon": 3, **kwargs})
    mdp = random_mdp()
    with pytest.raises(ValueError, match="prior"):
        SoftValueIteration(1.0, 3).run(mdp, torch.ones(2))
    with pytest.raises(ValueError, match="policy"):
        SoftValueIteration(1.0, 3).evaluate(mdp, torch.ones(2, 4, 2))
    with pytest.raises(ValueError, match="fixed"):
        SoftValueIteration(1.0, 3, "tilted").evaluate(mdp, torch.full((4, 2), 0.5))
