r"""Best-of-n as a likelihood: the posterior of p under it is what best-of-n draws.

With F(r) = P(R <= r) and F^-(r) = P(R < r) of the reward R of a draw of the prior, the best of n draws, ties broken by
chance, has the density

    \pi_n(x | c) = p(x | c) L(r),    L = (F^n - F^-^n) / (F - F^-)   [ n F^{n-1} without ties ],    E_p[L] = 1

so the reward is log L with beta = 1: it depends on the order of the rewards alone, not on their scale, and log Z = 0.
KL(\pi_n || p) is at most log n - (n - 1)/n, and that where there are no ties.

F of m draws of the prior counts the text itself as one more: F = (1 + #{r_i <= r}) / (m + 1), F^- = #{r_i < r} / (m +
1). The text's rank among m + 1 exchangeable draws is uniform, so E[L] = 1 for any m, and L is never 0.
Source: Amini, Vieira and Cotterell 2024, Variational best-of-N alignment, arXiv 2407.06057; Beirami et al. 2024, arXiv
2401.01879.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from bayeslm.validation import Count, validated

from .function_checks import short, with_none
from .reward import Reward
from .scorer import RewardFunction, Scores

PRECISION = np.float32  # of rewards on record, in which a text's own reward is to be equal to that of its draw


@validated
class BestOfNLikelihood(Reward):
    """log L of a reward's rank among draws of the prior: with beta = 1 its posterior is best-of-n of the prior.

    ``TiltedLM(lm, BestOfNLikelihood(reward, 16, prompts, r), beta=1.0)`` is the target that `SVI` trains a policy for.

    :param reward: r; its posterior is the same for any increasing function of it.
    :param n: the number of draws of which the best is taken.
    :param prompts: the prompts, each once.
    :param prior_rewards: r of draws of the prior, (draw, prompt), such as ``posterior.prior_rewards["reward"][0]``.
    :param prior_weights: (draw, prompt), where the draws are an enumeration of the prior and not draws of it: their
        probabilities, so that F is exact. None for draws.
    :raises TypeError: if the rewards or weights are no numbers.
    :raises ValueError: if the shapes do not fit, a prompt occurs twice, or a number is NaN or +inf.
    """

    def __init__(
        self,
        reward: Reward | RewardFunction,
        n: Count,
        prompts: Sequence[Any],
        prior_rewards: ArrayLike,
        prior_weights: ArrayLike | None = None,
    ) -> None:
        self.reward = reward if isinstance(reward, Reward) else Reward(reward)
        self.n = n
        values = _numbers("prior_rewards", prior_rewards).astype(PRECISION)
        if values.ndim != 2 or values.shape[1] != len(prompts) or not len(values):
            raise ValueError(f"prior_rewards must be (draw, {len(prompts)}), one a prompt, not {values.shape}")
        if np.isnan(values).any() or np.isposinf(values).any():
            raise ValueError("prior_rewards must be finite or -inf: found NaN or +inf")
        weights = np.ones(values.shape) if prior_weights is None else _numbers("prior_weights", prior_weights)
        valid = weights.shape == values.shape and ((weights >= 0) & np.isfinite(weights)).all()
        if not valid or not weights.any(axis=0).all():
            raise ValueError(f"prior_weights must be probabilities {values.shape}, one for each of prior_rewards")
        keys = [_key(prompt) for prompt in prompts]
        if len(set(keys)) < len(keys):
            twice = next(prompt for prompt, key in zip(prompts, keys, strict=True) if keys.count(key) > 1)
            raise ValueError(f"prompt {short.repr(twice)} occurs twice: give each prompt once, with its own draws")
        self._own = float(prior_weights is None)  # the text itself is one more of the draws
        order = np.argsort(values, axis=0, kind="stable")
        values = np.take_along_axis(values, order, axis=0)
        mass = np.cumsum(np.take_along_axis(weights, order, axis=0), axis=0)
        self._known = {key: (values[:, i], np.append(0.0, mass[:, i])) for i, key in enumerate(keys)}
        least = min(mass[-1].min() + self._own, 2.0**53)
        self._bound(math.log(n), -(n - 1) * math.log(least) if self._own else None)

    def score(self, prompts: list[Any], completions: list[str], **columns: Any) -> Scores:
        scores = self.reward._scores(prompts, completions, columns)
        return with_none(np.array([self._of(i, prompts, completions, r) for i, r in enumerate(scores.tolist())]))

    def _of(self, i: int, prompts: list[Any], completions: list[str], r: float) -> float:
        """Return log L of a reward; NaN where the reward abstains."""
        if math.isnan(r):
            return r
        known = self._known.get(_key(prompts[i]))
        if known is None:
            self._fail("has no draws of the prior for a prompt", prompts[i], completions[i])
        values, mass = known
        r = float(PRECISION(r))
        total = mass[-1] + self._own
        low = mass[np.searchsorted(values, r, side="left")] / total
        high = (mass[np.searchsorted(values, r, side="right")] + self._own) / total
        return log_best_of_n(low, high, self.n)

    @property
    def __name__(self) -> str:
        return f"best of {self.n}({self.reward.__name__})"


def log_best_of_n(below: float, up_to: float, n: int) -> float:
    r"""Return log L = log \sum_k F^k F^-^{n-1-k}, the density of the best of n over the prior's.

    :param below: F^- = P(R < r).
    :param up_to: F = P(R <= r).
    """
    if up_to <= 0.0:
        return -math.inf
    ratio = below / up_to
    terms = n if ratio == 1.0 else -math.expm1(n * math.log(ratio)) / (1.0 - ratio) if ratio > 0.0 else 1.0
    return (n - 1) * math.log(up_to) + math.log(terms)


def _numbers(name: str, values: ArrayLike) -> np.ndarray:
    """Return an argument as an array.

    :raises TypeError: if it is not of real numbers, or its rows differ in length.
    """
    try:
        return np.asarray(values, dtype=float)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be rows of numbers, got {short.repr(values)}") from error


def _key(prompt: Any) -> str:
    """Return a text that is the same for equal prompts."""
    if isinstance(prompt, str):
        return f"text {prompt}"
    return json.dumps(prompt, sort_keys=True, default=_plain)


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else dict(value) if hasattr(value, "keys") else list(value)
