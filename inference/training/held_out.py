r"""Evaluation of a policy by programs that it is not trained on: prompts held out, or a reward that it never gets.

A small beta sharpens the trained reward's errors with its truths. Past some KL a better reward, the "gold" one, falls
while the trained one still grows: over-optimisation (Gao, Schulman and Hilton 2023, arXiv 2210.10760).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np

from bayeslm.inference.program import PolicyGuide, draw, inspect, to_numpy
from bayeslm.validation import Count, Within, validated

from .callbacks import Callback, Memory, Reply, StepRecord


@validated
@dataclass(frozen=True)
class HeldOut(Callback):
    """Evaluates the policy on other programs every few steps, and at the end.

    :param programs: by name; each takes no arguments (`functools.partial` binds them), and its completions have the
        vocabulary and length of those that are trained: the same reward on other prompts, another reward on the same.
    :param every: steps from one evaluation to the next.
    :param num_particles: completions of each prompt in an evaluation.
    :raises ValueError: if there is no program, or a setting is out of range.

    ``stats`` then has ``held_out_steps`` (evaluation,), and for each program NAME ``NAME_elbo``, ``NAME_kl`` and
    ``NAME_log_likelihood`` (chain, evaluation, prompt), r / beta, with ``NAME_log_likelihood_stderr``. The reward
    that a program records is ``NAME_reward``, of several each ``NAME_reward_<its name>``, with ``..._stderr``: so one
    program has the trained reward, by `rewards.factor`, and a gold one, by `rewards.record`, of the same draws. A
    log-likelihood that ended below its best by more than 3 standard errors while the trained one grew is warned of.
    """

    programs: Mapping[str, Callable[[], Any]]
    every: Count = 25
    num_particles: Annotated[int, Within("[2, inf)")] = 64  # for standard errors

    def __post_init__(self) -> None:
        if not self.programs:
            raise ValueError("HeldOut: programs is empty: give at least one")

    def start(self, record: StepRecord, state: Memory) -> Reply | None:
        if record.policy is None:
            raise ValueError("HeldOut evaluates a policy, and this guide has none as its attribute .policy")
        return self._evaluate(record) if record.step == 0 else None

    def step(self, record: StepRecord, state: Memory) -> Reply | None:
        return self._evaluate(record) if record.step % self.every == 0 or record.is_last else None

    def end(self, record: StepRecord, state: Memory) -> Reply | None:
        reply = None
        if record.is_last and int(record.history["held_out_steps"][-1]) != record.step:
            reply = self._evaluate(record)  # a callback after this one has stopped the chain
        history = {key: list(values) for key, values in record.history.items()}
        for key, value in (reply.evaluations if reply else {}).items():
            history[key].append(value)
        if "log_likelihood" in history:
            self._warn(history)
        return reply

    def _evaluate(self, record: StepRecord) -> Reply:
        found = {"held_out_steps": np.array(record.step)}
        for name, model in self.programs.items():
            program = inspect(model)
            particles, cut_short = draw(program, PolicyGuide(program, record.policy), self.num_particles)
            if cut_short:
                raise KeyboardInterrupt
            likelihood = particles.total_log_likelihood
            found |= {
                f"{name}_elbo": to_numpy(particles.log_weights.mean(0)),
                f"{name}_kl": to_numpy((particles.log_proposal - particles.log_prior).mean(0)),
                f"{name}_log_likelihood": to_numpy(likelihood.mean(0)),
                f"{name}_log_likelihood_stderr": to_numpy(likelihood.std(0) / len(likelihood) ** 0.5),
            }
            for reward, r in particles.rewards.items():
                key = f"{name}_reward" if len(particles.rewards) == 1 else f"{name}_reward_{reward}"
                found |= {key: to_numpy(r.mean(0)), f"{key}_stderr": to_numpy(r.std(0) / len(r) ** 0.5)}
        return Reply(evaluations=found)

    def _warn(self, history: Mapping[str, list[np.ndarray]]) -> None:
        """Warn if a program's log-likelihood has fallen while the trained one grew."""
        trained = history["log_likelihood"]
        for name in self.programs:
            mean = np.array([x.mean() for x in history[f"{name}_log_likelihood"]])
            errors = [np.sqrt(np.square(x).sum()) / x.size for x in history[f"{name}_log_likelihood_stderr"]]
            best = int(mean.argmax())
            lost, error = mean[best] - mean[-1], np.hypot(errors[best], errors[-1])
            at = min(best * self.every, len(trained) - 1)
            before, last = (np.mean(part) for part in (trained[at : at + self.every], trained[-self.every :]))
            if lost > 3.0 * error and last > before:
                warnings.warn(
                    f"over-optimisation: the log-likelihood of {name!r} was {mean[best]:.2f} after {best * self.every} "
                    f"steps and ended at {mean[-1]:.2f} ± {errors[-1]:.2f}, while the trained one grew: use a larger "
                    "beta, or fewer steps",
                    stacklevel=2,
                )
