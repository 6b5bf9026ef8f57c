r"""Rewards that are linear in features, and what programs of them have in common.

    r_w(c, x) = w^T f(c, x),     w ~ Normal(0, (s^2 / d) I)

With features of variance 1 the prior's rewards have the standard deviation s, whatever their number d. Features are
computed once for each data set, however often an engine runs the program.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from .features import Features

Data = TypeVar("Data")
Read = TypeVar("Read")


class LinearReward(Generic[Data, Read]):
    """A Pyro program of data on a reward with the latent ``weights``, event shape (d,); override `read` and `observe`.

    :param features: any function of prompts and completions, see `features`.
    :param scale: the standard deviation s of the prior's rewards, where features have variance 1.
    :raises ValueError: if ``scale`` is not positive and finite.
    """

    def __init__(self, features: Features, scale: float = 1.0) -> None:
        if not (scale > 0 and math.isfinite(scale)):
            raise ValueError(f"scale must be positive and finite, got {scale}")
        self.features = features
        self.scale = scale
        self._last: tuple[Data, Read] | None = None

    def __call__(self, data: Data) -> None:
        """Run the program. Data that were given last are not read again: leave them as they are."""
        if self._last is None or self._last[0] is not data:
            self._last = data, self.read(data)
        self.observe(self._last[1])

    def read(self, data: Data) -> Read:
        """What the program needs of the data: features, and what was observed."""
        raise NotImplementedError

    def observe(self, read: Read) -> None:
        """Sample ``weights`` and score what was observed."""
        raise NotImplementedError

    def weights(self, features: Tensor) -> Tensor:
        """The latent site, (*particles, d), for features (..., d)."""
        d = features.shape[-1]
        return pyro.sample("weights", dist.Normal(features.new_zeros(d), self.scale / math.sqrt(d)).to_event(1))

    def reward(self, prompts: Sequence[str], completions: Sequence[str], weights: Any) -> Tensor:
        """Rewards (*, n) of n completions under weights (*, d), a tensor or an array."""
        x = self.featurise(prompts, completions)
        return torch.as_tensor(weights, dtype=x.dtype, device=x.device) @ x.T

    def featurise(self, prompts: Sequence[str], completions: Sequence[str]) -> Tensor:
        """Features (n, d), checked.

        :raises ValueError: if they have another shape, or are not finite.
        """
        x = self.features(list(prompts), list(completions))
        if not isinstance(x, Tensor) or x.ndim != 2 or len(x) != len(completions):
            shape = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"features must be a tensor ({len(completions)}, d), one row a completion, got {shape}")
        if not x.isfinite().all():
            i = int((~x.isfinite().all(-1)).nonzero()[0])
            raise ValueError(f"features of {completions[i]!r:.60} are not finite")
        return x.float()


def under_plate(weights: Tensor, x: Tensor) -> Tensor:
    """w^T x of weights (*particles, 1, d) or (d,) and x (..., n, d), as a plate of size n has it: (*particles, n)."""
    product = weights @ x.mT
    return product.squeeze(-2) if product.ndim > 1 else product
