"""examples/over_optimisation.py: its curves against enumeration, and what they show."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import expit, softmax

from bayeslm import diagnostics
from bayeslm.inference import Exact
from bayeslm.models import TiltedLM
from bayeslm.models.preferences import UncertainReward

pytest.importorskip("matplotlib")  # the example plots


@pytest.fixture(scope="module")
def example() -> ModuleType:
    path = Path(__file__).parents[3] / "examples" / "over_optimisation.py"
    spec = importlib.util.spec_from_file_location("over_optimisation", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def laplace(task: Any) -> UncertainReward:
    """Do what `Task.learn` does, with draws of the Laplace approximation in place of NUTS."""
    model = task.learner()
    x = model.prepare(task.comparisons()).double().numpy()  # (comparison, 7)
    precision = np.eye(7) * 7 / model.scale**2
    mode = np.zeros(7)
    for _ in range(30):
        win = expit(x @ mode)
        curvature = precision + x.T @ (x * (win * (1 - win))[:, None])
        mode = mode + np.linalg.solve(curvature, x.T @ (1 - win) - precision @ mode)
    weights = task.rng.multivariate_normal(mode, np.linalg.inv(curvature), 64)
    return task.centred(UncertainReward(model, torch.tensor(weights), "mean", seed=task.seed))


@pytest.mark.long
@pytest.mark.parametrize("way", ["laplace", "nuts"])
def test_pessimistic_and_marginal_forms_keep_the_true_reward(
    example: ModuleType, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """Where the learned reward is wrong away from its data: at the smallest beta, the largest n, and at equal KL."""
    if way == "laplace":
        monkeypatch.setattr(example.Task, "learn", laplace)
        both = example.curves(0.75, range(20), length=4)
    else:
        both = example.curves(0.5, range(100, 120))
    for curves in both:
        mean = curves["mean"]
        assert (np.diff(mean["proxy"]) > -1e-4).all()  # the optimised reward grows
        falls = mean["true"].max(1) - mean["true"][:, -1]
        assert falls.mean() > 3 * standard_error(falls)
        for form in ("quantile", "marginal"):
            more = curves[form]["true"][:, -1] - mean["true"][:, -1]
            assert more.mean() > 3 * standard_error(more), (form, more)
            kl = np.minimum(mean["kl"][:, -1], curves[form]["kl"][:, -1])
            more = at_kl(curves[form], kl) - at_kl(mean, kl)
            assert more.mean() > 2 * standard_error(more), (form, kl, more)


@pytest.mark.long
def test_the_mean_is_best_where_the_learned_reward_is_right(example: ModuleType) -> None:
    tilted, best = example.curves(0.0, range(200, 220))
    for curves in (tilted, best):
        for form, curve in curves.items():
            more = curve["true"][:, -1] - curves["mean"]["true"][:, -1]
            assert more.mean() <= 2 * standard_error(more), (form, more)
        claimed = curves["mean"]["proxy"][:, -1] - curves["mean"]["true"][:, -1]
        assert abs(claimed.mean()) < 3 * standard_error(claimed)  # no optimiser's curse


def standard_error(x: np.ndarray) -> float:
    return float(x.std(ddof=1) / np.sqrt(len(x)))


def at_kl(curve: dict[str, np.ndarray], kl: np.ndarray) -> np.ndarray:
    """Interpolate the true reward of each seed at a KL."""
    rows = zip(kl, curve["kl"], curve["true"], strict=True)
    return np.array([np.interp(at, k, true) for at, k, true in rows])


def test_the_curves_agree_with_the_enumerated_posterior(example: ModuleType) -> None:
    task = example.Task(0, 0.5, length=3)
    reward = laplace(task)
    scores = task.scores(reward)
    distributions = task.tilted(scores, reward.margins([example.PROMPT], task.texts))
    curve = task.curve(distributions["quantile"], scores["mean"])
    for i in (0, 12):
        model = TiltedLM(task.prior, reward.to_form("quantile"), float(example.BETAS[i]), max_new_tokens=3)
        exact = Exact(num_prior_samples=1).run(model, [example.PROMPT])
        assert curve["kl"][i] == pytest.approx(diagnostics.kl_to_prior(exact)[0][0], abs=1e-4)
        true = dict(zip(task.texts, task.true, strict=True))
        mean = (exact.weights()[0, :, 0] * [true[text] for text in exact.texts["completion"][0, :, 0]]).sum()
        assert curve["true"][i] == pytest.approx(mean, abs=1e-4)


def test_best_of_n_is_exact(example: ModuleType) -> None:
    """The best of two agrees with all pairs, and the best of one is the prior."""
    task = example.Task(0, 0.5, length=2)
    scores = {"any": np.round(task.true)}  # with ties
    example_ns, example.NS = example.NS, np.array([1, 2])
    try:
        one, two = task.best_of(scores)["any"]
    finally:
        example.NS = example_ns
    p = softmax(task.log_p)
    np.testing.assert_allclose(one, p, atol=1e-12)
    s = scores["any"]
    wins = (s[:, None] > s) + 0.5 * (s[:, None] == s)
    np.testing.assert_allclose(two, 2 * p * (wins @ p), atol=1e-12)
