"""Programs that mix their particles are refused, whatever their number; those whose particles stand alone are not."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from support.models import table_lm
from support.programs import longer
from support.statistics import assert_evidence

from bayeslm.inference import (
    MCMC,
    NUTS,
    SMC,
    SVI,
    AdaptiveImportance,
    AnnealedSMC,
    Auto,
    BestOfN,
    Exact,
    ImportanceSampling,
    Laplace,
    ProgramError,
    RejectionSampling,
    RunError,
)
from bayeslm.inference.program import RandomStates, check_independence, inspect, particles
from bayeslm.inference.sequential import TwistLearning
from bayeslm.inference.training import ReverseKL
from bayeslm.models import TiltedLM

LM = table_lm(order=2, seed=1, vocab=4)
REFUSED = "mixes particles|does not run with several particles"


def data(size: int) -> torch.Tensor:
    return 1.0 + torch.randn(size, generator=torch.Generator().manual_seed(0))


def mean_of(y: torch.Tensor) -> None:
    """The issue's: the data's dimension stands where particles do."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(mu, torch.ones(len(y))).to_event(1), obs=y)


def log_evidence(y: torch.Tensor) -> float:
    """log Z of `mean_of`: y is normal with the covariance I + 1 1^T."""
    n = len(y)
    square = (y.double() ** 2).sum() - y.double().sum() ** 2 / (n + 1)
    return float(-0.5 * (n * math.log(2 * math.pi) + math.log(n + 1) + square))


def normal(name: str = "x", shape: tuple[int, ...] = ()) -> torch.Tensor:
    return pyro.sample(name, dist.Normal(torch.zeros(shape), 1.0).to_event(len(shape)))


def summed():
    pyro.factor("r", normal().sum())


def centred():
    x = normal()
    pyro.factor("r", -((x - x.mean()) ** 2) + x)


def regression():
    w = normal(shape=(3,))
    mean = torch.eye(3) @ w  # (particle, 3) has no such product, but where there are three
    pyro.sample("y", dist.Normal(mean, 1.0).to_event(1), obs=torch.ones(3))


def a_prior_that_mixes():
    x = normal()
    pyro.sample("z", dist.Normal(x.mean(), 1.0))


def an_index_from_the_left():
    x = normal(shape=(2,))
    pyro.factor("r", -(x[0] ** 2).sum())


def of_the_third_particle():
    """The one with which the others are compared: its score is right, and that of all."""
    x = normal().reshape(-1)
    pyro.factor("r", x[min(2, len(x) - 1)])


def columns_of_a_table():
    k = pyro.sample("k", dist.Categorical(torch.ones(4)))
    loc = torch.arange(12.0).reshape(3, 4)[:, k]
    pyro.sample("y", dist.Normal(loc, 1.0).to_event(1), obs=torch.zeros(3))


def a_value_that_mixes():
    x = normal()
    pyro.deterministic("share", (x > 0).float().mean(), event_dim=0)


def a_switch_that_is_one_for_all():
    on = pyro.sample("on", dist.Bernoulli(0.5))
    pyro.factor("r", 2.0 * on.mean())


def a_word_in_any_text():
    with pyro.plate("prompts", 1):
        x = pyro.sample("completion", LM([[1]], max_new_tokens=2))
        pyro.factor("r", 2.0 * (x == 1).any().float())


def the_mean_length():
    with pyro.plate("prompts", 1):
        x = pyro.sample("completion", LM([[1]], max_new_tokens=4))
        pyro.factor("r", -(x != LM.pad_token_id).float().mean())


def prompts_of_the_first_particle():
    k = pyro.sample("k", dist.Categorical(torch.ones(3)))
    with pyro.plate("prompts", 2):
        pyro.sample("completion", LM([[1], [int(k.reshape(-1)[0])]], max_new_tokens=2))


def all_texts_together():
    with pyro.plate("prompts", 2):
        x = pyro.sample("completion", LM([[1], [2]], max_new_tokens=2))
        pyro.factor("r", 0.1 * x.float().sum().expand(x.shape[:-1]))


def one_branch_for_all(of):
    """A program whose Python code asks one number of all particles, as `of` tells, which way to go."""

    def model():
        x = normal()
        pyro.factor("r", x if of(x) > 0 else -x)

    model.__name__ = f"one_branch_for_all_by_{of.__name__}"
    return model


def one_of_two_for_all():
    x = normal()
    pyro.factor("r", torch.where(x.mean() > 0, x, -x))


def one_branch_by_a_scale():
    s = pyro.sample("s", dist.Gamma(2.0, 1.0))
    pyro.factor("r", s if s.mean() > 1 else -s)


def one_branch_by_counts():
    k = pyro.sample("k", dist.Categorical(torch.ones(3)))
    pyro.factor("r", k.float() if (k > 0).all() else -1.0 - k.float())


def the_smallest_loses():
    """Scores of two values, so that one particle's may be right by chance."""
    x = normal().reshape(-1)
    pyro.factor("r", -(x == x.min()).float().reshape(x.shape if len(x) > 1 else ()))


MIXED = [
    one_branch_for_all(torch.mean),
    one_branch_for_all(torch.amax),
    one_branch_for_all(torch.amin),
    one_of_two_for_all,
    one_branch_by_a_scale,
    one_branch_by_counts,
    the_smallest_loses,
    summed,
    centred,
    regression,
    a_prior_that_mixes,
    an_index_from_the_left,
    of_the_third_particle,
    columns_of_a_table,
    a_value_that_mixes,
    a_switch_that_is_one_for_all,
    a_word_in_any_text,
    the_mean_length,
    prompts_of_the_first_particle,
    all_texts_together,
]
RUN = {"seed": 0, "progress": False}
ENGINES = [
    ImportanceSampling(num_particles=2, **RUN),
    AdaptiveImportance(**RUN),
    Auto(**RUN),
    RejectionSampling(log_bound=1e3, **RUN),
    BestOfN(**RUN),
    SMC(**RUN),
    AnnealedSMC(num_particles=16, **RUN),
    MCMC(**RUN),
    NUTS(**RUN),
    Laplace(seed=0),
    SVI(**RUN),
    SVI(objective=pyro.infer.Trace_ELBO(), **RUN),
    SVI(objective=ReverseKL(1), num_samples=1, **RUN),
]


@pytest.mark.parametrize("model", MIXED, ids=lambda model: model.__name__)
@pytest.mark.parametrize("size", [2, 3, 256])
def test_a_program_that_mixes_particles_is_refused(model, size):
    with pytest.raises(ProgramError, match=REFUSED):
        ImportanceSampling(num_particles=size, **RUN).run(model)


@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: type(engine).__name__)
@pytest.mark.parametrize("size", [1, 2, 16, 256])
def test_by_every_engine_and_for_every_size_of_the_data(engine, size):
    with pytest.raises(ProgramError, match=rf"({REFUSED})(.|\n)*pyro.plate(.|\n)*vectorize=False"):
        engine.run(mean_of, data(size))


def test_by_enumeration_and_by_the_learning_of_twists():
    with pytest.raises(ProgramError, match=REFUSED):
        Exact().run(all_texts_together)
    with pytest.raises(ProgramError, match=REFUSED):
        TwistLearning(**RUN).run(all_texts_together)


def test_one_by_one_it_has_the_right_posterior():
    y = data(256)
    posterior = ImportanceSampling(num_particles=400, vectorize=False, **RUN).run(mean_of, y)
    assert_evidence(posterior, np.array([log_evidence(y)]))
    laplace = Laplace(vectorize=False, seed=0).run(mean_of, y)  # the posterior is normal
    np.testing.assert_allclose(laplace.log_evidence, log_evidence(y), atol=1e-2)
    np.testing.assert_allclose(laplace.samples["mu"].mean(), float(y.sum() / 257), atol=0.02)


@pytest.mark.parametrize("size", [1, 2, 5, 64])
def test_what_the_refusal_advises_is_right_whatever_the_sizes(size):
    y = data(size)

    def in_a_plate():
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", size):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    def with_a_last_dimension():
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu[..., None], torch.ones(size)).to_event(1), obs=y)

    for model in (in_a_plate, with_a_last_dimension):
        posterior = Laplace(num_samples=64, seed=0).run(model)
        np.testing.assert_allclose(posterior.log_evidence, log_evidence(y), atol=1e-3)


def test_a_random_judge_a_topic_in_the_prompt_and_a_table_are_no_mixing():
    def model():
        k = pyro.sample("k", dist.Categorical(torch.ones(3)))
        with pyro.plate("prompts", 2):
            x = pyro.sample("completion", LM(longer([[1], [2, 3]], k.expand(*k.shape[:-1], 2)), max_new_tokens=2))
            pyro.factor("judge", torch.randn(x.shape[:-1]))  # another answer each time, for each text alone
            pyro.factor("liking", torch.arange(3.0)[k] * (x == 1).any(-1))

    check_independence(inspect(model))


def test_the_check_draws_no_random_number_runs_no_network_and_calls_no_reward():
    calls = []

    def reward(completions, **_):
        calls.append(len(completions))
        return [0.0] * len(completions)

    program = inspect(TiltedLM(LM, reward, 1.0, max_new_tokens=3), [[1], [2]])
    before = RandomStates.now()
    passes = LM.causal.network.register_forward_pre_hook(lambda *_: pytest.fail("a network ran"))
    try:
        check_independence(program)
    finally:
        passes.remove()
    after = RandomStates.now()
    assert torch.equal(before.torch, after.torch)
    assert before.python == after.python
    assert (before.numpy[1] == after.numpy[1]).all()
    assert calls == [2]  # the inspection's


# -- functions that are no `Reward` ----------------------------------------------------------------------------


def judged(score):
    """A program that calls a function of its own; and the numbers of texts that it was called with."""
    texts = []

    def model():
        with pyro.plate("prompts", 2):
            x = pyro.sample("completion", LM([[1], [2]], max_new_tokens=2))
            texts.append(x[..., 0].numel())
            pyro.factor("judge", score(x))

    return model, texts


def varied(x):
    return 0.1 * x.float().sum(-1) + 0.01 * x[..., 0]


def sparse(x):
    return torch.zeros(x.shape[:-1])


def chance(x):
    return torch.randn(x.shape[:-1])


@pytest.mark.parametrize(("score", "calls"), [(varied, [2, 8, 2]), (chance, [2, 8, 2, 2]), (sparse, [2, 8, 2, 2, 2])])
def test_how_often_a_function_is_called(score, calls):
    """By the inspection, for 2 prompts; for 4 particles together; and alone for one.

    Alone for two if it is random, and for 3 if it says the same of all.
    """
    model, texts = judged(score)
    check_independence(inspect(model))
    assert texts == calls


def test_it_is_called_for_the_runs_own_particles_once():
    model, texts = judged(varied)
    posterior = ImportanceSampling(num_particles=64, **RUN).run(model)
    assert texts[:4] == [2, 8, 2, 128]
    assert texts[4:] == [2] * len(texts[4:])  # some of them alone, see test_own_particles.py
    assert len(texts) <= 4 + 4 + 2 + 1
    assert_evidence(posterior, Exact().run(judged(varied)[0]).log_evidence)


def test_where_it_fails_on_other_texts_the_program_runs():
    """Its error is one of a text, not of several particles; the run meets it, if there is such a text."""

    def picky(x):
        if (x == 1).any():
            raise ValueError("could not convert string to float")
        return varied(x)

    program, (model, texts) = inspect(judged(varied)[0]), judged(picky)
    check_independence(replace(program, model=model, verified=set()))
    assert texts[0] == 8  # it was tried


# -- guides ------------------------------------------------------------------------------------------------------


def two_latents():
    x = normal()
    z = pyro.sample("z", dist.Normal(x, 1.0))
    pyro.sample("y", dist.Normal(z, 1.0), obs=torch.tensor(0.5))


def q(name: str, loc, scale=1.0):
    return pyro.sample(name, dist.Normal(loc, scale))


def guide_by_the_mean():
    q("z", q("x", 0.0).mean())


def guide_by_the_sum():
    x = q("x", 0.0)
    q("z", x - x.sum())


def guide_by_the_first():
    q("z", q("x", 0.0).reshape(-1)[0])


def guide_by_the_last():
    q("z", q("x", 0.0).reshape(-1)[-1])


def guide_by_the_largest():
    x = q("x", 0.0)
    q("z", x, 1.0 + x.max().abs())


def guide_by_an_auxiliary_latent():
    a = pyro.sample("a", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
    q("z", q("x", a.mean()))


def guide_by_the_number_of_particles():
    x = q("x", 0.0)
    q("z", x, 1.0 + 1.0 / x.numel())


MIXED_GUIDES = [
    guide_by_the_mean,
    guide_by_the_sum,
    guide_by_the_first,
    guide_by_the_last,
    guide_by_the_largest,
    guide_by_an_auxiliary_latent,
    guide_by_the_number_of_particles,
]
GUIDE_REFUSED = "the guide (mixes particles|does not run with several particles)"


@pytest.mark.parametrize("guide", MIXED_GUIDES, ids=lambda guide: guide.__name__)
@pytest.mark.parametrize("size", [2, 256])
def test_a_guide_that_mixes_particles_is_refused(guide, size):
    with pytest.raises(ProgramError, match=GUIDE_REFUSED):
        ImportanceSampling(num_particles=size, guide=guide, **RUN).run(two_latents)


@pytest.mark.parametrize("num_particles", [3, 4, 256])
@pytest.mark.parametrize("size", [2, 4, 256])
def test_a_guide_with_data_in_the_dimension_of_particles(size, num_particles):
    """The program's own latent has no dimension; the guide's has that of the data."""
    y = data(size)

    def guide():
        pyro.sample("x", dist.Normal(y, 1.0))
        pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(ProgramError, match=f"'x' has a batch dimension of size {size} that no plate declares"):
        ImportanceSampling(num_particles=num_particles, guide=guide, **RUN).run(two_latents)


def test_a_guide_whose_prompts_are_the_first_particles():
    def model():
        k = pyro.sample("k", dist.Categorical(torch.ones(3)))
        with pyro.plate("prompts", 2):
            pyro.sample("completion", LM(longer([[1], [2, 3]], k.expand(*k.shape[:-1], 2)), max_new_tokens=2))

    def guide():
        k = pyro.sample("k", dist.Categorical(torch.ones(3)))
        with pyro.plate("prompts", 2):
            pyro.sample("completion", LM([[1], [int(k.reshape(-1)[0])]], max_new_tokens=2))

    with pytest.raises(ProgramError, match="the guide mixes particles"):
        ImportanceSampling(num_particles=8, guide=guide, **RUN).run(model)


@pytest.mark.parametrize(
    "engine",
    [
        lambda guide: SVI(guide=guide, num_steps=2, **RUN),
        lambda guide: SVI(guide=guide, num_steps=2, objective=pyro.infer.Trace_ELBO(), **RUN),
        lambda guide: ImportanceSampling(num_particles=8, num_chains=2, guide=guide, **RUN),
    ],
)
def test_by_every_engine_that_takes_a_guide(engine):
    def guide():
        q("z", q("x", pyro.param("loc", torch.tensor(0.0))).mean())

    with pytest.raises((ProgramError, RunError), match=GUIDE_REFUSED):
        engine(guide).run(two_latents)


class Network(torch.nn.Module):
    """A guide that computes by a network, which has dropout, and by parameters of Pyro's."""

    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(1, 4), torch.nn.Dropout(0.5), torch.nn.Linear(4, 1))

    def __call__(self):
        pyro.module("net", self.net)
        x = q("x", pyro.param("loc", torch.randn(())), pyro.param("scale", lambda: torch.rand(()) + 0.5))
        q("z", self.net(x[..., None])[..., 0])


def by_itself():
    q("z", q("x", pyro.param("loc", torch.randn(()))) * 0.5)


AUTOGUIDES = ["AutoNormal", "AutoMultivariateNormal", "AutoLowRankMultivariateNormal", "AutoStructured"]


@pytest.mark.parametrize(
    "guide",
    [
        lambda: by_itself,
        Network,
        *(partial(getattr(pyro.infer.autoguide, name), two_latents) for name in AUTOGUIDES),
    ],
)
def test_a_guide_whose_particles_stand_alone_trains_as_without_the_check(guide, monkeypatch):
    def trained():
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        posterior = SVI(guide=guide(), num_steps=3, num_samples=8, **RUN).run(two_latents)
        return posterior, {name: x.detach().clone() for name, x in pyro.get_param_store().items()}

    found, params = trained()
    monkeypatch.setattr(particles, "check_guide", lambda *_: None)
    expected, others = trained()
    assert params.keys() == others.keys()
    assert all(torch.equal(x, others[name]) for name, x in params.items())
    np.testing.assert_array_equal(found.log_weights, expected.log_weights)


def test_importance_sampling_by_a_guide_is_right():
    def model():
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 5):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=data(5))

    guide = partial(q, "mu", float(data(5).sum() / 6), 0.6)
    posterior = ImportanceSampling(num_particles=2000, guide=guide, **RUN).run(model)
    assert_evidence(posterior, np.array([log_evidence(data(5))]))
