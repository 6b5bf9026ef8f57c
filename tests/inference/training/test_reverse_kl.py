"""The theorem, and gradients against gradients by enumeration."""

from __future__ import annotations

import dataclasses

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from support.gradients import COPIES, LIMIT, assert_unbiased, gradients, perturbed, policy_guide
from support.models import table_lm, tiny_llama
from support.programs import PROMPTS, score_table, tilted
from torch import Tensor, nn

from bayeslm.inference import Exact, ProgramError
from bayeslm.inference.program import inspect, score_sites, traces
from bayeslm.inference.training import ExponentialAverage, ReverseKL, StatefulLoss


def exact_elbo(lm, policy, table: Tensor, beta: float, prompts) -> Tensor:
    """sum_x q(x) (log p(x) + r(x) / beta - log q(x)), (prompt,), differentiable in q."""
    law = policy(prompts, max_new_tokens=len(table))
    x = law.enumerate_support()
    log_q = law.log_prob(x)
    log_p = lm(prompts, max_new_tokens=len(table)).log_prob(x)
    reward = table[torch.arange(len(table)), x].sum(-1)
    return (log_q.exp() * (log_p + reward / beta - log_q)).sum(0)


@pytest.mark.parametrize(("kind", "beta"), [("table", 0.3), ("table", 1.0), ("table", 5.0), ("llama", 0.3)])
def test_beta_times_elbo_is_kl_penalised_reward(kind, beta):
    """The theorem: beta L(q) = E_q[r] - beta KL(q || p), and L(q) = log Z - KL(q || posterior)."""
    lm, table = table_lm(order=3, seed=1) if kind == "table" else tiny_llama(seed=2), score_table(0, tokens=4)
    policy = perturbed(lm)
    posterior = Exact(num_prior_samples=1).run(tilted(lm, table, beta), PROMPTS)
    law, prior = policy(PROMPTS, max_new_tokens=4), lm(PROMPTS, max_new_tokens=4)
    x = law.enumerate_support()
    log_q, log_p = law.log_prob(x).detach().double(), prior.log_prob(x).double()
    reward = table[torch.arange(4), x].sum(-1).double()
    # the machinery's own terms: the program run on every atom, as the objective runs it on draws
    program = inspect(tilted(lm, table, beta), PROMPTS)
    atoms = poutine.trace(lambda prompts: pyro.sample("completion", law.expand((len(x), 2)), obs=x)).get_trace(PROMPTS)
    atoms.nodes["completion"]["is_observed"] = False
    trace, _ = traces(dataclasses.replace(program, model=poutine.replay(program.model, trace=atoms)), None, len(x))
    terms = {name: term.double() for name, term in score_sites(program, trace, len(x)).items()}
    torch.testing.assert_close(terms["completion"], log_p)
    q = log_q.exp()
    elbo = (q * (terms["completion"] + terms["reward"] - log_q)).sum(0)
    penalised = (q * reward).sum(0) - beta * (q * (log_q - log_p)).sum(0)
    torch.testing.assert_close(beta * elbo, penalised, atol=1e-5, rtol=0)
    # and Exact's: log joint and log Z
    log_posterior = torch.tensor(posterior.log_joint[0] - posterior.log_evidence).double()
    torch.testing.assert_close(torch.tensor(posterior.samples["completion"][0]), x)
    gap = (q * (log_q - log_posterior)).sum(0)
    torch.testing.assert_close(elbo, torch.tensor(posterior.log_evidence).double() - gap, atol=1e-5, rtol=1e-6)


def test_elbo_estimate_is_unbiased():
    lm, table = table_lm(order=2, seed=4), score_table(1)
    policy = perturbed(lm)
    guide, model = policy_guide(policy, 5), tilted(lm, table, 0.5)
    objective = StatefulLoss(ReverseKL(num_particles=4000))
    torch.manual_seed(0)
    objective.loss(model, guide, PROMPTS)
    expected = exact_elbo(lm, policy, table, 0.5, PROMPTS).detach()
    law = policy(PROMPTS, max_new_tokens=5)
    x = law.enumerate_support()
    f = lm(PROMPTS, max_new_tokens=5).log_prob(x) + table[torch.arange(5), x].sum(-1) / 0.5 - law.log_prob(x)
    spread = ((law.log_prob(x).exp() * (f - expected) ** 2).sum(0) / 4000).sqrt().detach()
    last = objective.last.figures
    assert ((last["elbo"] - expected).abs() < LIMIT * spread).all()
    torch.testing.assert_close(last["log_likelihood"] - last["kl"], last["elbo"])
    torch.testing.assert_close(last["score"] / 0.5, last["log_likelihood"])


@pytest.mark.parametrize("seed", [0, 2])
@pytest.mark.parametrize(
    "objective",
    [
        ReverseKL(num_particles=4),
        ReverseKL(num_particles=4, baseline=ExponentialAverage()),
        Trace_ELBO(num_particles=16, vectorize_particles=True),
    ],
    ids=["leave-one-out", "exponential average", "stock Trace_ELBO"],
)
def test_gradient_is_unbiased(objective, seed):
    """Against the gradient by enumeration: vocabulary 4, 3 tokens, bigram."""
    lm, table = table_lm(order=2, seed=seed, vocab=4), score_table(seed, vocab=4, tokens=3, scale=1.0)
    policy = perturbed(lm, seed, scale=1.0)
    prompts = [[1], [2, 3]]
    parameters = list(policy.network.parameters())
    (-COPIES * exact_elbo(lm, policy, table, 0.5, prompts).sum()).backward()
    expected = torch.cat([p.grad.reshape(-1) for p in parameters])
    torch.manual_seed(seed)
    model, guide = tilted(lm, table, 0.5), policy_guide(policy, 3)
    assert_unbiased(gradients(objective, model, guide, parameters, (prompts * COPIES,)), expected)


def test_exponential_average_is_of_the_steps_before():
    """Each prompt's own; one that is new has the mean of the others'."""
    baseline = ExponentialAverage(decay=0.9)
    steps = [
        (torch.tensor([[1.0, 3.0], [5.0, 7.0]]), None, [0.0, 0.0]),  # means 3 and 5
        (torch.tensor([[0.0, 1.0]]), None, [3.0, 5.0]),  # then 2.7 and 4.6
        (torch.tensor([[9.0, 2.0]]), torch.tensor([3, 0]), [(2.7 + 4.6) / 2, 2.7]),  # then 9, and 2.63
        (torch.tensor([[1.0, 1.0]]), torch.tensor([1, 3]), [4.6, 9.0]),
        (torch.tensor([[1.0, 1.0]]), torch.tensor([2, 0]), [(2.63 + 4.24 + 8.2) / 3, 2.63]),
    ]
    state = {}
    for f, prompts, before in steps:
        advantage, state = baseline("x", f, prompts, state)
        torch.testing.assert_close(advantage, f - torch.tensor(before))
    torch.testing.assert_close(baseline("another", steps[0][0])[0], steps[0][0])


def test_baselines_reduce_the_variance():
    lm, table = table_lm(order=2, seed=0, vocab=4), score_table(0, vocab=4, tokens=3) + 3.0
    policy = perturbed(lm)
    model, guide = tilted(lm, table, 0.5), policy_guide(policy, 3)
    parameters = list(policy.network.parameters())
    spread = {}
    for name, objective in {
        "leave-one-out": ReverseKL(num_particles=4),
        "exponential average": ReverseKL(num_particles=4, baseline=ExponentialAverage()),
        "stock": Trace_ELBO(num_particles=4, vectorize_particles=True),
    }.items():
        torch.manual_seed(0)
        spread[name] = gradients(objective, model, guide, parameters, ([[1]],), repeats=50).std(0).norm()
    assert spread["leave-one-out"] < 0.5 * spread["stock"]
    assert spread["exponential average"] < 0.5 * spread["stock"]


def test_gradient_with_a_latent_shared_between_prompts():
    """theta ~ N(0, 1) shared, factor theta c(x) / 2 a prompt; guide theta ~ N(m, s), x ~ policy. The ELBO is closed:

    L = -KL(N(m, s) || N(0, 1)) + sum_prompts E_q[ log p(x) - log q(x) + m c(x) / 2 ]
    """
    lm = table_lm(order=2, seed=5, vocab=4)
    policy, prompts = perturbed(lm), [[1], [2, 3]]
    m, log_s = nn.Parameter(torch.tensor(0.8)), nn.Parameter(torch.tensor(-0.5))

    def c(x):
        return (x == 1).sum(-1).float()

    def model(prompts):
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        with pyro.plate("prompts", len(prompts)):
            x = pyro.sample("completion", lm(prompts, max_new_tokens=3))
            pyro.factor("reward", 0.5 * theta * c(x))

    def guide(prompts):
        pyro.module("policy", policy)
        loc, scale = pyro.param("m", m), pyro.param("log_s", log_s).exp()
        pyro.sample("theta", dist.Normal(loc, scale))
        with pyro.plate("prompts", len(prompts)):
            pyro.sample("completion", policy(prompts, max_new_tokens=3))

    law = policy(prompts, max_new_tokens=3)
    x = law.enumerate_support()
    log_q = law.log_prob(x)
    local = (log_q.exp() * (lm(prompts, max_new_tokens=3).log_prob(x) - log_q + 0.5 * m * c(x))).sum()
    kl = torch.distributions.kl_divergence(dist.Normal(m, log_s.exp()), dist.Normal(0.0, 1.0))
    parameters = [*policy.network.parameters(), m, log_s]
    (kl - COPIES * local).backward()
    expected = torch.cat([p.grad.reshape(-1) for p in parameters])
    torch.manual_seed(0)
    assert_unbiased(gradients(ReverseKL(num_particles=8), model, guide, parameters, (prompts * COPIES,)), expected)


def test_rewards_of_minus_infinity_are_refused_by_name():
    lm = table_lm(order=2, seed=0, vocab=4)

    def model(prompts):
        with pyro.plate("prompts", len(prompts)):
            x = pyro.sample("completion", lm(prompts, max_new_tokens=3))
            pyro.factor("constraint", torch.where(x[..., 0] == 1, 0.0, -torch.inf))

    with pytest.raises(ProgramError, match="'constraint' is -inf"):
        ReverseKL(num_particles=64)(model, policy_guide(lm.policy(), 3), [[1]])


def test_gradient_with_a_discrete_latent_shared_between_prompts():
    """mood ~ Bernoulli shared, a free logit in the guide; the ELBO is a finite sum over mood and completions."""
    lm = table_lm(order=2, seed=6, vocab=4)
    policy, prompts = perturbed(lm), [[1], [2, 3]]
    logit = nn.Parameter(torch.tensor(0.4))

    def c(x, mood):
        return (x == 1).sum(-1) * (0.5 + mood)

    def model(prompts):
        mood = pyro.sample("mood", dist.Bernoulli(0.3))
        with pyro.plate("prompts", len(prompts)):
            x = pyro.sample("completion", lm(prompts, max_new_tokens=3))
            pyro.factor("reward", c(x, mood))

    def guide(prompts):
        pyro.module("policy", policy)
        pyro.sample("mood", dist.Bernoulli(logits=pyro.param("logit", logit)))
        with pyro.plate("prompts", len(prompts)):
            pyro.sample("completion", policy(prompts, max_new_tokens=3))

    law = policy(prompts, max_new_tokens=3)
    x = law.enumerate_support()
    log_q, log_p = law.log_prob(x), lm(prompts, max_new_tokens=3).log_prob(x)
    on = logit.sigmoid()
    local = [(log_q.exp() * (log_p - log_q + c(x, mood))).sum() for mood in (0, 1)]
    kl = torch.distributions.kl_divergence(dist.Bernoulli(logits=logit), dist.Bernoulli(0.3))
    parameters = [*policy.network.parameters(), logit]
    (kl - COPIES * ((1 - on) * local[0] + on * local[1])).backward()
    expected = torch.cat([p.grad.reshape(-1) for p in parameters])
    torch.manual_seed(0)
    assert_unbiased(gradients(ReverseKL(num_particles=8), model, guide, parameters, (prompts * COPIES,)), expected)
