"""When a training ends, and which share of it is done."""

from __future__ import annotations

from dataclasses import dataclass

from bayeslm.validation import Count, Positive, validated


@validated
@dataclass(frozen=True)
class Budget:
    """Limits of a training, which ends at the first that is reached. Schedules run on the share of it that is used.

    :param steps: gradient steps.
    :param samples: new draws of a chain, of all prompts together; draws that are used again (`Replay`) are free.
    :param seconds: of a chain's steps; where the run is resumed, those before count. Two runs of the same seed then
        differ, as their steps' lengths do.
    :param kl: nats. The training ends where its estimate of KL(q || posterior) is at most this, see `NearPosterior`.
        This alone is no limit, as it may never be reached.
    :raises ValueError: if there is no limit.
    """

    steps: Count | None = None
    samples: Count | None = None
    seconds: Positive | None = None
    kl: Positive | None = None

    def __post_init__(self) -> None:
        if self.steps is None and self.samples is None and self.seconds is None:
            raise ValueError("Budget: give steps, samples or seconds, at which the training ends at the latest")

    def share(self, steps: int, samples: int, seconds: float) -> float:
        """Return the share that is used, in [0, 1]."""
        used = ((steps, self.steps), (samples, self.samples), (seconds, self.seconds))
        return min(1.0, max(done / limit for done, limit in used if limit is not None))

    def allows(self, samples: int) -> bool:
        """Return whether so many draws are within the limit."""
        return self.samples is None or samples <= self.samples
