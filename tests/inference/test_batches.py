"""Particles times prompts are drawn in batches that are full, whatever the two are."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from support import oracles
from support.allocations import peak_bytes
from support.models import llama_network, table_lm, tiny_llama
from support.programs import conversation, rewarded, score_table, tilted
from support.statistics import assert_agrees, assert_evidence, assert_mean, assert_roots_follow

from bayeslm import diagnostics
from bayeslm.inference import MCMC, SMC, SVI, AnnealedSMC, EvidenceError, Exact, ImportanceSampling, RejectionSampling
from bayeslm.inference.program import inspect
from bayeslm.inference.training import Adam
from bayeslm.models import LanguageModel, TiltedLM, rewards
from bayeslm.models.lm import CausalNetwork, autoregressive, prefix, subsample_of
from bayeslm.models.rewards import Reward

SETTINGS: dict[str, Any] = {"seed": 0, "progress": False}
PROMPTS = [[1 + i % 7, 1 + i // 7] for i in range(40)]


def batches(function: Any) -> tuple[list[int], list[int]]:
    """Return the rows of each batch that is drawn, and the prompts of each that is read."""
    drawn, read = [], []

    def generated(decoder: Any, *rest: Any) -> Any:
        drawn.append(len(decoder.values))
        return generate(decoder, *rest)

    def prefilled(network: Any, ids: Any, mask: Any) -> Any:
        read.append(len(ids))
        return prefill(network, ids, mask)

    generate, prefill = autoregressive.generate, prefix.prefill
    with mock.patch.object(autoregressive, "generate", generated), mock.patch.object(prefix, "prefill", prefilled):
        function()
    return drawn, read


@pytest.mark.parametrize(("prompts", "particles", "size"), [(16, 64, 15), (31, 8, 30), (5, 40, 8), (40, 3, 7)])
def test_batches_are_full(prompts, particles, size):
    model = tilted(tiny_llama(batch_size=size), score_table(1, tokens=2))
    drawn, read = batches(lambda: ImportanceSampling(particles, **SETTINGS).run(model, PROMPTS[:prompts]))
    rows = prompts * particles
    assert sum(drawn) == rows
    assert max(drawn) <= size
    ends = -(-prompts // size)  # the last prompts, fewer than fit, and their last completions
    assert len(drawn) <= 1.1 * rows / size + 2 * ends
    assert len(read) <= 4 * ends


def test_what_fits_one_batch_is_one_run():
    program = inspect(tilted(tiny_llama(), score_table(1, tokens=2)), PROMPTS)
    assert program.particles_a_run == program.max_particles > 100


# -- draws of all prompts, of which a run has some ------------------------------------------------------------------


def moody(lm: LanguageModel, size: int | None) -> Callable[[list[list[int]]], None]:
    """A mood of each prompt and a completion; of ``size`` prompts in a training step."""

    def model(prompts: list[list[int]]) -> None:
        with pyro.plate("prompts", len(prompts), subsample_size=subsample_of(size, len(prompts))) as batch:
            first = torch.tensor([prompts[i][0] for i in batch])
            mood = pyro.sample("mood", dist.Bernoulli(torch.full((), 0.4)))
            x = pyro.sample("completion", lm([prompts[i] for i in batch], max_new_tokens=2))
            pyro.factor("reward", (x == first[:, None]).sum(-1) * (0.5 + mood))

    return model


def test_draws_after_a_training_on_minibatches_fill_the_batches():
    """40 prompts, 4 a step: 8 draws of each, by two policies and the prior, are 15 batches of 64, not 30 of 32."""
    prompts = [[1 + i % 3, 1 + i // 3 % 3] for i in range(40)]
    lm = table_lm(order=2, seed=5, vocab=4)
    lm.batch_size = 64
    drawn: list[Any] = []
    engine = SVI(num_steps=3, num_particles=4, num_samples=8, num_prior_samples=8, optimizer=Adam(0.01), **SETTINGS)

    def train() -> None:
        drawn.append(engine.run(moody(lm, 4), prompts))

    rows, read = batches(train)
    assert rows[:3] == [16] * 3
    assert rows[3:] == [64] * 15
    assert len(read) == 3 + 15
    posterior = drawn[0]
    assert len(posterior.prompts) == 40
    x, mood = posterior.samples["completion"][0], posterior.samples["mood"][0]
    first = np.array(prompts)[:, :1]
    np.testing.assert_allclose(posterior.log_likelihood["reward"][0], (x == first).sum(-1) * (0.5 + mood), rtol=1e-6)


@pytest.mark.long
def test_draws_of_larger_minibatches_are_those_of_all_prompts():
    prompts = [[1 + i % 3, 1 + i // 3 % 3] for i in range(40)]
    lm = table_lm(order=2, seed=5, vocab=4)
    lm.batch_size = 64
    exact = Exact().run(moody(lm, None), prompts)
    sampled = [ImportanceSampling(8, seed=seed, progress=False).run(moody(lm, 4), prompts) for seed in range(60)]
    weights = np.stack([np.exp(found.log_weights[0] - exact.log_evidence) for found in sampled])  # (run, draw, prompt)
    moods = np.stack([found.samples["mood"][0] for found in sampled])
    assert_mean(weights.mean(1), 1.0)
    assert_mean((weights * moods).mean(1), oracles.expectation(exact, exact.samples["mood"]))


# -- memory that is bounded whatever particles times prompts are ---------------------------------------------------


SIZE = 12
ENGINES = {
    "importance": ImportanceSampling(9, **SETTINGS),
    "smc": SMC(SIZE, 2, twist="partial", **SETTINGS),
    "smc, groups": SMC(SIZE + 1, 1, twist="partial", proposal="twist", top_k=2, **SETTINGS),
    "annealed": AnnealedSMC(9, 2, ladder=(0.5, 1.0), **SETTINGS),
    "annealed, candidates": AnnealedSMC(9, 1, ladder=(1.0,), num_candidates=3, **SETTINGS),
    "mcmc": MCMC(num_samples=4, warmup=1, num_chains=2 * SIZE, initial_particles=6, num_candidates=2, **SETTINGS),
    "rejection": RejectionSampling(num_samples=8, log_bound=3.5, **SETTINGS),
    "svi": SVI(num_steps=2, num_particles=5, num_samples=4, **SETTINGS),
}


def counted(prompts: list[str], completions: list[str], bonus: list[float]) -> list[float]:
    return [text.count("a") + more for text, more in zip(completions, bonus, strict=True)]


def program() -> TiltedLM:
    return TiltedLM(tiny_llama(batch_size=SIZE), counted, beta=1.0, max_new_tokens=3)


LM = tiny_llama(batch_size=SIZE)


def bare(prompts: list[list[int]], bonus: list[float], lm: LanguageModel = LM) -> None:
    """An ordinary program, which knows nothing of some of its prompts."""
    with pyro.plate("prompts", len(prompts)):
        x = pyro.sample("completion", lm(prompts, max_new_tokens=3))
        rewards.factor("reward", (x == 1).sum(-1) + torch.tensor(bonus), 1.0)


@pytest.mark.parametrize("model", [program(), bare], ids=["tilted", "bare"])
@pytest.mark.parametrize("name", ENGINES)
def test_no_pass_has_more_rows_than_the_batch_size(name, model):
    rows = []
    hidden = CausalNetwork.hidden

    def noted(self: Any, ids: Any, *rest: Any, **settings: Any) -> Any:
        rows.append(len(ids))
        return hidden(self, ids, *rest, **settings)

    with mock.patch.object(CausalNetwork, "hidden", noted), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = ENGINES[name].run(model, PROMPTS[:5], bonus=[0.0, 0.1, 0.2, 0.3, 0.4])
    assert max(rows) <= SIZE
    assert found.log_weights.shape[-1] == len(found.prompts) == 5


def test_smc_of_some_prompts_after_others_is_that_of_all():
    """Its estimates, and shapes and labels of all that it records."""
    prompts, bonus = ["a", "b c", "d"], [0.0, 1.0, -0.5]
    exact = Exact().run(program(), prompts, bonus=bonus)
    engine = SMC(SIZE, 16, twist="partial", ess_threshold=0.8, **SETTINGS)
    found = engine.run(program(), prompts, bonus=bonus)
    weights = np.exp(diagnostics.chain_log_evidence(found.log_weights))  # (chain, prompt), unbiased
    assert_mean(weights, np.exp(exact.log_evidence))
    assert found.prompts == exact.prompts
    assert found.stats["ancestors"].shape == (16, 3, SIZE, 3)
    assert found.stats["resampled"].shape == found.stats["ess_by_step"].shape == (16, 3, 3)
    rows = [counted(prompts, texts.tolist(), bonus) for texts in found.texts["completion"][0]]
    np.testing.assert_allclose(found.rewards["reward"][0], rows, rtol=1e-6)
    assert SMC(SIZE, 2, retained=exact, **SETTINGS).run(program(), prompts, bonus=bonus).conditional


SMCS = {
    "partial": {"twist": "partial", "proposal": "twist", "top_k": 2, "ess_threshold": 1.0},
    "policy": {"twist": table_lm(order=3, seed=7, vocab=4), "proposal": "prior", "ess_threshold": 1.0},
}


@pytest.mark.long
@pytest.mark.parametrize(("particles", "size"), [(6, 12), (7, 4)], ids=["some prompts", "groups"])
@pytest.mark.parametrize("setting", SMCS)
def test_smc_in_batches_is_smc(setting, particles, size):
    """Of a program that runs with all its prompts alone: latents before a completion, and two of these."""
    prompts = [[1, 2], [3], [2, 2]]
    model = conversation(batch_size=size)
    exact = Exact().run(model, prompts)
    few = pytest.warns(UserWarning, match="holds 4 of the 7 particles of a chain, .* in groups of so many")
    with few if size < particles else contextlib.nullcontext():
        found = SMC(particles, 100, **SMCS[setting], **SETTINGS).run(model, prompts)
    words = [lambda p, t=t: p.samples["completion"][..., t] == 1 for t in (0, 1)]
    assert_agrees(found, exact, [*words, lambda p: p.samples["topic"], lambda p: p.samples["reply"][..., 0] == 2])
    assert_evidence(found, exact.log_evidence, unbiased=True)
    assert found.stats["resampled"].any()
    assert_roots_follow(found)
    assert found.stats["ess_by_step"].max() <= particles + 1e-3


@pytest.mark.long
@pytest.mark.parametrize("size", [10, 4])
def test_conditional_smc_in_batches(size):
    """In groups of 3 and 2 particles 1 / Z-hat is unbiased for 1 / Z only if the draw may be in any."""
    lm = table_lm(order=3, seed=0, vocab=4)
    lm.batch_size = size
    model = tilted(lm, score_table(0, vocab=4, tokens=3), 0.3)
    prompts = [[1, 2], [3], [2, 2]]
    exact = Exact().run(model, prompts)
    inverse = []
    for seed in range(25):
        draws = exact.resample(10, seed=seed)
        found = SMC(5, 10, twist="partial", retained=draws, seed=seed, progress=False).run(model, prompts)
        np.testing.assert_array_equal(found.samples["completion"][:, 0], draws.samples["completion"][0])
        inverse.append(np.exp(exact.log_evidence - diagnostics.chain_log_evidence(found.log_weights)).mean(0))
    assert_mean(np.stack(inverse), 1.0)


@pytest.mark.long
def test_smc_of_a_bare_program_holds_one_batch():
    """The most bytes of tensors, where eight times as many prompts are eight batches: little but texts and weights."""

    def peak(prompts: int) -> int:
        lm = LanguageModel(llama_network(num_hidden_layers=8), eos_token_ids=(), batch_size=16)
        model = rewarded(lm, 24, lambda x: 0.1 * (x == 1).sum(-1))
        return peak_bytes(lambda: SMC(16, 1, twist="partial", **SETTINGS).run(model, PROMPTS[:prompts]))

    one, eight = peak(1), peak(8)
    print(f"{one / 1e6:.2f} and {eight / 1e6:.2f} MB")
    assert eight < 2 * one


def test_an_error_of_some_prompts_names_them_among_all():
    reward = Reward(lambda prompts, completions: [-math.inf if prompt == "d" else 0.0 for prompt in prompts])
    with pytest.raises(EvidenceError, match=r"of prompt 2 \('d'\)"):
        SMC(SIZE, 1, **SETTINGS).run(TiltedLM(tiny_llama(batch_size=SIZE), reward), ["a", "b c", "d"])
