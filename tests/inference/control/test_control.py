"""Engines on control programs, against soft value iteration: evidence, posteriors, gradients, policies."""

from __future__ import annotations

import math

import pyro
import pytest
import torch
from support.gradients import assert_unbiased, gradients
from support.processes import all_episodes, random_mdp, random_policy
from support.statistics import assert_estimate, assert_evidence, assert_mean

from bayeslm.inference import SVI, ImportanceSampling, ProgramError, RejectionSampling
from bayeslm.inference.control import ControlledSMC, SoftValueIteration, StateValues
from bayeslm.inference.training import Adam, Critic, LogVariance, ReverseKL, StatefulLoss, Tempering
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
    returns,
)

STARTS = torch.tensor([0, 2])
HORIZON, BETA = 4, 1.5


def problem(seed: int = 0, prior=None, **kwargs) -> tuple[MDP, Control]:
    mdp = random_mdp(seed, **kwargs)
    return mdp, Control(TabularEnvironment(mdp), BETA, HORIZON, prior)


# -- the posterior over trajectories -----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.long) for seed in (1, 2))])
def test_importance_sampling_finds_the_evidence_and_the_first_action(seed):
    mdp, control = problem(seed)
    exact = SoftValueIteration(BETA, HORIZON, "tilted").run(mdp)
    posterior = ImportanceSampling(num_particles=4000, seed=seed).run(control, STARTS)
    assert_evidence(posterior, exact.values[0, STARTS] / BETA)
    assert (posterior.log_evidence_stderr < 0.1).all()
    weights = torch.as_tensor(posterior.weights()[0])
    first = torch.as_tensor(posterior.samples["trajectory"])[0, :, :, 0, 0] == 1
    share = (weights * first).sum(0)
    stderr = (share * (1 - share) * weights.square().sum(0)).sqrt()
    assert_estimate(share, stderr, exact.policy[0, STARTS, 1])


@pytest.mark.parametrize("seed", range(2))
def test_any_policy_may_propose(seed):
    """The posterior's policy is a better proposal than the prior; weights are ratios of policies, dynamics cancel."""
    mdp, control = problem(seed)
    exact = SoftValueIteration(BETA, HORIZON, "tilted").run(mdp)
    guide = control.guide(TabularPolicy(exact.policy.log()))
    guided = ImportanceSampling(num_particles=4000, guide=guide, seed=seed).run(control, STARTS)
    blind = ImportanceSampling(num_particles=4000, seed=seed).run(control, STARTS)
    assert_evidence(guided, exact.values[0, STARTS] / BETA)
    assert guided.stats["ess"].sum() > 1.2 * blind.stats["ess"].sum()


def test_in_a_deterministic_environment_the_best_policy_is_the_posterior():
    """Every weight of the soft-optimal policy's trajectories is Z."""
    mdp, control = problem(1, deterministic=True)
    exact = SoftValueIteration(BETA, HORIZON).run(mdp)
    guide = control.guide(TabularPolicy(exact.policy.log()))
    posterior = ImportanceSampling(num_particles=100, guide=guide, seed=0).run(control, STARTS)
    expected = (exact.values[0, STARTS] / BETA).expand(1, 100, 2)
    torch.testing.assert_close(torch.as_tensor(posterior.log_weights).double(), expected, atol=1e-4, rtol=1e-4)


def test_rejection_sampling_draws_exactly():
    mdp, control = problem(2)
    exact = SoftValueIteration(BETA, HORIZON, "tilted").run(mdp)
    bound = HORIZON * float(mdp.rewards.max()) / BETA
    posterior = RejectionSampling(num_samples=200, log_bound=bound, seed=0).run(control, STARTS)
    first = torch.as_tensor(posterior.samples["trajectory"])[0, :, :, 0, 0] == 1
    share = exact.policy[0, STARTS, 1]
    assert_estimate(first.double().mean(0), (share * (1 - share) / 200).sqrt(), share)


# -- gradients of the ELBO ---------------------------------------------------------------------------------------------

COPIES = torch.arange(3).repeat(20)  # starts: many independent terms in a gradient


def elbo_problem(seed: int = 0):
    """Return a policy that is neither the prior nor the best, and the exact gradient of its ELBO."""
    prior = TabularPolicy(random_policy(random_mdp(seed), seed + 5)).requires_grad_(False)
    mdp, control = problem(seed, prior)
    policy = TabularPolicy(random_policy(mdp, seed + 1, HORIZON))
    logits = policy.logits.detach().double().requires_grad_()
    values = SoftValueIteration(BETA, HORIZON).evaluate(mdp, logits.softmax(-1), prior.probabilities)
    elbo = values[0, COPIES].sum() / BETA
    (gradient,) = torch.autograd.grad(elbo, logits)
    return control, policy, elbo.detach(), gradient.float().reshape(-1)


def learned(baseline, control, policy, steps: int = 20):
    """A loss whose baseline has learned from some steps."""
    objective = StatefulLoss(ReverseKL(4, baseline))
    for _ in range(steps):
        objective.loss_and_grads(control, control.guide(policy), COPIES)
    return objective


@pytest.mark.parametrize("baseline", [None, Critic(1e-2), StateValues(4, 2)], ids=["leave-one-out", "critic", "values"])
def test_gradients_are_those_of_the_soft_value(baseline):
    control, policy, elbo, gradient = elbo_problem()
    pyro.set_rng_seed(0)
    objective = StatefulLoss(ReverseKL(4)) if baseline is None else learned(baseline, control, policy)
    found = gradients(objective, control, control.guide(policy), [policy.logits], (COPIES,), repeats=50)
    assert_unbiased(-found, gradient)
    with torch.no_grad():
        losses = torch.tensor([objective.loss(control, control.guide(policy), COPIES) for _ in range(30)])
    assert_mean(losses, -float(elbo))


def test_state_values_lower_the_variance():
    """Rewards to go minus the state's value have a smaller variance than returns minus their mean."""
    control, policy, _, _ = elbo_problem()
    spread = {}
    for name, objective in {
        "returns": ReverseKL(4),
        "values": learned(StateValues(4, HORIZON), control, policy, 50),
    }.items():
        pyro.set_rng_seed(1)
        found = gradients(objective, control, control.guide(policy), [policy.logits], (COPIES,), repeats=30)
        spread[name] = float(found.var(0).sum())
    assert spread["values"] < 0.6 * spread["returns"]


def test_state_values_learn_the_soft_values_of_the_policy():
    control, policy, _, _ = elbo_problem(3)
    mdp = control.environment.mdp
    values = StateValues(4, HORIZON, decay=0.99)
    pyro.set_rng_seed(0)
    objective = learned(values, control, policy, 100)
    (table,) = objective.state.values()
    found, visits = table.reshape(2, HORIZON, 4)
    exact = SoftValueIteration(BETA, HORIZON).evaluate(mdp, policy.probabilities, control.prior.probabilities) / BETA
    visited = visits > 500
    assert visited.sum() >= 9
    torch.testing.assert_close(found[visited].double(), exact[:-1][visited], atol=0.15, rtol=0.05)


def test_a_factor_of_the_whole_trajectory_has_the_same_gradient():
    """Without the plate of steps all rewards belong to every action, and the gradient is unbiased."""
    control, policy, _, gradient = elbo_problem(1)

    def model(starts):
        distribution = control.trajectory(control.prior, starts)
        with pyro.plate("prompts", len(starts)):
            pyro.factor("return", returns(pyro.sample("trajectory", distribution)) / BETA)

    pyro.set_rng_seed(0)
    objective = ReverseKL(4, StateValues(4, 2))
    found = gradients(objective, model, control.guide(policy), [policy.logits], (COPIES,), repeats=55)
    assert_unbiased(-found[5:], gradient)


def test_rewards_of_steps_follow_the_beta_schedule():
    """At an inverse temperature of 1/2, gradients are those of twice beta."""
    control, policy, _, _ = elbo_problem()
    mdp = control.environment.mdp
    logits = policy.logits.detach().double().requires_grad_()
    values = SoftValueIteration(2 * BETA, HORIZON).evaluate(mdp, logits.softmax(-1), control.prior.probabilities)
    (gradient,) = torch.autograd.grad(values[0, COPIES].sum() / (2 * BETA), logits)
    pyro.set_rng_seed(0)
    objective = StatefulLoss(ReverseKL(4, StateValues(4, HORIZON, decay=0.99)))
    objective.inverse_temperature = 0.5
    found = gradients(objective, control, control.guide(policy), [policy.logits], (COPIES,), repeats=100)
    assert_unbiased(-found[5:], gradient.float().reshape(-1))
    (table,) = objective.state.values()
    expected = values[:-1].detach() / (2 * BETA)
    visited = table[1].reshape(HORIZON, 4) > 1000
    torch.testing.assert_close(table[0].reshape(HORIZON, 4)[visited].double(), expected[visited], atol=0.06, rtol=0.02)


# -- policies ----------------------------------------------------------------------------------------------------------


def missed(control: Control, mdp: MDP, policy) -> tuple[float, float]:
    """Return the difference of a policy's soft value to the best, and the best."""
    solver = SoftValueIteration(control.beta, control.horizon)
    best = float(mdp.initial @ solver.run(mdp).values[0])
    return best - float(mdp.initial @ solver.evaluate(mdp, policy.probabilities)[0]), best


def gap(control: Control, mdp: MDP, policy) -> float:
    """Return the difference of a policy's soft value to the best, as a share of the best."""
    less, best = missed(control, mdp, policy)
    return less / abs(best)


def gym_problem(name: str, beta: float, horizon: int, **kwargs) -> tuple[MDP, Control]:
    gymnasium = pytest.importorskip("gymnasium")
    mdp = MDP.from_gymnasium(gymnasium.make(name, **kwargs))
    return mdp, Control(TabularEnvironment(mdp), beta, horizon)


@pytest.mark.parametrize(
    "objective", [ReverseKL(64, StateValues(4, HORIZON)), LogVariance(64)], ids=["elbo", "variance"]
)
def test_svi_finds_the_best_policy(objective):
    mdp, control = problem(0)
    policy = TabularPolicy.uniform(4, 2, HORIZON)
    svi = SVI(num_steps=100, optimizer=Adam(0.2), objective=objective, guide=control.guide(policy), seed=0)
    trained = svi.run(control)
    assert trained.policy is policy
    less, best = missed(control, mdp, policy)
    assert 0 <= less / BETA < 0.02  # nats
    elbo = trained.stats["elbo"][0, -20:, 0]
    assert abs(elbo.mean() - best / BETA) < 5 * elbo.std() / 20**0.5 + 0.05


SETTINGS = [
    ("FrozenLake-v1", 0.03, 100, {"is_slippery": False}),
    ("FrozenLake-v1", 0.03, 200, {"is_slippery": False, "map_name": "8x8"}),
    ("FrozenLake-v1", 0.003, 100, {}),
    ("FrozenLake-v1", 0.003, 200, {"map_name": "8x8"}),
    ("CliffWalking-v1", 1.0, 100, {}),
]

QUICK = {"num_steps": 400, "optimizer": Adam(0.2, schedule="cosine"), "callbacks": [Tempering(0.1, 0.4)]}
SLOW = {"num_steps": 1000, "optimizer": Adam(0.1), "callbacks": [Tempering(0.03, 0.5)]}


@pytest.mark.long
@pytest.mark.parametrize(
    ("setting", "training", "limit"),
    [(setting, QUICK, 0.01) for setting in (*SETTINGS[:3], SETTINGS[4])] + [(SETTINGS[3], SLOW, 0.02)],
)
def test_svi_is_close_to_the_soft_optimal_value(setting, training, limit):
    """Within 1%, and within 2% on the slippery 8x8 lake, which is the hardest."""
    name, beta, horizon, kwargs = setting
    mdp, control = gym_problem(name, beta, horizon, **kwargs)
    policy = CountdownPolicy(mdp.num_states, mdp.num_actions, horizon)
    SVI(
        **training,
        objective=ReverseKL(1000, StateValues(mdp.num_states)),
        guide=control.guide(policy),
        num_samples=16,
        seed=0,
    ).run(control)
    assert 0 <= gap(control, mdp, policy) < limit


# -- planning ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dynamics", ["tilted", "fixed"])
@pytest.mark.parametrize("seed", range(3))
def test_controlled_smc_finds_the_evidence(dynamics, seed):
    """The evidence is unbiased under both plans, with resampling at every step."""
    mdp, control = problem(seed)
    exact = SoftValueIteration(BETA, HORIZON, "tilted").run(mdp)
    smc = ControlledSMC(num_sweeps=2, num_particles=100, num_chains=20, dynamics=dynamics, ess_threshold=1.0, seed=seed)
    posterior = smc.run(control, STARTS)
    assert posterior.stats["resampled"].any()
    assert (posterior.log_evidence_stderr < 0.1).all()
    assert_evidence(posterior, exact.values[0, STARTS] / BETA)
    weights = torch.as_tensor(posterior.weights())
    first = torch.as_tensor(posterior.samples["trajectory"])[..., 0, 0] == 1
    by_chain = (weights * first).sum(1) / weights.sum(1)  # an estimate for each chain
    assert_estimate(by_chain.mean(0), by_chain.std(0) / 20**0.5 + 0.01, exact.policy[0, STARTS, 1])


@pytest.mark.parametrize("dynamics", ["tilted", "fixed"])
def test_a_prior_may_change_with_the_steps(dynamics):
    """Its first step makes improbable the action that is best later. log Z is computed from all episodes."""
    forward = torch.tensor([1, 2, 2])
    transitions = torch.stack([torch.eye(3), torch.eye(3)[forward]], 1)
    rewards = torch.zeros(3, 2, 3)
    rewards[:, 1] = 2.0
    mdp = MDP(transitions, rewards, torch.zeros(3, dtype=torch.bool), torch.tensor([1.0, 0.0, 0.0]))
    logits = torch.zeros(HORIZON, 3, 2)
    logits[0, :, 1], logits[1:, :, 1] = -8.0, 1.0
    p = logits.double().softmax(-1)
    z = sum(
        chance * math.prod(float(p[t, s, a]) * math.exp(r / BETA) for t, (s, a, r) in enumerate(steps))
        for chance, steps in all_episodes(mdp, 0, HORIZON)
    )
    control = Control(TabularEnvironment(mdp), BETA, HORIZON, TabularPolicy(logits))
    smc = ControlledSMC(num_sweeps=3, num_particles=100, num_chains=4, dynamics=dynamics, seed=0)
    posterior = smc.run(control)
    assert posterior.log_evidence_stderr < 0.1
    assert_estimate(posterior.log_evidence, posterior.log_evidence_stderr + 1e-4, math.log(z))
    exact = SoftValueIteration(BETA, HORIZON, dynamics).run(mdp, p)
    torch.testing.assert_close(posterior.policy.probabilities[:, 0], exact.policy[:, 0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("dynamics", ["tilted", "fixed"])
def test_the_exact_plan_makes_every_particle_exact(monkeypatch, dynamics):
    """Without a defensive share all particles have equal weights before the end and, in a deterministic environment,
    the weight Z at the end. With fixed dynamics weights are equal in a random environment too.
    """
    mdp, control = problem(1, deterministic=dynamics == "tilted")
    exact = SoftValueIteration(BETA, HORIZON, dynamics).run(mdp)
    monkeypatch.setattr(SoftValueIteration, "run", lambda *_: exact)
    smc = ControlledSMC(num_sweeps=1, num_particles=20, defensive=0.0, dynamics=dynamics, seed=0)
    posterior = smc.run(control, STARTS)
    assert posterior.stats["ess_by_step"] == pytest.approx(20, abs=1e-3)
    if dynamics == "fixed":
        return
    expected = (exact.values[0, STARTS] / BETA).expand(1, 20, 2)
    torch.testing.assert_close(torch.as_tensor(posterior.log_weights).double(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dynamics", ["tilted", "fixed"])
def test_the_plan_is_the_policy_of_its_dynamics(dynamics):
    mdp, control = problem(3)
    smc = ControlledSMC(num_sweeps=4, num_particles=2000, dynamics=dynamics, seed=0)
    plan = smc.run(control).policy.probabilities
    exact = SoftValueIteration(BETA, HORIZON, dynamics).run(mdp).policy
    other = SoftValueIteration(BETA, HORIZON, "fixed" if dynamics == "tilted" else "tilted").run(mdp).policy
    off = (plan - exact)[:, :3].abs().max()
    assert off < 0.05
    assert (plan - other)[:, :3].abs().max() > 2 * off


@pytest.mark.parametrize(
    ("name", "beta", "horizon", "kwargs"),
    [SETTINGS[0], pytest.param(*SETTINGS[1], marks=pytest.mark.long), SETTINGS[2], SETTINGS[4]],
)
def test_planning_is_within_a_hundredth_of_the_soft_optimal_value(name, beta, horizon, kwargs):
    mdp, control = gym_problem(name, beta, horizon, **kwargs)
    smc = ControlledSMC(num_sweeps=6, num_particles=1500, dynamics="fixed", seed=0)
    assert -1e-9 <= gap(control, mdp, smc.run(control).policy) < 0.01


@pytest.mark.long
@pytest.mark.parametrize(("name", "beta", "horizon", "kwargs"), [SETTINGS[3], ("Taxi-v4", 1.0, 200, {})])
@pytest.mark.parametrize("seed", range(3))
def test_planning_in_larger_worlds(name, beta, horizon, kwargs, seed):
    mdp, control = gym_problem(name, beta, horizon, **kwargs)
    smc = ControlledSMC(num_sweeps=8, num_particles=3000, dynamics="fixed", seed=seed)
    assert -1e-9 <= gap(control, mdp, smc.run(control).policy) < 0.01


def test_planning_with_copies_of_gymnasium():
    """Planning by copies of the environment, without its table, is within a hundredth of the best too."""
    mdp, table = gym_problem("FrozenLake-v1", 0.1, 12, is_slippery=False)
    control = Control(GymEnvironment("FrozenLake-v1", is_slippery=False), 0.1, 12)
    posterior = ControlledSMC(num_sweeps=4, num_particles=150, dynamics="fixed", seed=0).run(control)
    assert -1e-9 <= gap(table, mdp, posterior.policy) < 0.01
    exact = float(mdp.initial @ SoftValueIteration(0.1, 12).run(mdp).values[0]) / 0.1
    assert_estimate(posterior.log_evidence, posterior.log_evidence_stderr + 0.02, exact)
    assert posterior.stats["environment_steps"] > 1000


def test_unsupported_programs_and_settings_are_refused():
    _, control = problem()
    with pytest.raises(ProgramError, match="discrete states"):
        ControlledSMC().run(Control(GymEnvironment("CartPole-v1"), 1.0, 5))
    with pytest.raises(ProgramError, match="Control program"):
        ControlledSMC().run(lambda: pyro.sample("trajectory", control.trajectory(control.prior)))
    with pytest.raises(ValueError, match="defensive"):
        ControlledSMC(defensive=2.0)
    with pytest.raises(ValueError, match="fixed"):
        ControlledSMC(dynamics="warped")
    with pytest.raises(ValueError, match="decay"):
        StateValues(4, decay=1.0)
    with pytest.raises(ProgramError, match=r"StateValues\(5\).*'trajectory'.*6 numbers"):
        StatefulLoss(ReverseKL(2, StateValues(5))).loss_and_grads(control, control.guide(TabularPolicy.uniform(4, 2)))
    with pytest.raises(ProgramError, match="guide"):
        SVI(num_steps=1).run(control)


def test_a_program_may_have_a_trajectory_and_other_latents():
    """beta is uncertain in the same program; weights are those of the joint distribution."""
    mdp = random_mdp(0)
    environment = TabularEnvironment(mdp)

    def model():
        with pyro.plate("prompts", 1):
            cold = pyro.sample("cold", pyro.distributions.Bernoulli(0.3))
            distribution = Trajectory(environment, UniformPolicy(2), HORIZON, torch.tensor([0]))
            value = pyro.sample("trajectory", distribution)
            pyro.factor("return", returns(value) * torch.where(cold > 0, 2.0, 0.5))

    posterior = ImportanceSampling(num_particles=6000, seed=0).run(model)
    z = torch.stack([SoftValueIteration(b, HORIZON, "tilted").run(mdp).values[0, 0] / b for b in (2.0, 0.5)]).exp()
    evidence = 0.7 * z[0] + 0.3 * z[1]
    assert_evidence(posterior, evidence.log())
    weights = torch.as_tensor(posterior.weights()[0, :, 0])
    share = float((weights * torch.as_tensor(posterior.samples["cold"])[0, :, 0]).sum())
    assert abs(share - float(0.3 * z[1] / evidence)) < 0.1
    assert (actions(torch.as_tensor(posterior.samples["trajectory"])) >= -1).all()
