r"""A reward learned from ratings of single completions: numbers (Gaussian), or ordered levels such as 1 to 5 stars.

    y = a + r_w(c, x) + \epsilon,     \epsilon ~ Normal(0, \sigma^2)                                          Gaussian
    P(y <= l_j | c, x) = F(c_j - r_w(c, x)),     c_1 < ... < c_{K-1},     F logistic or normal                 ordinal

(McCullagh 1980, "Regression models for ordinal data".) The prior of the cutpoints follows from that of the level
probabilities of a completion of reward 0, which is uniform on the simplex: c_j = F^{-1}(p_1 + ... + p_j) (Betancourt
2019, "Ordinal regression"). With known noise the Gaussian model is conjugate.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, ClassVar, Literal

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.nn import functional as F

from bayeslm.validation import Finite, Positive, validated

from .features import Features
from .linear import LinearReward, under_plate
from .rows import PreferenceData, PreferenceError, check_texts


@dataclass(frozen=True)
class Ratings(PreferenceData):
    """Completions and the rating of each: three lists of one length.

    A row has ``prompt`` and ``completion``, strings, and ``rating``, a number.

    :raises PreferenceError: if the lists differ in length, or a rating is no finite number.
    """

    FIELDS: ClassVar = ("prompt", "completion", "rating")
    completions: list[str]
    ratings: list[float]

    @classmethod
    def _check_row(cls, *values: Any) -> tuple[Any, ...]:
        prompt, completion, rating = values
        check_texts({"prompt": prompt, "completion": completion})
        try:
            number = math.nan if isinstance(rating, bool) or not isinstance(rating, Real) else float(rating)
        except OverflowError:  # a whole number of more than 308 digits
            number = math.inf
        if not math.isfinite(number):
            raise PreferenceError(f"has {rating!r:.60} for 'rating': it must be a finite number")
        return prompt, completion, number


@validated
class GaussianRatings(LinearReward[Ratings, tuple[Tensor, Tensor]]):
    """A Pyro program of `Ratings` with normal noise.

    Latent sites are ``weights``, ``level`` a ~ Normal(0, level_scale), and ``noise`` sigma ~ HalfNormal(1) unless it is
    known; ``rating`` is observed in a plate ``ratings``. These priors suit ratings of standard deviation about 1.

    :param features: any function of prompts and completions, see `features`.
    :param scale: s, the standard deviation of the prior's rewards for features of variance 1.
    :param noise: the standard deviation sigma; None infers it.
    :param level_scale: the prior standard deviation of the mean rating.
    :raises ValueError: if ``noise``, ``level_scale`` or ``scale`` is not positive and finite.
    """

    def __init__(
        self, features: Features, scale: Positive = 1.0, *, noise: Positive | None = None, level_scale: Positive = 10.0
    ) -> None:
        super().__init__(features, scale)
        self.noise = noise
        self.level_scale = level_scale

    def prepare(self, data: Ratings) -> tuple[Tensor, Tensor]:
        """Return features (ratings, d) and ratings (ratings,)."""
        x = self.featurise(data.prompts, data.completions)
        return x, x.new_tensor(data.ratings)

    def observe(self, prepared: tuple[Tensor, Tensor]) -> None:
        x, y = prepared
        rewards = under_plate(self.weights(x), x)
        level = pyro.sample("level", dist.Normal(x.new_zeros(()), self.level_scale))
        noise = pyro.sample("noise", dist.HalfNormal(x.new_ones(()))) if self.noise is None else self.noise
        with pyro.plate("ratings", len(y)):
            pyro.sample("rating", dist.Normal(level + rewards, noise), obs=y)


@validated
class OrdinalRatings(LinearReward[Ratings, tuple[Tensor, Tensor]]):
    """A Pyro program of `Ratings` on a scale of ordered levels.

    Latent sites are ``weights`` and ``shares`` (K,), uniform on the simplex, from which ``cutpoints`` (K - 1,) follow.
    ``rating``, the index of a level, is observed in a plate ``ratings``.

    :param features: any function of prompts and completions, see `features`.
    :param levels: the possible ratings, worst first, for example ``range(1, 6)``.
    :param scale: s, the standard deviation of the prior's rewards for features of variance 1.
    :param link: F, "logit" or "probit".
    :raises ValueError: if there are fewer than two levels, levels do not increase, or the link is unknown.
    """

    def __init__(
        self,
        features: Features,
        levels: Sequence[Finite],
        scale: Positive = 1.0,
        *,
        link: Literal["logit", "probit"] = "logit",
    ) -> None:
        super().__init__(features, scale)
        self.levels = [float(level) for level in levels]
        if len(self.levels) < 2 or self.levels != sorted(set(self.levels)):
            raise ValueError(f"levels must be two or more different numbers, worst first, got {list(levels)}")
        self.link = link

    def prepare(self, data: Ratings) -> tuple[Tensor, Tensor]:
        """Return features (ratings, d) and the index of each rating's level, (ratings,).

        :raises PreferenceError: if a rating is no level.
        """
        index = {level: i for i, level in enumerate(self.levels)}
        for i, rating in enumerate(data.ratings):
            if rating not in index:
                raise PreferenceError(f"row {i} has the rating {rating:g}, which is none of the levels {self.levels}")
        x = self.featurise(data.prompts, data.completions)
        return x, torch.tensor([index[rating] for rating in data.ratings], device=x.device)

    def observe(self, prepared: tuple[Tensor, Tensor]) -> None:
        x, y = prepared
        rewards = under_plate(self.weights(x), x)  # (*particles, n)
        shares = pyro.sample("shares", dist.Dirichlet(x.new_ones(len(self.levels))))
        below = shares.cumsum(-1)[..., :-1].clamp(torch.finfo(x.dtype).tiny, 1 - torch.finfo(x.dtype).eps)
        cutpoints = below.logit() if self.link == "logit" else torch.special.ndtri(below)
        pyro.deterministic("cutpoints", cutpoints, event_dim=1)
        with pyro.plate("ratings", len(y)):
            level = dist.Categorical(logits=log_level_probs(rewards, cutpoints, self.link))
            pyro.sample("rating", level, obs=y)


def log_level_probs(rewards: Tensor, cutpoints: Tensor, link: str) -> Tensor:
    """Return log P(level), (*, K), which is log(F(b) - F(a)) between neighbouring cutpoints a < b.

    In the upper tail, where F is near 1, it is computed as log(F(-a) - F(-b)), because F is symmetric.

    :param rewards: (*).
    :param cutpoints: (*, K - 1).
    :param link: "logit" or "probit".
    """
    log_cdf = F.logsigmoid if link == "logit" else torch.special.log_ndtr
    z = cutpoints - rewards[..., None]
    first, last = log_cdf(z[..., :1]), log_cdf(-z[..., -1:])
    a, b = z[..., :-1], z[..., 1:]
    upper = a + b > 0
    low, high = log_cdf(torch.where(upper, -b, a)), log_cdf(torch.where(upper, -a, b))
    between = high + torch.log(-torch.expm1((low - high).clamp_max(-torch.finfo(z.dtype).tiny)))
    return torch.cat([first, between, last], -1)
