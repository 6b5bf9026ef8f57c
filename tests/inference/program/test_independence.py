"""Programs that mix their particles are refused, whatever their number; those whose particles stand alone are not."""

from __future__ import annotations

import math

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
)
from bayeslm.inference.program import RandomStates, check_independence, inspect
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


MIXED = [
    summed,
    centred,
    regression,
    a_prior_that_mixes,
    an_index_from_the_left,
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
