"""What is made of a posterior takes work in proportion to its prompts.

Work is counted, not timed: calls of functions, and elements of arrays whose methods are called (in NumPy's own loops no
Python function is called, so that a sum over all prompts, made once for each of them, is seen by its size alone).
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from dataclasses import replace
from types import FrameType
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from bayeslm import Posterior, diagnostics
from bayeslm.cli import tables
from bayeslm.inference import ImportanceSampling
from bayeslm.inference.preferences import Pool
from bayeslm.models import LanguageModel, TiltedLM, rewards
from bayeslm.plots import plot_rewards

SMALL, LARGE = 6, 24
VIEWS = ("take", "reshape", "transpose", "swapaxes", "squeeze", "view")  # which do not touch every element


def posterior(prompts: int, kind: str = "weighted") -> Posterior:
    rng = np.random.default_rng(0)
    shape, tokens = (2, 8, prompts), rng.integers(0, 5, (2, 8, prompts, 3))
    texts = np.array([f"text {i}" for i in range(2 * 8 * prompts)], dtype=object).reshape(shape)
    likelihood = rng.normal(size=shape)
    return Posterior(
        samples={"completion": tokens},
        rewards={"reward": likelihood},
        log_weights=likelihood if kind == "weighted" else np.zeros(shape),
        log_joint=likelihood,
        log_likelihood={"reward": likelihood},
        log_evidence=np.zeros(prompts),
        log_evidence_stderr=np.zeros(prompts),
        kind=kind,
        engine="Engine",
        dims={"completion": ("prompt", "token")},
        prompts=[f"prompt {i}" for i in range(prompts)],
        texts={"completion": texts},
        lengths={"completion": np.full(shape, 3)},
        prior={"reward": likelihood},
        prior_rewards={"reward": likelihood},
        stats={"seconds": 1.0, "tokens": 3},
        policy=object(),
    )


class Work:
    """The number of calls in a block, and of elements of arrays whose methods are called or that are indexed."""

    def __init__(self) -> None:
        self.calls = self.elements = 0

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        self.calls += event in ("call", "c_call")
        owner = getattr(argument, "__self__", None) if event == "c_call" else None
        if isinstance(owner, np.ndarray) and argument.__name__ not in VIEWS:
            self.elements += owner.size


def work(function: Callable[[], Any]) -> np.ndarray:
    counted = Work()
    sys.setprofile(counted)
    try:
        function()
    finally:
        sys.setprofile(None)
    return np.array([counted.calls, counted.elements])


def loaded(found: Posterior, folder: Any) -> None:
    folder.mkdir(exist_ok=True)
    name = folder / str(len(list(folder.iterdir())))
    replace(found, policy=None).save(name)
    Posterior.load(name)


def inferred(prompts: int) -> Callable[[], Any]:
    lm = LanguageModel.tabular(("<eos>", "a", "b"))
    model = TiltedLM(lm, rewards.Length(), max_new_tokens=2)
    engine = ImportanceSampling(num_particles=8, seed=0, progress=False)
    texts = [f"a {'b ' * (i % 3)}" for i in range(prompts)]
    return lambda: engine.run(model, texts)


def best(found: Posterior) -> None:
    for prompt in range(len(found.prompts)):
        found.best(prompt)


OF_A_POSTERIOR: dict[str, Callable[[Posterior, Any], Any]] = {
    "summary": lambda found, _: diagnostics.summary(found),
    "tables": lambda found, _: tables.show({"a": found}, Console(file=io.StringIO(), width=80)),
    "best texts": lambda found, _: best(found),
    "to_arviz": lambda found, _: found.to_arviz(),
    "save and load": loaded,
    "plot": lambda found, _: plot_rewards({"a": found}),
    "resample": lambda found, _: found.resample(3),
}


CASES = [(name, "weighted") for name in OF_A_POSTERIOR] + [("summary", "markov")]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_results_take_work_in_proportion_to_prompts(name, kind, tmp_path):
    function = OF_A_POSTERIOR[name]
    function(posterior(2, kind), tmp_path)  # imports
    small, large = (work(lambda size=size: function(posterior(size, kind), tmp_path)) for size in (SMALL, LARGE))
    assert (large <= 1.25 * LARGE / SMALL * small).all(), large / small


def test_a_run_takes_work_in_proportion_to_prompts():
    inferred(2)()
    small, large = (work(inferred(size)) for size in (SMALL, LARGE))
    assert (large <= 1.25 * LARGE / SMALL * small).all(), large / small


def test_a_pool_has_the_pairs_of_each_prompt_in_proportion_to_prompts():
    def pairs(prompts: int) -> Callable[[], Any]:
        pool = Pool([f"p{i % prompts}" for i in range(4 * prompts)], [f"c{i}" for i in range(4 * prompts)])
        return lambda: pool.pairs()

    small, large = (work(pairs(size)) for size in (SMALL, LARGE))
    assert (large <= 1.25 * LARGE / SMALL * small).all(), large / small
    rows = pairs(2)().tolist()  # indices 0, 2, 4, 6 are of the first prompt
    assert rows == [[0, 2], [0, 4], [0, 6], [1, 3], [1, 5], [1, 7], [2, 4], [2, 6], [3, 5], [3, 7], [4, 6], [5, 7]]
