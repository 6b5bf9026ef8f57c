r"""What a policy is worth beside what it is trained on: prompts held out, or a reward that it never sees.

A small beta sharpens the trained reward's errors with its truths. Past some KL a better reward, the "gold" one, falls
while the trained one still grows: over-optimisation (Gao, Schulman and Hilton 2023, arXiv 2210.10760).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bayeslm.inference.program import PolicyGuide, Program, check_counts, draw, inspect, to_numpy


@dataclass(frozen=True)
class HeldOut:
    """Programs that the policy is put into every few steps, and at the end.

    :param programs: by name; each takes no arguments (`functools.partial` binds them), and its completions are of the
        vocabulary and length of those that are trained: the same reward on other prompts, another reward on the same.
    :param every: steps from one look to the next.
    :param num_particles: completions of each prompt in a look.

    ``stats`` then has ``held_out_steps`` (look,), and for each program NAME ``NAME_elbo``, ``NAME_kl`` and
    ``NAME_log_likelihood`` (chain, look, prompt), r / beta, with ``NAME_log_likelihood_stderr``. A log-likelihood that
    ended below its best by more than 3 standard errors while the trained one grew is warned of.
    """

    programs: Mapping[str, Callable[[], Any]]
    every: int = 25
    num_particles: int = 64
    _known: dict[str, Program] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_counts(self, "every", "num_particles")
        if not self.programs:
            raise ValueError("HeldOut: programs is empty: give at least one")
        if self.num_particles < 2:
            raise ValueError("HeldOut: num_particles must be at least 2, for standard errors")

    def look(self, policy: Any) -> dict[str, np.ndarray]:
        """What the policy is worth, (prompt,) by name."""
        seen: dict[str, np.ndarray] = {}
        for name, model in self.programs.items():
            if name not in self._known:
                self._known[name] = inspect(model)
            program = self._known[name]
            particles, cut_short = draw(program, PolicyGuide(program, policy), self.num_particles)
            if cut_short:
                raise KeyboardInterrupt
            likelihood = particles.total_log_likelihood
            seen |= {
                f"{name}_elbo": to_numpy(particles.log_weights.mean(0)),
                f"{name}_kl": to_numpy((particles.log_proposal - particles.log_prior).mean(0)),
                f"{name}_log_likelihood": to_numpy(likelihood.mean(0)),
                f"{name}_log_likelihood_stderr": to_numpy(likelihood.std(0) / len(likelihood) ** 0.5),
            }
        return seen

    def warn(self, looks: Mapping[str, list[np.ndarray]], trained: list[np.ndarray]) -> None:
        """Say so if a program's log-likelihood has fallen while the trained one grew."""
        for name in self.programs:
            mean = np.array([x.mean() for x in looks[f"{name}_log_likelihood"]])
            errors = [np.sqrt(np.square(x).sum()) / x.size for x in looks[f"{name}_log_likelihood_stderr"]]
            best = int(mean.argmax())
            lost, error = mean[best] - mean[-1], np.hypot(errors[best], errors[-1])
            at = min(best * self.every, len(trained) - 1)
            before, last = (np.mean(part) for part in (trained[at : at + self.every], trained[-self.every :]))
            if lost > 3.0 * error and last > before:
                warnings.warn(
                    f"over-optimisation: the log-likelihood of {name!r} was {mean[best]:.2f} after {best * self.every} "
                    f"steps and ended at {mean[-1]:.2f} ± {errors[-1]:.2f}, while the trained one grew: "
                    "a larger beta, or fewer steps",
                    stacklevel=3,
                )
