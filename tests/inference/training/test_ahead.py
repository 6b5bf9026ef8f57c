"""Draws of older weights: with their own density, or refused; and those that an engine makes while steps are taken."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.enumerated import PROMPTS, Problem, T, kl_to
from support.samplers import Elsewhere, Perturbed

from bayeslm.inference import SVI, ProgramError, RunError
from bayeslm.inference.program import inspect, seeded
from bayeslm.inference.training import (
    Adam,
    Ahead,
    Checkpointing,
    FDivergence,
    ForwardKL,
    LogVariance,
    Renyi,
    Replay,
    ReverseKL,
    of_guide,
)
from bayeslm.models import TiltedLM
from bayeslm.models.lm import SamplerError, remembering

SOURCES = {"the sampler's lag": (of_guide, 2), "replay": (Replay(64, every=2), 1), "ahead": (Ahead(2), 0)}


def steps(objective, small, number=6):
    """Estimates of an objective, between which the policy changes; the log-densities of each, and the policies then."""
    program, state, seen, policies = inspect(small.model, PROMPTS), {}, [], []
    loss = objective.loss
    object.__setattr__(objective, "loss", lambda densities: (seen.append(densities), loss(densities))[1])
    estimates = []
    with seeded(0), remembering():
        for _ in range(number):
            policies.append(small.policy(PROMPTS, T).log_prob(small.x).detach())
            estimates.append(objective.step(program, small.guide, state))
            state = estimates[-1].state
            with torch.no_grad():
                for p in small.parameters:
                    p.add_(0.3 * torch.randn_like(p))
    return estimates, seen, policies


def at(small, log_prob, values):
    """The entries (particle, prompt) of a table (completion, prompt) at values (particle, prompt, token)."""
    which = (small.x[:, :, None] == values.transpose(0, 1)[None]).all(-1).long().argmax(0)  # (prompt, particle)
    return log_prob.gather(0, which.T)


@pytest.mark.parametrize("make", [LogVariance, ForwardKL, FDivergence])
@pytest.mark.parametrize("name", SOURCES)
def test_stale_draws_have_the_density_of_the_weights_that_drew_them(name, make):
    """By enumeration: log s is an older policy's, log q the present one's."""
    source, lag = SOURCES[name]
    small = Problem()
    small.policy.sampler = Elsewhere(lag)
    objective = make(source=source) if make is FDivergence else make(8, source)
    with pytest.warns(match="differ from this network's"):
        estimates, seen, policies = steps(objective, small)
    drawn_at = {
        "the sampler's lag": [0, 0, 0, 1, 2, 3],
        "replay": [0, 0, 0, 0, 2, None],
        "ahead": [0, 0, 0, 1, 2, 3],
    }
    for step, (estimate, densities) in enumerate(zip(estimates, seen, strict=True)):
        values = estimate.particles.values["completion"]
        torch.testing.assert_close(densities.log_q.detach(), at(small, policies[step], values), atol=1e-5, rtol=0)
        if (then := drawn_at[name][step]) is not None:
            torch.testing.assert_close(densities.log_s, at(small, policies[then], values), atol=1e-5, rtol=0)
        expected = (densities.log_target - densities.log_s).logsumexp(0) - np.log(len(densities.log_s))
        torch.testing.assert_close(estimate.figures["log_evidence"], expected)
    assert (seen[-1].log_s - seen[-1].log_q).abs().max() > 0.1


@pytest.mark.parametrize("objective", [ReverseKL(8), Renyi(num_particles=8)], ids=["ReverseKL", "Renyi"])
def test_objectives_that_need_the_policys_own_draws_refuse_stale_ones(objective):
    small = Problem()
    small.policy.sampler = Elsewhere(lag=1)
    objective.step(inspect(small.model, PROMPTS), small.guide)
    with torch.no_grad():
        small.parameters[0].add_(torch.randn_like(small.parameters[0]))
    with pytest.raises(ProgramError, match=f"{type(objective).__name__} needs .* the sampler"):
        objective.step(inspect(small.model, PROMPTS), small.guide)


# -- drawing while steps are taken ---------------------------------------------------------------------------------


def train(small, engine=None, *, steps=12, ahead=1, prompts=PROMPTS, **settings):
    """An SVI run whose policy's draws come from ``engine``."""
    small.lm.sampler = Elsewhere() if engine is None else engine
    objective = LogVariance(8, Ahead(ahead)) if ahead else LogVariance(8)
    settings = {"optimizer": Adam(0.05), "num_samples": 16, "seed": 0, "progress": False} | settings
    try:
        return SVI(steps, objective=objective, **settings).run(small.model, prompts)
    finally:
        small.lm.sampler = None


@pytest.mark.filterwarnings("ignore::bayeslm.posterior.DiagnosticsWarning")
def test_what_a_step_gets_depends_on_no_clock():
    small = Problem()
    slow = Elsewhere(seconds=lambda number: 0.03 * (number % 3 == 0))
    found, again = train(small, slow, ahead=2), train(small, ahead=2)
    np.testing.assert_array_equal(found.stats["elbo"], again.stats["elbo"])
    np.testing.assert_array_equal(found.samples["completion"], again.samples["completion"])
    assert found.stats["sampler_stale"] == (12 - 1) * 2 * 8  # all steps but the first


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::bayeslm.posterior.DiagnosticsWarning")
@pytest.mark.parametrize("ahead", [1, 4])
def test_it_reaches_the_posterior(ahead):
    small = Problem(order=4)
    found = train(small, steps=400, ahead=ahead)
    assert kl_to(found.policy, small).max() < 0.02


@pytest.mark.filterwarnings("ignore::bayeslm.posterior.DiagnosticsWarning")
def test_a_minibatch_comes_with_its_draws():
    """Each step learns from the prompts that the draws were asked for, and the rewards are of these."""
    small = Problem()
    model = TiltedLM(
        small.lm, lambda prompts, completions, at: [float(i) for i in at], 1.0, max_new_tokens=T, subsample_size=2
    )
    prompts = [[1 + i % 3, 1 + i // 3] for i in range(6)]
    small.lm.sampler = Elsewhere()
    engine = SVI(9, objective=LogVariance(8, Ahead(1)), optimizer=Adam(0.01), num_samples=16, seed=0, progress=False)
    found = engine.run(model, prompts, at=list(range(6)))
    small.lm.sampler = None
    np.testing.assert_allclose(found.stats["reward"], found.stats["prompts"], atol=1e-5)
    assert {*found.stats["prompts"][0, 2:8].reshape(-1)} == set(range(6))


@pytest.mark.filterwarnings("ignore::bayeslm.posterior.DiagnosticsWarning")
def test_an_error_of_the_engine_ends_the_run_which_goes_on_from_its_checkpoint(tmp_path):
    small = Problem()
    checkpoint = Checkpointing(tmp_path, every=1)
    with pytest.raises(RunError, match="the engine failed: ConnectionError: nobody answers") as caught:
        train(small, Elsewhere(dies_at=4), checkpoint=checkpoint)
    assert isinstance(caught.value.__cause__, SamplerError)
    assert caught.value.so_far.step == 4
    found, whole = train(small, checkpoint=checkpoint), train(small)
    np.testing.assert_array_equal(found.stats["elbo"][0, :4], whole.stats["elbo"][0, :4])
    assert np.isfinite(found.stats["elbo"]).all()
    assert found.stats["elbo"].shape == (1, 12, 2)


def test_refusals():
    small = Problem()
    engine = SVI(2, objective=LogVariance(8, Ahead()), seed=0, progress=False)
    with pytest.raises(ProgramError, match="the policy draws by itself: give the LanguageModel a sampler"):
        engine.run(small.model, PROMPTS)
    with pytest.raises(SamplerError, match="the engine failed: TypeError: it draws with the network that is trained"):
        train(small, Perturbed())
    with pytest.raises(ValueError, match="steps"):
        Ahead(0)
