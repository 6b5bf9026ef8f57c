r"""Stochastic variational inference: train a policy q towards the posterior.

    min_\phi KL(q_\phi || \pi^*)  =  max_\phi  E_{q_\phi}[ r ] / beta - KL(q_\phi || p)

KL-penalised reinforcement learning, as inference (Korbak, Perez and Buckley 2022, arXiv 2205.11275). The gradient is
an objective's (`objectives`), each step is `pyro.infer.SVI`'s.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from pyro.infer.autoguide import AutoGuide

from bayeslm.inference.program import (
    Particles,
    Program,
    Stopwatch,
    as_law,
    check_counts,
    check_positive,
    draw,
    inspect_or_reuse,
    posterior,
    seeded,
)
from bayeslm.inference.training.beta_schedules import KLTarget, Temperature
from bayeslm.inference.training.checkpoints import Checkpoints, describe_run
from bayeslm.inference.training.held_out import HeldOut
from bayeslm.inference.training.loop import Training, stack
from bayeslm.inference.training.objective import Objective
from bayeslm.inference.training.optimizer import SCHEDULES
from bayeslm.inference.training.reverse_kl import ReverseKL
from bayeslm.inference.training.stopping import Stopping
from bayeslm.models.lm import LanguageModel
from bayeslm.posterior import Posterior

NUM_SAMPLES, FEWEST = 256, 16  # draws of each prompt: by default, and where these are many


@dataclass(frozen=True)
class SVI:
    """A policy trained towards the posterior, and weighted draws of it.

    :param num_steps: gradient steps.
    :param num_particles: completions of each prompt in a step: 8, or as many as the ``objective`` says.
    :param learning_rate: of Adam, at the start. None: 1e-3, and 3e-4 for adapters (1e-3 can lead SmolLM2 away from its
        posterior with as few particles).
    :param latent_learning_rate: that of the default guide's laws of latents that are not completions, whose few
        parameters have further to go than a network's.
    :param schedule: "constant", or "linear" or "cosine" decay to 0.
    :param clip_norm: the largest norm of a gradient, of the mean over prompts; None clips nothing.
    :param num_samples: draws of the trained policy in each chain, of every prompt. None is 256; of a program whose
        prompts are subsampled, as many as cost what 256 of one minibatch do, and 16 at least.
    :param num_prior_samples: draws of the prior beside them, to compare with: as many if None, or none at all if 0.
    :param num_chains: independent replicates: policies trained from seeds of their own. ``policy`` is the best's.
    :param guide: None makes an `AutoPolicy`; a `LanguageModel`, such as the policy of a training before, makes one that
        begins as this model, of which a copy is trained. Or a Pyro guide of the program, whose parameters stay in
        Pyro's store, and a ``policy`` attribute of it is kept; or the class of an automatic one
        (`AutoMultivariateNormal`, `AutoLowRankMultivariateNormal`, `AutoLaplaceApproximation`, whose draws are of its
        normal law), made for each chain.
    :param lora_rank: for the default guide, see `AutoPolicy`.
    :param objective: a Pyro ELBO, with its own number of particles: one of `objectives`; None is `ReverseKL`.
    :param temperature: what moves beta: `Tempering` from the prior's end, or `KLTarget`, which holds KL(q || p).
    :param stop: ends a chain before ``num_steps``: `Plateau` of the ELBO, `NearPosterior`, or your own, see `Stopping`.
    :param held_out: other prompts, other rewards to look at beside: `HeldOut`.
    :param checkpoint: a folder. What is there is gone on from: a run that was killed ends as if it had not been, to the
        bit on a CPU, and so does one whose reward raised, or that was interrupted; one chain with a constant
        schedule goes on beyond its end with more steps. Each is a policy's parameters three times over.
    :param checkpoint_every: steps from one checkpoint to the next.
    :param log: called with the number of steps done, counted on through chains, and the means of what the last saw, the
        learning rate and the samples a second: `TensorBoard`, which shows completions too, or your own.
    :param on_step: called with the number of steps done, from 0 on, and the policy. It leaves the random numbers as
        they are.
    :param seed, progress, batch_size: as in `ImportanceSampling`.
    """

    num_steps: int = 200
    num_particles: int | None = None
    learning_rate: float | None = None
    latent_learning_rate: float = 3e-2
    schedule: str = "linear"
    clip_norm: float | None = 1.0
    num_samples: int | None = None
    num_prior_samples: int | None = None
    num_chains: int = 1
    guide: Callable[..., Any] | type[AutoGuide] | LanguageModel | None = None
    lora_rank: int | str | None = "auto"
    objective: Any = None
    temperature: Temperature | None = None
    stop: Stopping | None = None
    held_out: HeldOut | None = None
    checkpoint: str | PathLike[str] | None = None
    checkpoint_every: int = 50
    log: Callable[[int, Mapping[str, float]], None] | None = None
    on_step: Callable[[int, Any], None] | None = None
    batch_size: int | None = None
    seed: int | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        check_counts(self, "num_steps", "num_particles", "num_samples", "num_chains", "checkpoint_every", "batch_size")
        if self.num_prior_samples != 0:
            check_counts(self, "num_prior_samples")
        check_positive(self, "learning_rate", "latent_learning_rate", "clip_norm")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"SVI: schedule must be one of {', '.join(SCHEDULES)}, got {self.schedule!r}")
        own = getattr(self.objective, "num_particles", None)
        if None not in (own, self.num_particles) and own != self.num_particles:
            raise ValueError(
                f"SVI: num_particles={self.num_particles}, and the objective has {own} of its own: give it alone"
            )
        if not self.makes_guides and self.num_chains > 1:
            raise ValueError(
                "SVI: a guide of your own goes on from chain to chain: use num_chains=1, a class of guides, a "
                "LanguageModel, or none"
            )

    @property
    def has_an_end(self) -> bool:
        """Whether what a step does depends on how many there are to be (a chain begins where the one before ends)."""
        moves = self.temperature is not None and not isinstance(self.temperature, KLTarget)
        return self.schedule != "constant" or moves or self.num_chains > 1

    @property
    def makes_guides(self) -> bool:
        """Whether each chain has a new guide, with parameters of its own."""
        return self.guide is None or isinstance(self.guide, type | LanguageModel)

    def run(self, model: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Posterior:
        """Train on ``model(*args, **kwargs)``, then draw from the policy with weights log p - log q.

        ``stats``, NaN where a chain had ended: ``elbo``, ``kl``, ``log_likelihood``, ``log_evidence`` and ``score``
        (chain, step, prompt), ``gradient_norm`` and ``inverse_temperature`` (chain, step); ``ess`` and ``khat`` a
        prompt; `HeldOut`'s. Ctrl-C ends the training, and the policy so far is kept; so is it on an error, as the
        exception's ``policy``, and those of all chains as ``policies``. ``mismatch`` is how far log-probabilities were
        as they were drawn from those that were differentiated: the largest and the mean a token.

        Where the program's plate of prompts is subsampled, each step has a minibatch of them, whose indices are
        ``stats["prompts"]`` (chain, step, prompt); the draws are of all prompts.

        The program's own ``pyro.param`` statements are trained too, as in Pyro; with the default guide they are
        forgotten after.

        :raises ProgramError: if a reward is -inf under the policy.
        :raises FloatingPointError: if a loss or a gradient is not finite, with the texts and where to go on from.
        :raises ValueError: if ``checkpoint`` holds another run's, with what differs.
        :raises BlockingIOError: if another process trains with the same ``checkpoint``.
        """
        with seeded(self.seed), Stopwatch() as watch, contextlib.ExitStack() as held:
            program = inspect_or_reuse(None, model, args, kwargs)
            objective = self.objective if self.objective is not None else ReverseKL(self.num_particles or 8)
            if self.temperature is not None and not isinstance(objective, Objective):
                raise ValueError(
                    f"SVI: temperature moves that of an objective, and {type(objective).__name__} has none: give "
                    "ReverseKL, or temper in the program"
                )
            checkpoints = self._checkpoints(program, objective)
            if checkpoints is not None:
                held.enter_context(checkpoints)
            chains: list[Training] = []
            for index in range(self.num_chains):
                chain = Training(self, program, objective, index, watch)
                with _keeping([*chains, chain]):
                    if checkpoints is not None and (saved := checkpoints.newest(index)) is not None:
                        chain.restore(saved)
                    if not chain.done:
                        chain.run(checkpoints)
                chains.append(chain)
                if chain.interrupted:
                    break
            if isinstance(objective, Objective):
                objective.inverse_temperature = 1.0
            interrupted = any(chain.interrupted for chain in chains)
            chains = [chain for chain in chains if chain.step] or chains  # one interrupted in its first step is none
            num = self._num_samples(program)
            num_prior = num if self.num_prior_samples is None else self.num_prior_samples
            parts = []
            for chain in chains:
                with _keeping(chains), chain.own_params():
                    part, cut = self._draw(program, as_law(chain.guide, program), num, "draws of the policy")
                    parts.append(part)
                    interrupted |= cut
            prior = None
            if num_prior > 0:
                with _keeping(chains):
                    prior, cut = self._draw(program, None, num_prior, "draws of the prior")
                interrupted |= cut
            shortest = min(len(part.log_prior) for part in parts)
            parts = [part[:shortest] for part in parts]
            best = max(range(len(chains)), key=lambda c: float(parts[c].log_weights.mean()))
            return posterior(
                program,
                Particles.concatenate(parts),
                engine="SVI",
                kind="weighted",
                num_chains=len(chains),
                stats=watch.stats() | self._seen(chains) | {"interrupted": interrupted},
                prior=prior,
                policy=chains[best].policy,
            )

    def _checkpoints(self, program: Program, objective: Any) -> Checkpoints | None:
        if self.checkpoint is None:
            return None
        if isinstance(objective, Objective):
            objective.reset(program)  # a description is of settings, not of what is remembered
        return Checkpoints(Path(self.checkpoint), describe_run(self, program, objective))

    def _num_samples(self, program: Program) -> int:
        if self.num_samples is not None:
            return self.num_samples
        return max(FEWEST, NUM_SAMPLES * program.num_prompts // program.full_size)

    def _draw(self, program: Program, guide: Callable[..., Any] | None, num: int, what: str) -> tuple[Particles, bool]:
        return draw(program, guide, num, batch_size=self.batch_size, progress=self.progress, label=what)

    def _seen(self, chains: list[Training]) -> dict[str, Any]:
        """What the chains saw, as ``stats`` have it."""
        seen: dict[str, Any] = dict(stack([chain.history for chain in chains]))
        if self.held_out is not None:
            looks = stack([chain.looks for chain in chains])
            longest = max(chains, key=lambda chain: chain.step).looks.get("held_out_steps", [])
            seen |= looks | {"held_out_steps": [int(step) for step in longest]}
            for chain in chains:
                if chain.looks and "log_likelihood" in chain.history:
                    self.held_out.warn(chain.looks, chain.history["log_likelihood"])
        steps = max(chain.step for chain in chains)
        return seen | {"steps": steps}


@contextlib.contextmanager
def _keeping(chains: list[Training]) -> Iterator[None]:
    """Whatever is raised inside carries the policies trained so far."""
    try:
        yield
    except BaseException as error:
        policies = [chain.policy for chain in chains]
        error.policies, error.policy = policies, policies[-1]  # type: ignore[attr-defined]
        if policies[-1] is not None:
            before = f", those of all {len(chains)} chains in .policies" if len(chains) > 1 else ""
            error.add_note(f"the policy trained so far is kept in this error's .policy{before}")
        raise
