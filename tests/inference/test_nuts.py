"""NUTS against closed forms: conjugate posteriors, supports that move, observed completions, and what it refuses."""

from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from support.models import table_lm, tiny_llama
from support.programs import normal_mean
from support.statistics import assert_chain_mean, assert_mean, assert_random_state_kept

from bayeslm.inference import EvidenceError, ProgramError, RunError
from bayeslm.inference.markov.potential import Unconstrained
from bayeslm.inference.nuts import NUTS
from bayeslm.models.lm import Autoregressive

SHORT = [[1, 2], [3]]


def nuts(**settings) -> NUTS:
    return NUTS(**({"num_samples": 60, "warmup": 80, "num_chains": 2, "seed": 0, "progress": False} | settings))


def assert_prompt_means(values: np.ndarray, expected) -> None:
    """Assert the mean of values (chain, draw, prompt), an expected value a prompt.

    Prompts are replicates: a few draws of many tell as much as many of one, and cost less.
    """
    error = (values - expected).mean(-1)
    stderr = assert_chain_mean(error, 0.0)
    assert stderr < 0.3 * values.std(), "too few draws to tell anything"


def test_jacobians_are_summed_where_they_are():
    """On the device of the latents: here one without numbers, which takes part in nothing of the CPU's."""
    at = Unconstrained({})
    at.log_dets = {"one": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "two": torch.tensor([10.0, 20.0])}
    assert at.log_det_of_each(2).tolist() == [13.0, 27.0]
    at.log_dets = {name: log_det.to("meta") for name, log_det in at.log_dets.items()}
    assert at.log_det_of_each(2).device.type == "meta"


def test_conjugate_posteriors():
    """Normal mean, binomial probability and Poisson rate of each prompt: moments, and every term in closed form."""
    y = torch.tensor([1.2, -0.4]).repeat(8)
    k, counts = torch.tensor([7.0, 2.0]).repeat(8), torch.tensor([3.0, 0.0]).repeat(8)

    def model(prompts):
        with pyro.plate("prompts", len(prompts)):
            theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
            pyro.deterministic("double", 2 * theta, event_dim=0)
            pyro.sample("y", dist.Normal(theta, 1.0), obs=y)
            p = pyro.sample("p", dist.Beta(2.0, 3.0))
            pyro.factor("k", k * p.log() + (9 - k) * (1 - p).log())
            rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
            pyro.sample("counts", dist.Poisson(rate), obs=counts)

    posterior = nuts(num_samples=40, warmup=60, max_tree_depth=4).run(model, [[1]] * 16)
    assert (posterior.kind, posterior.engine) == ("markov", "NUTS")
    theta, p, rate = (posterior.samples[name] for name in ("theta", "p", "rate"))
    assert theta.shape == p.shape == rate.shape == (2, 40, 16)
    assert_prompt_means(theta, y.numpy() / 2)
    assert_prompt_means((theta - y.numpy() / 2) ** 2, 0.5)
    a, b = 2 + k.numpy(), 3 + 9 - k.numpy()
    assert_prompt_means(p, a / (a + b))
    assert_prompt_means((p - a / (a + b)) ** 2, a * b / (a + b) ** 2 / (a + b + 1))
    shape = 2 + counts.numpy()
    assert_prompt_means(rate, shape / 2)
    assert_prompt_means((rate - shape / 2) ** 2, shape / 4)

    np.testing.assert_allclose(posterior.samples["double"], 2 * theta, rtol=1e-6)
    x = {name: torch.as_tensor(value) for name, value in posterior.samples.items()}
    terms = {
        "y": dist.Normal(x["theta"], 1.0).log_prob(y),
        "k": k * x["p"].log() + (9 - k) * (1 - x["p"]).log(),
        "counts": dist.Poisson(x["rate"]).log_prob(counts),
    }
    for name, term in terms.items():
        np.testing.assert_allclose(posterior.log_likelihood[name], term, rtol=1e-4, atol=1e-5)
    prior = dist.Normal(0.0, 1.0).log_prob(x["theta"]) + dist.Beta(2.0, 3.0).log_prob(x["p"])
    prior = prior + dist.Gamma(2.0, 1.0).log_prob(x["rate"])
    np.testing.assert_allclose(posterior.log_joint, prior + sum(terms.values()), rtol=1e-4, atol=1e-5)

    assert (posterior.log_weights == 0).all()
    assert np.isnan(posterior.log_evidence).all()
    stats = posterior.stats
    assert stats["acceptance"].shape == stats["divergences"].shape == stats["step_size"].shape == (2,)
    assert (np.abs(stats["acceptance"] - 0.8) < 0.15).all()
    assert not stats["interrupted"]
    assert posterior.prior["theta"].shape == (1, 40, 16)
    assert {"posterior", "sample_stats", "prior"} <= set(posterior.to_arviz().groups())


def test_a_support_that_depends_on_a_latent():
    """width ~ Gamma(4, 1) shared by prompts, s ~ U(0, width): s / width is uniform whatever width is."""

    def model(prompts):
        width = pyro.sample("width", dist.Gamma(4.0, 1.0))
        with pyro.plate("prompts", len(prompts)):
            pyro.sample("s", dist.Uniform(0.0, width))

    posterior = nuts(num_samples=40, warmup=50, num_chains=1).run(model, [[1]] * 5)
    share = posterior.samples["s"] / posterior.samples["width"][..., None]
    assert ((share > 0) & (share < 1)).all()
    assert_prompt_means(share, 0.5)
    assert_prompt_means(share**2, 1 / 3)
    assert_prompt_means(posterior.samples["width"][..., None], 4.0)
    assert posterior.log_joint.shape == (1, 40, 1)


@pytest.mark.parametrize("frozen", [True, False])
def test_an_observed_completion_is_scored_once(frozen):
    """Its network, frozen or not, runs at the inspection and not at each leapfrog; its score is in the terms."""
    lm = tiny_llama(seed=1) if frozen else tiny_llama(seed=1).policy()
    tokens = lm(SHORT, 4).sample()

    def model(prompts):
        with pyro.plate("prompts", len(prompts)):
            theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
            pyro.sample("completion", lm(prompts, 4), obs=tokens.clone())
            pyro.sample("y", dist.Normal(theta, 1.0), obs=torch.tensor([1.2, -0.4]))

    posterior = nuts(num_samples=30, warmup=30, num_chains=1).run(model, SHORT)
    assert posterior.stats["model_calls"] == 1  # prompts and completions in one pass
    expected = lm(SHORT, 4).log_prob(tokens).detach()
    np.testing.assert_allclose(posterior.log_likelihood["completion"], expected.expand(1, 30, 2), atol=1e-5)
    np.testing.assert_array_equal(posterior.observed["completion"], tokens)


def test_an_observed_completion_whose_prompt_depends_on_a_latent():
    """P(theta > 0 | x) = p(x | prompt of theta > 0) / (p(x | that) + p(x | the other)) for theta ~ N(0, 1)."""
    lm = table_lm(order=2, seed=3, vocab=4)
    tokens = torch.tensor([[2, 0, 0]] * 8)

    def model():
        with pyro.plate("prompts", len(tokens)):
            theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
            ids = torch.where(theta > 0, 1, 3)[..., None]
            pyro.sample("completion", Autoregressive(lm, ids, None, 3), obs=tokens)

    scores = lm([[1], [3]], 3).log_prob(tokens[:2])
    posterior = nuts(num_samples=50, warmup=40, num_chains=1, max_tree_depth=3).run(model)
    assert_prompt_means((posterior.samples["theta"] > 0) * 1.0, scores.softmax(0)[0].item())
    up = posterior.samples["theta"] > 0
    np.testing.assert_allclose(posterior.log_likelihood["completion"], np.where(up, scores[0], scores[1]), atol=1e-5)


def test_every_prompt_starts_where_its_own_posterior_allows():
    """theta_i > 0 for each of 40 prompts: no joint draw of U(-2, 2) has all of them."""

    def model(prompts):
        with pyro.plate("prompts", len(prompts)):
            theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
            pyro.factor("positive", torch.where(theta > 0, 0.0, -torch.inf))

    posterior = nuts(num_samples=40, warmup=40, num_chains=1).run(model, [[1]] * 40)
    assert (posterior.samples["theta"] > 0).all()
    assert len(np.unique(posterior.samples["theta"][0, :, 0])) > 12


def test_programs_of_single_values_run_unvectorised():
    def model():
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        mean = theta if theta.item() > 0 else 3 * theta
        pyro.sample("y", dist.Normal(mean, 1.0), obs=torch.tensor(1.0))

    posterior = nuts(num_samples=20, warmup=20, num_chains=1, vectorize=False).run(model)
    theta = torch.as_tensor(posterior.samples["theta"])
    mean = torch.where(theta > 0, theta, 3 * theta)
    expected = dist.Normal(mean, 1.0).log_prob(torch.tensor(1.0))
    np.testing.assert_allclose(posterior.log_likelihood["y"][..., 0], expected, rtol=1e-4)


def test_same_seed_same_result_and_no_noise(capfd):
    def model():
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(theta, 1.0), obs=torch.tensor(1.0))

    with assert_random_state_kept():
        a, b, c = (nuts(seed=seed, num_samples=20, warmup=20).run(model) for seed in (5, 5, 6))
    np.testing.assert_array_equal(a.samples["theta"], b.samples["theta"])
    assert not np.array_equal(a.samples["theta"], c.samples["theta"])
    assert not np.array_equal(a.samples["theta"][0], a.samples["theta"][1])
    assert capfd.readouterr() == ("", "")


# -- what it refuses -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("latent", "says"),
    [
        (lambda: table_lm(order=2, vocab=4)(SHORT[:1], 3), r"'z' is a completion.*MCMC"),
        (lambda: dist.Categorical(torch.ones(3)), r"'z' is discrete.*MCMC"),
        (lambda: dist.Poisson(2.0), "'z' is discrete"),
    ],
    ids=["completion", "categorical", "count"],
)
def test_latents_that_are_not_continuous(latent, says):
    def model():
        with pyro.plate("prompts", 1):
            pyro.sample("z", latent())

    with pytest.raises(ProgramError, match=says):
        nuts().run(model)


def test_a_latent_that_is_only_sometimes_there():
    """Where the starting points are, it is not: a trajectory comes upon it."""

    def model():
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(theta, 0.1), obs=torch.tensor(5.0))
        if theta.item() > 3.5:
            pyro.sample("more", dist.Normal(0.0, 1.0))

    with pytest.raises(ProgramError, match=r"latents changed between runs: \['more', 'theta'\]"):
        nuts(num_samples=20, warmup=20, vectorize=False).run(model)


def given(reward):
    """A program whose reward of theta ~ N(0, 1) is a function of it."""

    def model(prompts):
        with pyro.plate("prompts", len(prompts)):
            pyro.factor("reward", reward(pyro.sample("theta", dist.Normal(0.0, 1.0))))

    return model


def test_rewards_that_no_chain_can_start_from():
    with pytest.raises(EvidenceError, match=r"prompt 1 .*100 draws"):
        nuts().run(given(lambda theta: torch.tensor([0.0, -torch.inf]).expand(theta.shape)), SHORT)
    with pyro.validation_enabled(False), pytest.raises(ProgramError, match="'reward' has log-probability nan"):
        nuts().run(given(lambda theta: theta * torch.nan), SHORT)
    with pytest.raises(ProgramError, match="gradient of the log-density along site 'theta' is not finite"):
        nuts().run(given(lambda theta: (theta * 0.0).sqrt()), SHORT)


def interrupting(after: int, error: type[BaseException], calls: list[int]):
    """A reward that raises at its call number ``after``."""

    def reward(theta):
        calls.append(1)
        if len(calls) == after:
            raise error("stop")
        return -(theta**2)

    return given(reward)


def runs_of(chains: int) -> int:
    """Program runs of so many chains of `short`, the inspection and the prior's draws included."""
    calls: list[int] = []
    short(num_chains=chains).run(interrupting(0, KeyboardInterrupt, calls), SHORT)
    return len(calls)


def short(**settings) -> NUTS:
    return nuts(**({"num_samples": 10, "warmup": 10, "num_chains": 3} | settings))


def test_what_is_drawn_before_an_interruption_is_kept():
    whole = short(num_chains=2).run(given(lambda theta: -(theta**2)), SHORT)
    in_third = runs_of(2) + 20
    posterior = short().run(interrupting(in_third, KeyboardInterrupt, []), SHORT)
    assert posterior.stats["interrupted"]
    assert posterior.stats["acceptance"].shape == (2,)
    np.testing.assert_array_equal(posterior.samples["theta"], whole.samples["theta"])

    in_first = runs_of(1) - 8
    posterior = short().run(interrupting(in_first, KeyboardInterrupt, []), SHORT)
    drawn = posterior.samples["theta"].shape[1]
    assert 0 < drawn < 10
    np.testing.assert_array_equal(posterior.samples["theta"][0], whole.samples["theta"][0, :drawn])

    with pytest.raises(KeyboardInterrupt):
        short().run(interrupting(3, KeyboardInterrupt, []), SHORT)
    with pytest.raises(RunError, match="stop") as caught:
        short().run(interrupting(in_third, OSError, []), SHORT)
    assert isinstance(caught.value.__cause__, OSError)
    np.testing.assert_array_equal(
        caught.value.so_far.particles.values["theta"].reshape(2, 10, 2), whole.samples["theta"]
    )


@pytest.mark.parametrize(
    "settings", [{"num_samples": 0}, {"warmup": -1}, {"max_tree_depth": 1.5}, {"num_chains": True}]
)
def test_counts_must_be_positive_whole_numbers(settings):
    with pytest.raises((TypeError, ValueError), match="must be a positive whole number"):
        NUTS(**settings)


@pytest.mark.parametrize("target", [0.0, 1.0, math.nan])
def test_target_accept_is_a_probability(target):
    with pytest.raises(ValueError, match=r"target_accept must be a number in \(0, 1\)"):
        NUTS(target_accept=target)


def test_what_arviz_shows_of_trajectories():
    """The energy is potential + kinetic at the start of a step, the latter of chi-squared / 2; divergences add up."""
    posterior = NUTS(num_samples=100, warmup=60, num_chains=2, seed=0, progress=False).run(normal_mean(1.0), ["a"])
    seen = posterior.sample_stats
    assert {name: values.shape for name, values in seen.items()} == dict.fromkeys(
        ("diverging", "tree_depth", "energy"), (2, 100)
    )
    np.testing.assert_array_equal(seen["diverging"].sum(1), posterior.stats["divergences"])
    assert (seen["tree_depth"] >= 1).all()
    kinetic = seen["energy"][:, 1:] + posterior.log_joint[:, :-1, 0]  # theta is a real number: U = -log p
    assert (kinetic > -1e-4).all()
    assert_mean(kinetic.ravel()[:, None], 0.5)
