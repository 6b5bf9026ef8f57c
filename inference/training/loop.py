"""One chain of a training: its steps, their figures, and what it takes to resume it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pyro
import torch
from pyro import poutine
from torch import Tensor

from bayeslm.inference.program import (
    Arbitrary,
    Message,
    Particles,
    Program,
    RandomStates,
    Stopwatch,
    all_to_numpy,
    digest_of,
    of_prompts,
    on_first,
    prompt_labels,
    ranks,
    run_particles,
    seed_of,
    seeded,
    set_seed,
)
from bayeslm.models.lm import is_sharded, offering, refuse_sharded, whole_offer
from bayeslm.progress import announce, track
from bayeslm.validation import validated

from .best import Best
from .budget import Budget
from .callbacks import Callback, Callbacks, Reply, StepRecord
from .checkpoints import Checkpoints, Saved
from .display import describe_outlier, texts_of
from .movement import Movement
from .objective import Estimate, Objective, StatefulLoss
from .optimizer import Adam
from .resumable import check_first, check_tensors, check_values, resuming
from .state import EMPTY, State, assign, copies, under, within
from .trust_region import TrustRegion

FIGURES = ("elbo", "kl", "log_likelihood", "reward", "log_evidence", "prompts")  # that are kept of an `Estimate`
CHECKED = 10  # steps from one comparison of the weights of all processes to the next
FEWEST_MEASURED, MOST_MEASURED = 4, 16  # particles at which a trust region measures how far a step moves the guide


@validated
class Training:
    """A chain of `SVI`.

    ``history`` holds the figures of each step, and the callbacks' evaluations, under the names of ``stats``.

    :param program: the program, inspected.
    :param guide: is trained; its attribute ``policy``, if it has one, is the language model in it.
    :param objective: an `Objective`, or a Pyro ELBO.
    :param optimizer: settings of Adam.
    :param budget: where the chain ends at the latest.
    :param callbacks: called in this order.
    :param owns_guide: whether the guide was made for this chain. Its parameters are then the chain's own; those of a
        user's guide stay where Pyro's users look for them, in Pyro's store.
    :param chain: the index of the chain.
    :param num_chains: how many there are.
    :param progress: whether to show the progress.
    :param stopwatch: of the run.
    """

    def __init__(
        self,
        program: Program,
        guide: Any,
        objective: Any,
        optimizer: Adam | TrustRegion,
        *,
        budget: Budget,
        callbacks: Sequence[Callback | Callable[[StepRecord], Reply | None]],
        owns_guide: bool,
        chain: int,
        num_chains: int,
        progress: bool,
        stopwatch: Stopwatch,
    ) -> None:
        self.program, self.guide, self.budget, self.chain = program, guide, budget, chain
        self.policy = getattr(guide, "policy", None)
        self.loss = StatefulLoss(objective, program) if isinstance(objective, Objective) else objective
        adapters = getattr(self.policy, "has_adapters", False)
        self.learning_rate, latent_rate = optimizer.rates(adapters)

        def rate_of(name: str) -> float:
            is_latent = owns_guide and not name.startswith("policies")
            return latent_rate if is_latent else self.learning_rate

        self.optimizer = optimizer.start(rate_of, lambda: self.share, program.full_size, self._movement)
        self.callbacks = Callbacks(callbacks)
        self.history: dict[str, list[np.ndarray]] = {}
        self.step = 0
        self.samples = 0  # drawn anew, of all prompts
        self.seconds = 0.0  # of the steps
        self.best = Best()
        self._kept_step: int | None = None  # whose parameters the guide has, if not the last one's
        self.inverse_temperature = 1.0  # of the next step
        self.ended = False  # before its last step, by a callback
        self.interrupted = False
        self.checkpoint: str | None = None  # the path of the last one
        self._writes = False  # checkpoints, the first process for all
        self._resumed: Path | None = None  # the one that the next step is the first after
        self.lost: Particles | None = None  # those of the step in which a number was not finite
        self._params: Any = {"params": {}, "constraints": {}} if owns_guide else None
        if not budget.allows(self._new_samples):
            raise ValueError(f"Budget: samples={budget.samples}, and one step draws {self._new_samples}: give as many")
        self._title = "SVI" if num_chains == 1 else f"SVI, chain {chain + 1} of {num_chains}"
        self._progress, self._stopwatch = progress, stopwatch

    def run(self, checkpoints: Checkpoints | None) -> None:
        """Take all steps that are not done yet.

        :raises OSError: if checkpoints cannot be written, before the first step.
        """
        if checkpoints is not None:
            checkpoints.require_writable()
        svi = pyro.infer.SVI(self.program.model, self.guide, self.optimizer, loss=self.loss)
        total = self.budget.steps or 100  # per cent
        shown = track(self._title, total, self._progress, done=self._shown_of(total), plan=self._plan)
        with self.own_params(), offering(self._parts), shown as report:
            for x in _unconstrained().values():
                x.grad = None  # of an interrupted step
            try:
                with self._ended_by_ctrl_c(), ranks().deferring():
                    self._begin_together(checkpoints)
                    self._call("start", self._record())
                    while not self.done:
                        before = self._shown_of(total)
                        with self._rescued(checkpoints):
                            seconds = self._take_step(svi)
                        record = self._record(seconds) if self.callbacks else None
                        report(self._shown_of(total) - before, values=self._shown(seconds))
                        if record is not None:
                            self.ended = self._call("step", record).is_last and not self.done
                        if not self.done:
                            self._write(checkpoints, checkpoints is not None and checkpoints.due(self.step))
                self.optimizer.warn_if_stuck()
                with self._ended_by_ctrl_c(), ranks().deferring():
                    self._call("end", self._record())
            except Exception as error:
                self._explain(error)
                raise
            if not self.interrupted:
                with ranks().deferring():
                    self._write(checkpoints, checkpoints is not None)
            if self._parts():  # which the first process puts together for its checkpoint
                ranks().exchange(may_stop=False)

    @property
    def _plan(self) -> str:
        steps = "steps" if self.budget.steps is None else f"{self.budget.steps} steps"
        new = self._new_samples // self.program.num_prompts
        return f"{steps} of {new} new draws {of_prompts(self.program)}"

    @property
    def share(self) -> float:
        """The share of the budget that is used."""
        return self.budget.share(self.step, self.samples, self.seconds)

    @property
    def done(self) -> bool:
        """Whether no step is left."""
        return self.ended or self.share >= 1.0 or not self.budget.allows(self.samples + self._new_samples)

    @property
    def _new_samples(self) -> int:
        """The draws that the next step takes, of all its prompts."""
        if isinstance(self.loss, StatefulLoss):
            return self.loss.objective.num_drawn(self.loss.state) * self.program.num_prompts
        return int(getattr(self.loss, "num_particles", 1)) * self.program.num_prompts

    def _shown_of(self, total: int) -> int:
        """Return what the progress counts: steps, or the share of another budget."""
        return self.step if self.budget.steps == total else int(total * self.share)

    @contextlib.contextmanager
    def own_params(self) -> Iterator[None]:
        """Have the chain's parameters in Pyro's store."""
        store = pyro.get_param_store()
        if self._params is None:
            yield
            return
        try:
            with store.scope(self._params):
                yield
        finally:
            list(store.values())  # gives parameters of an enclosing training the references that `scope` took off

    @contextlib.contextmanager
    def _ended_by_ctrl_c(self) -> Iterator[None]:
        try:
            yield
        except KeyboardInterrupt:
            self.interrupted = True

    # -- which parameters are kept ---------------------------------------------------------------------------------

    @property
    def kept_step(self) -> int:
        """The step whose parameters the guide has."""
        return self.step if self._kept_step is None else self._kept_step

    @property
    def _raises_elbo(self) -> bool:
        return isinstance(self.loss, StatefulLoss) and self.loss.objective.raises_elbo

    def rivals(self) -> list[int] | None:
        """Return earlier steps whose parameters may have a higher ELBO than the last ones.

        None where the training has another aim: by its objective, or by its inverse temperature.
        """
        if not self._raises_elbo or self.inverse_temperature != 1.0 or not self.step:
            return None
        return self.best.rivals(self.history["elbo"])

    @contextlib.contextmanager
    def at(self, step: int) -> Iterator[Callable[[], None]]:
        """Have the parameters after an earlier step in the block, and after it if the function is called."""
        params, kept = self.optimizer.params, False
        last = copies(params)

        def keep() -> None:
            nonlocal kept
            kept, self._kept_step = True, step

        assign(self.optimizer.first if step == 0 else self.best.params, params)
        try:
            yield keep
        finally:
            if not kept:
                assign(last, params)

    # -- a step --------------------------------------------------------------------------------------------------

    def _take_step(self, svi: pyro.infer.SVI) -> float:
        """Take a gradient step and note its figures; return the seconds that it took."""
        start, share, drawn = time.perf_counter(), self.share, self._new_samples
        if isinstance(self.loss, StatefulLoss):
            self.loss.inverse_temperature = self.inverse_temperature
        loss = svi.step(*self.program.args, **self.program.kwargs)
        seconds = float(ranks().first(time.perf_counter() - start).value)
        found = {"elbo": torch.tensor([-loss])} if self._last is None else self._last.figures
        figures = all_to_numpy({key: found[key] for key in FIGURES if key in found})
        figures |= {"gradient_norm": np.array(self.optimizer.gradient_norm)}
        figures |= {"inverse_temperature": np.array(self.inverse_temperature)}
        if (moved := self.optimizer.moved) is not None:
            rate = self.learning_rate * self.optimizer.factor
            figures |= {"moved": np.array(moved), "learning_rate": np.array(rate)}
        self._note(figures)
        self.step, self.samples, self.seconds = self.step + 1, self.samples + drawn, self.seconds + seconds
        if self._resumed is not None:
            with resuming(self._resumed):
                check_first(self.history, figures, self.step)
            self._resumed = None
        if self._raises_elbo:
            self.best.note(self.history["elbo"], self.share, share, self.optimizer.params)
        if ranks().size > 1 and (self.step % CHECKED == 0 or self.done):
            weights = {name: x for name, x in self.optimizer.params.items() if not is_sharded(x)}
            ranks().check_same(f"after step {self.step}, the guide", {"its weights": digest_of(weights)})
        return seconds

    def _begin_together(self, checkpoints: Checkpoints | None) -> None:
        """Give the guide the parameters of the first process, on all processes of the run."""
        if ranks().size == 1:
            return
        self._writes = bool(ranks().first(checkpoints is not None).value)
        if self.step == 0:
            self._set_up()
        params = _unconstrained()
        refuse_sharded(params.items())
        ranks().copy_first([x for x in params.values() if not is_sharded(x)])

    @contextlib.contextmanager
    def _rescued(self, checkpoints: Checkpoints | None) -> Iterator[None]:
        """Write a checkpoint of the state before a step, if the step is stopped before it has moved the guide."""
        if checkpoints is None or self.step == 0 or self._parts():  # no process can put parts together alone
            yield
            return
        begun, random, state = self.step, RandomStates.now(), self._state
        seconds, usage = self._stopwatch.seconds(), copy(self._stopwatch.usage)
        try:
            yield
        except BaseException:
            if self.optimizer.steps == begun:
                random.restore()
                self._state = state
                saved, used = self._saved(state), {"seconds": seconds} | usage.state_dict()
                self.checkpoint = checkpoints.write(replace(saved, values=saved.values | {"used": used}))
            raise

    def _movement(self) -> Movement:
        """Return the guide's distributions at some of the step's particles, or at draws of it where a loss has none."""
        program = self.program.chunks[0] if self.program.in_chunks else self.program
        if self._last is None:
            return Movement(program, self.guide, run_particles(program, self.guide, FEWEST_MEASURED))
        own = self._last.particles
        num = min(MOST_MEASURED, max(FEWEST_MEASURED, ranks().size * len(own) // 4))  # of all processes
        particles = own[: max(1, num // ranks().size)]
        return Movement(self._program_of(particles), self.guide, particles)

    def _program_of(self, particles: Particles) -> Program:
        """Return the program of the prompts that particles of a step have: all of them, or a minibatch."""
        return self.program if particles.prompts is None else self.program.on(particles.prompts[0])

    @property
    def _last(self) -> Estimate | None:
        """The last step's estimate, if the objective is not a Pyro ELBO."""
        return self.loss.last if isinstance(self.loss, StatefulLoss) else None

    @property
    def _state(self) -> State:
        """What the objective remembers."""
        return self.loss.state if isinstance(self.loss, StatefulLoss) else EMPTY

    @_state.setter
    def _state(self, state: State) -> None:
        if isinstance(self.loss, StatefulLoss):
            self.loss.state = state

    # -- figures and callbacks -----------------------------------------------------------------------------------

    def _note(self, figures: dict[str, np.ndarray]) -> None:
        for key, value in figures.items():
            self.history.setdefault(key, []).append(value)

    def _call(self, when: str, record: StepRecord) -> StepRecord:
        """Call the callbacks, keep their evaluations, and return the record after them."""
        record, gamma = self._agreed(when, record)
        if gamma != self.inverse_temperature and not isinstance(self.loss, StatefulLoss):
            raise ValueError(
                f"SVI: a callback moves the inverse temperature of an objective, and {type(self.loss).__name__} has "
                "none: use ReverseKL, or temper in the program"
            )
        self.inverse_temperature = gamma
        self._note(dict(record.evaluations))
        return record

    def _agreed(self, when: str, record: StepRecord) -> tuple[StepRecord, float]:
        """Call the callbacks, of the first process alone; what they reply holds for all."""
        if ranks().size == 1 or not self.callbacks:
            return self.callbacks.call(when, record)
        last = record

        def call() -> Message:
            nonlocal last
            last, gamma = self.callbacks.call(when, record)
            arrays = {name: torch.from_numpy(np.array(x)) for name, x in last.evaluations.items()}
            return Message([last.is_last, gamma], arrays)

        (is_last, gamma), found = on_first(ranks(), call)
        evaluations = {name: x.numpy() for name, x in found.items()}
        return replace(last, is_last=is_last, evaluations=evaluations), gamma

    def _record(self, seconds: float | None = None) -> StepRecord:
        """Return what callbacks get; with figures if a step took so many seconds."""
        figures: dict[str, float] = {}
        if seconds is not None:
            names = [key for key in (*FIGURES, "gradient_norm", "inverse_temperature", "moved") if key in self.history]
            figures = {key: float(self.history[key][-1].mean()) for key in names if key != "prompts"}
            figures |= {"samples_per_second": self._speed(seconds)}
            figures |= {"learning_rate": self.learning_rate * self.optimizer.factor}
        particles = None if self._last is None else self._last.particles
        return StepRecord(
            step=self.step,
            num_steps=self.budget.steps,
            share=self.share,
            chain=self.chain,
            is_last=self.done,
            policy=self.policy,
            inverse_temperature=self.inverse_temperature,
            history=MappingProxyType(self.history),
            figures=figures,
            particles=particles,
            texts=lambda: [] if particles is None else texts_of(particles, self._program_of(particles), self._labels()),
        )

    def _speed(self, seconds: float) -> float:
        return float(getattr(self.loss, "num_particles", 1) * self.history["elbo"][-1].size / max(seconds, 1e-9))

    def _shown(self, seconds: float) -> dict[str, float]:
        """Return what the progress shows, the most important first."""
        labels = {"elbo": "elbo", "reward": "reward", "kl": "kl", "gradient_norm": "gradient"}
        shown = {label: float(self.history[key][-1].mean()) for key, label in labels.items() if key in self.history}
        return shown | {"samples/s": self._speed(seconds)}

    def _explain(self, error: Exception) -> None:
        """Add to an error where the training was, and the particles if numbers went wrong."""
        error.add_note(f"SVI stopped at step {self.step}" + (f" of chain {self.chain}" if self.chain else ""))
        if isinstance(error, FloatingPointError) and self._last is not None:
            self.lost = self._last.particles
            error.add_note(describe_outlier(self.lost, self._program_of(self.lost), self._labels()))
        if self._resumed is not None:
            error.add_note(f"it was the first step after {self._resumed}: if somebody has changed that, remove it")
        if self.checkpoint is not None:
            error.add_note(f"the last checkpoint is {self.checkpoint}, which the same run resumes")

    def _labels(self) -> list[str]:
        """Return the names of the last step's prompts."""
        labels = prompt_labels(self.program)
        batch = None if self._last is None else self._last.figures.get("prompts")
        return labels if batch is None else [labels[i] for i in batch.tolist()]

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def _write(self, checkpoints: Checkpoints | None, wanted: bool) -> None:
        """Write a checkpoint, if the first process wants one; it has what all processes remember."""
        state = self._state
        if self._writes:
            wanted = bool(ranks().first(wanted).value)
            state = self.loss.objective.gathered(state) if wanted and isinstance(self.loss, StatefulLoss) else state
        if wanted and checkpoints is not None:
            self.checkpoint = checkpoints.write(self._saved(state))

    def _saved(self, state: State) -> Saved:
        """Return all that it takes to resume the chain from here.

        :param state: what the objective remembers.
        """
        rng, states = RandomStates.now().saved()
        tensors = rng | self._moved() | under("objective", state) | under("callbacks", self.callbacks.state())
        tensors |= {f"history.{name}": torch.from_numpy(np.array(values)) for name, values in self.history.items()}
        places = sorted(name for name, x in tensors.items() if is_sharded(x))
        tensors |= {name: whole_offer(i).cpu() for i, name in enumerate(places)}
        _, numbers = self.best.state()
        done = {"step": self.step, "ended": self.ended, "gamma": self.inverse_temperature, "best": numbers}
        done |= {"samples": self.samples, "train_seconds": self.seconds, "used": self._stopwatch.snapshot()}
        return Saved(self.chain, tensors, done | states)

    def _moved(self) -> dict[str, Tensor]:
        """Return the parameters that are trained, Adam's moments of them, and the best of them, for a checkpoint."""
        trained = self.optimizer.params  # a user's store may hold parameters of other guides
        tensors = {f"param.{name}": x for name, x in _unconstrained().items() if name in trained}
        return tensors | under("adam", self.optimizer.moments()) | self.best.state()[0]

    def _parts(self) -> list[Tensor]:
        """Return those of them that are sharded, by name."""
        moved = self._moved()
        return [moved[name] for name in sorted(moved) if is_sharded(moved[name])]

    def restore(self, saved: Saved) -> None:
        """Resume from a checkpoint, the random numbers included.

        :raises ValueError: if it is of another guide, is none that this training can have written, or has more steps
            than the budget.
        """
        with resuming(saved.path):
            check_values(saved.values, can_end=bool(self.callbacks))
            random = RandomStates.of(saved.tensors, saved.values)
        if self.budget.steps is not None and saved.values["step"] > self.budget.steps:
            raise ValueError(
                f"the checkpoint has {saved.values['step']} steps already, and num_steps is {self.budget.steps}: give "
                "as many, or choose another folder"
            )
        state = {name: x.to(self.program.device) for name, x in within("objective", saved.tensors).items()}
        with self.own_params():
            self._set_up()
            params, kept = _unconstrained(), within("param", saved.tensors)
            with resuming(saved.path):
                check_tensors(saved.tensors, params, saved.values)
                if isinstance(self.loss, StatefulLoss):
                    self.loss.objective.check_state(state, self.program, saved.values["step"])
                moments = within("adam", saved.tensors)
                self.optimizer.restore(moments, {name: params[name] for name in kept}, saved.values["step"])
        self.step, self.ended = saved.values["step"], saved.values["ended"]
        self.samples, self.seconds = saved.values["samples"], saved.values["train_seconds"]
        self.inverse_temperature = saved.values["gamma"]
        self._stopwatch.resume(**saved.values["used"])
        assign(kept, params)
        self.best.restore(saved.tensors, saved.values["best"])
        self._state = self.loss.objective.divided(state) if isinstance(self.loss, StatefulLoss) else state
        self.callbacks.restore(within("callbacks", saved.tensors))
        self.history = {name: list(x.numpy()) for name, x in within("history", saved.tensors).items()}
        random.restore()
        if not ranks().is_first:  # a stream of its own from here on, however many processes wrote the checkpoint
            set_seed(ranks().stream(seed_of(saved.tensors["rng.torch"])))
        self._resumed = saved.path
        ended = ", its last" if self.done else ""
        announce(f"{self._title}: resumed from step {self.step}{ended}", self._progress)

    def _set_up(self) -> None:
        """Run guide and program once, so that their parameters are in Pyro's store."""
        args, kwargs = self.program.args, self.program.kwargs
        with seeded(0), torch.no_grad(), poutine.block(), Arbitrary():
            self.guide(*args, **kwargs)
            self.program.model(*args, **kwargs)


def _unconstrained() -> dict[str, Tensor]:
    """Return the parameters in Pyro's store, in the unconstrained form that is optimised."""
    store = pyro.get_param_store()
    return {name: store[name].unconstrained() for name in sorted(store.keys())}  # type: ignore[attr-defined]
