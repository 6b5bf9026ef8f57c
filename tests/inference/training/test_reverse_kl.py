"""The theorem, and the baselines. (Gradients against those by enumeration: test_divergences.py.)"""

from __future__ import annotations

import dataclasses

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from support.enumerated import BETA, Problem
from support.gradients import gradients, perturbed, policy_guide
from support.models import table_lm, tiny_llama
from support.programs import PROMPTS, rewarded, score_table, tilted

from bayeslm.inference import Exact, ProgramError
from bayeslm.inference.program import inspect, score_sites, traces
from bayeslm.inference.training import ExponentialAverage, ReverseKL


@pytest.mark.parametrize(("kind", "beta"), [("table", 0.3), ("table", 1.0), ("table", 5.0), ("llama", 0.3)])
def test_beta_times_elbo_is_kl_penalised_reward(kind, beta):
    """The theorem: beta L(q) = E_q[r] - beta KL(q || p), and L(q) = log Z - KL(q || posterior)."""
    lm, table = table_lm(order=3, seed=1) if kind == "table" else tiny_llama(seed=2), score_table(0, tokens=4)
    policy = perturbed(lm)
    posterior = Exact(num_prior_samples=1).run(tilted(lm, table, beta), PROMPTS)
    q, prior = policy(PROMPTS, max_new_tokens=4), lm(PROMPTS, max_new_tokens=4)
    x = q.enumerate_support()
    log_q, log_p = q.log_prob(x).detach().double(), prior.log_prob(x).double()
    reward = table[torch.arange(4), x].sum(-1).double()
    # the machinery's own terms: the program run on every atom, as the objective runs it on draws
    program = inspect(tilted(lm, table, beta), PROMPTS)
    atoms = poutine.trace(lambda prompts: pyro.sample("completion", q.expand((len(x), 2)), obs=x)).get_trace(PROMPTS)
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


@pytest.mark.long
def test_baselines_reduce_the_variance():
    small, spread = Problem(), {}
    model = tilted(small.lm, small.table + 3.0, BETA)
    for name, objective in {
        "leave-one-out": ReverseKL(num_particles=4),
        "exponential average": ReverseKL(num_particles=4, baseline=ExponentialAverage()),
        "stock": Trace_ELBO(num_particles=4, vectorize_particles=True),
    }.items():
        torch.manual_seed(0)
        spread[name] = gradients(objective, model, small.guide, small.parameters, ([[1]],), repeats=50).std(0).norm()
    assert spread["leave-one-out"] < 0.5 * spread["stock"]
    assert spread["exponential average"] < 0.5 * spread["stock"]


def test_rewards_of_minus_infinity_are_refused_by_name():
    lm = table_lm(order=2, seed=0, vocab=4)
    model = rewarded(lm, 3, lambda x: torch.where(x[..., 0] == 1, 0.0, -torch.inf), "constraint")
    with pytest.raises(ProgramError, match="'constraint' is -inf"):
        ReverseKL(num_particles=64)(model, policy_guide(lm.policy(), 3), [[1]])
