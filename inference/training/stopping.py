r"""When a training has gone far enough, from what its steps saw.

    KL(q || \pi^*) = log Z - ELBO

so a training ends where the ELBO no longer grows, or where what it is below log Z is small enough.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from scipy.special import logsumexp

from bayeslm.inference.program import check_counts, check_positive

History = Mapping[str, Sequence[np.ndarray]]
"""What each step saw, (prompt,) a step, under the names of `SVI`'s ``stats``."""


class Stopping(Protocol):
    """Asked after every step whether the training is done."""

    def __call__(self, history: History) -> bool: ...


@dataclass(frozen=True)
class Plateau:
    """The mean ELBO of the last ``window`` steps is not ``nats`` above that of as many steps before them.

    While the temperature moves it waits; so under `KLTarget` it never stops.

    :param window: steps.
    :param nats: what counts as growth, the mean over prompts.
    """

    window: int = 50
    nats: float = 0.0

    def __post_init__(self) -> None:
        check_counts(self, "window")

    def __call__(self, history: History) -> bool:
        if len(history["elbo"]) < 2 * self.window:
            return False
        if len({float(gamma) for gamma in history.get("inverse_temperature", [])[-2 * self.window :]}) > 1:
            return False  # the target still moves
        before, last = np.array(history["elbo"][-2 * self.window :]).mean(-1).reshape(2, -1).mean(-1)
        return bool(last - before <= self.nats)


@dataclass(frozen=True)
class NearPosterior:
    """The estimate of KL(q || posterior), mean over prompts, is at most ``nats`` over the last ``window`` steps.

    log Z is estimated from the weights of all particles of these steps (with minibatches of prompts, of each step).
    While q misses parts of the posterior they underestimate it, and so the KL: take a window of some hundred particles.

    :raises ValueError: in training, if the objective does not know the law of its draws, as of `FromPosterior`'s.
    """

    nats: float = 0.05
    window: int = 20

    def __post_init__(self) -> None:
        check_counts(self, "window")
        check_positive(self, "nats")

    def __call__(self, history: History) -> bool:
        if not history.get("log_evidence"):
            raise ValueError("NearPosterior needs draws whose law is known, which this objective does not have")
        if len(history["elbo"]) < self.window:
            return False
        elbo, log_z = (np.array(history[key][-self.window :]) for key in ("elbo", "log_evidence"))  # (step, prompt)
        if "prompts" not in history:  # else minibatches, of each of which a step alone can tell
            log_z = logsumexp(log_z, axis=0) - np.log(self.window)
        return bool(log_z.mean() - elbo.mean() <= self.nats)
