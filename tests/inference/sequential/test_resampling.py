"""Resampling against what is known of each scheme: exact bounds on offspring, their means, their variances.

A tolerance is 4 standard errors, which a comparison exceeds by chance in 6 of 100,000 tests; some 200 of them: the
file fails by chance with probability 1%, and each test starts from a fixed seed.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support.statistics import assert_estimate
from torch import Tensor

from bayeslm.inference.sequential.resampling import (
    RESAMPLING,
    conditional_multinomial,
    ess,
    keep_in_place,
    multinomial,
    residual,
    stratified,
    systematic,
)

Scheme = Callable[[Tensor], Tensor]
every_scheme = pytest.mark.parametrize("scheme", RESAMPLING.values(), ids=RESAMPLING)

RUNS = 20_000
WEIGHTS = torch.tensor([[0.31, 0.0, 0.05, 0.02, 0.12, 0.5, 0.0], [1 / 7] * 7, [0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0]]).T
WEIGHTS = WEIGHTS.double()  # (particle, column): ordinary, equal, a single one


def offspring(ancestors: Tensor) -> Tensor:
    """How many descend from each particle, (chain, particle, column)."""
    return torch.zeros_like(ancestors).scatter_add(1, ancestors, torch.ones_like(ancestors))


def runs_of(scheme: Scheme, weights: Tensor = WEIGHTS) -> Tensor:
    """Offspring of independent runs of one set of weights, one a chain."""
    ancestors = scheme(weights.log().expand(RUNS, *weights.shape))
    assert ancestors.dtype == torch.int64
    assert ancestors.shape == (RUNS, *weights.shape)
    return offspring(ancestors)


@every_scheme
def test_offspring_are_unbiased(scheme: Scheme) -> None:
    """N W of each particle on average; for any scheme their variance is at most the multinomial's, N W (1 - W)."""
    counts, expected = runs_of(scheme).double(), 7 * WEIGHTS
    error = (expected * (1 - WEIGHTS) / RUNS).sqrt()
    assert (counts.sum(1) == 7).all()
    assert_estimate(counts.mean(0), error, expected)


@every_scheme
@pytest.mark.parametrize("seed", range(3))
def test_weights_that_are_zero_have_no_offspring(scheme: Scheme, seed: int) -> None:
    torch.manual_seed(seed)
    log_weights = torch.randn(50, 400, 3)
    log_weights[torch.rand(50, 400, 3) < 0.9] = -torch.inf
    log_weights[:, :7] = log_weights[:, -7:] = -torch.inf
    assert torch.isfinite(log_weights.gather(1, scheme(log_weights))).all()


@every_scheme
def test_rounding_wakes_no_dead(scheme: Scheme, monkeypatch: pytest.MonkeyPatch) -> None:
    """A uniform number rounded up to 1 puts a point past the last of the living."""
    monkeypatch.setattr(torch, "rand_like", torch.ones_like)
    log_weights = torch.tensor([0.3, 0.1, -torch.inf, -torch.inf])[None, :, None]
    assert torch.isfinite(log_weights.gather(1, scheme(log_weights))).all()


@pytest.mark.parametrize("seed", range(3))
def test_offspring_are_the_expected_number_rounded(seed: int) -> None:
    """Certain, not only likely: systematic up or down, stratified within one more, residual never below."""
    torch.manual_seed(seed)
    log_weights = 2 * torch.randn(40, 100, 3, dtype=torch.float64)
    expected = 100 * log_weights.softmax(1)
    low, high = (expected - 1e-9).floor(), (expected + 1e-9).ceil()
    counts = offspring(systematic(log_weights))
    assert ((counts >= low) & (counts <= high)).all()
    counts = offspring(stratified(log_weights))
    assert ((counts >= low - 1) & (counts <= high + 1)).all()
    assert (offspring(residual(log_weights)) >= low).all()


@every_scheme
@pytest.mark.parametrize("size", [1, 49, 1000])
def test_equal_weights(scheme: Scheme, size: int) -> None:
    """All but multinomial resampling leave every particle exactly one descendant."""
    counts = offspring(scheme(torch.full((3, size, 2), -7.3)))
    if scheme is multinomial and size > 1:
        assert counts.max() > 1
    else:
        assert (counts == 1).all()


@every_scheme
def test_only_ratios_count_however_large(scheme: Scheme) -> None:
    log_weights = torch.tensor([-3e4, 1e5, 1e5 - 1e3, -torch.inf])[None, :, None]
    for shift in (0.0, -2e5):
        assert (scheme(log_weights + shift) == 1).all()
    shifted = (WEIGHTS.log() + 1e4).expand(RUNS, *WEIGHTS.shape)
    torch.manual_seed(1)
    first = scheme(shifted)
    torch.manual_seed(1)
    assert (scheme(shifted - 1e4) == first).double().mean() > 1 - 1e-4  # rounding of the weights apart


@every_scheme
def test_columns_and_chains_are_resampled_each_on_its_own(scheme: Scheme) -> None:
    """The offspring of the first particle in different chains, and in different columns, are uncorrelated.

    A correlation of independent counts has standard error 1 / sqrt(RUNS / 2).
    """
    weights = WEIGHTS[:, :1].expand(7, 2)
    first = runs_of(scheme, weights)[:, 0].double()  # (run, column)
    pairs = first.reshape(-1, 2, 2).flatten(1)  # two chains, two columns each
    correlation = torch.corrcoef(pairs.T)
    assert (correlation - torch.eye(4)).abs().max() < 4 / (RUNS / 2) ** 0.5


@every_scheme
def test_no_weight_at_all_counts_as_equal(scheme: Scheme) -> None:
    log_weights = torch.randn(2, 9, 2)
    log_weights[0, :, 1] = -torch.inf
    ancestors = scheme(log_weights)
    assert ((ancestors >= 0) & (ancestors < 9)).all()
    if scheme is not multinomial:
        assert (ancestors[0, :, 1] == torch.arange(9)).all()
    assert (ess(log_weights)[0, 1], ess(log_weights)[1, 1] > 0) == (0, True)


def test_variances_are_those_of_theory() -> None:
    """Of the estimate sum n_i f_i / N: multinomial by its formula; residual and stratified never more (Douc and Cappé).

    The sample variance of RUNS runs has relative standard error sqrt((kurtosis - 1) / RUNS), about 0.01.
    """
    weights = torch.tensor([0.31, 0.01, 0.05, 0.02, 0.12, 0.45, 0.04], dtype=torch.float64)[:, None]
    values = torch.linspace(-1.0, 1.0, 7, dtype=torch.float64)[:, None]
    variance = {}
    for name, scheme in RESAMPLING.items():
        estimate = (runs_of(scheme, weights) * values).sum(1) / 7
        variance[name] = float(estimate.var())
    mean = (weights * values).sum()
    theory = float((weights * (values - mean) ** 2).sum() / 7)
    assert variance["multinomial"] == pytest.approx(theory, rel=4 * 0.011)
    shares = 7 * weights
    rest = shares - shares.floor()
    left = rest / rest.sum()
    spread = (left * (values - (left * values).sum()) ** 2).sum()
    assert variance["residual"] == pytest.approx(float(rest.sum() * spread / 49), rel=4 * 0.011)
    # stratified: the variance within each stratum [k, k + 1), by the length of it that each particle covers
    ends = shares.cumsum(0)
    edges = torch.arange(7.0, dtype=torch.float64)
    covered = (torch.minimum(ends, edges + 1) - torch.maximum(ends - shares, edges)).clamp_min(0)  # (particle, stratum)
    within = (covered * values**2).sum(0) - (covered * values).sum(0) ** 2
    assert variance["stratified"] == pytest.approx(float(within.sum() / 49), rel=4 * 0.011)
    assert max(variance["residual"], variance["stratified"]) < variance["multinomial"]
    assert variance["systematic"] < variance["multinomial"]


@pytest.mark.parametrize("seed", range(3))
def test_survivors_keep_their_place(seed: int) -> None:
    """The same multiset; a particle with offspring is its own slot's ancestor; so only the lost slots are replaced."""
    torch.manual_seed(seed)
    ancestors = multinomial(2 * torch.randn(30, 20, 3))
    kept = keep_in_place(ancestors)
    assert (kept.sort(1).values == ancestors.sort(1).values).all()
    survives = offspring(ancestors) > 0
    slots = torch.arange(20)[:, None]
    assert ((kept == slots) == survives).all()
    assert (keep_in_place(kept) == kept).all()


@pytest.mark.parametrize("seed", range(3))
def test_the_retained_particle_stays_first(seed: int) -> None:
    """Slot 0 for certain, the others multinomial: N - 1 draws, so (N - 1) W offspring on average."""
    torch.manual_seed(seed)
    ancestors = conditional_multinomial(WEIGHTS.log().expand(RUNS, *WEIGHTS.shape))
    assert (ancestors[:, 0] == 0).all()
    assert (keep_in_place(ancestors)[:, 0] == 0).all()
    counts = offspring(ancestors).double()
    counts[:, 0] -= 1
    error = (6 * WEIGHTS * (1 - WEIGHTS) / RUNS).sqrt()
    assert_estimate(counts.mean(0), error, 6 * WEIGHTS)


def test_ess_by_hand() -> None:
    weights = torch.tensor([[4.0, 1.0, 1.0], [0.0, 2.0, 2.0]], dtype=torch.float64)
    assert ess(weights.log()[..., None] - 900).flatten().tolist() == pytest.approx([36 / 18, 2.0])
