"""Runs on several machines become one posterior."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from support.engines import ENGINES
from support.models import table_lm
from support.programs import highest, score_table, tilted, token_is
from support.statistics import assert_agrees, assert_roots_follow
from support.toys import enumerated, from_prior

from bayeslm import Posterior, diagnostics
from bayeslm.inference import Exact

SHORT = [[1, 2], [3]]
TABLE = score_table(2, vocab=4, tokens=3)
MODEL, BOUND = tilted(table_lm(order=3, seed=2, vocab=4), TABLE, 0.7), highest(TABLE) / 0.7
FUNCTIONS = [lambda p: p.rewards["reward"], *(token_is(t, token) for t in range(3) for token in (0, 1))]


@pytest.fixture(scope="module")
def exact():
    return Exact().run(MODEL, SHORT)


ALIKE = ("importance, policy", "annealed")  # to importance and smc


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.long] * (name in ALIKE))
        for name in ("importance", "importance, policy", "rejection", "smc", "annealed", "mcmc")
    ],
)
def test_four_runs_are_one_that_agrees_with_exact(name, exact, tmp_path):
    runs = [ENGINES[name].make(seed, BOUND, 1).run(MODEL, SHORT) for seed in range(4)]
    together = Posterior.concatenate(runs)
    assert_agrees(together, exact, FUNCTIONS)
    assert together.log_weights.shape[0] == sum(len(run.log_weights) for run in runs)
    assert together.stats["tokens"] == sum(run.stats["tokens"] for run in runs)
    assert together.stats["runs"] == 4
    if not np.isnan(together.log_evidence).any():  # errors of four runs are half of one's
        ratio = together.log_evidence_stderr / np.mean([run.log_evidence_stderr for run in runs], axis=0)
        assert ((ratio > 0.3) & (ratio < 0.75)).all(), ratio
    if together.kind == "particles":
        assert_roots_follow(together)
    for field in ("log_evidence_lower", "log_evidence_upper"):
        each = [getattr(run, field) for run in runs]
        if each[0] is not None:
            np.testing.assert_allclose(getattr(together, field), np.mean(each, axis=0))
    loaded = Posterior.load(together.save(tmp_path / "run"))
    np.testing.assert_array_equal(loaded.log_weights, together.log_weights)
    diagnostics.summary(together)


def test_independent_draws_in_chains_of_different_lengths_are_one_chain():
    """log Z of all draws, and not the mean of the runs'."""
    parts = [from_prior(0), from_prior(1)]
    short = replace(
        parts[1],
        samples={"completion": parts[1].samples["completion"][:, :10]},
        **{name: getattr(parts[1], name)[:, :10] for name in ("log_weights", "log_joint")},
        **{
            name: {key: x[:, :10] for key, x in getattr(parts[1], name).items()}
            for name in ("rewards", "log_likelihood", "texts", "lengths")
        },
    )
    together = Posterior.concatenate([parts[0], short])
    assert together.log_weights.shape == (1, 4 * 260, 2)
    weights = np.concatenate([x.log_weights.reshape(-1, 2) for x in (parts[0], short)])
    np.testing.assert_allclose(together.log_evidence, np.log(np.exp(weights).mean(0)))
    assert together.texts["completion"].shape == (1, 1040, 2)


@pytest.mark.parametrize(
    ("others", "message"),
    [
        (lambda one: [], "no posteriors"),
        (
            lambda one: [one, replace(from_prior(1), engine="Other")],
            "engine is 'Toy' of one run and 'Other' of",
        ),
        (lambda one: [one, replace(from_prior(1), prompts=["a", "b"])], "prompts is"),
        (lambda one: [one, from_prior(1, kind="exact")], "kind is 'weighted' of one run and 'exact' of another"),
        (lambda one: [enumerated(), enumerated()], "an enumeration has every value once already"),
        (lambda one: [one, from_prior(1), from_prior(0)], "run 2 has the draws of another run: give each a seed"),
    ],
)
def test_what_is_not_one_posterior(others, message):
    with pytest.raises(ValueError, match=message):
        Posterior.concatenate(others(from_prior(0)))


@pytest.mark.parametrize(
    ("setting", "one", "other"),
    [
        ("beta", 0.1, 0.2),
        ("max_new_tokens", 2, 3),
        ("reward", "Length()", "Length(target=3)"),
        ("temperature", 1.0, 0.5),
    ],
)
def test_runs_of_programs_with_other_settings_are_not_one_posterior(setting, one, other):
    def run(seed, value):
        return from_prior(
            seed, stats={"program": {"program": "TiltedLM", "prior": f"/home/{seed}/model", setting: value}}
        )

    Posterior.concatenate([run(0, one), run(1, one)])
    with pytest.raises(ValueError, match=f"{setting} of the program is"):
        Posterior.concatenate([run(0, one), run(1, other)])
    function = "Reward(<function f at 0x7f{}>)"
    Posterior.concatenate([from_prior(i, stats={"program": {"reward": function.format(i)}}) for i in range(2)])


def test_one_run_is_itself():
    one = from_prior(0)
    assert vars(Posterior.concatenate([one])) == vars(one)
