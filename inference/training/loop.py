"""One training of a guide: its steps, what they saw, and all that it takes to go on with them another day."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import pyro
import torch
from pyro import poutine
from torch import Tensor

from bayeslm.inference.program import (
    Arbitrary,
    AutoPolicy,
    Program,
    RandomStates,
    Stopwatch,
    prompt_labels,
    seeded,
    to_numpy,
)
from bayeslm.models.lm import LanguageModel
from bayeslm.progress import track

from .checkpoints import Checkpoints, Saved
from .objective import Objective
from .optimizer import ScheduledAdam

if TYPE_CHECKING:
    from bayeslm.inference.svi import SVI

SEEN = ("elbo", "kl", "log_likelihood", "score", "log_evidence", "prompts")


@runtime_checkable
class ShowsTexts(Protocol):
    """A log that wants completions too, every so many steps."""

    texts_every: int

    def texts(self, step: int, rows: Sequence[tuple[str, str, float]]) -> None:
        """A prompt, a completion of it, and its log-likelihood, r / beta, in each row."""


class Training:
    """A chain of `SVI`.

    ``history`` holds what each step saw under the names of ``stats``, ``looks`` what `HeldOut` saw.
    """

    def __init__(self, engine: SVI, program: Program, objective: Any, chain: int, stopwatch: Stopwatch) -> None:
        self.engine, self.program, self.objective, self.chain = engine, program, objective, chain
        self.guide: Any = engine.guide
        if engine.guide is None or isinstance(engine.guide, LanguageModel):
            self.guide = AutoPolicy(program, engine.lora_rank, start=engine.guide)
        elif engine.makes_guides:
            self.guide = engine.guide(program.model)
        self.policy = getattr(self.guide, "policy", None)
        adapters = getattr(self.policy, "has_adapters", False)
        self.learning_rate = engine.learning_rate or (3e-4 if adapters else 1e-3)
        if engine.held_out is not None and self.policy is None:
            raise ValueError("SVI: held_out looks at a policy, and this guide has none as its attribute .policy")
        # A guide of the user's keeps its parameters where Pyro's users look for them; the default one's are its own.
        self.params: Any = {"params": {}, "constraints": {}} if engine.makes_guides else None
        self.optimizer = ScheduledAdam(
            self._rate_of, engine.num_steps, engine.schedule, engine.clip_norm, program.full_size
        )
        self.history: dict[str, list[np.ndarray]] = {}
        self.looks: dict[str, list[np.ndarray]] = {}
        self.step = 0
        self.ended = False  # before its last step, since it was far enough
        self.interrupted = False
        self.checkpoint: str | None = None  # the last one's path
        self._stopwatch = stopwatch
        if isinstance(objective, Objective):  # chains, and runs, learn nothing from one another
            objective.reset(program)
            if engine.temperature is not None:
                objective.inverse_temperature = engine.temperature.first()

    def run(self, checkpoints: Checkpoints | None) -> None:
        """All steps that are not done yet."""
        engine = self.engine
        svi = pyro.infer.SVI(self.program.model, self.guide, self.optimizer, loss=self.objective)
        name = "SVI" if engine.num_chains == 1 else f"SVI, chain {self.chain + 1} of {engine.num_chains}"
        with self.own_params(), track(name, engine.num_steps, engine.progress) as report:
            report(self.step)
            for x in _unconstrained().values():
                x.grad = None  # of a step that was broken off
            try:
                if self.step == 0:
                    self._watch()
                while not self.done:
                    with self._rescued(checkpoints):
                        report(values=self._take_step(svi))
                    self._watch()
                    self._log()
                    if checkpoints is not None and self.step % engine.checkpoint_every == 0 and not self.done:
                        self.checkpoint = checkpoints.write(self._saved())
            except KeyboardInterrupt:
                self.interrupted = True
                return
            except Exception as error:
                self._explain(error)
                raise
            if checkpoints is not None:
                self.checkpoint = checkpoints.write(self._saved())

    @contextlib.contextmanager
    def _rescued(self, checkpoints: Checkpoints | None) -> Iterator[None]:
        """A step that is broken off, before it has moved the guide, leaves a checkpoint of where it began."""
        if checkpoints is None or self.step == 0:
            yield
            return
        begun = self.step
        # as they are, to be written in the case: nothing here is changed in place, or read from the device
        random, seconds, usage = RandomStates.now(), self._stopwatch.seconds(), copy(self._stopwatch.usage)
        remembered = self.objective.state_dict() if isinstance(self.objective, Objective) else {}
        try:
            yield
        except BaseException:
            if self.optimizer.steps == begun:
                random.restore()
                self._remember(remembered)
                saved, used = self._saved(), {"seconds": seconds} | usage.state_dict()
                self.checkpoint = checkpoints.write(replace(saved, values=saved.values | {"used": used}))
            raise

    def _remember(self, state: dict[str, Tensor]) -> None:
        if isinstance(self.objective, Objective):
            gamma = self.objective.inverse_temperature
            self.objective.reset(self.program)
            self.objective.load_state_dict(state)
            self.objective.inverse_temperature = gamma

    def _take_step(self, svi: pyro.infer.SVI) -> dict[str, float]:
        """One gradient step; gives what to show."""
        start = time.perf_counter()
        loss = svi.step(*self.program.args, **self.program.kwargs)
        return self._note(loss, time.perf_counter() - start)

    @contextlib.contextmanager
    def own_params(self) -> Iterator[None]:
        """With the chain's parameters in Pyro's store."""
        if self.params is None:
            yield
        else:
            with pyro.get_param_store().scope(self.params):
                yield

    @property
    def done(self) -> bool:
        return self.ended or self.step == self.engine.num_steps

    def _rate_of(self, name: str) -> float:
        is_latent = self.engine.makes_guides and not name.startswith("policies")
        return self.engine.latent_learning_rate if is_latent else self.learning_rate

    # -- what a step saw -------------------------------------------------------------------------------------

    def _note(self, loss: float, seconds: float) -> dict[str, float]:
        """Keep what the step saw, move the temperature, and ask whether it is far enough; gives what to show."""
        engine, objective = self.engine, self.objective
        seen = getattr(objective, "last", None) or {"elbo": torch.tensor([-loss])}
        gamma = getattr(objective, "inverse_temperature", 1.0)
        now = {key: to_numpy(seen[key]) for key in SEEN if key in seen}
        now |= {"gradient_norm": np.array(self.optimizer.gradient_norm), "inverse_temperature": np.array(gamma)}
        for key, value in now.items():
            self.history.setdefault(key, []).append(value)
        self.step += 1
        if engine.temperature is not None:
            kl = float(now["kl"].mean()) if "kl" in now else float("nan")
            objective.inverse_temperature = engine.temperature.after(gamma, self.step / engine.num_steps, kl)
        self.ended = engine.stop is not None and engine.stop(self.history)
        shown = {"elbo": "elbo", "score": "reward", "kl": "kl", "gradient_norm": "gradient"}
        self._speed = getattr(objective, "num_particles", 1) * now["elbo"].size / max(seconds, 1e-9)
        return {label: float(now[key].mean()) for key, label in shown.items() if key in now} | {
            "samples/s": self._speed
        }

    def _log(self) -> None:
        log, particles = self.engine.log, getattr(self.objective, "particles", None)
        if log is None:
            return
        at = self.chain * self.engine.num_steps + self.step
        log(at, self._means())
        if isinstance(log, ShowsTexts) and particles is not None and (self.step % log.texts_every == 0 or self.done):
            log.texts(at, particles.texts(self.program, self._labels()))

    def _means(self) -> dict[str, float]:
        """The last of everything, means over prompts."""
        means = {key: float(values[-1].mean()) for key, values in self.history.items() if key != "prompts"}
        means |= {"samples_per_second": self._speed, "learning_rate": self.learning_rate * self.optimizer.factor}
        if self.looks and int(self.looks["held_out_steps"][-1]) == self.step:
            means |= {
                f"held_out/{key}": float(x[-1].mean()) for key, x in self.looks.items() if key != "held_out_steps"
            }
        return means

    def _watch(self) -> None:
        """Let others look, who leave the random numbers as they are."""
        engine, held_out = self.engine, self.engine.held_out
        if engine.on_step is not None:
            with seeded(self.step):
                engine.on_step(self.step, self.policy)
        if held_out is not None and (self.step % held_out.every == 0 or self.done):
            with seeded(self.step):
                seen = held_out.look(self.policy)
            for key, value in (seen | {"held_out_steps": np.array(self.step)}).items():
                self.looks.setdefault(key, []).append(value)

    def _explain(self, error: Exception) -> None:
        """Say where it was, and what the particles were if numbers went wrong."""
        error.add_note(f"SVI stopped at step {self.step}" + (f" of chain {self.chain}" if self.chain else ""))
        particles = getattr(self.objective, "particles", None)
        if isinstance(error, FloatingPointError) and particles is not None:
            error.add_note(particles.farthest(self.program, self._labels()))
            error.draws = particles.values  # type: ignore[attr-defined]
        if self.checkpoint is not None:
            error.add_note(f"the last checkpoint is {self.checkpoint}: the same call goes on from there")

    def _labels(self) -> list[str]:
        """What to call the prompts of the last step."""
        labels = prompt_labels(self.program)
        batch = self.objective.last.get("prompts")
        return labels if batch is None else [labels[i] for i in batch.tolist()]

    # -- stopping and going on -------------------------------------------------------------------------------

    def _saved(self) -> Saved:
        """Where it stands."""
        rng, states = RandomStates.now().saved()
        trained = self.optimizer.names  # a user's store may hold what is none of this guide's
        tensors = rng | {f"param.{name}": x for name, x in _unconstrained().items() if name in trained}
        tensors |= {f"adam.{name}": x for name, x in self.optimizer.moments().items()}
        if isinstance(self.objective, Objective):
            tensors |= {f"objective.{name}": x for name, x in self.objective.state_dict().items()}
            states["gamma"] = self.objective.inverse_temperature
        for group, seen in (("history", self.history), ("looks", self.looks)):
            tensors |= {f"{group}.{name}": torch.from_numpy(np.array(values)) for name, values in seen.items()}
        done = {"step": self.step, "ended": self.ended, "used": self._stopwatch.snapshot()}
        return Saved(self.chain, tensors, done | states)

    def restore(self, saved: Saved) -> None:
        """Go on from there, the random numbers included.

        :raises ValueError: if it is of another guide, or of more steps than there are to be.
        """
        if saved.values["step"] > self.engine.num_steps:
            raise ValueError(
                f"the checkpoint has {saved.values['step']} steps already, and num_steps is {self.engine.num_steps}: "
                "give as many, or choose another folder"
            )

        def group(name: str) -> dict[str, Tensor]:
            return {key.removeprefix(f"{name}."): x for key, x in saved.tensors.items() if key.startswith(f"{name}.")}

        with self.own_params():
            self._set_up()
            params = _unconstrained()
            kept = group("param")
            if missing := sorted(kept.keys() - params.keys()):
                raise ValueError(f"the checkpoint is of another guide: this one has no parameter {missing[0]!r}")
            for name, x in kept.items():
                if params[name].shape != x.shape:
                    raise ValueError(
                        f"the checkpoint is of another guide: {name!r} has the shape {tuple(x.shape)} there"
                    )
                with torch.no_grad():
                    params[name].copy_(x)
        self.step, self.ended = saved.values["step"], saved.values["ended"]
        self._stopwatch.resume(**saved.values["used"])
        self.optimizer.load_moments(group("adam"), params, self.step)
        if isinstance(self.objective, Objective):
            device = self.program.device
            self.objective.load_state_dict({name: x.to(device) for name, x in group("objective").items()})
            self.objective.inverse_temperature = saved.values["gamma"]
        self.history, self.looks = (
            {name: list(x.numpy()) for name, x in group(kind).items()} for kind in ("history", "looks")
        )
        RandomStates.of(saved.tensors, saved.values).restore()

    def _set_up(self) -> None:
        """Run guide and program once, so that what parameters they have is there to be set."""
        args, kwargs = self.program.args, self.program.kwargs
        with seeded(0), torch.no_grad(), poutine.block(), Arbitrary():
            self.guide(*args, **kwargs)
            self.program.model(*args, **kwargs)


def _unconstrained() -> dict[str, Tensor]:
    """The parameters in Pyro's store, as they are optimised."""
    store = pyro.get_param_store()
    return {name: store[name].unconstrained() for name in sorted(store.keys())}  # type: ignore[attr-defined]


def stack(chains: list[dict[str, list[np.ndarray]]]) -> dict[str, Any]:
    """Lists of chains as arrays (chain, step, ...); NaN after the end of a chain that ended before others."""
    stacked = {}
    for key in [key for key in chains[0] if all(key in chain for chain in chains)]:
        rows = [np.array(chain[key]) for chain in chains]
        most = max(map(len, rows))
        ended = [np.full((most - len(x), *x.shape[1:]), np.nan) for x in rows]
        stacked[key] = np.array(
            [np.concatenate([x, nan]) if len(nan) else x for x, nan in zip(rows, ended, strict=True)]
        )
    return stacked
