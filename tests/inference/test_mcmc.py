"""MCMC against exact posteriors; tempering, warm start, and what is kept when a run breaks off."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from support.gradients import perturbed
from support.models import WORDS, table_lm
from support.oracles import Enumerated, expectation
from support.programs import FUNCTIONS, PROMPTS, SHORT, case, conversation, rewarded, score_table, shared, tilted
from support.statistics import assert_agrees, assert_drawn_from, assert_mean

from bayeslm import Posterior, diagnostics
from bayeslm.inference import Exact
from bayeslm.inference.markov.tempering import log_target
from bayeslm.inference.mcmc import MCMC, Replicas
from bayeslm.models import LanguageModel

CHAINS = 64


def mcmc(**settings) -> MCMC:
    defaults = {"num_samples": 60, "num_chains": CHAINS, "warmup": 40, "initial_particles": 1000}
    return MCMC(**(defaults | {"seed": 0, "progress": False} | settings))


@pytest.mark.parametrize(
    ("kind", "setting"), [("table", "policy"), pytest.param("llama", "tempered", marks=pytest.mark.long)]
)
def test_agrees_with_exact(kind, setting):
    """The expected reward and length, and marginals of the first and third token."""
    lm, model, exact = case(kind, 1.0)
    tempered = {"num_samples": 15, "num_chains": 40, "num_temperatures": 2, "num_candidates": 4}
    settings = tempered if setting == "tempered" else {"proposal": perturbed(lm)}
    posterior = mcmc(**settings).run(model, PROMPTS)
    assert_agrees(posterior, exact, FUNCTIONS)


@pytest.mark.long
def test_chains_agree_on_the_reward_within_a_budget():
    """R-hat <= 1.01: 16 chains of 400 sweeps after 100, six temperatures; 19,608 completions a prompt."""
    _, model, exact = case("table", 1.0)
    posterior = mcmc(num_chains=16, num_samples=400, warmup=100, num_temperatures=6).run(model, PROMPTS)
    assert (diagnostics.rhat(posterior.measured) <= 1.01).all()
    mean, stderr = diagnostics.expectation(posterior, posterior.measured)
    assert (np.abs(mean - expectation(exact, exact.measured)) < 4.5 * stderr).all()  # the error is itself an estimate
    assert (stderr < 0.05).all()


# -- programs with more in them --------------------------------------------------------------------------------------


def uncertain_reward():
    """How much prompts share of a liking, w ~ N(0, 1), tilts both completions: log Z(w) is enumerable."""
    lm = table_lm(order=2, seed=4, vocab=4)

    def model(prompts):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("prompts", len(prompts)):
            x = pyro.sample("completion", lm(prompts, max_new_tokens=2))
            pyro.factor("reward", 0.6 * w * (x == 1).sum(-1))

    return lm, model


def test_a_continuous_latent_beside_completions_by_quadrature():
    lm, model = uncertain_reward()
    distribution = lm(SHORT, max_new_tokens=2)
    support = distribution.enumerate_support()
    hits = (support == 1).sum(-1)
    grid = torch.linspace(-6, 6, 2001, dtype=torch.double)
    terms = distribution.log_prob(support).double() + 0.6 * grid[:, None, None] * hits  # (w, value, prompt)
    log_z = terms.logsumexp(1)  # (w, prompt)
    weight = (log_z.sum(-1) - grid**2 / 2).softmax(0)
    expected_hits = (weight[:, None] * ((terms - log_z[:, None]).exp() * hits).sum(1)).sum(0)
    posterior = mcmc(num_samples=50).run(model, SHORT)
    assert_mean(posterior.samples["w"].mean(1), float((weight * grid).sum()))
    assert_mean((posterior.samples["w"] ** 2).mean(1), float((weight * grid**2).sum()))
    assert_mean((posterior.samples["completion"] == 1).sum(-1).mean(1), expected_hits.numpy())
    assert 0.3 < posterior.stats["acceptance_w"][0] < 0.6
    assert posterior.stats["step_size_w"].shape == (1,)


# -- tempering -------------------------------------------------------------------------------------------------------


def test_tempering_crosses_between_modes():
    """Texts of many a's or of many b's are worth much, and started from few draws plain chains stay where they are."""
    table = torch.tensor([[0.05, 0.3, 0.3, 0.35]]).log()
    lm = LanguageModel.tabular(WORDS[:4], order=1, table=table)
    model = rewarded(lm, 5, lambda x: 3.0 * torch.maximum((x == 1).sum(-1), (x == 2).sum(-1)))

    def first(p):
        return (p.samples["completion"][..., 0] == 1) * 1.0

    exact = Exact().run(model, SHORT)
    settings = {"num_chains": 32, "initial_particles": 30}
    plain = mcmc(num_samples=40, **settings).run(model, SHORT)
    tempered = mcmc(num_samples=80, warmup=130, num_temperatures=4, **settings).run(model, SHORT)
    assert_agrees(tempered, exact, [first])
    assert (np.diff(first(plain), axis=1) != 0).mean() < 0.02
    assert (np.diff(first(tempered), axis=1) != 0).mean() > 0.05
    ladder, rates = tempered.stats["inverse_temperatures"], tempered.stats["swap_acceptance"]
    assert ladder.shape == (4, 2)
    assert (ladder[0] == 0).all()
    assert (ladder[-1] == 1).all()
    assert (np.diff(ladder, axis=0) > 0).all()
    assert rates.shape == (3, 2)
    assert ((rates > 0.2) & (rates < 0.8)).all()


def test_temperatures_move_to_where_neighbours_refuse_equally():
    """Refusals of 0.6, 0.2 and 0.2: the ladder between 0 and 1/3 then needs three of five parts of the steps."""
    target = Enumerated(shared())
    replicas = Replicas(target.program, 4, 100)
    log_likelihood = -3.0 * torch.tensor([1.0, 0.4, 0.8, 0.8]).log().cumsum(0)  # a third of the gap is log acceptance
    state = replace(target.draw(400), log_likelihood={"reward": log_likelihood.repeat_interleave(100)[:, None]})
    for _ in range(2):  # the even pairs, and the odd one
        replicas.swap(state)
    np.testing.assert_allclose(replicas.stats()["swap_acceptance"][:, 0], [0.4, 0.8, 0.8], rtol=1e-5)
    replicas.adapt(17)
    np.testing.assert_allclose(replicas.stats()["inverse_temperatures"][:, 0], [0, 1 / 3, 2 / 3, 1], atol=1e-6)
    replicas.adapt(32)
    np.testing.assert_allclose(replicas.stats()["inverse_temperatures"][:, 0], [0, 5 / 27, 1 / 3 + 1 / 9, 1], atol=2e-3)


def test_swaps_leave_every_temperature_as_it_is():
    """Replicas that are exact draws of their targets still are, each, after exchanges."""
    chains, temperatures = 4000, 3
    target = Enumerated(conversation())
    replicas = Replicas(target.program, temperatures, chains)
    gammas = replicas.gamma.reshape(temperatures, chains, 2)[:, 0]
    distributions = [log_target(target.atoms, gamma).double().log_softmax(0) for gamma in gammas]
    torch.manual_seed(0)
    index = torch.cat([distribution.exp().T.multinomial(chains, replacement=True).T for distribution in distributions])
    state = target.atoms.gather(target.program, index)
    moved = replicas.swap(replicas.swap(state))
    after = target.index(moved).reshape(temperatures, chains, 2)
    for distribution, place, before in zip(distributions, after, index.reshape(temperatures, chains, 2), strict=True):
        assert (place != before).float().mean() > 0.1
        for prompt in range(2):
            assert_drawn_from(place[:, prompt].bincount(minlength=len(distribution)), distribution[:, prompt])


def test_the_warm_start_draws_from_the_weights():
    """Of each temperature: a replica at 0 is a draw of the prior, one at 1 of the weighted particles."""
    target = Enumerated(shared())
    particles = target.draw(50)
    particles = replace(particles, log_proposal=particles.log_prior - torch.linspace(-1, 1, 50)[:, None])
    replicas = Replicas(target.program, 2, 20_000)
    torch.manual_seed(0)
    state = replicas.start(particles)
    for k, gamma in enumerate((0.0, 1.0)):
        part = state[k * 20_000 : (k + 1) * 20_000]
        weights = gamma * particles.total_log_likelihood + particles.log_prior - particles.log_proposal
        atoms = target.index(particles)[:, 0]
        distribution = torch.zeros(len(target.log_prob)).index_add_(0, atoms, weights[:, 0].softmax(0))
        assert_drawn_from(target.index(part)[:, 0].bincount(minlength=len(distribution)), distribution.log())


# -- the contract ----------------------------------------------------------------------------------------------------


SMALL = {"num_samples": 8, "num_chains": 3, "warmup": 4, "initial_particles": 50}
MODEL = tilted(table_lm(order=2, seed=2, vocab=4), score_table(2, vocab=4, tokens=4), 1.0)


def small(**settings) -> Posterior:
    return mcmc(**(SMALL | settings)).run(MODEL, SHORT)


def test_contract():
    posterior = small(num_temperatures=2)
    assert posterior.kind == "markov"
    assert (posterior.log_weights == 0).all()
    assert posterior.prior["completion"].shape == (1, 50, 2, 4)
    assert 0 < posterior.stats["cuts_completion"].sum() <= 3 * 8 * 2  # the replicas at 1, after the warm-up
    assert posterior.stats["initial_ess"].shape == (2,)
    # one chain's draws are neighbours: a draw differs from the last one by an accepted move or not at all
    x = posterior.samples["completion"]
    assert (x[:, 1:] == x[:, :-1]).all(-1).any()


def test_thinning_keeps_every_second_state():
    every, second = small(), small(num_samples=4, thin=2)
    np.testing.assert_array_equal(every.samples["completion"][:, 1::2], second.samples["completion"])
    with_policy = small(proposal=table_lm(order=2, seed=3, vocab=4))
    assert not with_policy.prior


@pytest.mark.parametrize(
    "settings", [{"num_chains": 0}, {"thin": 0}, {"warmup": -1}, {"num_temperatures": 1.5}, {"step_size": 0.0}], ids=str
)
def test_settings_are_checked(settings):
    with pytest.raises((TypeError, ValueError), match=next(iter(settings))):
        MCMC(**settings)
