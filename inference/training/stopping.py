r"""Callbacks that stop a training where it has come far enough.

    KL(q || \pi^*) = log Z - ELBO

so a training ends where the ELBO no longer grows, or where its distance below log Z is small enough.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bayeslm.validation import Count, Finite, Positive, validated

from .callbacks import Callback, Memory, Reply, StepRecord


@validated
@dataclass(frozen=True)
class Plateau(Callback):
    """Stops where the mean ELBO of the last ``window`` steps is not ``nats`` above that of as many steps before them.

    While beta moves it waits; so under `KLTarget` it never stops.

    :param window: steps.
    :param nats: what counts as growth, the mean over prompts.
    :raises ValueError: if ``window`` is below 1.
    """

    window: Count = 50
    nats: Finite = 0.0

    def step(self, record: StepRecord, state: Memory) -> Reply | None:
        elbo, gamma = (record.history[key][-2 * self.window :] for key in ("elbo", "inverse_temperature"))
        if len(elbo) < 2 * self.window or len({float(x) for x in gamma}) > 1:
            return None  # too few steps, or the target still moves
        before, last = np.array(elbo).mean(-1).reshape(2, -1).mean(-1)
        return Reply(stop=bool(last - before <= self.nats))


@validated
@dataclass(frozen=True)
class NearPosterior(Callback):
    """Stops where the estimate of KL(q || posterior), mean over prompts, is at most ``nats`` over ``window`` steps.

    log Z is estimated from the weights of all particles of these steps (with minibatches of prompts, of each step).
    While q misses parts of the posterior they underestimate it, and so the KL: take a window of some hundred particles.

    :param nats: the KL.
    :param window: the last steps, over which it is estimated.
    :raises ValueError: if a setting is not positive; in training, if the objective does not know the density of its
        particles, as of `FromPosterior`'s.
    """

    nats: Positive = 0.05
    window: Count = 20

    def step(self, record: StepRecord, state: Memory) -> Reply | None:
        history = record.history
        if not history.get("log_evidence"):
            raise ValueError(
                "NearPosterior needs an objective that estimates log Z, and this one does not know the density of its "
                "particles: use Plateau"
            )
        from scipy.special import logsumexp

        if len(history["elbo"]) < self.window:
            return None
        elbo, log_z = (np.array(history[key][-self.window :]) for key in ("elbo", "log_evidence"))  # (step, prompt)
        if "prompts" not in history:  # of minibatches, a step alone can estimate its own
            log_z = logsumexp(log_z, axis=0) - np.log(self.window)
        return Reply(stop=bool(log_z.mean() - elbo.mean() <= self.nats))
