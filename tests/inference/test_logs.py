"""Where there is no terminal, a run of any engine writes lines, and one that is not to show its progress none."""

import re
import time

import pyro
import pyro.distributions as dist
import pytest
import torch
from support.models import table_lm
from support.programs import SHORT

from bayeslm import progress
from bayeslm.inference import ENGINES, SVI, Laplace
from bayeslm.inference.training import Adam, Budget, Checkpointing
from bayeslm.models.rewards.rehearsal import is_rehearsal

LM = table_lm(order=2, seed=2, vocab=4)
LM.batch_size = 100
SLOW = 0.008  # seconds of a reward


def texts(prompts):
    with pyro.plate("prompts", len(prompts)):
        x = pyro.sample("completion", LM(prompts, max_new_tokens=4))
        if not is_rehearsal():
            time.sleep(SLOW)
        pyro.factor("reward", (x == 2).sum(-1))


def continuous(prompts):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    time.sleep(SLOW / 10)
    pyro.sample("y", dist.Normal(z, 1.0), obs=torch.tensor(1.0))


SVI_SETTINGS = {"num_steps": 4, "num_particles": 4, "optimizer": Adam(), "num_samples": 8}
RUNS = {  # settings, and what the lines look like
    "exact": ({"num_prior_samples": 10}, r"Exact: \d+/121 · "),
    "importance": ({"num_particles": 400}, r"importance sampling: \d+/400 · "),
    "adaptive": ({"num_particles": 300}, r"AdaptiveImportance.*: \d+/300 · "),
    "auto": ({"num_particles": 300}, r"Auto.*: \d+/300 · "),
    "rejection": ({"num_samples": 40, "log_bound": 4.0}, r"rejection sampling: \d+/40 · "),
    "bestofn": ({"num_samples": 100, "n": 4}, r"best of 4: \d+/400 · "),
    "smc": ({"num_particles": 40, "twist": "partial"}, r"SMC: \d+/16 · "),
    "annealed": ({"num_particles": 20}, r"annealing: \d+ · "),
    "mcmc": ({"num_samples": 4, "warmup": 2, "num_chains": 2}, r"MCMC: \d+/6 · "),
    "svi": (SVI_SETTINGS, r"SVI: \d+/4 · .*elbo -?\d"),
    "nuts": ({"num_samples": 4, "warmup": 4, "num_chains": 1}, r"NUTS: \d+/8 · "),
    "laplace": ({"num_samples": 10}, r"Laplace: \d+ · "),
}


@pytest.mark.parametrize("name", RUNS)
def test_every_engine_writes_lines_and_none_that_is_not_wanted(name, monkeypatch, capfd):
    monkeypatch.setattr(progress, "INTERVAL", 0.005)
    engine = (ENGINES | {"laplace": Laplace})[name]
    settings, line = RUNS[name]
    model = continuous if name in ("nuts", "laplace") else texts
    engine(**settings, seed=0).run(model, SHORT)
    lines = capfd.readouterr().err.splitlines()
    assert any(re.match(line, each) for each in lines), lines
    engine(**settings, seed=0, progress=False).run(model, SHORT)
    assert capfd.readouterr().err == ""


def test_all_engines_are_here():
    assert RUNS.keys() == ENGINES.keys() | {"laplace"}


@pytest.mark.parametrize(
    ("budget", "plan"),
    [
        (Budget(steps=4), "SVI: 4 steps of 4 new draws of each of 2 prompts"),
        (Budget(samples=32), "SVI: steps of 4 new draws of each of 2 prompts"),
    ],
)
def test_a_training_says_what_it_draws(budget, plan, monkeypatch, capfd):
    monkeypatch.setattr(progress, "LONG", 0.0)
    monkeypatch.setattr(progress, "MEASURED", 0.0)
    SVI(**SVI_SETTINGS | {"num_steps": budget}).run(texts, SHORT)
    assert re.match(re.escape(plan) + r"; about \d+ s in all\n", capfd.readouterr().err)


def test_a_resumed_training_says_from_where(tmp_path, capfd):
    settings = SVI_SETTINGS | {"optimizer": Adam(schedule="constant"), "checkpoint": Checkpointing(tmp_path, every=2)}
    SVI(**settings).run(texts, SHORT)
    assert "resumed" not in capfd.readouterr().err
    SVI(**settings | {"num_steps": 6}).run(texts, SHORT)
    assert capfd.readouterr().err == "SVI: resumed from step 4\n"
    SVI(**settings | {"num_steps": 6}).run(texts, SHORT)
    assert capfd.readouterr().err == "SVI: resumed from step 6, its last\n"
    SVI(**settings | {"num_steps": 8}, progress=False).run(texts, SHORT)
    assert capfd.readouterr().err == ""
