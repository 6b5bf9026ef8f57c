"""How often the host waits for a device, counted on one that keeps its data on the CPU (`support.device`).

A wait drains the queue of a GPU: each costs some of what the GPU would have computed meanwhile. Counted are the numbers
and sizes that the host asks for, and copies in either direction. The results are those of a run on the CPU, to the bit.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from support.device import Waits, counted_device, waits
from support.models import llama_network
from support.tokenizers import byte_level

from bayeslm import Posterior
from bayeslm.inference import SMC, SVI, ImportanceSampling
from bayeslm.inference.training import Adam, ReverseKL
from bayeslm.models import LanguageModel, TiltedLM, rewards
from bayeslm.models.lm import compiled, on_host, remembering

PROMPTS = ["a b c", "a"]
SETTINGS: dict[str, Any] = {"seed": 0, "progress": False}


@functools.cache
def language_model(device: torch.device, compile: bool = False) -> LanguageModel:
    """Made once a device, and tried by a first run, so that its first use is not counted; found out on the CPU."""
    tokenizer = byte_level()
    network = llama_network(vocab_size=len(tokenizer), num_hidden_layers=1)
    lm = LanguageModel(network, tokenizer, eos_token_ids=(0,), compile=compile)
    assert lm.causal.shares_prefill(torch.ones(1, 2))
    lm.to(device)._causal = None
    ImportanceSampling(2, **SETTINGS).run(TiltedLM(lm, rewards.Length(), max_new_tokens=2), PROMPTS)
    return lm


def run(engine: Any, tokens: int, device: torch.device, compile: bool = False) -> tuple[Waits, Posterior]:
    reward = rewards.Length() + rewards.get("contains", phrase="a")
    model = TiltedLM(language_model(device, compile), reward, max_new_tokens=tokens)
    with waits() as found:
        return found, engine.run(model, PROMPTS)


def more(few: Any, many: Any, num: int, compile: bool = False) -> float:
    """The waits of one run of an engine more than of another, by token or step, of which it has ``num`` more."""
    device = counted_device()
    before, after = (run(*each, device, compile)[0] for each in (few, many))
    print(*(after - before).items(), sep="\n")  # where, if there are too many
    return (after.total() - before.total()) / num


ENGINES = {
    "prefix": SMC(8, 2, twist="partial", **SETTINGS),
    "resampled at every token": SMC(8, 2, twist="partial", ess_threshold=1.0, **SETTINGS),
    "candidates": SMC(8, 2, twist="partial", proposal="twist", top_k=3, **SETTINGS),
}


def test_the_device_waits_where_a_gpu_does_and_computes_as_the_cpu():
    device = counted_device()
    x = torch.arange(6.0).reshape(2, 3).to(device)
    counted = {
        "a number": (lambda: float(x.sum()), 1),
        "a branch": (lambda: 1 if (x > 2).any() else 0, 1),
        "a mask": (lambda: x[x > 2], 1),
        "a copy": (lambda: x.cpu(), 1),
        "to the device": (lambda: torch.ones(3).to(device), 1),
        "a new tensor": (lambda: torch.tensor([1.0, 2.0], device=device), 1),
        "a list": (lambda: x.tolist(), 1),
        "equality": (lambda: torch.equal(x, x), 1),
        "a sum": (lambda: (2.0 * x.T @ x + 1.0).softmax(-1).sum(), 0),
        "a made one": (lambda: torch.zeros(3, device=device) + torch.arange(3, device=device), 0),
        "where": (lambda: torch.where(x > 2, x, 0.0), 0),
        "in place": (lambda: x.clone()[:, 1:].mul_(2.0), 0),
    }
    for name, (function, expected) in counted.items():
        with waits() as found:
            function()
        assert found.total() == expected, (name, found)
    with pytest.raises(RuntimeError, match="one device"):
        x + torch.ones(3)
    y = x.clone()
    y[:, 1:].mul_(2.0)
    torch.testing.assert_close(y.cpu(), torch.tensor([[0.0, 2.0, 4.0], [3.0, 8.0, 10.0]]))


@pytest.mark.parametrize(("name", "most"), [("prefix", 4), ("resampled at every token", 4), ("candidates", 8)])
def test_smc_waits_a_few_times_a_token(name, most):
    assert more((ENGINES[name], 2), (ENGINES[name], 6), 4) <= most


def test_sampling_waits_every_eighth_token():
    engine = ImportanceSampling(8, **SETTINGS)
    assert more((engine, 2), (engine, 10), 8) <= 0.3


def test_steps_of_a_fixed_size_wait_as_rarely(monkeypatch):
    monkeypatch.setattr(compiled, "_compiled", lambda device: compiled._step)  # graphs of this device cannot be made
    sampling, smc = ImportanceSampling(8, **SETTINGS), ENGINES["resampled at every token"]
    assert more((sampling, 2), (sampling, 10), 8, compile=True) <= 0.3
    assert more((smc, 2), (smc, 6), 4, compile=True) <= 4
    (_, expected), (_, found) = (run(smc, 6, torch.device("cpu")), run(smc, 6, counted_device(), compile=True))
    np.testing.assert_array_equal(found.samples["completion"], expected.samples["completion"])


OBJECTIVES = {
    "default": {},
    "ReverseKL, Adam": {"objective": ReverseKL(4), "optimizer": Adam()},
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_step_of_svi_waits_at_most_25_times(name):
    model = TiltedLM(language_model(counted_device()), rewards.Length(), max_new_tokens=3)
    totals: list[Waits] = []
    with waits() as found:
        settings = {"num_particles": 4, "num_samples": 1, "num_prior_samples": 0} | SETTINGS | OBJECTIVES[name]
        SVI(num_steps=3, callbacks=[lambda _: totals.append(Waits(found))], **settings).run(model, PROMPTS)
    steps = [after - before for before, after in itertools.pairwise(totals)][-2:]
    print(*steps[-1].items(), sep="\n")
    assert all(10 < step.total() <= 25 for step in steps)


@pytest.mark.parametrize("engine", [ImportanceSampling(8, **SETTINGS), ENGINES["prefix"]], ids=["importance", "smc"])
def test_runs_on_the_device_are_those_of_the_cpu(engine):
    (_, expected), (_, found) = (run(engine, 8, device) for device in (torch.device("cpu"), counted_device()))
    np.testing.assert_array_equal(found.samples["completion"], expected.samples["completion"])
    np.testing.assert_array_equal(found.log_weights, expected.log_weights)


def test_a_copy_on_the_host_is_that_of_the_tensor_now():
    with remembering(), waits() as found:
        x = torch.arange(3).to(counted_device())
        assert on_host(x) is on_host(x)
        assert found.total() == 2  # there and back
        x[0] = 7
        assert on_host(x).tolist() == [7, 1, 2]
        y = torch.arange(3)
        assert on_host(y) is y
