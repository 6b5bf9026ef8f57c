"""Programs that are trained in tests of `SVI`, and what their policies are to be."""

from __future__ import annotations

import functools
import random
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from support.programs import PROMPTS, case, score_table, tilted

from bayeslm.inference import Exact
from bayeslm.inference.training import Adam, Checkpointing, StepRecord

LM, MODEL, EXACT = case("table", 1.0)
# of two tokens, so that the table can be the posterior: the places after these prompts have contexts of their own
TWO = tilted(LM, score_table(1, tokens=2, scale=1.5))
EXACT_TWO = Exact().run(TWO, PROMPTS)
FAST = {"num_particles": 32, "optimizer": Adam(0.1), "num_samples": 8, "seed": 0, "progress": False}
GOLD = functools.partial(tilted(LM, score_table(5)), PROMPTS)
SMALL = {"num_steps": 12, "num_samples": 16, "seed": 0, "progress": False}


class Killed(BaseException):
    """As sudden as Ctrl-C, and not taken for it."""


def killer(step: int):
    def kill(record: StepRecord) -> None:
        if record.step == step:
            raise Killed

    return kill


def every_5(folder: str | Path) -> Checkpointing:
    return Checkpointing(folder, every=5)


def every_step(folder: str | Path) -> Checkpointing:
    return Checkpointing(folder, every=1)


def topical(prompts):
    """Other latents before the completion: one with AutoNormal's parameters, one with free logits."""
    with pyro.plate("prompts", len(prompts)):
        level = pyro.sample("level", dist.Normal(0.0, 1.0))
        topic = pyro.sample("topic", dist.Categorical(torch.tensor([0.3, 0.7])))
        x = pyro.sample("completion", LM(prompts, max_new_tokens=3))
        pyro.factor("reward", level * (x[..., 0] == topic + 1))
        pyro.factor("own", pyro.param("weight", torch.tensor(0.5)) * (x[..., 1] == 2))


def batches(prompts):
    """A prompt a step."""
    with pyro.plate("prompts", len(prompts), subsample_size=1) as chosen:
        x = pyro.sample("completion", LM([prompts[i] for i in chosen], max_new_tokens=3))
        pyro.factor("reward", 1.0 * (x == 2).sum(-1))


def fickle(prompts):
    """A reward with random numbers of its own, of Python's and of NumPy's."""
    with pyro.plate("prompts", len(prompts)):
        x = pyro.sample("completion", LM(prompts, max_new_tokens=3))
        noise = random.random() + np.random.standard_normal()  # noqa: NPY002  (the generator that rewards may use)
        pyro.factor("reward", 1.0 * (x == 2).sum(-1) + noise)


def log_probs(lm) -> torch.Tensor:
    """Of every completion of `TWO`, (value, prompt)."""
    with torch.no_grad():
        return lm(PROMPTS, 2).log_prob(torch.as_tensor(EXACT_TWO.samples["completion"][0])).double()


def kl_of(policy, gamma: float = 1.0) -> float:
    """KL(q || the posterior of `TWO` at an inverse temperature), the mean over prompts."""
    log_q = log_probs(policy)
    target = (log_probs(LM) + gamma * torch.as_tensor(EXACT_TWO.log_likelihood["reward"][0])).log_softmax(0)
    return float((log_q.exp() * (log_q - target)).sum(0).mean())


def assert_same(one, other) -> None:
    """The same to the bit, but for the clock."""
    assert one.stats.keys() == other.stats.keys()
    for key in one.stats.keys() - {"seconds"}:
        np.testing.assert_equal(one.stats[key], other.stats[key], err_msg=key)
    for name, value in one.samples.items():
        assert (value == other.samples[name]).all(), name
    assert (one.log_weights == other.log_weights).all()
    for p, q in zip(one.policy.parameters(), other.policy.parameters(), strict=True):
        assert torch.equal(p, q)
