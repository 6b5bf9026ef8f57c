r"""Stochastic variational inference: train a policy q towards the posterior.

    min_\phi KL(q_\phi || \pi^*)  =  max_\phi  E_{q_\phi}[ r ] / beta - KL(q_\phi || p)

KL-penalised reinforcement learning, as inference (Korbak, Perez and Buckley 2022, arXiv 2205.11275). The gradient is
an objective's (`objectives`), each step is `pyro.infer.SVI`'s.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro
import torch
from pyro.optim import PyroOptim
from torch import Tensor

from bayeslm.posterior import Posterior

from ..models.progress import track
from .checks import check_counts, check_positive
from .elbo import Objective
from .guides import AutoPolicy
from .particles import Particles
from .program import Program, look, seeded
from .results import Stopwatch, draw, posterior
from .reverse_kl import ReverseKL

SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
}


class ScheduledAdam(PyroOptim):
    """Adam over all parameters at once, with the gradient clipped by its global norm and a learning-rate schedule.

    (Pyro's own optimisers hold one optimiser a parameter, and clip each parameter by itself.)

    :param rate_of: the learning rate of a parameter, by its name in Pyro's store.
    """

    def __init__(self, rate_of: Callable[[str], float], num_steps: int, schedule: str, clip_norm: float | None) -> None:
        super().__init__(torch.optim.Adam, {})
        self._rate_of = rate_of
        self._num_steps = num_steps
        self._factor = SCHEDULES[schedule]
        self._clip = math.inf if clip_norm is None else clip_norm
        self._adam: torch.optim.Adam | None = None
        self._params: list[Tensor] = []
        self._known: set[Tensor] = set()
        self._step = 0
        self.gradient_norm = 0.0

    def __call__(self, params: Iterable[Tensor], *args: Any, **kwargs: Any) -> None:
        # Params are a set: taken in the order of their names, so that a seed reproduces the run.
        names = {p: str(pyro.get_param_store().param_name(p)) for p in set(params) - self._known}
        groups: dict[float, list[Tensor]] = {}
        for p in sorted(names, key=names.__getitem__):
            groups.setdefault(self._rate_of(names[p]), []).append(p)
        for rate, group in groups.items():
            settings: dict[str, Any] = {"params": group, "lr": rate, "rate": rate}
            if self._adam is None:
                self._adam = torch.optim.Adam([settings])
            else:
                self._adam.add_param_group(settings)
            self._params += group
            self._known.update(group)
        assert self._adam is not None
        for settings in self._adam.param_groups:
            settings["lr"] = settings["rate"] * self._factor(self._step / self._num_steps)
        self.gradient_norm = float(torch.nn.utils.clip_grad_norm_(self._params, self._clip))
        if not math.isfinite(self.gradient_norm):
            raise FloatingPointError(f"the gradient is {self.gradient_norm} at step {self._step}")
        self._adam.step()
        self._step += 1


@dataclass(frozen=True)
class SVI:
    """A policy trained towards the posterior, and weighted draws of it.

    :param num_steps: gradient steps.
    :param num_particles: completions of each prompt in a step.
    :param learning_rate: of Adam, at the start.
    :param latent_learning_rate: that of the default guide's laws of latents that are not completions, whose few
        parameters have further to go than a network's.
    :param schedule: "constant", or "linear" or "cosine" decay to 0.
    :param clip_norm: the largest norm of a gradient; None clips nothing.
    :param num_samples: draws of the trained policy in each chain; as many of the prior are drawn for comparison.
    :param num_chains: independent replicates: policies trained from seeds of their own. ``policy`` is the best's.
    :param guide: a Pyro guide of the program; None makes an `AutoPolicy`. A ``policy`` attribute of it is kept.
    :param lora_rank: for the default guide, see `AutoPolicy`.
    :param objective: a Pyro ELBO, with its own number of particles: one of `objectives`; None is `ReverseKL`.
    :param on_step: called with the number of steps done, from 0 on, and the policy: to watch rewards that are not
        trained on, held-out prompts, or the clock. It leaves the random numbers as they are.
    :param seed, progress, batch_size: as in `ImportanceSampling`.
    """

    num_steps: int = 200
    num_particles: int = 8
    learning_rate: float = 1e-3
    latent_learning_rate: float = 3e-2
    schedule: str = "linear"
    clip_norm: float | None = 1.0
    num_samples: int = 256
    num_chains: int = 1
    guide: Callable[..., Any] | None = None
    lora_rank: int | str | None = "auto"
    objective: Any = None
    on_step: Callable[[int, Any], None] | None = None
    batch_size: int | None = None
    seed: int | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        check_counts(self, "num_steps", "num_particles", "num_samples", "num_chains", "batch_size")
        check_positive(self, "learning_rate", "latent_learning_rate", "clip_norm")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"SVI: schedule must be one of {', '.join(SCHEDULES)}, got {self.schedule!r}")
        if self.guide is not None and self.num_chains > 1:
            raise ValueError("SVI: a guide of your own goes on from chain to chain: use num_chains=1, or no guide")

    def run(self, model: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Posterior:
        """Train on ``model(*args, **kwargs)``, then draw from the policy with weights log p - log q.

        ``stats``: ``elbo``, ``kl``, ``log_likelihood`` (chain, step, prompt), ``gradient_norm`` (chain, step),
        ``ess`` and ``khat`` a prompt. Ctrl-C ends the training, and the policy so far is kept; so is it on an
        error, as the exception's ``policy``.

        Where the program's plate of prompts is subsampled, each step has a minibatch of them, whose indices are
        ``stats["prompts"]`` (chain, step, prompt); the draws are of all prompts.

        The program's own ``pyro.param`` statements are trained too, as in Pyro; with the default guide they are
        forgotten after.

        :raises ProgramError: if a reward is -inf under the policy.
        :raises FloatingPointError: if a gradient is not finite.
        """
        # A guide of the user's keeps its parameters where Pyro's users look for them; the default one's are its own.
        own_guide = self.guide is not None
        store = contextlib.nullcontext() if own_guide else pyro.get_param_store().scope()
        with seeded(self.seed), store, Stopwatch() as watch:
            program = look(None, model, args, kwargs)
            chains, parts = [], []
            for chain in range(self.num_chains):
                if not own_guide:
                    pyro.clear_param_store()
                guide = self.guide if self.guide is not None else AutoPolicy(program, self.lora_rank)
                policy = getattr(guide, "policy", None)
                with _keeping(policy):
                    history = self._train(program, guide, policy, chain)
                    parts.append(self._draw(program, guide, "draws of the policy"))
                chains.append((history, policy))
                if history["interrupted"]:
                    break
            with _keeping(policy):
                prior = self._draw(program, None, "draws of the prior")
            shortest = min(len(part.log_prior) for part in parts)
            parts = [part[:shortest] for part in parts]
            best = max(range(len(chains)), key=lambda c: float(parts[c].log_weights.mean()))
            return posterior(
                program,
                Particles.concatenate(parts),
                engine="SVI",
                kind="weighted",
                num_chains=len(chains),
                stats=watch.read() | _stack([history for history, _ in chains]),
                prior=prior,
                policy=chains[best][1],
            )

    def _draw(self, program: Program, guide: Callable[..., Any] | None, what: str) -> Particles:
        size, shown = self.batch_size, self.progress
        return draw(program, guide, self.num_samples, batch_size=size, progress=shown, what=what)[0]

    def _train(self, program: Program, guide: Callable[..., Any], policy: Any, chain: int) -> dict[str, Any]:
        """Gradient steps; what was seen in each."""
        objective = self.objective or ReverseKL(self.num_particles)
        if isinstance(objective, Objective):  # chains, and runs, learn nothing from one another
            objective.reset(program)

        def rate_of(name: str) -> float:
            is_latent = self.guide is None and not name.startswith("policies")
            return self.latent_learning_rate if is_latent else self.learning_rate

        optimizer = ScheduledAdam(rate_of, self.num_steps, self.schedule, self.clip_norm)
        svi = pyro.infer.SVI(program.model, guide, optimizer, loss=objective)
        history: dict[str, Any] = {"elbo": [], "kl": [], "log_likelihood": [], "prompts": [], "gradient_norm": []}
        interrupted = False
        name = "SVI" if self.num_chains == 1 else f"SVI, chain {chain + 1} of {self.num_chains}"
        with track(name, self.num_steps, self.progress) as report:
            self._watch(0, policy)
            for step in range(self.num_steps):
                try:
                    loss = svi.step(*program.args, **program.kwargs)
                except KeyboardInterrupt:
                    interrupted = True
                    break
                except Exception as error:
                    error.add_note(f"SVI stopped at step {step}")
                    raise
                seen = getattr(objective, "last", None) or {"elbo": torch.tensor([-loss])}
                for key in ("elbo", "kl", "log_likelihood", "prompts"):
                    if key in seen:
                        history[key].append(seen[key].cpu().numpy())
                history["gradient_norm"].append(optimizer.gradient_norm)
                shown = {"elbo": "elbo", "score": "reward", "kl": "kl"}
                report(values={label: float(seen[key].mean()) for key, label in shown.items() if key in seen})
                self._watch(step + 1, policy)
        return history | {"interrupted": interrupted}

    def _watch(self, done: int, policy: Any) -> None:
        if self.on_step is not None:
            with seeded(done):
                self.on_step(done, policy)


@contextlib.contextmanager
def _keeping(policy: Any) -> Iterator[None]:
    """Whatever is raised inside carries the policy trained so far."""
    try:
        yield
    except BaseException as error:
        error.policy = policy  # type: ignore[attr-defined]
        if policy is not None:
            error.add_note("the policy trained so far is kept in this error's .policy")
        raise


def _stack(histories: list[dict[str, Any]]) -> dict[str, Any]:
    """Histories of chains, (chain, step, ...), cut to the shortest."""
    steps = min(len(history["gradient_norm"]) for history in histories)
    keys = [key for key in histories[0] if key != "interrupted" and histories[0][key]]
    stacked = {key: np.array([history[key][:steps] for history in histories]) for key in keys}
    return stacked | {"steps": steps, "interrupted": any(history["interrupted"] for history in histories)}
