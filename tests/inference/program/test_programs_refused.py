"""Programs, guides and settings that cannot be right get an error that names what is wrong, and nothing is lost."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from support.models import table_lm
from torch import nn

from bayeslm.inference import (
    MCMC,
    SMC,
    SVI,
    BestOfN,
    Exact,
    ImportanceSampling,
    ProgramError,
    RejectionSampling,
    RunError,
)
from bayeslm.inference.training import Adam, LogVariance
from bayeslm.models import TiltedLM
from bayeslm.models.rewards import RewardError

ENGINE = ImportanceSampling(num_particles=4, progress=False)


@pytest.mark.parametrize("beta", [0.0, -1.0, math.nan, math.inf])
def test_beta_must_be_positive_and_finite(beta):
    with pytest.raises(ValueError, match="beta must be positive and finite"):
        TiltedLM(table_lm(), lambda completions, **_: [0.0] * len(completions), beta)


@pytest.mark.parametrize(
    "make",
    [
        lambda: ImportanceSampling(num_particles=0),
        lambda: ImportanceSampling(num_particles=2.5),
        lambda: ImportanceSampling(num_chains=-1),
        lambda: RejectionSampling(max_proposals=0),
        lambda: BestOfN(n=0),
        lambda: Exact(max_atoms=0),
        lambda: SVI(num_steps=0),
    ],
)
def test_counts_must_be_positive_whole_numbers(make):
    with pytest.raises((TypeError, ValueError), match="must be a positive whole number"):
        make()


def test_settings_of_svi_are_checked():
    with pytest.raises(ValueError, match="learning_rate must be positive"):
        Adam(learning_rate=-1.0)
    with pytest.raises(ValueError, match="schedule must be one of 'constant', 'linear', 'cosine'"):
        Adam(schedule="lineer")
    with pytest.raises(ValueError, match="num_chains=1"):
        SVI(guide=lambda: None, num_chains=2)


def test_a_program_without_latents():
    with pytest.raises(ProgramError, match="no latent site"):
        ENGINE.run(lambda: pyro.sample("y", dist.Normal(0.0, 1.0), obs=torch.tensor(1.0)))


def test_a_batch_dimension_without_a_plate():
    with pytest.raises(ProgramError, match=r"'theta' has a batch dimension of size 3.*\.to_event"):
        ENGINE.run(lambda: pyro.sample("theta", dist.Normal(torch.zeros(3), 1.0)))


def test_a_factor_that_is_not_a_number_is_named():
    def model(value):
        pyro.sample("theta", dist.Normal(0.0, 1.0))
        pyro.factor("evidence", torch.tensor(value))

    with pyro.validation_enabled(True):
        for bad in (math.inf, math.nan):
            with pytest.raises(ProgramError, match=f"'evidence' has log-probability {bad}"):
                ENGINE.run(model, bad)
        with pytest.raises(ValueError, match="log_factor"):  # outside an engine Pyro checks as before
            model(math.nan)


@pytest.mark.filterwarnings("ignore:Encountered:UserWarning")
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(
    "engine",
    [
        ImportanceSampling(num_particles=300, seed=0, progress=False),
        SMC(num_particles=300, seed=0, progress=False),
        MCMC(num_samples=5, seed=0, progress=False),
        SVI(num_steps=20, num_particles=100, seed=0, progress=False),
        SVI(num_steps=20, objective=LogVariance(100), seed=0, progress=False),
    ],
    ids=["importance", "smc", "mcmc", "svi", "svi, over draws"],
)
def test_the_text_whose_factor_is_not_a_number_is_told(engine, bad):
    lm = table_lm(order=2, vocab=3)

    def model(prompts):
        with pyro.plate("prompts", len(prompts)):
            x = pyro.sample("completion", lm(prompts, max_new_tokens=3))
            count = (x == 1).float().sum(-1)
            pyro.factor("liking", torch.where(count > 2, bad, count))

    said = rf"'liking' has log-probability {bad} at particle \d+, prompt [01]"
    with pytest.raises((ProgramError, RunError), match=said) as caught:
        engine.run(model, ["a", "b"])
    error = caught.value.__cause__ if isinstance(caught.value, RunError) else caught.value  # after a step, or before
    assert isinstance(error, ProgramError)
    assert "completion: 'a a a'" in str(caught.value)


def test_a_guide_with_a_site_of_its_own():
    def guide():
        pyro.sample("thetta", dist.Normal(0.0, 1.0))

    with pytest.raises(ProgramError, match="'thetta', which the program does not have"):
        ImportanceSampling(guide=guide, progress=False).run(lambda: pyro.sample("theta", dist.Normal(0.0, 1.0)))


def test_a_program_whose_sites_come_and_go():
    state = iter(range(10))

    def model():
        pyro.sample("theta", dist.Normal(0.0, 1.0))
        if next(state) > 0:
            pyro.sample("late", dist.Normal(0.0, 1.0))

    with pytest.raises(ProgramError, match="sites changed between runs"):
        ENGINE.run(model)


def test_a_language_model_is_no_guide_of_a_program_without_completions():
    with pytest.raises(ProgramError, match="no completion site"):
        ImportanceSampling(guide=table_lm(), progress=False).run(lambda: pyro.sample("z", dist.Normal(0.0, 1.0)))


def test_discrete_latents_without_a_default_guide_are_named():
    def model():
        pyro.sample("count", dist.Poisson(3.0))

    with pytest.raises(ProgramError, match="'count'"):
        SVI(num_steps=1, progress=False).run(model)


def test_a_bound_that_does_not_hold_is_an_error_not_a_bias():
    lm = table_lm(order=2, vocab=4)
    model = TiltedLM(lm, lambda completions, **_: [float(len(c)) for c in completions], 1.0, max_new_tokens=3)
    with pytest.raises(ProgramError, match="above the bound"):
        RejectionSampling(log_bound=0.5, progress=False, seed=0).run(model, ["a"])


def test_a_reward_that_raises_shows_the_text_and_loses_no_particle():
    lm = table_lm(order=2, vocab=4)
    batches = iter(range(100))

    def moody(completions, **columns):
        if next(batches) >= 3:  # one inspection of the program, two batches of particles
            raise RuntimeError("out of patience")
        return [0.0] * len(completions)

    engine = ImportanceSampling(num_particles=30, batch_size=10, seed=0, progress=False)
    with pytest.raises(RunError, match=r"out of patience(.|\n)*completion(.|\n)*20 particles") as caught:
        engine.run(TiltedLM(lm, moody, 1.0, max_new_tokens=3), ["a"])
    assert isinstance(caught.value.__cause__, RewardError)
    assert len(caught.value.so_far.particles) == 20


def test_a_gradient_that_is_not_finite_stops_with_the_policy_kept():
    class Broken(nn.Module):
        def __init__(self, step):
            super().__init__()
            self.loc = nn.Parameter(torch.zeros(()))
            self.policy, self.good = nn.Identity(), iter(range(step))

        def forward(self):
            pyro.module("broken", self)
            lost = 0.0 if next(self.good, None) is not None else torch.sqrt(0.0 * self.loc)  # 0, with a gradient of NaN
            pyro.sample("theta", dist.Normal(self.loc + lost, 1.0))

    def train(guide):
        with pyro.get_param_store().scope():
            SVI(num_steps=3, guide=guide, progress=False).run(lambda: pyro.sample("theta", dist.Normal(1.0, 1.0)))

    with pytest.raises(FloatingPointError, match="at step 0"):  # nothing is trained yet
        train(Broken(0))
    guide = Broken(1)
    with pytest.raises(RunError, match=r"FloatingPointError: the gradient is nan(.|\n)*1 steps") as caught:
        train(guide)
    assert isinstance(caught.value.__cause__, FloatingPointError)
    assert "at step 1" in caught.value.__cause__.__notes__[0]
    assert caught.value.so_far.policy is guide.policy
    assert caught.value.so_far.step == 1
