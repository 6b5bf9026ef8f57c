r"""Stochastic variational inference: train a policy q towards the posterior.

    min_\phi KL(q_\phi || \pi^*)  =  max_\phi  E_{q_\phi}[ r ] / beta - KL(q_\phi || p)

KL-penalised reinforcement learning, as inference (Korbak, Perez and Buckley 2022, arXiv 2205.11275). The gradient is
an objective's (`objectives`), each step is `pyro.infer.SVI`'s.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro
import torch
from pyro.optim import PyroOptim
from torch import Tensor

from bayeslm import diagnostics
from bayeslm.posterior import Posterior

from ..models.progress import track
from .checks import check_counts, check_positive
from .guides import AutoPolicy
from .objectives import ReverseKL
from .program import Particles, Program, inspect, seeded
from .results import Stopwatch, draw, posterior

SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
}


class ScheduledAdam(PyroOptim):
    """Adam over all parameters at once, with the gradient clipped by its global norm and a learning-rate schedule.

    (Pyro's own optimisers hold one optimiser a parameter, and clip each parameter by itself.)
    """

    def __init__(self, learning_rate: float, num_steps: int, schedule: str, clip_norm: float | None) -> None:
        super().__init__(torch.optim.Adam, {"lr": learning_rate})
        self._learning_rate = learning_rate
        self._num_steps = num_steps
        self._factor = SCHEDULES[schedule]
        self._clip = math.inf if clip_norm is None else clip_norm
        self._adam: torch.optim.Adam | None = None
        self._params: list[Tensor] = []
        self._step = 0
        self.gradient_norm = 0.0

    def __call__(self, params: Iterable[Tensor], *args: Any, **kwargs: Any) -> None:
        if self._adam is None:  # params are a set: in a fixed order, so that a seed reproduces the run
            self._params = sorted(params, key=lambda p: str(pyro.get_param_store().param_name(p)))
            self._adam = torch.optim.Adam(self._params, lr=self._learning_rate)
        for group in self._adam.param_groups:
            group["lr"] = self._learning_rate * self._factor(self._step / self._num_steps)
        norm = torch.nn.utils.clip_grad_norm_(self._params, self._clip)
        self.gradient_norm = float(norm)
        if math.isfinite(self.gradient_norm):
            self._adam.step()
        else:
            raise FloatingPointError(f"the gradient is {self.gradient_norm} at step {self._step}")
        self._step += 1


@dataclass(frozen=True)
class SVI:
    """A policy trained towards the posterior, and weighted draws of it.

    :param num_steps: gradient steps.
    :param num_particles: completions of each prompt in a step.
    :param learning_rate: of Adam, at the start.
    :param schedule: "constant", or "linear" or "cosine" decay to 0.
    :param clip_norm: the largest norm of a gradient; None clips nothing.
    :param num_samples: draws of the trained policy in each chain; as many of the prior are drawn for comparison.
    :param num_chains: independent replicates: policies trained from seeds of their own. ``policy`` is the best's.
    :param guide: a Pyro guide of the program; None makes an `AutoPolicy`. A ``policy`` attribute of it is kept.
    :param lora_rank: for the default guide, see `AutoPolicy`.
    :param objective: a Pyro ELBO; None is `ReverseKL`.
    :param seed, progress, batch_size: as in `ImportanceSampling`.
    """

    num_steps: int = 200
    num_particles: int = 8
    learning_rate: float = 1e-3
    schedule: str = "linear"
    clip_norm: float | None = 1.0
    num_samples: int = 256
    num_chains: int = 1
    guide: Callable[..., Any] | None = None
    lora_rank: int | str | None = "auto"
    objective: Any = None
    batch_size: int | None = None
    seed: int | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        check_counts(self, "num_steps", "num_particles", "num_samples", "num_chains", "batch_size")
        check_positive(self, "learning_rate", "clip_norm")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"SVI: schedule must be one of {', '.join(SCHEDULES)}, got {self.schedule!r}")
        if self.guide is not None and self.num_chains > 1:
            raise ValueError("SVI: a guide of your own goes on from chain to chain: use num_chains=1, or no guide")

    def run(self, model: Callable[..., Any], *args: Any, **kwargs: Any) -> Posterior:
        """Train on ``model(*args, **kwargs)``, then draw from the policy with weights log p - log q.

        ``stats``: ``elbo``, ``kl``, ``log_likelihood`` (chain, step, prompt), ``gradient_norm`` (chain, step),
        ``ess`` and ``khat`` a prompt. Ctrl-C ends the training, and the policy so far is kept; so is it on an
        error, as the exception's ``policy``.

        :raises ProgramError: if a reward is -inf under the policy.
        :raises FloatingPointError: if a gradient is not finite.
        """
        # A guide of the user's keeps its parameters where Pyro's users look for them; the default one's are its own.
        store = contextlib.nullcontext() if self.guide else pyro.get_param_store().scope()
        with seeded(self.seed), store, Stopwatch() as watch:
            program = inspect(model, *args, **kwargs)
            chains, parts = [], []
            for chain in range(self.num_chains):
                if self.guide is None:
                    pyro.clear_param_store()
                guide = self.guide or AutoPolicy(program, self.lora_rank)
                history = self._train(program, guide, chain)
                chains.append((history, getattr(guide, "policy", None)))
                parts.append(self._draw(program, guide, "draws of the policy"))
                if history["interrupted"]:
                    break
            prior = self._draw(program, None, "draws of the prior")
            shortest = min(len(part.log_prior) for part in parts)
            parts = [part[:shortest] for part in parts]
            best = max(range(len(chains)), key=lambda c: float(parts[c].log_weights.mean()))
            result = posterior(
                program,
                Particles.concatenate(parts),
                engine="SVI",
                kind="weighted",
                num_chains=len(chains),
                stats=watch.read() | _stack([history for history, _ in chains]),
                prior=prior,
                policy=chains[best][1],
            )
        result.stats["ess"] = diagnostics.ess(result.log_weights)
        result.stats["khat"] = diagnostics.psis(result.log_weights)[1]
        return result

    def _draw(self, program: Program, guide: Callable[..., Any] | None, what: str) -> Particles:
        size, shown = self.batch_size, self.progress
        return draw(program, guide, self.num_samples, batch_size=size, progress=shown, what=what)[0]

    def _train(self, program: Program, guide: Callable[..., Any], chain: int) -> dict[str, Any]:
        """Gradient steps; what was seen in each."""
        objective = self.objective or ReverseKL(self.num_particles, program)
        optimizer = ScheduledAdam(self.learning_rate, self.num_steps, self.schedule, self.clip_norm)
        svi = pyro.infer.SVI(program.model, guide, optimizer, loss=objective)
        history: dict[str, Any] = {"elbo": [], "kl": [], "log_likelihood": [], "gradient_norm": []}
        interrupted = False
        name = "SVI" if self.num_chains == 1 else f"SVI, chain {chain + 1} of {self.num_chains}"
        with track(name, self.num_steps, self.progress) as report:
            for step in range(self.num_steps):
                try:
                    loss = svi.step(*program.args, **program.kwargs)
                except KeyboardInterrupt:
                    interrupted = True
                    break
                except Exception as error:
                    error.policy = getattr(guide, "policy", None)  # type: ignore[attr-defined]
                    error.add_note(f"SVI stopped at step {step}; the policy so far is kept in this error's .policy")
                    raise
                seen = getattr(objective, "last", None) or {"elbo": torch.tensor([-loss])}
                for key in ("elbo", "kl", "log_likelihood"):
                    if key in seen:
                        history[key].append(seen[key].cpu().numpy())
                history["gradient_norm"].append(optimizer.gradient_norm)
                shown = {"elbo": "elbo", "score": "reward", "kl": "kl"}
                report(values={label: float(seen[key].mean()) for key, label in shown.items() if key in seen})
        return history | {"interrupted": interrupted}


def _stack(histories: list[dict[str, Any]]) -> dict[str, Any]:
    """Histories of chains, (chain, step, ...), cut to the shortest."""
    steps = min(len(history["gradient_norm"]) for history in histories)
    keys = [key for key in histories[0] if key != "interrupted" and histories[0][key]]
    stacked = {key: np.array([history[key][:steps] for history in histories]) for key in keys}
    return stacked | {"steps": steps, "interrupted": any(history["interrupted"] for history in histories)}
