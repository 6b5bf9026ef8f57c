"""SVI, best of n and unvectorised runs against `Exact`; the laws of all engines are in `test_laws.py`.

Standard errors are computed from the exact posterior where they can be, not from the draws under test.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from support.models import llama_network, table_lm
from support.oracles import expectation, kl_to
from support.programs import PROMPTS, case, score_table, tilted
from support.statistics import assert_estimate, assert_evidence

from bayeslm import diagnostics
from bayeslm.inference import SVI, AdaptiveImportance, BestOfN, Exact, ImportanceSampling
from bayeslm.inference.training import Adam
from bayeslm.models import LanguageModel
from bayeslm.models.lm import Twist

SMALL = {"vocab": 4, "tokens": 4}
SHORT = [[1, 2], [3]]


SVI_CASES = [*itertools.product((0.7, 1.5), (0, 1))]


@pytest.mark.parametrize(
    ("kind", "beta", "seed"),
    [
        ("table", 0.7, 0),
        ("table", 1.5, 0),
        *(pytest.param("table", beta, 1, marks=pytest.mark.long) for beta in (0.7, 1.5)),
        pytest.param("llama", 0.7, 0, marks=pytest.mark.long),
        *(pytest.param("larger llama", *case, marks=pytest.mark.long) for case in SVI_CASES),
    ],
)
def test_svi_reaches_the_posterior(kind, beta, seed):
    """KL(q || posterior) <= 0.05 nats by enumeration, with log Z and the reward of its weighted draws right.

    The table knows the whole history (order 6), so that it can hold the posterior.
    """
    table, prompts = (score_table(seed), PROMPTS) if kind == "larger llama" else (score_table(seed, **SMALL), SHORT)
    if kind == "table":
        lm, rate = table_lm(order=6, seed=seed, vocab=4), 0.1
    else:
        network = llama_network(seed, scale=1.0, initializer_range=0.08, vocab_size=table.shape[1])
        lm, rate = LanguageModel(network), 3e-3
    model = tilted(lm, table, beta)
    exact = Exact(num_prior_samples=1).run(model, prompts)
    steps = 120 if kind == "table" else 250
    settings = {"num_steps": steps, "num_particles": 64, "num_samples": 2000, "seed": seed, "progress": False}
    posterior = SVI(optimizer=Adam(rate, schedule="cosine"), **settings).run(model, prompts)
    gap = kl_to(exact, posterior.policy, prompts).numpy()
    assert (gap <= 0.05).all(), gap
    assert (gap >= -1e-6).all()
    # the policy's own weighted draws: variance of weights from the enumeration
    distribution = posterior.policy(prompts, max_new_tokens=len(table))
    log_q = distribution.log_prob(torch.as_tensor(exact.samples["completion"][0])).detach().double().numpy()
    relative = np.exp(2 * (exact.log_joint[0] - exact.log_evidence) - log_q).sum(0) - 1
    assert_estimate(np.exp(posterior.log_evidence - exact.log_evidence), np.sqrt(relative / 2000), 1.0)
    assert_estimate(*diagnostics.kl_to_posterior(posterior, exact.log_evidence), gap)
    mean = expectation(exact, exact.rewards["reward"])
    assert_estimate(*diagnostics.expectation(posterior, posterior.rewards["reward"]), mean)


def test_best_of_n_distribution_and_bound():
    """P(best of n <= t) = F(t)^n for rewards without ties; and its KL stays under the bound."""
    _, model, exact = case("table", 0.5, 0)
    posterior = BestOfN(n=4, num_samples=1500, seed=0, progress=False).run(model, PROMPTS)
    prior = np.exp(exact.log_joint - exact.log_likelihood["reward"])
    for i in range(len(PROMPTS)):
        for threshold in np.quantile(exact.rewards["reward"][0, :, i], [0.3, 0.5, 0.8]):
            below = prior[0, exact.rewards["reward"][0, :, i] <= threshold, i].sum() ** 4
            share = (posterior.rewards["reward"][..., i] <= threshold).mean()
            assert_estimate(share, math.sqrt(below * (1 - below) / 1500), below)
    assert posterior.kind == "uncorrected"
    assert posterior.stats["kl_bound"] == pytest.approx(math.log(4) - 0.75)


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
    engine = SVI(num_steps=100, num_particles=32, optimizer=Adam(0.06), num_samples=2000, seed=0, progress=False)
    posterior = engine.run(model, SHORT)
    assert posterior.log_weights.shape == (1, 2000, 1)
    assert_evidence(posterior, exact.log_evidence)
    before, after = (posterior.stats["elbo"][0][s] for s in (slice(0, 10), slice(-10, None)))
    assert after.mean() > before.mean() + 0.05
    mean = expectation(exact, exact.samples["mood"][..., None])
    assert_estimate(*diagnostics.expectation(posterior, posterior.samples["mood"][..., None] * 1.0), mean)


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


@pytest.mark.parametrize("engine", [ImportanceSampling, AdaptiveImportance, SVI])
def test_a_twist_is_no_guide(engine):
    """It can be called, as a guide can."""
    with pytest.raises(TypeError, match=rf"{engine.__name__}: guide must draw texts, got a Twist"):
        engine(guide=Twist(LanguageModel(llama_network()), 3))
