"""What a reward, a tool or a program sets for the whole process does not change the draws of a run unseen."""

from __future__ import annotations

import random

import numpy as np
import pyro
import pytest
import torch
from support.models import table_lm

from bayeslm.inference import MCMC, SVI, Exact, ImportanceSampling, ProgramError
from bayeslm.models import TiltedLM, Tool, rewards
from bayeslm.models.rewards import call

LM = table_lm(order=2, seed=1, vocab=5)
SEED = 3  # of engines, and of functions that seed: the same must show too


def score(completions, **columns):
    return [float(len(text)) for text in completions]


def seeds_torch(completions, **columns):
    torch.manual_seed(SEED)
    return score(completions)


def seeds_all(completions, **columns):
    pyro.set_rng_seed(0)
    torch.randn(3)
    return score(completions)


def switches_off_gradients(completions, **columns):
    torch.set_grad_enabled(False)
    torch.set_default_dtype(torch.float64)
    return score(completions)


ENGINES = {
    "mcmc": MCMC(num_samples=20, warmup=5, num_chains=2, seed=SEED, progress=False),
    "svi": SVI(num_steps=4, num_particles=4, num_samples=8, seed=SEED, progress=False),
}


@pytest.mark.parametrize("name", ENGINES)
def test_a_reward_that_seeds_torch_or_switches_off_gradients_leaves_the_draws_as_they_are(name):
    """MCMC had the same proposals in each step, which was no longer the posterior."""
    runs = [
        ENGINES[name].run(TiltedLM(LM, reward, beta=2.0, max_new_tokens=3), ["a"])
        for reward in (score, seeds_torch, seeds_all, switches_off_gradients)
    ]
    assert torch.is_grad_enabled()
    assert torch.get_default_dtype() == torch.float32
    for other in runs[1:]:
        np.testing.assert_array_equal(other.samples["completion"], runs[0].samples["completion"])
        np.testing.assert_array_equal(other.log_joint, runs[0].log_joint)


@pytest.mark.parametrize("fails", [False, True])
def test_numbers_that_a_function_draws_count_and_its_seeds_do_not(fails):
    def draws_and_seeds():
        drawn = torch.rand(2)
        torch.manual_seed(SEED)
        if fails:
            raise RuntimeError
        return drawn

    torch.manual_seed(SEED)
    expected = torch.rand(2)
    seed, state = torch.initial_seed(), torch.get_rng_state()
    torch.manual_seed(SEED)
    torch.testing.assert_close(call(lambda: torch.rand(2), None), expected)
    assert torch.initial_seed() == seed
    assert torch.equal(torch.get_rng_state(), state)
    if fails:
        with pytest.raises(RuntimeError):
            call(draws_and_seeds, None)
    else:
        call(draws_and_seeds, None)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_tool_that_seeds_leaves_the_state():
    torch.manual_seed(SEED)
    torch.rand(1)
    state = torch.get_rng_state()
    Tool(lambda text: str(torch.manual_seed(0)))(np.array(["a"], dtype=object))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("seed", [lambda: torch.manual_seed(0), lambda: pyro.set_rng_seed(SEED)])
def test_a_program_that_seeds_is_refused(seed):
    def program(prompts):
        seed()
        TiltedLM(LM, rewards.Length(), max_new_tokens=2)(prompts)

    before = random.getstate(), torch.get_rng_state()
    with pytest.raises(ProgramError, match="seeds torch's random numbers"):
        ImportanceSampling(num_particles=4, seed=SEED, progress=False).run(program, ["a"])
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_default_dtype_of_few_digits_is_refused(dtype):
    torch.set_default_dtype(dtype)
    try:
        with pytest.raises(ProgramError, match=f"default dtype is {dtype}"):
            Exact(progress=False).run(TiltedLM(LM, score, max_new_tokens=2), ["a"])
    finally:
        torch.set_default_dtype(torch.float32)
