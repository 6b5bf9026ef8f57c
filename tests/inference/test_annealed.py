"""Annealed SMC against exact posteriors: log Z, expectations, the ladder, and what is kept when a run breaks off."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.gradients import perturbed
from support.models import table_lm
from support.programs import FUNCTIONS, PROMPTS, SHORT, case, rewarded
from support.statistics import assert_agrees, assert_estimate, assert_evidence, assert_roots_follow

from bayeslm.inference import Exact, RunError
from bayeslm.inference.annealed import AnnealedSMC, next_inverse_temperature
from bayeslm.models.rewards.rehearsal import is_rehearsal

CHAINS = 64
LADDER = (0.15, 0.4, 0.7, 1.0)


def annealed(**settings) -> AnnealedSMC:
    return AnnealedSMC(**({"num_particles": 32, "num_chains": CHAINS, "seed": 0, "progress": False} | settings))


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        pytest.param("table", {"ladder": LADDER}, marks=pytest.mark.long),
        ("table", {}),
        ("table", {"ladder": LADDER, "ess_threshold": 1.0, "resampling": "multinomial", "num_particles": 24}),
        ("llama", {"ladder": (0.3, 1.0), "ess_threshold": 0.9}),
    ],
    ids=str,
)
def test_agrees_with_exact(kind, settings):
    """E[Z-hat / Z] = 1 where the ladder is given; the expected reward, length and marginals."""
    _, model, exact = case(kind, 0.8)
    posterior = annealed(**settings).run(model, PROMPTS)
    assert posterior.kind == "particles"
    assert_agrees(posterior, exact, FUNCTIONS, unbiased="ladder" in settings)


def test_a_policy_may_propose_the_suffixes():
    lm, model, exact = case("table", 0.8)
    posterior = annealed(ladder=LADDER, proposal=perturbed(lm)).run(model, PROMPTS)
    assert_agrees(posterior, exact, FUNCTIONS)


def test_moves_make_z_hat_more_precise():
    """Its variance is less than half of what importance sampling has with as many particles, by Exact."""
    _, model, exact = case("table", 0.8)
    posterior = annealed(num_particles=32).run(model, PROMPTS)
    ratios = np.exp(posterior.log_weights - exact.log_evidence).mean(1)
    importance = np.exp(exact.log_likelihood["reward"] - exact.log_evidence)
    relative = (exact.weights() * importance).sum((0, 1)) - 1  # the variance of one prior draw's weight
    assert (ratios.var(0, ddof=1) < relative / 32 / 2).all()


# -- the ladder --------------------------------------------------------------------------------------------------------


def test_a_step_goes_as_far_as_the_conditional_ess_allows():
    """CESS = share of the particles that are alive, each chain and prompt by its own likelihoods; never past 1."""
    torch.manual_seed(0)
    likelihood = torch.randn(3, 500, 2) * torch.tensor([1.0, 30.0])
    likelihood[0, :100, 1] = -torch.inf
    likelihood[2, :, 0] = 0.1 * likelihood[2, :, 0]
    weights = torch.randn(3, 500, 2)
    gamma = torch.tensor([[0.0, 0.0], [0.3, 0.99], [0.5, 0.0]])
    new = next_inverse_temperature(weights, likelihood, gamma, 0.8)
    assert (new > gamma).all()
    for chain in range(3):
        for column in range(2):
            alive = likelihood[chain, :, column] > -torch.inf
            w = weights[chain, alive, column].double().softmax(0)
            step = (new - gamma)[chain, column].double()
            v = (step * likelihood[chain, alive, column].double()).exp()
            cess = (w @ v) ** 2 / (w @ v**2)
            assert abs(cess - 0.8) < 1e-3 or (new[chain, column] == 1 and cess > 0.8)
    assert new[2, 0] == 1
    assert (new[:, 1] < 1).sum() >= 2


def test_each_prompt_has_a_ladder_of_its_own():
    lm = table_lm(order=2, seed=0, vocab=4)
    model = rewarded(lm, 4, lambda x: torch.tensor([0.01, 3.0]) * (x == 1).sum(-1))
    posterior = annealed(num_chains=3, num_particles=100).run(model, SHORT)
    ladder = posterior.stats["inverse_temperatures"]  # (chain, step, prompt)
    assert (ladder[..., 0] == 1).all()  # next to nothing to anneal: a single step
    assert (ladder[:, 0, 1] < 0.5).all()
    assert (np.diff(ladder[..., 1], axis=1) >= 0).all()
    assert (ladder[:, -1] == 1).all()
    assert len(np.unique(ladder[:, 0, 1])) == 3
    shape = ladder.shape
    assert posterior.stats["ess_by_step"].shape == posterior.stats["resampled"].shape == shape
    assert posterior.stats["ancestors"].shape == (3, shape[1], 100, 2)
    assert_roots_follow(posterior)
    assert (posterior.stats["resampled"][..., 0] == 0).all()
    assert posterior.stats["resampled"][..., 1].any()


def test_a_constraint_costs_no_step():
    """A third of the prior breaks a constraint: those die at the first step, and the ladder is as long as without."""
    lm = table_lm(order=2, seed=0, vocab=4)
    model = rewarded(lm, 4, lambda x: torch.where(x[..., 0] == 1, -torch.inf, 0.2 * (x == 2).sum(-1)))
    exact = Exact().run(model, SHORT)
    posterior = annealed(ess_threshold=1.0).run(model, SHORT)
    assert posterior.stats["inverse_temperatures"].shape[1] <= 2
    assert (posterior.log_joint[posterior.log_weights > -np.inf] > -np.inf).all()
    assert_agrees(posterior, exact, [lambda p: p.samples["completion"][..., 0] == 2], unbiased=False)


# -- the contract --------------------------------------------------------------------------------------------------


def test_an_interruption_cools_what_there_is():
    """The particles so far, weighted as if the ladder ended in one jump: still right, with fewer sweeps."""
    _, inner, exact = case("table", 0.8)
    calls, error = 0, KeyboardInterrupt()

    def model(prompts):
        nonlocal calls
        calls += not is_rehearsal()
        if calls == 5:
            raise error
        inner(prompts)

    engine = annealed(num_particles=100)
    posterior = engine.run(model, PROMPTS)
    assert posterior.stats["interrupted"]
    assert calls == 5
    ladder = posterior.stats["inverse_temperatures"]
    assert (ladder[:, -1] == 1).all()
    assert (ladder[:, -2] < 1).mean() > 0.5
    assert_evidence(posterior, exact.log_evidence)
    calls, error = 0, RuntimeError("the reward's server is down")
    with pytest.raises(RunError, match="server is down") as caught:
        engine.run(model, PROMPTS)
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert len(caught.value.so_far.particles) == 100 * CHAINS
    assert f"{100 * CHAINS} particles" in str(caught.value)


def test_a_chain_may_die_alone():
    """Its Z-hat is 0; the others' are not."""
    lm = table_lm(order=1, seed=0, vocab=8)
    model = rewarded(lm, 2, lambda x: torch.where((x[..., 0] == 3), 0.0, -torch.inf))
    posterior = annealed(num_chains=40, num_particles=4).run(model, SHORT)
    exact = Exact().run(model, SHORT)
    alive = np.isfinite(posterior.log_weights).any(1)
    assert alive.any(0).all()
    assert not alive.all()
    ratio = np.exp(posterior.log_evidence - exact.log_evidence)
    assert_estimate(ratio, ratio * posterior.log_evidence_stderr, 1.0)


@pytest.mark.parametrize(
    "settings",
    [
        {"num_particles": 0},
        {"num_sweeps": 0},
        {"cess": 1.0},
        {"ess_threshold": 1.5},
        {"resampling": "best"},
        {"step_size": -1.0},
        {"ladder": ()},
        {"ladder": (0.5, 0.5, 1.0)},
        {"ladder": (0.0, 1.0)},
        {"ladder": (0.5, 0.9)},
    ],
    ids=str,
)
def test_settings_are_checked(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        AnnealedSMC(**settings)
