r"""Adam with steps in a trust region: how far the guide itself moves sets the learning rate.

Step t, taken when the share u_t of all steps is done, may move the guide by

    KL(q_t || q_{t+1})  <=  1.5 \delta_t,     \delta_t = \delta (1 - u_t)^2

(Kakade and Langford 2002; Schulman et al. 2015, arXiv 1502.05477). Of a small step KL is a quadratic function of its
length. So a step that moves the guide too far is shortened to the share sqrt(\delta_t / KL) of its length, at most six
times, and else left out; and the next learning rate is this one times sqrt(\delta_t / KL), within [1/2, 2]. A rate that
suits a table is hundreds of times one that suits a network's weights: both are found within some ten steps.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bayeslm.validation import Positive, validated

from .movement import Movement
from .optimizer import Adam, Decay, ScheduledAdam
from .resumable import check_tensor
from .state import State

SLACK = 1.5  # times the target: a step that moves the guide further is shortened
SHORTENED = 6  # times at most
SWING = 2.0  # the most by which the learning rate changes from a step to the next
FIRST, LARGEST = 1e-3, 0.3  # learning rates: a table's logits take hundreds of times those of a network's weights
OF_LATENTS = 30.0  # times the learning rate: of the default guide's distributions of other latents


@validated
@dataclass(frozen=True)
class TrustRegion:
    r"""Settings of Adam in a trust region: no learning rate, schedule or clipping is to be chosen.

    :param kl: \delta, in nats a prompt: how far the first step may move the guide. A smaller one is safer, and needs
        more steps to come far.
    :param betas: decay of the averages of gradients and of squared gradients, a step.
    :raises ValueError: if ``kl`` is not positive.

    ``stats`` of the run then have ``moved``, KL(q_t || q_{t+1}) of each step, 0 where it was left out, and
    ``learning_rate``, both (chain, step). The KL is the mean over a quarter of the step's particles, 4 at least
    and 16 at most, see `Movement`; measuring it evaluates the guide at them twice, and once more each time a step is
    shortened.
    """

    kl: Positive = 0.03
    betas: tuple[Decay, Decay] = (0.9, 0.95)

    can_be_extended = True  # the region then grows again

    def rates(self, has_adapters: bool) -> tuple[float, float]:
        """Return what multiplies the learning rate, of all parameters but the latents', and of these."""
        return 1.0, OF_LATENTS

    def start(
        self,
        rate_of: Callable[[str], float],
        share: Callable[[], float],
        num_prompts: int,
        movement: Callable[[], Movement],
    ) -> RegionAdam:
        """Return the optimizer of a run."""
        return RegionAdam(self, rate_of, share, num_prompts, movement)


class RegionAdam(ScheduledAdam):
    """Adam whose steps stay in a trust region.

    ``factor`` is the learning rate of the last step, and ``moved`` its KL.

    :param region: the settings.
    :param rate_of: what multiplies the learning rate, of a parameter by its name.
    :param share: returns the share of the run's budget that is used.
    :param num_prompts: over which the loss is a sum.
    :param movement: returns the guide's distributions before it moves.
    """

    def __init__(
        self,
        region: TrustRegion,
        rate_of: Callable[[str], float],
        share: Callable[[], float],
        num_prompts: int,
        movement: Callable[[], Movement],
    ) -> None:
        adam = Adam(schedule="constant", clip_norm=None, betas=region.betas)
        super().__init__(adam, rate_of, share, num_prompts)
        self._region, self._movement = region, movement
        self._rate = FIRST  # of the next step
        self.moved, self.left_out = 0.0, 0

    def _next_factor(self) -> float:
        return self._rate

    def _move(self) -> None:
        target = self._region.kl * (1.0 - self._share()) ** 2
        movement, before = self._movement(), [p.detach().clone() for p in self._names]
        super()._move()
        step = [p.detach() - x for p, x in zip(self._names, before, strict=True)]
        try:
            first, self.moved = self._shorten(movement, before, step, target)
        except BaseException:  # a step that nobody has measured does not stay
            self._put(before, step, 0.0)
            raise
        swing = SWING if first == 0.0 else math.sqrt(target / first) if math.isfinite(first) else 0.0
        self._rate = min(LARGEST, self._rate * min(SWING, max(1.0 / SWING, swing)))

    def _shorten(
        self, movement: Movement, before: list[Tensor], step: list[Tensor], target: float
    ) -> tuple[float, float]:
        """Shorten a step until it is inside the region, or leave it out; return its KL at first and at last."""
        length, first = 1.0, movement.kl()
        kl = first
        for _ in range(SHORTENED):
            if kl <= SLACK * target:
                break
            length *= math.sqrt(target / kl) if math.isfinite(kl) else 0.1
            self._put(before, step, length)
            kl = movement.kl()
        if kl <= SLACK * target:
            return first, kl
        self._put(before, step, 0.0)  # too far still, or NaN
        self.left_out += 1
        return first, 0.0

    def _put(self, before: list[Tensor], step: list[Tensor], length: float) -> None:
        """Put the parameters where a share of the step leads; a share of 0 restores them exactly."""
        with torch.no_grad():
            for p, x, dx in zip(self._names, before, step, strict=True):
                p.copy_(x if length == 0.0 else x + length * dx)

    def moments(self) -> State:
        own = {"rate": torch.tensor(self._rate, dtype=torch.float64), "left_out": torch.tensor(self.left_out)}
        return {**super().moments(), **own}

    def restore(self, moments: State, params: Any, steps: int) -> None:
        check_tensor("adam.rate", moments.get("rate"), (), like=torch.empty((), dtype=torch.float64))
        check_tensor("adam.left_out", moments.get("left_out"), (), whole=True)
        self._rate, self.left_out = float(moments["rate"]), int(moments["left_out"])
        if not 0.0 < self._rate <= LARGEST or not 0 <= self.left_out <= steps:
            raise ValueError(f"no {steps} steps lead to a rate of {self._rate} with {self.left_out} left out")
        super().restore({name: x for name, x in moments.items() if name not in ("rate", "left_out")}, params, steps)

    def warn_if_stuck(self) -> None:
        """Warn if most steps were left out, and say why."""
        if self.left_out > 0.5 * self.steps:
            warnings.warn(
                f"SVI: {self.left_out} of {self.steps} steps were left out of the trust region: {SHORTENED} times "
                "shorter ones still moved the guide too far, or by a KL that is not a number. The guide's distribution "
                "jumps with its parameters, or has no finite KL to itself: see stats['moved'], or use Adam",
                stacklevel=2,
            )
