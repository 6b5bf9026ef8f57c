"""The same draws at another beta, against enumeration."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy.special import logsumexp
from support.models import table_lm
from support.toys import JOINT, PRIOR, REWARD, enumerated, from_prior

from bayeslm import diagnostics
from bayeslm.inference import SVI, Exact, ImportanceSampling
from bayeslm.models import TiltedLM
from bayeslm.reweighting import at_beta


def letters(completions: list[str], **columns: object) -> list[float]:
    return [float(text.count("a")) for text in completions]


@pytest.mark.parametrize("beta", [0.05, 0.1, 0.4])
def test_every_beta_is_that_of_the_closed_form(beta: float) -> None:
    """The toys have beta 0.1; draws of zero probability, of a reward of minus infinity, stay so."""
    log_z = logsumexp(np.log(PRIOR) + 0.1 * REWARD / beta, axis=1)
    exact = at_beta(enumerated(), beta)
    np.testing.assert_allclose(exact.log_evidence, log_z)
    drawn = at_beta(from_prior(0), beta)
    assert (np.abs(drawn.log_evidence - log_z) < 4.5 * drawn.log_evidence_stderr).all()
    truth = (exact.weights() * np.where(exact.weights() > 0, exact.measured, 0.0)).sum((0, 1))
    mean, error = diagnostics.expectation(drawn, drawn.measured)
    assert (np.abs(mean - truth) < 4.5 * error).all()
    assert not np.isnan(drawn.log_joint).any()
    assert np.isneginf(drawn.log_weights[from_prior(0).log_weights == -np.inf]).all()


def test_the_same_beta_changes_nothing() -> None:
    drawn = from_prior(1)
    same = at_beta(drawn, 0.1)
    np.testing.assert_allclose(same.log_weights, drawn.log_weights, atol=1e-12)
    np.testing.assert_allclose(same.log_evidence, drawn.log_evidence)
    assert same.stats["seconds"] == drawn.stats["seconds"]
    assert JOINT.shape == REWARD.shape


@pytest.mark.parametrize("engine", ["importance", "svi"])
def test_a_run_at_one_beta_is_one_at_another(engine: str) -> None:
    """By draws of the prior with their own seed, bit for bit but for rounding, and of a policy within errors."""
    lm, prompts = table_lm(), [[1, 2], [3]]
    model, other = (TiltedLM(lm, letters, beta, max_new_tokens=3) for beta in (0.8, 0.5))
    exact = Exact(progress=False).run(other, prompts)
    if engine == "importance":
        run = ImportanceSampling(400, 4, seed=0, progress=False)
        moved, own = at_beta(run.run(model, prompts), 0.5), run.run(other, prompts)
        for name in ("log_weights", "log_evidence", "log_evidence_stderr", "log_evidence_lower", "log_joint"):
            np.testing.assert_allclose(getattr(moved, name), getattr(own, name), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(moved.stats["ess"], own.stats["ess"], rtol=1e-4)
        np.testing.assert_allclose(moved.prior["reward"], own.prior["reward"], rtol=1e-5)
    else:
        trained = SVI(10, num_samples=800, num_prior_samples=0, seed=0, progress=False).run(model, prompts)
        moved = at_beta(trained, 0.5)
    assert (np.abs(moved.log_evidence - exact.log_evidence) < 4.5 * moved.log_evidence_stderr + 1e-4).all()


def test_what_is_refused() -> None:
    drawn = from_prior(0)
    for bad, says in [
        (replace(drawn, kind="markov"), "not markov ones"),
        (replace(drawn, rewards={}), r"records \[\]"),
        (replace(drawn, log_likelihood={"other": drawn.log_likelihood["reward"]}), r"records \['reward'\]"),
        (replace(drawn, rewards={"reward": drawn.rewards["reward"] + 0.05}), "not its reward divided by one beta"),
    ]:
        with pytest.raises(ValueError, match=says):
            at_beta(bad, 0.3)
    with pytest.raises(ValueError, match="beta"):
        at_beta(drawn, -1.0)
