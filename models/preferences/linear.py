r"""Rewards that are linear in features, and the base of all programs that learn them.

    r_w(c, x) = w^T f(c, x),     w ~ Normal(0, (s^2 / d) I)

For features of variance 1 the standard deviation of the prior's rewards is s, whatever the number d of features. The
features of a data set are computed once, however often an engine runs the program.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from bayeslm.validation import Positive, validated

from .features import Features, checked_features

Data = TypeVar("Data")
Prepared = TypeVar("Prepared")


@validated
class LinearReward(Generic[Data, Prepared]):
    """A Pyro program of data that depend on a linear reward; subclasses override `prepare` and `observe`.

    Its latent site is ``weights``, of event shape (d,).

    :param features: any function of prompts and completions, see `features`.
    :param scale: s, the standard deviation of the prior's rewards for features of variance 1.
    :raises ValueError: if ``scale`` is not positive and finite.
    """

    def __init__(self, features: Features, scale: Positive = 1.0) -> None:
        self.features = features
        self.scale = scale
        self._last: tuple[Data, Prepared] | None = None

    def __call__(self, data: Data) -> None:
        """Run the program. The features of the last ``data`` object are kept, so it must not be changed in place."""
        if self._last is None or self._last[0] is not data:
            self._last = data, self.prepare(data)
        self.observe(self._last[1])

    def identity(self) -> dict[str, Any]:
        """Return the settings, by which checkpoints tell runs apart."""
        return {name: x for name, x in vars(self).items() if name != "_last"}

    def prepare(self, data: Data) -> Prepared:
        """Return the tensors that `observe` needs: features and observations."""
        raise NotImplementedError

    def observe(self, prepared: Prepared) -> None:
        """Sample ``weights``, and the observed sites."""
        raise NotImplementedError

    def weights(self, features: Tensor) -> Tensor:
        """Sample the latent site, (*particles, d), for features (..., d)."""
        d = features.shape[-1]
        return pyro.sample("weights", dist.Normal(features.new_zeros(d), self.scale / math.sqrt(d)).to_event(1))

    def reward(self, prompts: Sequence[str], completions: Sequence[str], weights: Any) -> Tensor:
        """Return the rewards of n completions, (*, n).

        :param weights: (*, d), a tensor or an array.
        """
        x = self.featurise(prompts, completions)
        return torch.as_tensor(weights, dtype=x.dtype, device=x.device) @ x.T

    def featurise(self, prompts: Sequence[str], completions: Sequence[str]) -> Tensor:
        """Return checked features, (n, d) float32.

        :raises ValueError: if they have another shape, or are not finite.
        """
        return checked_features(self.features, prompts, completions).float()


def under_plate(weights: Tensor, x: Tensor) -> Tensor:
    """Return w^T x for a plate of size n, (*particles, n).

    :param weights: (*particles, 1, d), or (d,) without particles.
    :param x: (..., n, d).
    """
    product = weights @ x.mT
    return product.squeeze(-2) if product.ndim > 1 else product
