r"""Beta schedules: callbacks that move the inverse temperature \gamma of the likelihood.

The target is p(x) exp(\gamma l(x)):
\gamma = 1 is the program's own posterior; r / beta times \gamma is r over a beta of beta / \gamma.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

from bayeslm.validation import Positive, Within, validated

from .callbacks import Callback, Memory, Reply, StepRecord


@validated
@dataclass(frozen=True)
class Tempering(Callback):
    r"""Moves from near the prior to the posterior: \gamma grows geometrically from ``first`` to 1, then stays.

    :param first: \gamma of the first step, in (0, 1].
    :param share: of the run's budget, in (0, 1], after which \gamma is 1.
    :raises ValueError: if a setting is out of range.
    """

    first: Annotated[float, Within("(0, 1]")] = 0.1
    share: Annotated[float, Within("(0, 1]")] = 0.5

    needs_num_steps = True

    def start(self, record: StepRecord, state: Memory) -> Reply | None:
        return Reply(inverse_temperature=self.first) if record.step == 0 else None

    def step(self, record: StepRecord, state: Memory) -> Reply:
        return Reply(inverse_temperature=self.first ** (1.0 - min(1.0, record.share / self.share)))


@validated
@dataclass(frozen=True)
class KLTarget(Callback):
    r"""Holds KL(q || p) at a target by moving beta = 1 / \gamma (Ziegler et al. 2019, arXiv 1909.08593).

        e = clip(KL / target - 1, -0.2, 0.2),    beta <- beta (1 + gain e)

    The policy is then that of another beta, ``1 / stats["inverse_temperature"][:, -1]`` times the program's; weights
    and evidence of the draws are still towards the program's posterior.

    :param nats: the target, the mean over prompts.
    :param gain: how fast beta follows, a step.
    :raises ValueError: if a setting is not positive; in training, if the objective does not estimate the KL.
    """

    nats: Positive
    gain: Positive = 0.1

    def step(self, record: StepRecord, state: Memory) -> Reply | None:
        if "kl" not in record.figures:
            raise ValueError("KLTarget: this objective does not estimate KL(q || p): use ReverseKL")
        kl = record.figures["kl"]
        if not math.isfinite(kl):
            return None
        error = min(max(kl / self.nats - 1.0, -0.2), 0.2)
        return Reply(inverse_temperature=record.inverse_temperature / (1.0 + self.gain * error))
