"""Optimal resampling: what each child weighs in expectation, and what it costs, are known exactly.

Tolerances are 4 standard errors, some 40 figures a seed: a false alarm in 1 of 400 runs; seeds are fixed.
"""

from __future__ import annotations

import pyro
import pytest
import torch
from support.models import table_lm
from support.programs import PROMPTS, case
from support.statistics import assert_estimate

from bayeslm.inference import SMC, Exact, ProgramError
from bayeslm.inference.sequential.branching import keep

RUNS, NUMBER = 20_000, 4
MASS = torch.tensor([0.9, 0.05, 0.35, 0.0, 0.2, 0.15, 0.01, 0.19], dtype=torch.float64)
# two are kept for certain, as 0.9 > 1.85 / 4 and 0.35 > 0.95 / 3, and two of the others, with probability mass / 0.3
THRESHOLD = 0.3


@pytest.mark.parametrize("seed", range(3))
def test_a_child_weighs_its_mass_on_average_with_the_least_variance(seed: int) -> None:
    torch.manual_seed(seed)
    index, log_weight = (x[..., 0] for x in keep(MASS.log().expand(RUNS, -1)[..., None], NUMBER))
    weights = torch.zeros(RUNS, len(MASS), dtype=torch.float64).scatter(1, index, log_weight.exp())
    assert ((weights > 0).sum(1) == NUMBER).all(), "each is kept once"
    torch.testing.assert_close(weights.sum(1), MASS.sum().expand(RUNS))
    torch.testing.assert_close(weights[:, MASS >= THRESHOLD], MASS[MASS >= THRESHOLD].expand(RUNS, -1))
    others = MASS < THRESHOLD
    variance = MASS[others] * (THRESHOLD - MASS[others])
    assert_estimate(weights[:, others].mean(0), (variance / RUNS).sqrt(), MASS[others])
    squares = (weights[:, others] - MASS[others]).square()
    assert_estimate(squares.mean(0), squares.std(0) / RUNS**0.5, variance)


@pytest.mark.parametrize(
    "log_mass", [[0.0, -1.0, *[-torch.inf] * 4], [-torch.inf] * 6, [-800.0, 700.0, *[-torch.inf] * 4]]
)
def test_where_few_children_have_mass_all_are_kept(log_mass: list[float]) -> None:
    given = torch.tensor(log_mass)
    index, log_weight = (x[0, :, 0] for x in keep(given[None, :, None], 3))
    found = torch.full((6,), -torch.inf).scatter_reduce(0, index, log_weight, "amax")
    torch.testing.assert_close(
        found.exp() if given.max() < 100 else (found - 700).exp(),
        given.exp() if given.max() < 100 else (given - 700).exp(),
    )


def test_texts_of_a_chain_are_different_and_the_rest_is_unbiased() -> None:
    """With as many particles as texts of positive probability nothing is left to chance."""
    _, model, exact = case("table", 0.5, 0)
    posterior = SMC(8, 20, twist="partial", resampling="optimal", seed=0, progress=False).run(model, PROMPTS)
    for chain in range(20):
        for prompt in range(len(PROMPTS)):
            alive = posterior.log_weights[chain, :, prompt] > -torch.inf
            texts = posterior.samples["completion"][chain, alive, prompt]
            assert len({tuple(text) for text in texts.tolist()}) == len(texts)
    number = exact.samples["completion"].shape[1]
    posterior = SMC(number, 1, resampling="optimal", twist=None, seed=0, progress=False).run(model, PROMPTS)
    torch.testing.assert_close(posterior.log_evidence, exact.log_evidence, atol=1e-4, rtol=0)


def test_a_latent_before_the_text_keeps_its_particles() -> None:
    """Particles that differ are not merged: the law of the latent is right, and of the text given it."""
    lm = table_lm(order=2, seed=3)

    def model() -> None:
        k = pyro.sample("k", pyro.distributions.Categorical(torch.tensor([0.2, 0.3, 0.5])))
        x = pyro.sample("x", lm([[1]], 3))
        pyro.factor("both", (x[..., 0] == k + 1).float() * 2.0)

    exact = Exact().run(model)
    posterior = SMC(16, 400, resampling="optimal", twist=None, seed=0, progress=False).run(model)
    different = [
        len(set(k[w > -torch.inf].tolist()))
        for k, w in zip(posterior.samples["k"], posterior.log_weights[..., 0], strict=True)
    ]
    assert min(different) > 1, "each chain has texts of several k"
    chains = (posterior.log_weights - exact.log_evidence).astype("float64")
    ratio = torch.from_numpy(chains).exp().mean(1)[:, 0]
    assert_estimate(ratio.mean(), ratio.std() / 400**0.5, torch.ones(()))
    assert abs(float(posterior.log_evidence[0] - exact.log_evidence[0])) < 4 * float(posterior.log_evidence_stderr[0])


def test_what_it_refuses() -> None:
    with pytest.raises(ValueError, match="retained"):
        SMC(8, 1, resampling="optimal", retained=case("table", 0.5, 0)[2])
    with pytest.raises(ValueError, match="resampling"):
        SMC(resampling="best")
    lm = table_lm(order=2, seed=3)

    def two() -> None:
        with pyro.plate("texts", 2):
            pyro.sample("x", lm([[1]], 3))

    with pytest.raises(ProgramError, match="several completions"):
        SMC(8, 1, resampling="optimal", progress=False).run(two)
