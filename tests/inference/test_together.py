"""Engines whose work several processes divide: the results have the same law, and are the same on every process."""

from __future__ import annotations

import numpy as np
import pytest
from support.engines import ENGINES
from support.models import table_lm
from support.programs import highest, score_table, tilted, token_is
from support.ranks import launch
from support.statistics import assert_agrees, assert_roots_follow

from bayeslm.inference import Exact

SHORT = [[1, 2], [3]]
TABLE = score_table(2, vocab=4, tokens=4)
MODEL, BOUND = tilted(table_lm(order=3, seed=2, vocab=4), TABLE, 0.7), highest(TABLE) / 0.7
FUNCTIONS = [lambda p: p.rewards["reward"], *(token_is(t, token) for t in range(4) for token in (0, 1, 2))]
IN_SUITE = ["importance", "rejection", "smc", "mcmc", "svi"]
MORE = ["importance, policy", "annealed", "smc, induced", "mcmc, tempered"]


@pytest.fixture(scope="module")
def exact():
    return Exact().run(MODEL, SHORT)


@pytest.mark.parametrize("name", [*IN_SUITE, *(pytest.param(name, marks=pytest.mark.long) for name in MORE)])
def test_two_processes_agree_with_exact(name, exact):
    """log Z, the expected reward, and the marginal of every token; the draws of one are not the other's."""
    engine = ENGINES[name].make(3, BOUND, 1 if name == "mcmc" else 2)
    one, other = launch(lambda rank: engine.run(MODEL, SHORT))
    assert_agrees(one, exact, FUNCTIONS)
    assert one.stats["processes"] == 2
    for array in ("log_weights", "log_joint", "log_evidence", "log_evidence_stderr"):
        np.testing.assert_array_equal(getattr(one, array), getattr(other, array))
    np.testing.assert_array_equal(one.samples["completion"], other.samples["completion"])
    assert one.stats.keys() == other.stats.keys()
    for key in one.stats.keys() - {"seconds"}:
        np.testing.assert_equal(one.stats[key], other.stats[key])
    whole = engine.run(MODEL, SHORT)
    assert one.log_weights.shape == whole.log_weights.shape
    assert whole.stats.keys() == one.stats.keys() - {"processes"}
    flat = one.samples["completion"].reshape(-1, 2, 4)
    assert not np.array_equal(flat[: len(flat) // 2], flat[len(flat) // 2 :])
    if one.kind == "particles":
        assert_roots_follow(one)
