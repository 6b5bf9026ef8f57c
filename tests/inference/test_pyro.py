"""Stock Pyro on programs with completions: handlers, Predictive, SVI, enumeration and NUTS."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO, TraceEnum_ELBO, config_enumerate
from pyro.infer.mcmc.util import initialize_model
from support.models import table_lm, tiny_llama
from support.oracles import kl_to
from support.statistics import assert_drawn_from, count_completions

from bayeslm.inference import Exact
from bayeslm.models import TiltedLM

PROMPTS = ["a b c", "d"]
BETA = 0.5
TOKENS = 3


def count_a(completions, **kwargs):
    """The reward: how many words are "a"."""
    return [float(text.split().count("a")) for text in completions]


@pytest.fixture
def lm():
    return table_lm(order=2, seed=1, vocab=5)


@pytest.fixture
def program(lm):
    return TiltedLM(lm, count_a, beta=BETA, max_new_tokens=TOKENS)


def posterior(lm):
    """Every completion (support, tokens), with log p(x) + r(x) / beta and log p(x), (support, prompts)."""
    distribution = lm(PROMPTS, TOKENS)
    support = distribution.enumerate_support(expand=False)
    log_prior = distribution.log_prob(support)
    reward = torch.tensor(count_a(lm.decode(support.squeeze(1))))
    return support.squeeze(1), log_prior + reward[:, None] / BETA, log_prior


def test_trace(lm, program):
    trace = poutine.trace(program).get_trace(PROMPTS)
    x = trace.nodes["completion"]["value"]
    assert x.shape == (2, TOKENS)
    expected = lm(PROMPTS, TOKENS).log_prob(x) + torch.tensor(count_a(lm.decode(x))) / BETA
    torch.testing.assert_close(trace.log_prob_sum(), expected.sum())
    assert trace.nodes["reward/r"]["value"].tolist() == count_a(lm.decode(x))


def test_tilted_tempers_its_prior(lm):
    program = TiltedLM(lm, count_a, max_new_tokens=TOKENS, temperature=0.7)
    node = poutine.trace(program).get_trace(PROMPTS).nodes["completion"]
    torch.testing.assert_close(
        node["fn"].log_prob(node["value"]), lm(PROMPTS, TOKENS, temperature=0.7).log_prob(node["value"])
    )


def test_tilted_hands_columns_to_the_reward(lm):
    def right(completions, answer, **kwargs):
        return [float(text.startswith(a)) for text, a in zip(completions, answer, strict=True)]

    program = TiltedLM(lm, right, max_new_tokens=1)
    conditioned = poutine.condition(program, data={"completion": torch.tensor([[1], [2]])})
    trace = poutine.trace(conditioned).get_trace(PROMPTS, answer=["a", "a"])
    assert trace.nodes["reward/r"]["value"].tolist() == [1.0, 0.0]


def test_replay_and_condition(lm, program):
    trace = poutine.trace(program).get_trace(PROMPTS)
    replayed = poutine.trace(poutine.replay(program, trace=trace)).get_trace(PROMPTS)
    torch.testing.assert_close(replayed.log_prob_sum(), trace.log_prob_sum())
    data = {"completion": torch.tensor([[1, 1, 1], [1, 0, 0]])}
    conditioned = poutine.trace(poutine.condition(program, data=data)).get_trace(PROMPTS)
    expected = lm(PROMPTS, TOKENS).log_prob(data["completion"]) + torch.tensor([3.0, 1.0]) / BETA
    torch.testing.assert_close(conditioned.log_prob_sum(), expected.sum())


@pytest.mark.parametrize("parallel", [True, False])
def test_predictive_draws_from_the_prior(lm, program, parallel):
    num = 2000 if parallel else 100
    draws = Predictive(program, num_samples=num, parallel=parallel)(PROMPTS)
    x = draws["completion"].reshape(num, 2, TOKENS)
    assert draws["reward/r"].reshape(num, 2).tolist() == [count_a(row) for row in lm.decode(x)]
    support, _, log_prior = posterior(lm)
    for prompt in range(2):
        assert_drawn_from(count_completions(x[:, prompt], support, 5), log_prior[:, prompt])


def test_expand_to_event_and_mask(lm):
    distribution = lm(PROMPTS, TOKENS)
    x = distribution.sample()
    log_prob = distribution.log_prob(x)
    joint = lm(PROMPTS, TOKENS).to_event(1)
    assert (joint.batch_shape, joint.event_shape) == ((), (2, TOKENS))
    torch.testing.assert_close(joint.log_prob(x), log_prob.sum())
    half = lm(PROMPTS, TOKENS).mask(torch.tensor([True, False]))
    torch.testing.assert_close(half.log_prob(x), log_prob * torch.tensor([1.0, 0.0]))
    wide = lm(PROMPTS, TOKENS).expand_by([4])
    assert wide.batch_shape == (4, 2)
    assert wide().shape == (4, 2, TOKENS)
    assert joint().shape == half().shape == (2, TOKENS)


def test_enumeration_gives_the_evidence(lm, program):
    """TraceEnum_ELBO sums the completion out, so its loss is exactly -sum_c log Z(c)."""
    _, log_joint, _ = posterior(lm)
    elbo = TraceEnum_ELBO(max_plate_nesting=1)
    loss = elbo.loss(config_enumerate(program), lambda prompts: None, PROMPTS)
    assert loss == pytest.approx(-log_joint.logsumexp(0).sum().item(), rel=1e-5)


@pytest.mark.parametrize(
    ("make", "rate"),
    [
        (lambda: table_lm(2, 1, 5), 0.05),
        pytest.param(lambda: tiny_llama(seed=1), 0.005, marks=pytest.mark.long),
    ],
)
def test_svi_trains_a_policy(make, rate):
    """Trace_ELBO with vectorised particles: the ELBO rises towards log Z, and the prior stays as it was."""
    prior = make()
    policy = prior.policy()
    program = TiltedLM(prior, count_a, beta=BETA, max_new_tokens=2)

    def guide(prompts):
        pyro.module("policy", policy)
        with pyro.plate("prompts", len(prompts)):
            pyro.sample("completion", policy(prompts, max_new_tokens=2))

    exact = Exact().run(program, PROMPTS)
    before, weights = kl_to(exact, policy, PROMPTS).sum(), [p.clone() for p in prior.parameters()]
    pyro.set_rng_seed(0)
    elbo = Trace_ELBO(num_particles=256, vectorize_particles=True, max_plate_nesting=1)
    svi = SVI(program, guide, pyro.optim.Adam({"lr": rate}), elbo)
    for _ in range(80):  # Trace_ELBO has no baseline: 40 steps of 64 halve the KL with every second seed only
        svi.step(PROMPTS)
    assert kl_to(exact, policy, PROMPTS).sum() < before / 2
    assert all(torch.equal(p, w) for p, w in zip(prior.parameters(), weights, strict=True))


@pytest.mark.long
def test_nuts_on_a_continuous_latent(lm):
    """w ~ N(0, 1), reward w · (number of a's), two texts observed, two completions summed out."""
    distribution = lm(PROMPTS, 2)
    support = distribution.enumerate_support(expand=False)
    number = torch.tensor(count_a(lm.decode(support).squeeze(1)))

    def model():
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("prompts", 2):
            x = pyro.sample("completion", lm(PROMPTS, 2), infer={"enumerate": "parallel"})
            score = (x == 1).float().sum(-1)
            pyro.factor("reward", w * score)
            pyro.sample("rating", dist.Normal(score, 0.5), obs=torch.tensor([1.0, 2.0]))

    initial, potential, *_ = initialize_model(model, max_plate_nesting=1)
    log_prior = distribution.log_prob(support)
    rating = dist.Normal(number[:, None], 0.5).log_prob(torch.tensor([1.0, 2.0]))
    for w in (-1.0, 0.3, 2.0):
        exact = (log_prior + w * number[:, None] + rating).logsumexp(0).sum() + dist.Normal(0.0, 1.0).log_prob(
            torch.tensor(w)
        )
        torch.testing.assert_close(potential({"w": torch.tensor(w)}), -exact)
    assert set(initial) == {"w"}
    grid = torch.linspace(-3.0, 9.0, 100)
    density = torch.stack([-potential({"w": w}) for w in grid]).softmax(0)
    mean = (density * grid).sum()
    sd = (density * (grid - mean) ** 2).sum().sqrt()
    mcmc = MCMC(NUTS(model, max_plate_nesting=1), num_samples=60, warmup_steps=50, disable_progbar=True)
    mcmc.run()
    draws = mcmc.get_samples()["w"]
    assert abs(draws.mean() - mean) < 5 * sd / 18**0.5  # 60 draws of NUTS are worth at least 18
    assert 0.5 < draws.std() / sd < 1.5
