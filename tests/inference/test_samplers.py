"""Engines whose completions another engine draws, from a distribution that is known and not the prior's or policy's."""

from __future__ import annotations

import functools
import itertools
import math

import numpy as np
import pytest
import torch
from support.enumerated import PROMPTS as BATCH
from support.enumerated import Problem, T
from support.gradients import COPIES, assert_unbiased, gradients, perturbed
from support.models import table_lm, tiny_llama
from support.programs import FUNCTIONS, PROMPTS, conversation, highest, score_table, tilted
from support.samplers import Enumerating, Perturbed
from support.statistics import assert_agrees

from bayeslm.inference import (
    MCMC,
    SMC,
    SVI,
    AnnealedSMC,
    BestOfN,
    Exact,
    ImportanceSampling,
    ProgramError,
    RejectionSampling,
    RunError,
)
from bayeslm.inference.program import inspect, seeded
from bayeslm.inference.sequential import TwistLearning
from bayeslm.inference.training import Checkpointing, ExponentialAverage, ForwardKL, LogVariance, Renyi, ReverseKL
from bayeslm.models.lm import SamplerError

FACTOR = 2.0  # of the temperature: the engine's distribution is flatter
TABLE = score_table(1, tokens=3)
ENGINES = {
    "importance": ImportanceSampling(num_particles=100, num_chains=20, seed=0, progress=False),
    "rejection": RejectionSampling(num_samples=50, num_chains=20, log_bound=highest(TABLE), seed=0, progress=False),
    "best of n": BestOfN(n=4, num_samples=50, num_chains=20, seed=0, progress=False),
}


@functools.cache
def case(kind: str):
    """A language model, a program on it, and its posterior: 400 completions a prompt."""
    lm = table_lm(order=3, seed=1) if kind == "table" else tiny_llama(seed=1)
    model = tilted(lm, TABLE)
    return lm, model, Exact(progress=False).run(model, PROMPTS)


@pytest.fixture
def drawn_by():
    """Give a language model a sampler, until the end of the test."""
    given = []

    def give(lm, sampler):
        given.append(lm)
        lm.sampler = sampler
        return sampler

    yield give
    for lm in given:
        lm.sampler = None


def check(name: str, posterior, exact) -> None:
    functions = [] if name == "best of n" else FUNCTIONS  # whose draws are not the posterior's
    assert_agrees(posterior, exact, functions, unbiased=name == "importance")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("importance", "table"),
        ("rejection", "table"),
        pytest.param("best of n", "table", marks=pytest.mark.long),
        pytest.param("importance", "llama", marks=pytest.mark.long),
    ],
)
def test_log_z_and_means_are_right_whoever_draws(name, kind, drawn_by):
    """By the engine's own density; a naive engine, which claims the network's density for its draws, fails."""
    lm, model, exact = case(kind)
    sampler = drawn_by(lm, Perturbed(factor=FACTOR))
    with pytest.warns(match="differ from this network's by .* nats a token"):
        posterior = ENGINES[name].run(model, PROMPTS)
    assert sampler.asked
    check(name, posterior, exact)
    assert 0.1 < posterior.stats["sampler_ess"] < 0.8
    assert posterior.stats["sampler_difference"][1] > 0.1
    drawn_by(lm, Perturbed(factor=FACTOR, honest=False))
    naive = ENGINES[name].run(model, PROMPTS)
    with pytest.raises(AssertionError):
        check(name, naive, exact)


def test_an_exact_engine_changes_nothing_but_who_draws(drawn_by):
    lm, model, _ = case("table")
    drawn_by(lm, Perturbed())
    posterior = ImportanceSampling(num_particles=200, seed=0, progress=False).run(model, PROMPTS)
    assert posterior.stats["sampler_draws"] == 400
    assert posterior.stats["sampler_difference"][0] < 1e-5
    assert posterior.stats["sampler_ess"] > 0.9999
    np.testing.assert_allclose(posterior.log_weights, posterior.log_likelihood["reward"], atol=1e-5)


def test_the_sampler_of_a_policy_draws_the_proposal(drawn_by):
    """Of a guide whose own density the draws do not have; and of a program of several completions."""
    lm, model, exact = case("table")
    policy = perturbed(lm)
    sampler = drawn_by(policy, Perturbed(factor=FACTOR))
    posterior = ImportanceSampling(num_particles=100, num_chains=20, guide=policy, seed=0, progress=False).run(
        model, PROMPTS
    )
    assert sampler.asked
    assert_agrees(posterior, exact, FUNCTIONS)
    talk = conversation()
    (of_talk,) = {cell.cell_contents for cell in talk.__closure__ if hasattr(cell.cell_contents, "sampler")}
    drawn_by(of_talk, Perturbed(factor=FACTOR))
    posterior = ImportanceSampling(num_particles=100, num_chains=20, seed=0, progress=False).run(talk, [[1], [2, 3]])
    assert posterior.stats["sampler_draws"] == 2 * 2 * 2000
    of_talk.sampler = None
    assert_agrees(posterior, Exact().run(talk, [[1], [2, 3]]), [lambda p: p.samples["topic"]])


@pytest.mark.parametrize(
    "engine",
    [
        SMC(num_particles=16, seed=0, progress=False),
        MCMC(num_chains=2, num_samples=4, warmup=2, seed=0, progress=False),
        AnnealedSMC(num_particles=8, seed=0, progress=False),
    ],
    ids=lambda engine: type(engine).__name__,
)
def test_engines_that_need_more_than_whole_draws_draw_themselves(engine, drawn_by):
    lm, model, _ = case("table")
    expected = engine.run(model, PROMPTS)
    sampler = drawn_by(lm, Perturbed(factor=FACTOR))
    found = engine.run(model, PROMPTS)
    assert not sampler.asked
    np.testing.assert_array_equal(found.samples["completion"], expected.samples["completion"])


# -- objectives ------------------------------------------------------------------------------------------------


def variance_under(log_s):
    """The log-variance divergence of draws of s."""

    def loss(small):
        f, share = small.log_target - small.log_q, log_s.exp()
        return 0.5 * ((share * f**2).sum(0) - (share * f).sum(0) ** 2)

    return loss


OBJECTIVES = {
    "leave-one-out": (lambda: ReverseKL(4), lambda small, log_s: small.reverse_kl()),
    "average": (lambda: ReverseKL(4, ExponentialAverage()), lambda small, log_s: small.reverse_kl()),
    "log-variance": (lambda: LogVariance(4), lambda small, log_s: variance_under(log_s)(small)),
}


@pytest.mark.parametrize("name", ["leave-one-out", "log-variance", "forward KL"])
def test_gradients_by_an_engine_that_draws_every_completion_once(name, drawn_by):
    """By draws of the uniform density s, each once, a sum over particles is the expectation: q / s = 40 q.

    Of the baselines, which leave the particle itself out, and the variance a factor n / (n - 1) remains.
    """
    small = Problem()
    num = len(small.x)
    log_s = torch.full_like(small.log_q.detach(), -math.log(num))
    if name == "forward KL":
        objective, expected = ForwardKL(num), (small.log_posterior.exp() * (small.log_posterior - small.log_q)).sum(0)
    else:
        make, loss = OBJECTIVES[name]
        objective, expected = type(make())(num), num / (num - 1) * loss(small, log_s)
    drawn_by(small.policy, Enumerating())
    found = gradients(objective, small.model, small.guide, small.parameters, (BATCH,), repeats=1)[0]
    torch.testing.assert_close(COPIES * found, small.gradient(expected), rtol=1e-4, atol=1e-3)


def test_figures_and_weights_by_an_engine_that_draws_every_completion_once(drawn_by):
    """The ELBO is the guide's, whose draws these are not; and log Z has no error."""
    small = Problem()
    num = len(small.x)
    drawn_by(small.policy, Enumerating())
    with seeded(0):
        figures = ReverseKL(num).step(inspect(small.model, BATCH), small.guide).figures
    elbo = (small.log_q.exp() * (small.log_target - small.log_q)).sum(0).detach()
    torch.testing.assert_close(figures["elbo"], elbo)
    torch.testing.assert_close(figures["log_evidence"], small.log_z.detach())
    drawn_by(small.lm, Enumerating())
    for guide in (None, small.policy):
        found = ImportanceSampling(num_particles=num, guide=guide, progress=False).run(small.model, BATCH)
        np.testing.assert_allclose(found.log_evidence, small.log_z.detach(), atol=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradients_of_draws_of_another_density(name, drawn_by):
    """Those of `LogVariance` are right for draws of any density, without knowing it."""
    small = Problem()
    with torch.no_grad():
        log_s = small.policy(BATCH, T, FACTOR).log_prob(small.x)
    make, loss = OBJECTIVES[name]
    expected = small.gradient(loss(small, log_s))
    drawn_by(small.policy, Perturbed(factor=FACTOR))
    torch.manual_seed(0)
    assert_unbiased(small.estimates(make(), repeats=64), expected)
    if name != "log-variance":
        drawn_by(small.policy, Perturbed(factor=FACTOR, honest=False))
        with pytest.raises(AssertionError):
            assert_unbiased(small.estimates(make(), repeats=64), expected)


@pytest.mark.long
def test_forward_kl_of_a_sampler(drawn_by):
    small = Problem(scale=0.3)
    expected = small.gradient((small.log_posterior.exp() * (small.log_posterior - small.log_q)).sum(0))
    drawn_by(small.policy, Perturbed(factor=FACTOR))
    torch.manual_seed(0)
    many = gradients(ForwardKL(4000), small.model, small.guide, small.parameters, (BATCH,), repeats=40)
    assert_unbiased(COPIES * many, expected)


def test_renyi_refuses_draws_that_are_not_the_guides(drawn_by):
    small = Problem()
    drawn_by(small.policy, Perturbed())
    small.estimates(Renyi(num_particles=2), repeats=1)
    drawn_by(small.policy, Perturbed(factor=FACTOR))
    with pytest.raises(ProgramError, match=r"Renyi needs particles of the guide itself.*differs .* by \d"):
        small.estimates(Renyi(num_particles=2), repeats=1)


# -- a training whose engine fails ---------------------------------------------------------------------------------


def test_a_training_goes_on_after_its_engine_died(tmp_path):
    lm = table_lm(order=2, seed=0, vocab=4)
    model = tilted(lm, score_table(0, vocab=4, tokens=T))
    settings = {"objective": ReverseKL(8), "num_steps": 6, "num_samples": 16, "seed": 0, "progress": False}
    engine = SVI(**settings, checkpoint=Checkpointing(tmp_path, every=1))

    class Dying(Perturbed):
        calls = itertools.count()
        dies = True

        def draw(self, request):
            if self.dies and next(self.calls) == 3:
                raise ConnectionError("nobody answers")
            return super().draw(request)

    lm.sampler = Dying()
    with pytest.raises(RunError, match="the engine failed: ConnectionError: nobody answers") as caught:
        engine.run(model, BATCH)
    assert caught.value.so_far.step == 3
    assert isinstance(caught.value.__cause__, SamplerError)
    lm.sampler.dies = False
    found = engine.run(model, BATCH)
    lm.sampler = Perturbed()
    whole = SVI(**settings).run(model, BATCH)
    np.testing.assert_array_equal(found.stats["elbo"], whole.stats["elbo"])
    assert found.stats["sampler_draws"] == whole.stats["sampler_draws"]


@pytest.mark.long
def test_a_twist_is_learned_from_a_samplers_draws(drawn_by):
    """Resampled by p / s they are the prior's, so that the twist is as good as one of the prior's own draws."""
    lm, model, exact = case("table")
    gains = {}
    for name, sampler in {"own": None, "sampler": Perturbed(factor=FACTOR)}.items():
        drawn_by(lm, sampler)
        twist = TwistLearning(num_particles=512, num_steps=60, seed=0, progress=False).run(model, PROMPTS)
        gains[name] = twist.stats["gain"]
        assert ("sampler_draws" in twist.stats) == (sampler is not None)
        found = SMC(num_particles=64, num_chains=20, twist=twist, seed=0, progress=False).run(model, PROMPTS)
        assert_agrees(found, exact, FUNCTIONS)
    assert gains["own"] > 0.0
    assert abs(gains["sampler"] - gains["own"]) < 0.3 * gains["own"]
