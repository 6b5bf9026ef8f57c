r"""Stochastic variational inference: train a policy q towards the posterior.

    min_\phi KL(q_\phi || \pi^*)  =  max_\phi  E_{q_\phi}[ r ] / beta - KL(q_\phi || p)

KL-penalised reinforcement learning, as inference (Korbak, Perez and Buckley 2022, arXiv 2205.11275). The gradient is
an objective's (`training`), each step is `pyro.infer.SVI`'s.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from os import PathLike
from typing import Any

from pyro.infer import ELBO
from torch import Tensor

from bayeslm.inference.program import (
    Particles,
    Program,
    SoFar,
    Stopwatch,
    as_proposal,
    check_draws_texts,
    check_independence,
    describe,
    describe_object,
    draw,
    inspect_or_reuse,
    keeping,
    posterior,
    ranks,
    running,
    seeded,
)
from bayeslm.inference.training import (
    Adam,
    AutoPolicy,
    Budget,
    Callback,
    Checkpointing,
    Checkpoints,
    NearPosterior,
    Objective,
    Reply,
    Saved,
    StepRecord,
    Training,
    TrustRegion,
    default_objective,
    describe_run,
    stack_chains,
)
from bayeslm.model_card import unfinished_notes
from bayeslm.models.lm import LanguageModel
from bayeslm.posterior import Posterior
from bayeslm.progress import announce
from bayeslm.validation import Count, Natural, Seed, validated

NUM_SAMPLES, FEWEST = 256, 16  # draws of each prompt: by default, and the fewest where prompts are many
FEW = 32  # draws after Ctrl-C
COMPARISON = "to compare policies"
COMPARED, FEWEST_COMPARED = 64, 4  # draws of each policy, at least, that decide which is the best; of many prompts


@validated
@dataclass(frozen=True)
class SVI:
    """A policy trained towards the posterior, and weighted draws of it.

    :param num_steps: gradient steps, or a `Budget` of steps, samples, seconds or a KL to reach.
    :param num_particles: completions of each prompt in a step, or as many as the ``objective`` says.
    :param objective: the loss: one of `bayeslm.inference.training`, with its own number of particles, or a Pyro ELBO.
        None chooses by the program and the size of its networks (see `default_objective`): `ReverseKL` on 16 new
        completions a step; of small networks in a `TrustRegion` `LogVariance` on lots of 128, all of which are kept
        for further steps.
    :param guide: None makes an `AutoPolicy` for each chain. A `LanguageModel`, such as the policy of an earlier
        training, makes one that begins with a copy of it. A class or a `functools.partial` of one is called for each
        chain: ``partial(AutoPolicy, lora_rank=8)`` with the program, Pyro's automatic guides with the model
        (`AutoMultivariateNormal`, `AutoLowRankMultivariateNormal`; `AutoLaplaceApproximation`, whose draws are of its
        normal distribution). Anything else is a Pyro guide of the program, whose parameters stay in Pyro's store; if it
        has an attribute ``policy``, that is the trained language model.
    :param optimizer: `TrustRegion`, which needs no learning rate, schedule or clipping; or `Adam`, which has them.
    :param callbacks: called at the start, after each step and at the end, in this order: `HeldOut` evaluates other
        prompts and rewards, `Tempering` and `KLTarget` move beta, `Plateau` and `NearPosterior` stop a chain early,
        `TensorBoard` logs. Or your own: a `Callback`, or a function of the `StepRecord`.
    :param checkpoint: a folder, or a `Checkpointing`. The same call resumes what it holds, bit-identically on a CPU:
        a run that was killed or interrupted, or whose reward raised. One chain, in a `TrustRegion` or with a constant
        schedule, may be trained longer by more ``num_steps``.
    :param num_samples: draws of the trained policy in each chain, of every prompt. None is 256; of a program whose
        prompts are subsampled, scaled to the cost of 256 draws of one minibatch, and 16 at least.
    :param num_prior_samples: draws of the prior, to compare with. None is ``num_samples``, 0 none.
    :param num_chains: independent replicates: policies trained with seeds of their own. ``policy`` is the best chain's.
    :param seed: of all random numbers of the run; the same gives the same results. The generators' states are restored
        after. None draws from them as they are.
    :param progress: whether to show a progress bar.
    :raises ValueError: if a setting is out of range.
    """

    num_steps: Count | Budget = 200
    num_particles: Count | None = None
    objective: Objective | ELBO | None = None
    guide: Callable[..., Any] | LanguageModel | None = None
    optimizer: Adam | TrustRegion = field(default_factory=TrustRegion)
    callbacks: Sequence[Callback | Callable[[StepRecord], Reply | None]] = ()
    checkpoint: str | PathLike[str] | Checkpointing | None = None
    num_samples: Count | None = None
    num_prior_samples: Natural | None = None
    num_chains: Count = 1
    seed: Seed | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        check_draws_texts("SVI", self.guide)
        own = getattr(self.objective, "num_particles", None)
        if None not in (own, self.num_particles) and own != self.num_particles:
            raise ValueError(
                f"SVI: num_particles={self.num_particles}, and the objective has {own} of its own: leave one out"
            )
        for i, callback in enumerate(self.callbacks):
            if isinstance(callback, type):
                raise TypeError(
                    f"SVI: callbacks[{i}] must be a Callback or a function, got the class {callback.__name__}: make one"
                )
        if not self.makes_guides and self.num_chains > 1:
            raise ValueError(
                "SVI: a guide of your own would be trained further from chain to chain: use num_chains=1, a class of "
                "guides, a LanguageModel, or none"
            )

    @property
    def budget(self) -> Budget:
        """Where each chain ends at the latest."""
        return self.num_steps if isinstance(self.num_steps, Budget) else Budget(steps=self.num_steps)

    @property
    def _callbacks(self) -> list[Any]:
        kl = self.budget.kl
        return [*self.callbacks, *([] if kl is None else [NearPosterior(kl)])]

    @property
    def makes_guides(self) -> bool:
        """Whether each chain has a new guide, with parameters of its own."""
        return self.guide is None or isinstance(self.guide, LanguageModel) or _class_of(self.guide) is not None

    def run(self, model: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Posterior:
        """Train on ``model(*args, **kwargs)``, then draw from the policy with weights log p - log q.

        ``stats``, NaN after the end of a chain: ``elbo``, ``kl``, ``log_likelihood``, ``log_evidence`` and ``reward``
        (chain, step, prompt; where the program records one), ``gradient_norm`` and ``inverse_temperature`` (chain,
        step); ``ess`` and ``khat`` a prompt; `HeldOut`'s. ``mismatch``, the largest and the mean a token, is the
        difference of log-probabilities as they were drawn and as they were differentiated. Ctrl-C ends the training and
        keeps the policy so far.

        Where the program's plate of prompts is subsampled, each step has a minibatch of them, whose indices are
        ``stats["prompts"]`` (chain, step, prompt); the draws are of all prompts.

        The program's own ``pyro.param`` statements are trained too, as in Pyro; with the default guide they are
        forgotten after.

        :raises RunError: if an error stops the run after its first step; it carries the policies so far.
        :raises ProgramError: if a reward is -inf under the policy.
        :raises FloatingPointError: if a loss or a gradient is not finite, with the texts and the last checkpoint.
        :raises ValueError: if ``checkpoint`` holds another run's, with what differs.
        :raises BlockingIOError: if another process trains with the same ``checkpoint``.
        """
        with running(self.seed, divided=True, sampled=True) as watch, contextlib.ExitStack() as held:
            program = inspect_or_reuse(None, model, args, kwargs)
            check_independence(program)  # before the training, also where the objective runs one particle at a time
            objective = self.objective
            if objective is None:
                in_region = isinstance(self.optimizer, TrustRegion)
                objective = default_objective(
                    program, self.num_particles, self.budget, owns_guide=self.makes_guides, in_region=in_region
                )
            self._check_together(program, objective, watch)
            checkpoints = self._checkpoints(program, objective)
            if checkpoints is not None:
                held.enter_context(checkpoints)
            saved = [self._newest(checkpoints, i) for i in range(self.num_chains)]
            chains: list[Training] = []
            with keeping(lambda: _so_far(chains)):
                while len(chains) < self.num_chains and not any(chain.interrupted for chain in chains):
                    chains.append(self._chain(program, objective, len(chains), watch))
                    if (state := saved.pop(0)) is not None:
                        chains[-1].restore(state)
                    if not chains[-1].done:
                        chains[-1].run(checkpoints)
            with keeping(lambda: _so_far(chains), can_return=False):
                return self._posterior(program, objective, chains, watch)
        raise AssertionError("unreachable")  # `keeping` has raised

    def _chain(self, program: Program, objective: Any, index: int, watch: Stopwatch) -> Training:
        return Training(
            program,
            self._guide(program),
            objective,
            self.optimizer,
            budget=self.budget,
            callbacks=self._callbacks,
            owns_guide=self.makes_guides,
            chain=index,
            num_chains=self.num_chains,
            progress=self.progress,
            stopwatch=watch,
        )

    def _posterior(self, program: Program, objective: Any, chains: list[Training], watch: Stopwatch) -> Posterior:
        """Draw from the trained policies, and from the prior."""
        interrupted = any(chain.interrupted for chain in chains)
        chains = [chain for chain in chains if chain.step] or chains  # one interrupted in its first step is none
        num = self._num_samples(program)
        num_prior = num if self.num_prior_samples is None else self.num_prior_samples
        if interrupted:
            num, num_prior = min(num, FEW), min(num_prior, FEW)
            text = f"SVI: interrupted after step {chains[-1].step}. Next are {num} draws of the policy and {num_prior}"
            announce(f"{text} of the prior, which say how good it is; Ctrl-C again leaves them out", self.progress)
        parts = []
        for chain in chains:
            with chain.own_params():
                part, cut = self._draw(program, as_proposal(chain.guide, program), num, "draws of the policy")
                parts.append(part)
                interrupted |= cut
        prior = None
        if num_prior > 0:
            prior, cut = self._draw(program, None, num_prior, "draws of the prior")
            interrupted |= cut
        if not interrupted:
            parts = [self._best_draws(program, *each, prior) for each in zip(chains, parts, strict=True)]
        shortest = min(len(part.log_prior) for part in parts)
        parts = [part[:shortest] for part in parts]
        best = max(range(len(chains)), key=lambda c: float(parts[c].log_weights.mean()))
        stats = stack_chains([chain.history for chain in chains])
        figures = {"steps": max(chain.step for chain in chains), "kept_steps": [chain.kept_step for chain in chains]}
        figures |= {"interrupted": interrupted, "optimizer": describe_object(self.optimizer)}
        figures |= {"objective": describe_object(objective)}
        return posterior(
            program,
            Particles.concatenate(parts),
            engine="SVI",
            kind="weighted",
            num_chains=len(chains),
            stats=watch.stats() | stats | figures,
            prior=prior,
            policy=chains[best].policy,
        )

    def _best_draws(self, program: Program, chain: Training, last: Particles, prior: Particles | None) -> Particles:
        """Return draws of the best policy of a chain, see `Best`, to which the chain's guide is put back.

        Draws of the first policy are there if it is the prior: if the guide is no other, and has texts alone.
        """
        compared = max(FEWEST_COMPARED, COMPARED * program.num_prompts // program.full_size)  # as in `_num_samples`
        rivals, num, best = chain.rivals(), max(compared, len(last)), last
        if rivals and len(last) < num:
            with chain.own_params(), seeded(ranks().stream(chain.step)):
                proposal = as_proposal(chain.guide, program)
                best, cut = self._draw(program, proposal, num, "draws of the policy", COMPARISON)
        elif rivals is not None and prior is not None and len(prior) >= compared and self._begins_with_prior(program):
            higher = _is_higher(prior.total_log_likelihood, last.log_weights)
            rivals = [*([0] if higher else []), *(step for step in rivals if step)]
        for step in rivals or []:
            with chain.own_params(), chain.at(step) as keep, seeded(ranks().stream(step)):
                label = f"draws of the policy after step {step}"
                part, cut = self._draw(program, as_proposal(chain.guide, program), num, label, COMPARISON)
                if not cut and _is_higher(part.log_weights, best.log_weights):
                    keep()
                    best, last = part, part[: len(last)]
        if chain.kept_step == 0:
            warnings.warn(
                f"SVI: after {chain.step} steps the ELBO was lower than the first policy's, which is returned: take "
                "more steps or more particles",
                stacklevel=4,
            )
        return last

    def _begins_with_prior(self, program: Program) -> bool:
        is_auto = self.guide is None or _class_of(self.guide) is AutoPolicy
        return is_auto and all(site.is_completion for site in program.latents)

    def _guide(self, program: Program) -> Any:
        if self.guide is None or isinstance(self.guide, LanguageModel):
            return AutoPolicy(program, start=self.guide)
        made = _class_of(self.guide)
        if made is None:
            return self.guide
        return self.guide(program if issubclass(made, AutoPolicy) else program.model)

    def _check_together(self, program: Program, objective: Any, watch: Stopwatch) -> None:
        """Check what several processes must agree on; the first one's guide is that of all."""
        if watch.ranks.size > 1 and not isinstance(objective, Objective):
            raise ValueError(
                f"SVI: {type(objective).__name__} is a Pyro ELBO, whose particles cannot be divided among "
                f"{watch.ranks.size} processes: use an objective of bayeslm.inference.training, or launch one process"
            )
        watch.check_together(program, self, "guide", num_particles=getattr(objective, "num_particles", 1))

    def _newest(self, checkpoints: Checkpoints | None, chain: int) -> Saved | None:
        """Return the state of a chain after its last checkpoint, which the first process has read; None without one."""
        saved = None if checkpoints is None else checkpoints.newest(chain)
        if ranks().size == 1 or self.checkpoint is None:
            return saved
        values, tensors = ranks().first(*((None, None) if saved is None else (saved.values, saved.tensors)))
        return None if values is None else Saved(chain, tensors, values)

    def _checkpoints(self, program: Program, objective: Any) -> Checkpoints | None:
        if self.checkpoint is None or not ranks().is_first:  # which writes for all
            return None
        settings = self.checkpoint if isinstance(self.checkpoint, Checkpointing) else Checkpointing(self.checkpoint)
        return Checkpoints(settings, describe_run(self, program, objective))

    def _num_samples(self, program: Program) -> int:
        if self.num_samples is not None:
            return self.num_samples
        return max(FEWEST, NUM_SAMPLES * program.num_prompts // program.full_size)

    def _draw(
        self, program: Program, guide: Callable[..., Any] | None, num: int, what: str, purpose: str = ""
    ) -> tuple[Particles, bool]:
        return draw(program, guide, num, progress=self.progress, label=what, purpose=purpose)


def _class_of(guide: Any) -> type | None:
    """Return the class of a factory of guides, a class or a partial of one; None for a guide."""
    made = guide.func if isinstance(guide, partial) else guide
    return made if isinstance(made, type) else None


def _is_higher(one: Tensor, other: Tensor) -> bool:
    """Whether draws of one ELBO (particle, prompt) show that it is higher than another's, by 2 standard errors."""
    means, errors = zip(*[(x.mean(1).mean(), x.mean(1).var() / len(x)) for x in (one, other)], strict=True)
    return bool(means[0] - means[1] > 2.0 * (errors[0] + errors[1]).sqrt())


def _so_far(chains: list[Training]) -> SoFar | None:
    """Return what the chains have trained; None before the first step."""
    if not any(chain.step for chain in chains):
        return None
    last = chains[-1]
    policies = tuple(chain.policy for chain in chains)
    for chain in chains:
        if isinstance(chain.policy, LanguageModel):
            chain.policy.provenance = unfinished_notes(describe(chain.program), chain.step, chain.history)
    return SoFar(particles=last.lost, policies=policies, step=last.step, checkpoint=last.checkpoint)
