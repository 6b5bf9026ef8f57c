"""Legal programs that are easy to weigh wrongly, and those that are refused because they would be."""

from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from support.gradients import gradient_of, gradients
from support.models import table_lm
from support.programs import score_table, tilted
from support.statistics import LIMIT, assert_evidence, assert_mean

from bayeslm.inference import SVI, Exact, ImportanceSampling, ProgramError
from bayeslm.inference.training import ReverseKL, StatefulLoss
from bayeslm.models import rewards

SHORT = [[1, 2], [3]]


def importance(**settings) -> ImportanceSampling:
    return ImportanceSampling(**({"num_particles": 500, "seed": 0, "progress": False} | settings))


def test_svi_at_its_defaults_finds_latents_that_are_not_texts():
    """theta ~ N(0, 1) inside the plate of prompts, y ~ N(theta, 1) = 1.2: posterior N(0.6, 1/2); and a Bernoulli.

    KL to the posterior under 0.05 nats, log Z known in closed form.
    """

    def model(prompts):
        with pyro.plate("prompts", len(prompts)):
            theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(theta, 1.0), obs=torch.tensor([1.2, -0.4]))
            z = pyro.sample("z", dist.Bernoulli(0.5))
            pyro.factor("liking", 3.0 * z)

    posterior = SVI(num_samples=4000, seed=0, progress=False).run(model, SHORT)
    evidence = dist.Normal(0.0, math.sqrt(2.0)).log_prob(torch.tensor([1.2, -0.4])).numpy()
    evidence = evidence + math.log(0.5 + 0.5 * math.exp(3.0))
    gap = evidence - posterior.log_weights.mean((0, 1))
    stderr = posterior.log_weights.std((0, 1)) / 4000**0.5
    assert (gap < 0.05 + LIMIT * stderr).all(), gap
    assert (gap > -LIMIT * stderr).all()
    np.testing.assert_allclose(posterior.observed["y"], [1.2, -0.4], rtol=1e-6)
    assert "observed_data" in posterior.to_arviz().groups()


@pytest.mark.parametrize("family", ["normal", "bernoulli"])
def test_gradient_where_the_guide_leaves_a_latent_to_the_prior(family):
    """z given theta is drawn from the model; theta ~ Bernoulli(sigmoid(a)) or N(a, 1) in the guide.

    d/da of the ELBO in closed form: for N, z ~ N(0, e^theta) and reward z, d/da (-a^2 / 2) plus nothing from z;
    for Bernoulli, z ~ Bernoulli(sigmoid(theta)), reward z, by a sum over theta.
    """
    a = torch.tensor(0.7, requires_grad=True)

    def model():
        if family == "normal":
            theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
            z = pyro.sample("z", dist.Normal(theta, theta.exp()))
        else:
            theta = pyro.sample("theta", dist.Bernoulli(0.5))
            z = pyro.sample("z", dist.Bernoulli(torch.sigmoid(3 * theta - 1)))
        pyro.factor("reward", z)

    def guide():
        loc = pyro.param("a", a)
        pyro.sample("theta", dist.Normal(loc, 1.0) if family == "normal" else dist.Bernoulli(logits=loc))

    if family == "normal":
        exact = a - a**2 / 2  # E[z] = E[theta] = a, KL = a^2 / 2
    else:
        q = torch.sigmoid(a)
        on, off = torch.sigmoid(torch.tensor(2.0)), torch.sigmoid(torch.tensor(-1.0))
        kl = torch.distributions.kl_divergence(dist.Bernoulli(q), dist.Bernoulli(0.5))
        exact = q * on + (1 - q) * off - kl
    (expected,) = torch.autograd.grad(-exact, a)
    assert_mean(gradients(ReverseKL(num_particles=50), model, guide, [a], (), repeats=200), expected)


def test_gradient_of_a_guide_that_draws_the_shared_latent_last():
    """q(x) q(mood | x): the score of x must see what mood, drawn after it, does to every prompt."""
    lm = table_lm(order=2, seed=0, vocab=3)
    policy = lm.policy()
    slope = torch.tensor(0.6, requires_grad=True)

    def model(prompts):
        mood = pyro.sample("mood", dist.Bernoulli(0.5))
        with pyro.plate("prompts", len(prompts)):
            x = pyro.sample("completion", lm(prompts, max_new_tokens=1))
            pyro.factor("reward", 2.0 * mood * (x == 1).sum(-1))

    def guide(prompts):
        pyro.module("policy", policy)
        with pyro.plate("prompts", len(prompts)):
            x = pyro.sample("completion", policy(prompts, max_new_tokens=1))
        hits = (x == 1).sum((-1, -2), keepdim=False)[..., None] if x.dim() > 2 else (x == 1).sum()
        pyro.sample("mood", dist.Bernoulli(logits=pyro.param("slope", slope) * hits))

    prompts = [[1], [2]]
    distribution = policy(prompts, max_new_tokens=1)
    tokens = distribution.enumerate_support(expand=False)
    log_q = distribution.log_prob(tokens)  # (token, prompt)
    log_p = lm(prompts, max_new_tokens=1).log_prob(tokens)
    total = torch.zeros(())
    for i in range(3):
        for j in range(3):
            hits = float(tokens[i, 0, 0] == 1) + float(tokens[j, 0, 0] == 1)
            for mood in (0.0, 1.0):
                log_mood = dist.Bernoulli(logits=slope * hits).log_prob(torch.tensor(mood))
                q = log_q[i, 0] + log_q[j, 1] + log_mood
                f = log_p[i, 0] + log_p[j, 1] + math.log(0.5) + 2.0 * mood * hits - q
                total = total + q.exp() * f
    parameters = [*policy.network.parameters(), slope]
    estimates = gradients(ReverseKL(num_particles=400), model, guide, parameters, (prompts,), repeats=150)
    assert_mean(estimates, gradient_of(-total, parameters), rounding=1e-6)


@pytest.mark.parametrize("raters", [2, 3])
def test_another_plate_at_the_prompts_dim_is_not_the_prompts(raters):
    """A latent in a plate parallel to the prompts makes one posterior; the loss is stock Pyro's."""
    lm = table_lm(order=2, seed=0, vocab=3)

    def model(prompts):
        with pyro.plate("raters", raters):
            pyro.sample("mood", dist.Bernoulli(0.5))
            pyro.factor("opinions", torch.linspace(0.0, 1.0, raters))
        with pyro.plate("prompts", len(prompts)):
            x = pyro.sample("completion", lm(prompts, max_new_tokens=1))
            pyro.factor("reward", (x == 1).sum(-1) * 1.0)

    def guide(prompts):
        with pyro.plate("raters", raters):
            pyro.sample("mood", dist.Bernoulli(0.3))
        with pyro.plate("prompts", len(prompts)):
            pyro.sample("completion", lm(prompts, max_new_tokens=1))

    prompts = [[1, 2], [2]]
    exact = Exact().run(model, prompts)
    assert exact.log_weights.shape == (1, 2**raters * 9, 1)
    posterior = importance(num_particles=3000).run(model, prompts)
    assert_evidence(posterior, exact.log_evidence)
    losses = {}
    for name, elbo in {
        "ours": StatefulLoss(ReverseKL(4000)),
        "stock": Trace_ELBO(4000, vectorize_particles=True),
    }.items():
        losses[name] = elbo.loss(model, guide, prompts)
    assert losses["ours"] == pytest.approx(losses["stock"], abs=0.15)  # sd of a particle's ELBO is below 1.2


def test_guides_outside_the_plate_of_prompts_are_refused():
    def model(prompts):
        with pyro.plate("prompts", len(prompts)):
            pyro.sample("theta", dist.Normal(0.0, 1.0))

    def guide(prompts):
        pyro.sample("theta", dist.Normal(torch.zeros(len(prompts)), 1.0).to_event(1))

    with pytest.raises(ProgramError, match="'theta' outside the plate 'prompts'"):
        importance(guide=guide).run(model, SHORT)


def test_subsampled_and_scaled_latents_are_refused():
    def subsampled():
        with pyro.plate("raters", 10, subsample_size=2):
            pyro.sample("z", dist.Bernoulli(0.5))

    def scaled():
        with poutine.scale(scale=3.0):
            pyro.sample("z", dist.Bernoulli(0.5))

    for model in (subsampled, scaled):
        with pytest.raises(ProgramError, match="'z' is subsampled or scaled"):
            importance().run(model)


def test_masked_latents_are_not_enumerated():
    def model():
        with pyro.plate("prompts", 2), poutine.mask(mask=torch.tensor([True, False])):
            pyro.sample("z", dist.Bernoulli(0.5))

    with pytest.raises(ProgramError, match="'z': it is masked"):
        Exact().run(model)


def test_a_proposal_of_other_completions_is_refused():
    model = tilted(table_lm(order=2, vocab=4), score_table(0, vocab=4, tokens=3))
    with pytest.raises(ValueError, match="vocabularies differ"):
        importance(guide=table_lm(order=2, vocab=3)).run(model, SHORT)


def test_half_precision_scores_and_odd_deterministic_sites():
    lm = table_lm(order=2, vocab=4)

    def model(prompts):
        bonus = pyro.param("bonus", torch.tensor(0.3))
        with pyro.plate("prompts", len(prompts)):
            x = pyro.sample("completion", lm(prompts, max_new_tokens=2))
            rewards.record("reward", (x == 1).sum(-1).bfloat16())
            pyro.deterministic("bonus_seen", bonus)
            pyro.factor("reward", (x == 1).sum(-1) * bonus)

    for engine in (importance(), SVI(num_steps=2, num_samples=8, progress=False)):
        posterior = engine.run(model, SHORT)
        assert posterior.rewards["reward"].dtype == np.float32
        assert posterior.samples["bonus_seen"].shape == posterior.log_weights.shape
        # one value for all: 0.3, or what SVI makes of the program's own parameter (empirical Bayes, as in Pyro)
        expected = 0.3 if posterior.engine == "ImportanceSampling" else posterior.samples["bonus_seen"][0, 0, 0]
        np.testing.assert_allclose(posterior.samples["bonus_seen"], expected, rtol=1e-6)


def test_a_default_dtype_of_float64_changes_nothing():
    model = tilted(table_lm(order=2, vocab=4), score_table(0, vocab=4, tokens=3))
    expected = Exact().run(model, SHORT).log_evidence
    torch.set_default_dtype(torch.float64)
    try:
        found = Exact().run(model, SHORT).log_evidence
        importance().run(model, SHORT)
    finally:
        torch.set_default_dtype(torch.float32)
    np.testing.assert_allclose(found, expected, atol=1e-5)
