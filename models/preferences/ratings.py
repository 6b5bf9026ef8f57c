r"""A reward learned from ratings of single completions: numbers (Gaussian), or ordered levels such as 1 to 5 stars.

    y = a + r_w(c, x) + \epsilon,     \epsilon ~ Normal(0, \sigma^2)                                          Gaussian
    P(y <= l_j | c, x) = F(c_j - r_w(c, x)),     c_1 < ... < c_{K-1},     F logistic or normal                 ordinal

(McCullagh 1980, "Regression models for ordinal data".) The prior of the cutpoints is that of the shares of ratings
which a completion of reward 0 gets: uniform on the simplex, c_j = F^{-1}(p_1 + ... + p_j) (Betancourt 2019, "Ordinal
regression"). Given its noise the Gaussian model is conjugate.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.nn import functional as F

from .comparisons import PreferenceError, check_strings, collect, fields, read_lines
from .features import Features
from .linear import LinearReward, under_plate


@dataclass(frozen=True)
class Ratings:
    """Completions and what number each was given: three lists of one length.

    :raises PreferenceError: if the lists differ in length, or a rating is no finite number.
    """

    prompts: list[str]
    completions: list[str]
    ratings: list[float]

    def __post_init__(self) -> None:
        if not len(self.prompts) == len(self.completions) == len(self.ratings):
            sizes = f"{len(self.prompts)}, {len(self.completions)} and {len(self.ratings)}"
            raise PreferenceError(f"prompts, completions and ratings must be of one length, not {sizes}")
        collect("row", enumerate(zip(self.prompts, self.completions, self.ratings, strict=True)), _check)

    def __len__(self) -> int:
        return len(self.prompts)

    @classmethod
    def from_rows(cls, rows: Iterable[Mapping[str, Any]]) -> Ratings:
        """Ratings of rows with ``prompt`` and ``completion``, strings, and ``rating``, a number.

        :raises PreferenceError: for rows that are not so, by their numbers from 0.
        """
        return cls._of("row", enumerate(rows))

    @classmethod
    def from_jsonl(cls, path: str | os.PathLike[str]) -> Ratings:
        """Ratings of a file with one JSON object a line; empty lines are left out.

        :raises PreferenceError: as `from_rows`, and for lines that are no JSON, by their numbers from 1.
        :raises OSError: if the file cannot be read.
        """
        return cls._of(f"{os.fspath(path)}: line", read_lines(path))

    @classmethod
    def _of(cls, what: str, rows: Iterable[tuple[int, Any]]) -> Ratings:
        read = collect(what, rows, lambda row: _check(tuple(fields(row, "prompt", "completion", "rating"))))
        prompts, completions, ratings = map(list, zip(*read, strict=True))
        return cls(prompts, completions, ratings)


def _check(row: tuple[Any, ...]) -> tuple[str, str, float]:
    prompt, completion, rating = row
    check_strings({"prompt": prompt, "completion": completion})
    if isinstance(rating, bool) or not isinstance(rating, int | float) or not math.isfinite(rating):
        raise PreferenceError(f"has {rating!r:.60} for 'rating': it must be a finite number")
    return prompt, completion, float(rating)


class GaussianRatings(LinearReward[Ratings, tuple[Tensor, Tensor]]):
    """A Pyro program of `Ratings` that are numbers.

    Latents are ``weights``, ``level`` a ~ Normal(0, level_scale), and ``noise`` sigma ~ HalfNormal(1) where it is not
    given; ``rating`` is observed in the plate ``ratings``. Priors suit ratings of a spread of about 1.

    :param noise: the standard deviation sigma, None to infer it.
    :param level_scale: the prior standard deviation of the mean rating.
    :param features, scale: as in `LinearReward`.
    :raises ValueError: if ``noise``, ``level_scale`` or ``scale`` is not positive and finite.
    """

    def __init__(
        self, features: Features, scale: float = 1.0, *, noise: float | None = None, level_scale: float = 10.0
    ) -> None:
        super().__init__(features, scale)
        for name, value in {"noise": noise, "level_scale": level_scale}.items():
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name} must be positive and finite, got {value}")
        self.noise = noise
        self.level_scale = level_scale

    def read(self, data: Ratings) -> tuple[Tensor, Tensor]:
        """Features (ratings, d) and ratings."""
        x = self.featurise(data.prompts, data.completions)
        return x, x.new_tensor(data.ratings)

    def observe(self, read: tuple[Tensor, Tensor]) -> None:
        x, y = read
        rewards = under_plate(self.weights(x), x)
        level = pyro.sample("level", dist.Normal(x.new_zeros(()), self.level_scale))
        noise = pyro.sample("noise", dist.HalfNormal(x.new_ones(()))) if self.noise is None else self.noise
        with pyro.plate("ratings", len(y)):
            pyro.sample("rating", dist.Normal(level + rewards, noise), obs=y)


class OrdinalRatings(LinearReward[Ratings, tuple[Tensor, Tensor]]):
    """A Pyro program of `Ratings` that are ordered levels.

    Latents are ``weights`` and ``shares`` (K,), uniform on the simplex; ``cutpoints`` (K - 1,) follow from these.
    ``rating``, the index of a level, is observed in the plate ``ratings``.

    :param levels: the numbers that ratings can be, worst first, say ``range(1, 6)``.
    :param link: F: "logit" or "probit".
    :param features, scale: as in `LinearReward`.
    :raises ValueError: if levels are not two or more, in increasing order, or the link is none.
    """

    def __init__(
        self,
        features: Features,
        levels: Sequence[float],
        scale: float = 1.0,
        *,
        link: Literal["logit", "probit"] = "logit",
    ) -> None:
        super().__init__(features, scale)
        self.levels = [float(level) for level in levels]
        if len(self.levels) < 2 or self.levels != sorted(set(self.levels)):
            raise ValueError(f"levels must be two or more different numbers, worst first, got {list(levels)}")
        if link not in ("logit", "probit"):
            raise ValueError(f"link must be 'logit' or 'probit', got {link!r}")
        self.link = link

    def read(self, data: Ratings) -> tuple[Tensor, Tensor]:
        """Features (ratings, d) and the index of each rating's level.

        :raises PreferenceError: for a rating that is no level.
        """
        index = {level: i for i, level in enumerate(self.levels)}
        for i, rating in enumerate(data.ratings):
            if rating not in index:
                raise PreferenceError(f"row {i} has the rating {rating:g}, which is none of the levels {self.levels}")
        x = self.featurise(data.prompts, data.completions)
        return x, torch.tensor([index[rating] for rating in data.ratings], device=x.device)

    def observe(self, read: tuple[Tensor, Tensor]) -> None:
        x, y = read
        rewards = under_plate(self.weights(x), x)  # (*particles, n)
        shares = pyro.sample("shares", dist.Dirichlet(x.new_ones(len(self.levels))))
        below = shares.cumsum(-1)[..., :-1].clamp(torch.finfo(x.dtype).tiny, 1 - torch.finfo(x.dtype).eps)
        cutpoints = below.logit() if self.link == "logit" else torch.special.ndtri(below)
        pyro.deterministic("cutpoints", cutpoints, event_dim=1)
        with pyro.plate("ratings", len(y)):
            law = dist.Categorical(logits=log_level_probs(rewards, cutpoints, self.link))
            pyro.sample("rating", law, obs=y)


def log_level_probs(rewards: Tensor, cutpoints: Tensor, link: str) -> Tensor:
    """log P(level) (*, K) of rewards (*) and cutpoints (*, K - 1): log(F(b) - F(a)) between neighbours a < b.

    Of intervals in the upper tail, where F is near 1, it is log(F(-a) - F(-b)): F is symmetric.
    """
    log_cdf = F.logsigmoid if link == "logit" else torch.special.log_ndtr
    z = cutpoints - rewards[..., None]
    first, last = log_cdf(z[..., :1]), log_cdf(-z[..., -1:])
    a, b = z[..., :-1], z[..., 1:]
    upper = a + b > 0
    low, high = log_cdf(torch.where(upper, -b, a)), log_cdf(torch.where(upper, -a, b))
    between = high + torch.log(-torch.expm1((low - high).clamp_max(-torch.finfo(z.dtype).tiny)))
    return torch.cat([first, between, last], -1)
