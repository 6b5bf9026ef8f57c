"""Ctrl-C and errors in mid-run: what was drawn before is kept, and it is what the complete run draws."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from support.models import table_lm
from support.programs import SHORT, score_table, tilted

from bayeslm.inference import MCMC, SMC, ImportanceSampling, RunError
from bayeslm.models.rewards.rehearsal import is_rehearsal

LM = table_lm(order=2, seed=2, vocab=4)
LM.batch_size = 20  # a chain of `SMC` at a time
MODEL = tilted(LM, score_table(2, vocab=4, tokens=4), 1.0)
SETTINGS = {"seed": 0, "progress": False}

# an engine, which run of the program fails (the first is the inspection), and the chains and draws that are kept
ENGINES = {
    "importance": (ImportanceSampling(num_particles=30, batch_size=10, **SETTINGS), 4, (1, 20)),
    "smc": (SMC(num_particles=10, num_chains=10, twist="partial", **SETTINGS), 13, (2, 10)),
    # drawn, warmed up, and five sweeps
    "mcmc": (MCMC(num_samples=8, num_chains=3, warmup=4, initial_particles=10, **SETTINGS), 12, (3, 5)),
}


def failing(at: int, error: BaseException):
    """The program, which raises in its run number ``at``."""
    runs = itertools.count(1)

    def model(prompts):
        if not is_rehearsal() and next(runs) == at:
            raise error
        MODEL(prompts)

    return model


@pytest.mark.parametrize("name", ENGINES)
def test_what_is_drawn_before_an_interruption_or_an_error_is_kept(name):
    engine, at, (chains, draws) = ENGINES[name]
    whole = engine.run(MODEL, SHORT).samples["completion"][:chains, :draws]
    posterior = engine.run(failing(at, KeyboardInterrupt()), SHORT)
    assert posterior.stats["interrupted"]
    np.testing.assert_array_equal(posterior.samples["completion"], whole)
    with pytest.raises(RunError, match="server is down") as caught:
        engine.run(failing(at, RuntimeError("the reward's server is down")), SHORT)
    assert isinstance(caught.value.__cause__, RuntimeError)
    kept = caught.value.so_far.particles.values["completion"].reshape(whole.shape)
    np.testing.assert_array_equal(kept, whole)


def test_in_the_warm_up_there_is_nothing_to_keep():
    with pytest.raises(KeyboardInterrupt):
        ENGINES["mcmc"][0].run(failing(6, KeyboardInterrupt()), SHORT)
