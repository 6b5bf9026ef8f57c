r"""Calibration of predicted probabilities of preferences, each figure with two kinds of error.

With p_{is} = P(y_i = 1 | \theta_s) of pair i under draw s, and the posterior predictive \bar p_i = mean_s p_{is}:

    accuracy     the share of pairs whose likelier outcome happened (1/2 where \bar p_i = 1/2)
    log score    (1/n) \sum_i log P(y_i),     P(1) = \bar p_i,  P(0) = 1 - \bar p_i             in nats
    ECE          \sum_b (n_b / n) |right_b - confidence_b|,     confidence_i = max(\bar p_i, 1 - \bar p_i)

with bins b of equal width in confidence, right_b the share of the bin's likelier outcomes that happened. (Gneiting and
Raftery 2007 on proper scores; Naeini, Cooper and Hauskrecht 2015 and Guo et al. 2017, arXiv 1706.04599, on the expected
calibration error.) None of them depends on which of a pair is called the first. Of an answer, which is right or wrong
with probability \bar p_i, the opposite is no answer: there (``folded=False``) the confidence is \bar p_i itself, and
the accuracy is the share that is right.

A figure's standard error is that of the finite number of pairs, by the bootstrap; its Monte Carlo error that of the
finite number of draws, by the bootstrap of batches of successive draws, sqrt(draws) in each chain, which are nearly
independent where draws are not (batch means: Flegal and Jones 2010). The ECE of right probabilities is not 0, since
shares differ from probabilities by chance: `ece_if_calibrated` is its distribution for right probabilities.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from bayeslm.posterior_draws import PosteriorDraws
from bayeslm.validation import validated
from bayeslm.weights import Array

if TYPE_CHECKING:
    import pandas as pd

REPLICATES = 500  # of each bootstrap


class Figure(NamedTuple):
    """An estimate, its standard error over pairs, and its Monte Carlo error over draws; infinite where unknown."""

    value: float
    stderr: float
    mcse: float


@dataclass(frozen=True, eq=False)
class Calibration:
    """Accuracy, log score and calibration error, and the curve of a reliability diagram; see `calibrate`."""

    accuracy: Figure
    log_score: Figure
    ece: Figure
    ece_if_calibrated: tuple[float, float]
    """The mean and the 95% quantile of the ECE if outcomes followed the predicted probabilities."""
    confidence: Array
    """(bin,): the mean confidence of the pairs in each bin, NaN for an empty bin."""
    right: Array
    """(bin,): the share of these pairs whose likelier outcome happened."""
    counts: Array
    """(bin,): the number of these pairs."""
    lowest: float = 0.5
    """The left edge of the first bin: 0 if probabilities are not folded."""

    @property
    def right_stderr(self) -> Array:
        """(bin,): the standard error of `right` for right probabilities, sqrt(confidence (1 - confidence) / count)."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.sqrt(self.confidence * (1 - self.confidence) / self.counts)

    def table(self) -> pd.DataFrame:
        """Accuracy, log score and ECE in rows; value, standard error and Monte Carlo error in columns."""
        import pandas as pd

        rows = {"accuracy": self.accuracy, "log score": self.log_score, "ECE": self.ece}
        return pd.DataFrame.from_dict(rows, orient="index", columns=["value", "stderr", "mcse"])


@validated
def calibrate(
    predicted: PosteriorDraws | ArrayLike,
    outcomes: ArrayLike | None = None,
    *,
    site: str = "preferred",
    bins: int = 10,
    folded: bool = True,
    seed: int = 0,
) -> Calibration:
    """Compute accuracy, log score and expected calibration error of predicted probabilities of binary outcomes.

    :param predicted: probabilities P(y_i = 1) of equally weighted draws, (chain, draw, pair), or one of each pair,
        (pair,); or a posterior with the log-likelihood of each pair, such as `bayeslm.inference.predict` returns for
        held-out comparisons.
    :param outcomes: y, 0 or 1, (pair,). None means that all are 1, as for a posterior, whose probabilities are those of
        the outcomes that happened.
    :param site: the posterior's observed site.
    :param bins: the number of bins of confidence, from 1/2 to 1, or from 0 if it is not folded.
    :param folded: whether a probability counts as that of the likelier outcome, as of two alternatives. False: as it
        is, as of answers that are right (1) or wrong (0).
    :param seed: of the bootstrap.
    :raises ValueError: if shapes do not agree, probabilities are outside [0, 1], outcomes are neither 0 nor 1, or the
        posterior has no such site or weighted draws.
    """
    p = _probabilities(predicted, site)
    y = np.ones(p.shape[2]) if outcomes is None else np.asarray(outcomes, dtype=float)
    if y.shape != p.shape[2:]:
        raise ValueError(f"outcomes must be one for each of {p.shape[2]} pairs, got shape {y.shape}")
    if (bad := y[~np.isin(y, (0, 1))]).size:
        raise ValueError(f"outcomes must be 0 or 1, got {bad[0]:g}")
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}")
    happened = np.where(y == 1, p, 1 - p)  # the probability of what happened
    mean, batches = happened.mean((0, 1)), _batch_means(happened)  # (pair,), (batch, pair)
    rng = np.random.default_rng(seed)
    resampled = rng.integers(len(mean), size=(REPLICATES, len(mean)))
    other_pairs = mean[resampled]  # (replicate, pair)
    picked = rng.multinomial(len(batches), np.full(len(batches), 1 / len(batches)), size=REPLICATES)
    other_draws = picked @ batches / len(batches)

    def figure(statistic: Callable[[Array, Array], Array]) -> Figure:
        over_pairs = statistic(other_pairs, y[resampled]).std() if len(mean) > 1 else np.inf
        over_draws = statistic(other_draws, y).std() if len(batches) > 1 else np.inf
        return Figure(float(statistic(mean, y)), float(over_pairs), float(over_draws))

    def judged(q: Array, y: Array) -> tuple[Array, Array]:
        """Return confidence and whether it was right, of the probability of what happened."""
        if folded:
            return np.maximum(q, 1 - q), _is_right(q)
        return np.where(y == 1, q, 1 - q), np.broadcast_to(y, q.shape)

    def ece(q: Array, y: Array) -> Array:
        confidence, right, counts = _reliability(*judged(q, y), bins, lowest)
        return np.nansum(counts * np.abs(right - confidence), -1) / q.shape[-1]

    lowest = 0.5 if folded else 0.0
    again = rng.random(other_pairs.shape) < mean  # what happened
    by_chance = ece(np.where(again, mean, 1 - mean), np.where(again, y, 1 - y))
    with np.errstate(divide="ignore", invalid="ignore"):  # probability 0 for what happened: -inf
        log_score = figure(lambda q, _: np.log(q).mean(-1))
    return Calibration(
        figure(lambda q, y: judged(q, y)[1].mean(-1)),
        log_score,
        figure(ece),
        (float(by_chance.mean()), float(np.quantile(by_chance, 0.95))),
        *_reliability(*judged(mean, y), bins, lowest),
        lowest,
    )


def _probabilities(predicted: PosteriorDraws | ArrayLike, site: str) -> Array:
    """Return probabilities (chain, draw, pair), after checks."""
    if isinstance(predicted, PosteriorDraws):
        if site not in predicted.pointwise:
            raise ValueError(f"the posterior has no observed site {site!r}, only {sorted(predicted.pointwise)}")
        if predicted.kind in ("weighted", "particles", "enumerated"):
            raise ValueError("the posterior's draws are weighted: use calibrate(posterior.resample())")
        predicted = np.exp(predicted.pointwise[site].astype(float))
    p = np.asarray(predicted, dtype=float)
    if p.ndim not in (1, 3) or p.size == 0:
        raise ValueError(f"predicted must be probabilities (chain, draw, pair) or (pair,), not empty, got {p.shape}")
    if (bad := p[~((p >= 0) & (p <= 1))]).size:
        raise ValueError(f"predicted probabilities must be between 0 and 1, got {bad[0]:g}")
    return p if p.ndim == 3 else p[None, None]


def _batch_means(values: Array) -> Array:
    """Return the means (batch, pair) of sqrt(draws) batches of successive draws per chain; a remainder is left out."""
    chains, draws, pairs = values.shape
    batches = int(draws**0.5)
    size = draws // batches
    return values[:, : batches * size].reshape(chains * batches, size, pairs).mean(1)


def _is_right(happened: Array) -> Array:
    """Return 1 where the likelier outcome happened, 1/2 where both were equally likely, else 0."""
    return np.where(happened == 0.5, 0.5, happened > 0.5)


def _reliability(confidence: Array, right: Array, bins: int, lowest: float) -> tuple[Array, Array, Array]:
    """Return mean confidence, share right and number of pairs in bins of equal width, each (*, bin).

    :param confidence: (*, pair).
    :param right: of the same shape.
    :param lowest: the left edge of the first bin.
    """
    index = np.minimum(((confidence - lowest) / (1 - lowest) * bins).astype(int), bins - 1)
    index = index.reshape(-1, confidence.shape[-1])
    shape = (*confidence.shape[:-1], bins)
    index = (index + bins * np.arange(len(index))[:, None]).ravel()  # bins of each row in turn

    def total(x: Array | None) -> Array:
        weights = None if x is None else x.ravel()
        return np.bincount(index, weights, minlength=int(np.prod(shape))).reshape(shape).astype(float)

    counts = total(None)
    with np.errstate(invalid="ignore"):
        return total(confidence) / counts, total(right) / counts, counts
