"""Neural policies: their inputs, their gradient against dynamic programming, and CartPole."""

from __future__ import annotations

import gymnasium
import numpy as np
import pyro
import pytest
import torch
from support.gradients import assert_unbiased, gradient_of, gradients
from support.trainings import Killed, assert_same, killer
from torch import Tensor

from bayeslm import Posterior
from bayeslm.inference import SVI, ImportanceSampling
from bayeslm.inference.control import StateValues
from bayeslm.inference.training import Adam, Checkpointing, Critic, ReverseKL
from bayeslm.models.control import (
    MDP,
    Control,
    GymEnvironment,
    MLPPolicy,
    TabularEnvironment,
    TabularPolicy,
    actions,
    returns,
)

HORIZON = 4
BETA = 0.7


def small_world(seed: int = 0) -> MDP:
    """Return a random process of three states, the last of which is terminal, and two actions."""
    generator = torch.Generator().manual_seed(seed)
    return MDP(
        transitions=torch.randn(3, 2, 3, generator=generator, dtype=torch.float64).softmax(-1),
        rewards=torch.randn(3, 2, 3, generator=generator, dtype=torch.float64),
        terminal=torch.tensor([False, False, True]),
        initial=torch.tensor([0.6, 0.4, 0.0], dtype=torch.float64),
    )


def elbo(mdp: MDP, policy: MLPPolicy) -> Tensor:
    """Return E[return] / beta - KL(q || uniform) by dynamic programming."""
    states = torch.arange(mdp.num_states)[:, None].float()
    log_pi = policy(states, torch.zeros(mdp.num_states, dtype=torch.long)).log_softmax(-1).double()
    log_pi = log_pi.masked_fill(mdp.terminal[:, None], -np.log(mdp.num_actions))  # no action is taken there
    value = torch.zeros(mdp.num_states, dtype=torch.float64)
    for _ in range(HORIZON):
        gain = (mdp.transitions * (mdp.rewards / BETA + value)).sum(-1)
        value = (log_pi.exp() * (gain - np.log(mdp.num_actions) - log_pi)).sum(-1)
    return mdp.initial @ value


# -- inputs of a policy --------------------------------------------------------------------------------------------


def test_what_makes_no_environment_is_refused():
    with pytest.raises(TypeError, match="make, or its kwargs, do not make an environment: len"):
        GymEnvironment(len)


def test_boxes_are_scaled_by_their_bounds():
    environment = GymEnvironment("CartPole-v1")
    policy = MLPPolicy(environment)
    torch.testing.assert_close(policy.scale, torch.tensor([4.8, 1.0, 0.41887903, 1.0]))  # two velocities have no bounds
    observed = torch.randn(5, 3, 4)
    expected = policy.layers(observed / policy.scale)
    torch.testing.assert_close(policy(observed, torch.zeros(5, 3, dtype=torch.long)), expected)
    torch.testing.assert_close(
        MLPPolicy(GymEnvironment("Acrobot-v1")).scale, torch.tensor([1.0, 1.0, 1.0, 1.0, 12.566371, 28.274334])
    )


def test_discrete_states_are_one_hot_inputs():
    """A network without hidden layers is a table."""
    policy = MLPPolicy(TabularEnvironment(small_world()), hidden=())
    torch.nn.init.normal_(policy.layers[-1].weight)
    logits = policy(torch.tensor([[0.0], [1.0], [2.0]]), torch.zeros(3, dtype=torch.long))
    torch.testing.assert_close(logits, policy.layers[-1].weight.T)


@pytest.mark.parametrize("name", ["CartPole-v1", "Acrobot-v1", "FrozenLake-v1"])
def test_it_begins_near_the_uniform_policy(name):
    environment = GymEnvironment(name)
    before = torch.get_rng_state()
    policy, same, other = (MLPPolicy(environment, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    space = gymnasium.make(name).observation_space
    space.seed(0)
    observed = torch.tensor(np.array([space.sample() for _ in range(100)]), dtype=torch.float32).reshape(100, -1)
    observed = observed.clamp(-5, 5)  # samples of an unbounded box are far larger than observations
    steps = torch.zeros(100, dtype=torch.long)
    log_pi = policy(observed, steps).log_softmax(-1)
    assert log_pi.shape == (100, environment.num_actions)
    assert (log_pi.exp() - 1 / environment.num_actions).abs().max() < 0.02
    assert torch.equal(policy(observed, steps), same(observed, steps))
    assert not torch.equal(policy(observed, steps), other(observed, steps))


# -- its gradient ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.long)])
@pytest.mark.parametrize("critic", [None, Critic(learning_rate=0.02, num_steps=3)], ids=["leave-one-out", "critic"])
def test_the_gradient_is_unbiased(critic, seed):
    """The gradient is that of the ELBO by dynamic programming, while the critic is trained."""
    mdp = small_world(seed)
    environment = TabularEnvironment(mdp)
    policy = MLPPolicy(environment, hidden=(3,), seed=seed)
    for p in policy.parameters():
        torch.nn.init.normal_(p, generator=torch.Generator().manual_seed(seed))
    control = Control(environment, BETA, HORIZON)
    parameters = list(policy.parameters())
    expected = gradient_of(-elbo(mdp, policy), parameters).float()
    torch.manual_seed(seed)
    objective = ReverseKL(256) if critic is None else ReverseKL(256, critic)
    estimates = gradients(objective, control, control.guide(policy), parameters, ())
    assert_unbiased(estimates, expected)


@pytest.mark.long
def test_the_critic_lowers_the_variance():
    """The policy is untrained, and the expected return depends on the state."""
    mdp = small_world(1)
    environment = TabularEnvironment(mdp)
    policy = MLPPolicy(environment, hidden=(3,), seed=0)
    control = Control(environment, BETA, HORIZON)
    variance = []
    for objective in (ReverseKL(32), ReverseKL(32, Critic(learning_rate=0.02, num_steps=3))):
        torch.manual_seed(0)
        estimates = gradients(objective, control, control.guide(policy), list(policy.parameters()), (), repeats=70)
        variance.append(float(estimates[30:].var(0).sum()))
    assert variance[1] < 0.7 * variance[0], variance


# -- trainings ------------------------------------------------------------------------------------------------------


def cartpole(seed: int, num_steps: int, schedule: str) -> tuple[float, int]:
    """Return the mean return of 100 episodes of a trained policy, and the number of steps played in training."""
    environment = GymEnvironment("CartPole-v1")
    control = Control(environment, beta=0.1, horizon=500)
    policy = MLPPolicy(environment, seed=seed)
    objective = ReverseKL(16, Critic())
    played = 0

    def count(record) -> None:
        nonlocal played
        if record.particles is not None:
            played += int((actions(record.particles.values["trajectory"]) >= 0).sum())

    svi = SVI(
        num_steps=num_steps,
        optimizer=Adam(1e-2, schedule=schedule),
        objective=objective,
        guide=control.guide(policy),
        callbacks=[count],
        num_samples=100,
        seed=seed,
        progress=False,
    )
    posterior = svi.run(control)
    assert posterior.samples["trajectory"].shape == (1, 100, 1, 500, 6)
    score = returns(torch.from_numpy(posterior.samples["trajectory"]))
    np.testing.assert_allclose(score.numpy(), posterior.rewards["reward"])
    np.testing.assert_allclose(posterior.log_likelihood["reward"], score.numpy() / 0.1, rtol=1e-5)
    return float(score.mean()), played


def test_cartpole():
    """A short training improves on the mean return of a uniform policy, which is 22."""
    score, played = cartpole(seed=0, num_steps=12, schedule="constant")
    assert score > 150, score
    assert played < 20_000


@pytest.mark.long
@pytest.mark.parametrize("seed", range(3))
def test_cartpole_is_solved(seed):
    score, played = cartpole(seed, num_steps=30, schedule="linear")
    assert score >= 475, score
    assert played < 250_000


WORLD = TabularEnvironment(small_world())
UNTRAINED = {"mlp": lambda: MLPPolicy(WORLD, seed=1), "table": lambda: TabularPolicy.uniform(3, 2)}


@pytest.mark.parametrize("untrained", UNTRAINED.values(), ids=UNTRAINED)
def test_trainings_do_not_share_parameters(untrained):
    """Pyro stores parameters by name, and would train the first policy's in place of the second's."""
    control = Control(WORLD, BETA, HORIZON)
    policies = [untrained() for _ in range(2)]
    for guide in [control.guide(policy) for policy in policies]:
        SVI(num_steps=5, optimizer=Adam(0.1), guide=guide, num_samples=1, seed=0, progress=False).run(control)
    for one, other, begun in zip(*(p.parameters() for p in (*policies, untrained())), strict=True):
        assert one is not other
        assert torch.equal(one, other)
        assert not torch.equal(one, begun)


@pytest.mark.parametrize("name", UNTRAINED)
def test_a_policy_is_saved_with_its_posterior(tmp_path, name):
    environment, untrained = WORLD, UNTRAINED[name]
    control = Control(environment, BETA, HORIZON)
    engine = SVI(num_steps=3, guide=control.guide(untrained()), num_samples=2, seed=0, progress=False)
    trained = engine.run(control)
    loaded = Posterior.load(trained.save(tmp_path / "run"))
    policy = untrained().load_pretrained(loaded.policy_path)
    for one, other, begun in zip(*(p.parameters() for p in (policy, trained.policy, untrained())), strict=True):
        assert torch.equal(one, other)
        assert not torch.equal(one, begun)
    with pytest.raises(ValueError, match="size mismatch"):
        MLPPolicy(environment, hidden=(5, 5)).load_pretrained(loaded.policy_path) if name == "mlp" else (
            TabularPolicy.uniform(3, 4).load_pretrained(loaded.policy_path)
        )


RESUMED = {
    "episodes and a critic": (GymEnvironment("CartPole-v1"), 30, MLPPolicy, Critic()),
    "values of states": (WORLD, 4, lambda world: TabularPolicy.uniform(3, 2), StateValues(3, 2)),
}


@pytest.mark.parametrize("name", RESUMED)
def test_a_training_resumes(name, tmp_path):
    """A training that was stopped resumes bit-identically, episodes and baseline included."""
    environment, horizon, policy, baseline = RESUMED[name]
    control = Control(environment, beta=0.1, horizon=horizon)

    def train(folder, *callbacks):
        settings = {"num_steps": 5, "num_samples": 2, "seed": 0, "progress": False, "callbacks": callbacks}
        guide, checkpoint = control.guide(policy(environment)), Checkpointing(tmp_path / folder, every=2)
        return SVI(objective=ReverseKL(4, baseline), guide=guide, checkpoint=checkpoint, **settings).run(control)

    with pytest.raises(Killed):
        train("broken", killer(3))
    assert_same(train("broken"), train("whole"))


@pytest.mark.long
def test_acrobot():
    """An environment with three actions and no vectorised version is trained on, and the policy is a proposal."""
    environment = GymEnvironment("Acrobot-v1")
    control = Control(environment, beta=1.0, horizon=30)
    policy = MLPPolicy(environment)
    guide = control.guide(policy)
    engine = SVI(num_steps=2, objective=ReverseKL(4, Critic()), guide=guide, num_samples=4, seed=0, progress=False)
    posterior = engine.run(control)
    assert np.isfinite(posterior.stats["gradient_norm"]).all()
    weighted = ImportanceSampling(num_particles=8, guide=guide, seed=0, progress=False).run(control)
    value = torch.from_numpy(weighted.samples["trajectory"])
    assert set(actions(value).unique().tolist()) <= {-1, 0, 1, 2}
    with torch.no_grad():
        log_q = control.trajectory(policy).log_prob(value).numpy()
    expected = returns(value).numpy() / 1.0 + (actions(value) >= 0).sum(-1).numpy() * -np.log(3) - log_q
    np.testing.assert_allclose(weighted.log_weights, expected, atol=1e-4)


def test_stock_pyro_trains_it_too():
    environment = TabularEnvironment(small_world())
    control = Control(environment, BETA, HORIZON)
    policy = MLPPolicy(environment, seed=0)
    before = [p.detach().clone() for p in policy.parameters()]
    with pyro.get_param_store().scope():
        pyro.set_rng_seed(0)
        loss = pyro.infer.Trace_ELBO(num_particles=16, vectorize_particles=True, max_plate_nesting=2)
        svi = pyro.infer.SVI(control, control.guide(policy), pyro.optim.Adam({"lr": 0.01}), loss)
        losses = [svi.step() for _ in range(3)]
    assert np.isfinite(losses).all()
    assert all(not torch.equal(p, old) for p, old in zip(policy.parameters(), before, strict=True))
