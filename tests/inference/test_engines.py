"""Importance sampling, rejection, best of n and SVI against `Exact`; the laws of all engines are in `test_laws.py`.

Standard errors are computed from the exact posterior where they can be, not from the draws under test.
"""

from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy.special import softmax
from support.models import llama_network, table_lm
from support.oracles import expectation
from support.programs import PROMPTS, case, highest, score_table, tilted, token_is
from support.statistics import LIMIT, assert_estimate, assert_evidence

from bayeslm import diagnostics
from bayeslm.inference import SVI, BestOfN, Exact, ImportanceSampling, RejectionSampling
from bayeslm.inference.training import Adam
from bayeslm.models import LanguageModel

SMALL = {"vocab": 4, "tokens": 4}
SHORT = [[1, 2], [3]]


ENGINES = {
    "importance": lambda bound: ImportanceSampling(num_particles=2000, num_chains=2, seed=1, progress=False),
    "rejection": lambda bound: RejectionSampling(
        num_samples=150, num_chains=2, log_bound=bound, seed=1, max_proposals=40_000, progress=False
    ),
}
CASES = [("table", 0.5, 0), ("table", 1.0, 1), ("llama", 1.0, 0), ("llama", 0.5, 1)]


@pytest.mark.parametrize(("kind", "beta", "seed"), CASES)
@pytest.mark.parametrize("engine", ENGINES)
def test_samplers_agree_with_exact(engine, kind, beta, seed):
    """log Z, the expected reward, and the marginals of the first and third token."""
    _, model, exact = case(kind, beta, seed)
    posterior = ENGINES[engine](highest(score_table(seed)) / beta).run(model, PROMPTS)
    assert posterior.log_weights.shape[:2] == posterior.samples["completion"].shape[:2]
    # relative variance of one prior draw's weight, from the enumeration
    log_prior = exact.log_joint - exact.log_likelihood["reward"]
    second = np.log(np.exp(log_prior + 2 * exact.log_likelihood["reward"]).sum((0, 1)))
    relative = np.exp(second - 2 * exact.log_evidence) - 1
    n = posterior.stats["proposals"] if engine == "rejection" else posterior.log_weights[..., 0].size
    assert_estimate(np.exp(posterior.log_evidence - exact.log_evidence), np.sqrt(relative / n), 1.0)

    size = posterior.log_weights[..., 0].size
    importance = np.exp(exact.log_likelihood["reward"] - exact.log_evidence)  # posterior / prior at each atom
    assert exact.log_weights.shape[1] == 19_608
    for value in (lambda p: p.samples["score"], *(token_is(t, token) for t in (0, 2) for token in (0, 1, 5))):
        mean = expectation(exact, value(exact))
        square = (value(exact) - mean) ** 2  # of weighted draws: the asymptotic variance of a self-normalised mean
        variance = expectation(exact, square * (importance if engine == "importance" else 1.0))
        estimate = (softmax(posterior.log_weights, (0, 1)) * value(posterior)).sum((0, 1))
        assert_estimate(estimate, np.sqrt(variance / size), mean)


def test_importance_sampling_is_unbiased_for_z():
    """The mean of Z-hat / Z over 400 chains of 25 particles is 1, and its standard error is what the chains say."""
    _, model, exact = case("table", 1.0)
    posterior = ImportanceSampling(num_particles=25, num_chains=400, seed=3, progress=False).run(model, PROMPTS)
    assert_evidence(posterior, exact.log_evidence, unbiased=True)


SVI_CASES = [(kind, beta, seed) for kind in ("table", "llama") for beta in (0.7, 1.5) for seed in (0, 1)]


@pytest.mark.parametrize(
    ("kind", "beta", "seed"),
    [  # a network takes 20 s: one, at the beta that asks for more, stays
        pytest.param(*case, marks=[pytest.mark.long] if case[0] == "llama" and case != ("llama", 0.7, 0) else [])
        for case in SVI_CASES
    ],
)
def test_svi_reaches_the_posterior(kind, beta, seed):
    """KL(q || posterior) <= 0.05 nats by enumeration, with log Z and the reward of its weighted draws right.

    The table knows the whole history (order 6), so that it can hold the posterior.
    """
    if kind == "table":
        lm, table, prompts, rate = table_lm(order=6, seed=seed, vocab=4), score_table(seed, **SMALL), SHORT, 0.05
    else:
        lm = LanguageModel(llama_network(seed, scale=1.0, initializer_range=0.08))
        table, prompts, rate = score_table(seed), PROMPTS, 3e-3
    model = tilted(lm, table, beta)
    exact = Exact(num_prior_samples=1).run(model, prompts)
    engine = SVI(
        num_steps=250,
        num_particles=64,
        optimizer=Adam(rate, schedule="cosine"),
        num_samples=2000,
        seed=seed,
        progress=False,
    )
    posterior = engine.run(model, prompts)
    distribution = posterior.policy(prompts, max_new_tokens=len(table))
    atoms = torch.as_tensor(exact.samples["completion"][0])
    log_q = distribution.log_prob(atoms).detach().double().numpy()
    gap = (np.exp(log_q) * (log_q - (exact.log_joint[0] - exact.log_evidence))).sum(0)
    assert (gap <= 0.05).all(), gap
    assert (gap >= -1e-6).all()
    # the policy's own weighted draws: variance of weights from the enumeration
    log_w = exact.log_joint[0] - log_q
    relative = np.exp(np.log(np.exp(log_q + 2 * log_w).sum(0)) - 2 * exact.log_evidence) - 1
    assert_estimate(np.exp(posterior.log_evidence - exact.log_evidence), np.sqrt(relative / 2000), 1.0)
    assert_estimate(*diagnostics.kl_to_posterior(posterior, exact.log_evidence), gap)
    mean = expectation(exact, exact.samples["score"])
    assert_estimate(*diagnostics.expectation(posterior, posterior.samples["score"]), mean)


def test_best_of_n_law_and_bound():
    """P(best of n <= t) = F(t)^n for rewards without ties; and its KL stays under the bound."""
    _, model, exact = case("table", 0.5, 0)
    posterior = BestOfN(n=4, num_samples=1500, seed=0, progress=False).run(model, PROMPTS)
    prior = np.exp(exact.log_joint - exact.log_likelihood["reward"])
    for i in range(len(PROMPTS)):
        for threshold in np.quantile(exact.samples["score"][0, :, i], [0.3, 0.5, 0.8]):
            below = prior[0, exact.samples["score"][0, :, i] <= threshold, i].sum() ** 4
            share = (posterior.samples["score"][..., i] <= threshold).mean()
            assert_estimate(share, math.sqrt(below * (1 - below) / 1500), below)
    assert posterior.kind == "uncorrected"
    assert posterior.stats["kl_bound"] == pytest.approx(math.log(4) - 0.75)


# -- programs with more in them --------------------------------------------------------------------------------


def test_importance_sampling_with_other_latents_agrees_with_exact():
    """A topic a prompt that the completion's prompt does not see, two completions, two factors."""
    lm = table_lm(order=2, seed=1, vocab=4)

    def model(prompts):
        with pyro.plate("prompts", len(prompts)):
            topic = pyro.sample("topic", dist.Categorical(torch.tensor([0.2, 0.8])))
            x = pyro.sample("completion", lm(prompts, max_new_tokens=2))
            y = pyro.sample("reply", lm(prompts, max_new_tokens=2))
            pyro.factor("match", (x == topic[..., None] + 1).sum(-1) * 1.0)
            pyro.factor("echo", 0.7 * (x == y).all(-1))

    exact = Exact().run(model, SHORT)
    posterior = ImportanceSampling(num_particles=8000, seed=0, progress=False).run(model, SHORT)
    assert_evidence(posterior, exact.log_evidence)
    mean = expectation(exact, exact.samples["topic"])
    assert_estimate(*diagnostics.expectation(posterior, posterior.samples["topic"] * 1.0), mean)


def test_svi_with_every_kind_of_latent_agrees_with_exact():
    """A Bernoulli mood shared by prompts, a topic a prompt, a completion: all in the default guide."""
    lm = table_lm(order=4, seed=1, vocab=4)

    def model(prompts):
        mood = pyro.sample("mood", dist.Bernoulli(0.4))
        with pyro.plate("prompts", len(prompts)):
            topic = pyro.sample("topic", dist.Categorical(logits=torch.zeros(2)))
            x = pyro.sample("completion", lm(prompts, max_new_tokens=2))
            pyro.factor("reward", (0.5 + mood) * 1.5 * (x == topic[..., None] + 1).sum(-1))

    exact = Exact().run(model, SHORT)
    engine = SVI(num_steps=200, num_particles=32, optimizer=Adam(0.03), num_samples=2000, seed=0, progress=False)
    posterior = engine.run(model, SHORT)
    assert posterior.log_weights.shape == (1, 2000, 1)
    assert_evidence(posterior, exact.log_evidence)
    before, after = (posterior.stats["elbo"][0][s] for s in (slice(0, 10), slice(-10, None)))
    assert after.mean() > before.mean() + 0.05
    mean = expectation(exact, exact.samples["mood"][..., None])
    assert_estimate(*diagnostics.expectation(posterior, posterior.samples["mood"][..., None] * 1.0), mean)


def test_svi_on_a_continuous_latent_alone_matches_the_closed_form():
    """theta ~ N(0, 1), y ~ N(theta, 1): posterior N(y / 2, 1 / 2), evidence N(y; 0, 2)."""
    y = torch.tensor(1.2)

    def model():
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(theta, 1.0), obs=y)

    engine = SVI(num_steps=400, num_particles=16, optimizer=Adam(0.05), num_samples=4000, seed=0, progress=False)
    posterior = engine.run(model)
    evidence = dist.Normal(0.0, math.sqrt(2.0)).log_prob(y).item()
    assert_estimate(posterior.log_evidence, posterior.log_evidence_stderr, evidence, rounding=1e-4)
    gap, stderr = diagnostics.kl_to_posterior(posterior, np.array([evidence]))
    assert gap[0] < 0.01 + LIMIT * stderr[0]
    assert_estimate(*diagnostics.expectation(posterior, posterior.samples["theta"][..., None]), 0.6)


def test_a_policy_as_proposal_corrects_itself():
    """Importance sampling from a wrong policy is right; from the posterior itself it has no variance."""
    model = tilted(table_lm(order=3, seed=2, vocab=4), score_table(2, **SMALL))
    exact = Exact().run(model, SHORT)
    policy = table_lm(order=3, seed=9, vocab=4)
    posterior = ImportanceSampling(num_particles=4000, guide=policy, seed=0, progress=False).run(model, SHORT)
    assert_evidence(posterior, exact.log_evidence)
    assert not posterior.prior


def test_programs_of_single_values_run_unvectorised():
    """A prompt that depends on a latent through plain Python."""
    lm = table_lm(order=2, seed=1, vocab=4)

    def model():
        topic = pyro.sample("topic", dist.Bernoulli(0.3))
        prompt = [1] if topic.item() == 1 else [2]
        x = pyro.sample("completion", lm([prompt], max_new_tokens=2))
        pyro.factor("reward", (x == 3).sum(-1) * 1.0)

    def given(prompt):
        def conditional():
            x = pyro.sample("completion", lm([prompt], max_new_tokens=2))
            pyro.factor("reward", (x == 3).sum(-1) * 1.0)

        return Exact().run(conditional).log_evidence[0]

    expected = np.logaddexp(math.log(0.3) + given([1]), math.log(0.7) + given([2]))
    engine = ImportanceSampling(num_particles=600, vectorize=False, seed=0, progress=False)
    posterior = engine.run(model)
    assert_evidence(posterior, expected)
