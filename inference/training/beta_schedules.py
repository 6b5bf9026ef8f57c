r"""How the likelihood's inverse temperature \gamma moves while SVI trains: the target is p(x) exp(\gamma l(x)).

\gamma = 1 is the program's own posterior; r / beta times \gamma is r over a beta of beta / \gamma.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from bayeslm.inference.program import check_positive


class Temperature(Protocol):
    """The first \\gamma, and the next ones."""

    def first(self) -> float: ...

    def after(self, gamma: float, done: float, kl: float) -> float:
        """What follows ``gamma``, a share ``done`` of the steps being done and KL(q || p) in the last ``kl`` nats."""


@dataclass(frozen=True)
class Tempering:
    r"""From the prior's end to the posterior: \gamma grows geometrically from ``start`` to 1, then stays.

    :param start: \gamma of the first step, in (0, 1].
    :param share: of the steps, in (0, 1], after which it is 1.
    """

    start: float = 0.1
    share: float = 0.5

    def __post_init__(self) -> None:
        for name in ("start", "share"):
            if not 0.0 < getattr(self, name) <= 1.0:
                raise ValueError(f"Tempering: {name} must be in (0, 1], got {getattr(self, name)}")

    def first(self) -> float:
        return self.start

    def after(self, gamma: float, done: float, kl: float) -> float:
        return self.start ** (1.0 - min(1.0, done / self.share))


@dataclass(frozen=True)
class KLTarget:
    r"""Holds KL(q || p) at a target by moving beta = 1 / \gamma (Ziegler et al. 2019, arXiv 1909.08593):

        e = clip(KL / target - 1, -0.2, 0.2),    beta <- beta (1 + gain e)

    The policy is then that of another beta, ``1 / stats["inverse_temperature"][:, -1]`` times the program's; weights
    and evidence of the draws are still towards the program's posterior.

    :param nats: the target, the mean over prompts.
    :param gain: how fast beta follows, a step.
    """

    nats: float
    gain: float = 0.1

    def __post_init__(self) -> None:
        check_positive(self, "nats", "gain")

    def first(self) -> float:
        return 1.0

    def after(self, gamma: float, done: float, kl: float) -> float:
        if not math.isfinite(kl):
            return gamma
        error = min(max(kl / self.nats - 1.0, -0.2), 0.2)
        return gamma / (1.0 + self.gain * error)
