"""The kernel for Pyro's own MCMC: exact answers, what comes out of it, and how it starts, adapts and refuses.

Means over chains of many replicates (equal prompts, each a posterior of its own) are compared by
`assert_mean`. ../test_calibration.py tests that each step keeps the posterior.
"""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC
from support.models import table_lm, tiny_llama
from support.programs import rewarded, score_table, tilted
from support.statistics import assert_mean

from bayeslm.inference import EvidenceError, Exact, ProgramError
from bayeslm.inference.markov.suffix_kernel import SuffixKernel
from bayeslm.models import LanguageModel
from bayeslm.models.lm import Autoregressive, count_usage

SHORT = [[1, 2], [3]]


def run(kernel, prompts, samples=40, warmup=20, **settings):
    """Samples (draw, *batch, *event) of Pyro's own MCMC."""
    mcmc = MCMC(kernel, num_samples=samples, warmup_steps=warmup, disable_progbar=True, **settings)
    mcmc.run(prompts)
    return mcmc.get_samples()


@pytest.mark.parametrize("policy", [None, 9])
def test_texts_agree_with_exact(policy):
    table = score_table(2, vocab=4, tokens=4)
    model = tilted(table_lm(order=3, seed=2, vocab=4), table, 0.5)
    exact = Exact(num_prior_samples=1).run(model, SHORT[:1])
    proposal = None if policy is None else table_lm(order=2, seed=policy, vocab=4)
    samples = run(SuffixKernel(model, proposal=proposal), SHORT[:1] * 200)
    x = samples["completion"]
    assert x.shape == (40, 200, 4)
    assert x.dtype == torch.int64
    atoms, weights = torch.as_tensor(exact.samples["completion"][0, :, 0]), exact.weights()[0, :, 0]
    for t in range(4):
        for token in range(4):
            assert_mean((x[..., t] == token).double().mean(0), (weights * (atoms[:, t] == token).numpy()).sum())
    assert_mean(table[torch.arange(4), x].sum(-1).double().mean(0), (weights * exact.rewards["reward"][0, :, 0]).sum())


def mixed(y, noise=1.0):
    """theta ~ N(0, 1), width | topic ~ U(0, 1 + topic), x | topic; y ~ N(theta + topic + how often x says b, noise)."""
    lm = table_lm(order=2, seed=1, vocab=4)

    def model(prompts):
        with pyro.plate("prompts", len(prompts)):
            theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
            topic = pyro.sample("topic", dist.Categorical(torch.tensor([0.5, 0.3, 0.2])))
            width = pyro.sample("width", dist.Uniform(0.0, 1.0 + topic))
            x = pyro.sample("completion", Autoregressive(lm, topic[..., None] + 1, None, 2))
            mean = theta + topic + (x == 2).sum(-1)
            pyro.sample("y", dist.Normal(mean, noise), obs=torch.tensor(y).expand(len(prompts)))
            pyro.factor("narrow", -width)

    def discrete(prompts):
        """Without theta and width, which can be integrated out."""
        with pyro.plate("prompts", len(prompts)):
            topic = pyro.sample("topic", dist.Categorical(torch.tensor([0.5, 0.3, 0.2])))
            x = pyro.sample("completion", Autoregressive(lm, topic[..., None] + 1, None, 2))
            mean = 1.0 * (topic + (x == 2).sum(-1))  # of whole numbers torch would make the scale one too
            pyro.sample("y", dist.Normal(mean, (1 + noise**2) ** 0.5), obs=torch.tensor(y).expand(len(prompts)))
            pyro.factor("narrow", ((1 - torch.exp(-1.0 - topic)) / (1.0 + topic)).log())

    return model, discrete


@pytest.mark.parametrize("continuous", ["random-walk", pytest.param("nuts", marks=pytest.mark.long)])
def test_every_kind_of_latent_agrees_with_exact(continuous):
    """A width whose support the topic changes, and a prompt that the topic changes, among them."""
    model, discrete = mixed(1.5)
    exact = Exact(num_prior_samples=1).run(discrete, SHORT[:1])
    weights = exact.weights()[0, :, 0]
    topic, says_b = exact.samples["topic"][0, :, 0], (exact.samples["completion"][0, :, 0] == 2).sum(-1)
    replicates = 200 if continuous == "random-walk" else 40
    samples = run(SuffixKernel(model, continuous=continuous), SHORT[:1] * replicates, samples=25, warmup=40)
    assert {name: x.dtype for name, x in samples.items()} == {
        "theta": torch.float32,
        "topic": torch.int64,
        "width": torch.float32,
        "completion": torch.int64,
    }
    for k in range(3):
        assert_mean((samples["topic"] == k).double().mean(0), weights[topic == k].sum())
    assert_mean((samples["completion"] == 2).sum(-1).double().mean(0), (weights * says_b).sum())
    assert_mean(samples["theta"].double().mean(0), (weights * (1.5 - topic - says_b) / 2).sum())
    span = 1.0 + topic
    assert_mean(samples["width"].double().mean(0), (weights * (1 - span / np.expm1(span))).sum())
    assert (samples["width"] < 1 + samples["topic"]).all()
    assert (samples["width"] > 1).any()


@pytest.mark.parametrize("continuous", ["random-walk", "nuts"])
def test_adaptation_ends_with_the_warm_up(continuous):
    model, _ = mixed(1.5)
    steps = {"Warmup": [], "Sample": []}

    def note(kernel, params, stage, step):
        steps[stage].append([x.tolist() for x in kernel.step_sizes.values()])

    run(SuffixKernel(model, continuous=continuous), SHORT, samples=5, warmup=15, hook_fn=note)
    assert steps["Warmup"][0] != steps["Warmup"][1]
    assert all(step == steps["Warmup"][-1] for step in steps["Sample"])


def test_token_ids_stay_exact_beside_half_precision():
    """Pyro keeps all sites of a draw in one tensor; ids over 256 are not exact in bfloat16."""
    words = ["<eos>", *(f"w{i}" for i in range(600))]
    lm = LanguageModel.tabular(words, order=1)

    def model(prompts):
        with pyro.plate("prompts", len(prompts)):
            half = torch.zeros((), dtype=torch.bfloat16)
            pyro.sample("theta", dist.Normal(half, torch.ones_like(half)))
            x = pyro.sample("completion", lm(prompts, 3))
            pyro.factor("odd", torch.where((x % 2 == 1).all(-1), 0.0, -torch.inf))

    samples = run(SuffixKernel(model, continuous="nuts", max_tree_depth=3), [[1]] * 5, samples=4, warmup=2)
    assert samples["theta"].dtype == torch.bfloat16
    assert (samples["completion"] % 2 == 1).all()
    assert (samples["completion"] > 256).any()


def test_starts_where_it_is_told():
    model, _ = mixed(1.5)
    start = {
        "theta": torch.tensor([0.3, -2.0]),
        "topic": torch.tensor([2, 0]),
        "width": torch.tensor([2.5, 0.5]),
        "completion": torch.tensor([[1, 3], [2, 2]]),
    }
    kernel = SuffixKernel(model)
    kernel.initial_params = start
    kernel.setup(0, SHORT)
    for name, value in kernel.initial_params.items():
        assert torch.equal(value, start[name])
    moved = kernel.sample(kernel.initial_params)
    back = kernel.sample(dict(start))  # from there, wherever the chain was
    assert set(moved) == set(back) == set(start)
    kernel.cleanup()
    kernel.setup(0, SHORT)  # the next chain starts where importance sampling puts it
    assert not torch.equal(kernel.initial_params["theta"], start["theta"])
    samples = run(SuffixKernel(model, continuous="nuts"), SHORT, samples=2, warmup=1, initial_params=start)
    assert samples["completion"].shape == (2, 2, 2)


def test_chains_one_after_the_other_and_of_one_seed(monkeypatch):
    model, _ = mixed(1.5)
    monkeypatch.setattr(torch.multiprocessing, "cpu_count", lambda: 1)  # else Pyro forks
    draws = []
    for seed in (3, 3, 4):
        pyro.set_rng_seed(seed)
        with pytest.warns(UserWarning, match="sequentially"):
            mcmc = MCMC(SuffixKernel(model), num_samples=4, warmup_steps=2, num_chains=2, disable_progbar=True)
        mcmc.run(SHORT)
        draws.append(mcmc.get_samples(group_by_chain=True))
    assert draws[0]["completion"].shape == (2, 4, 2, 2)
    assert all(torch.equal(draws[0][name], draws[1][name]) for name in draws[0])
    assert not torch.equal(draws[0]["theta"], draws[2]["theta"])
    assert not torch.equal(draws[0]["theta"][0], draws[0]["theta"][1])


def test_diagnostics_tell_of_the_chain_after_the_warm_up():
    model, _ = mixed(1.5)
    kernel = SuffixKernel(model, continuous="nuts")
    run(kernel, SHORT, samples=10, warmup=5)
    found = kernel.diagnostics()
    assert found["acceptance_topic"].shape == found["acceptance_completion"].shape == (2,)
    assert found["cuts_completion"].sum() == 20  # two prompts, ten steps
    assert found["divergences"] == [] or isinstance(found["divergences"][0], int)
    assert {"acc. topic", "acc. completion", "step size"} <= set(kernel.logging())
    walking = SuffixKernel(model)
    run(walking, SHORT, samples=10, warmup=5)
    assert {"acc. theta", "acc. width"} <= set(walking.logging())


def test_a_network_under_nuts_is_scored_once_a_step():
    """Leapfrogs run no network: its calls do not grow with the trajectory."""
    lm = tiny_llama(seed=1)

    def model(prompts):
        with pyro.plate("prompts", len(prompts)):
            theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
            x = pyro.sample("completion", lm(prompts, 3))
            pyro.sample("y", dist.Normal(theta + (x == 1).sum(-1), 1.0), obs=torch.zeros(len(prompts)))

    calls = []
    for depth in (1, 5):
        kernel = SuffixKernel(model, continuous="nuts", max_tree_depth=depth)
        kernel.setup(0, SHORT)
        with count_usage() as usage:
            for _ in range(3):
                kernel.sample(kernel.initial_params)
        calls.append(usage.model_calls)
    assert max(calls) <= 3 * (2 + 2 + 3)  # a step: the suffix written (prefill, tokens), and its score under NUTS


# -- what it refuses -------------------------------------------------------------------------------------------


def test_settings():
    model, _ = mixed(1.5)
    with pytest.raises(ValueError, match="continuous must be 'random-walk' or 'nuts', got 'hmc'"):
        SuffixKernel(model, continuous="hmc")
    with pytest.raises(ValueError, match="initial_particles must be a positive whole number"):
        SuffixKernel(model, initial_particles=0)
    with pytest.raises(ValueError, match="step_size must be positive"):
        SuffixKernel(model, step_size=0.0)


def test_posteriors_that_do_not_exist():
    lm = table_lm(order=2, vocab=4)
    dead = rewarded(lm, 3, lambda x: torch.where((x == 2).all(-1), 0.0, -torch.inf))
    kernel = SuffixKernel(dead, initial_particles=2)
    pyro.set_rng_seed(1)
    with pytest.raises(EvidenceError, match="in all 2 draws"):
        run(kernel, SHORT)
    with pytest.raises(EvidenceError, match="prompt 1 "):
        run(kernel, SHORT, initial_params={"completion": torch.tensor([[2, 2, 2], [1, 1, 1]])})

    def masked(prompts):
        with pyro.plate("prompts", len(prompts)), pyro.poutine.mask(mask=torch.tensor(False)):
            pyro.sample("completion", lm(prompts, 3))

    with pytest.raises(ProgramError, match="'completion' is masked"):
        run(SuffixKernel(masked), SHORT)
