"""Engines from settings: each setting is the engine's own, and its constructor checks it.

A setting that is an object is written as in Python, ``Adam(learning_rate=1e-3)``, with the names of `makers`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from .console import UsageError, err_console
from .expressions import CALL, check_names, evaluate, nearest
from .inputs import read_prompts, trained_policy

OF_TRAINING: tuple[str, ...] = ("Adam", "Ahead", "Budget", "Checkpointing", "Critic", "ExponentialAverage")
OF_TRAINING += ("FDivergence", "ForwardKL", "FromPosterior", "KLTarget", "LogVariance", "NearPosterior", "Plateau")
OF_TRAINING += ("Renyi", "Replay", "ReverseKL", "Tempering", "TensorBoard", "TrustRegion")
VALUES = ("leave_one_out", "of_guide", "of_prior")  # functions, which are named without a call
WITHOUT_EFFECT = ("progress", "checkpoint")  # settings on which no result depends
STAND_IN = "partial"  # a twist that every other setting of SMC accepts


class UnreadableFile(OSError):
    """A file that a setting names cannot be used; the setting itself is well formed."""


class NeedsNetwork(Exception):
    """A setting cannot be made before the language model is loaded."""


@dataclasses.dataclass
class Run:
    """What engines are made for, as far as it is known.

    :param seed: of engines that set no other; trainings of twists have their engine's.
    :param lm: the prior, once it is loaded.
    :param program: makes the program of a language model.
    """

    seed: int = 0
    lm: Any = None
    program: Any = None


@dataclasses.dataclass
class Prepared:
    """An engine, and a training of its twist that comes first, or None."""

    engine: Any
    learning: Any = None

    @property
    def trains(self) -> bool:
        """Whether the engine changes weights, so that it needs a language model that is not packed."""
        return _trains(type(self.engine))

    def identity(self) -> dict[str, Any]:
        """Return the settings on which the engine's results depend, as JSON."""
        from bayeslm.inference.training import Callback, identify

        settings = {x.name: getattr(self.engine, x.name) for x in dataclasses.fields(self.engine)}
        if "callbacks" in settings:
            logs = [x for x in settings["callbacks"] if isinstance(x, Callback) and x.identity() is None]
            settings["callbacks"] = [x for x in settings["callbacks"] if x not in logs]
        if self.learning is not None:
            settings["twist"] = dataclasses.replace(self.learning, progress=True)
        return {name: identify(value) for name, value in settings.items() if name not in WITHOUT_EFFECT}


def _trains(engine: type) -> bool:
    from bayeslm.inference import SVI, AdaptiveImportance, Auto

    return issubclass(engine, (SVI, AdaptiveImportance, Auto))


def prepare(name: str, settings: Mapping[str, Any], run: Run, where: str) -> Prepared | None:
    """Make an engine; None if that needs a language model, and there is none yet.

    :param name: of the engine, a key of `bayeslm.inference.ENGINES`.
    :param settings: of the engine, as a settings file has them.
    :param run: what is known so far.
    :param where: the option or the key of a file that has the settings, for errors.
    :raises UnreadableFile: if a file that a setting names is damaged.
    :raises UsageError: if the engine or a setting is unknown, or its constructor refuses a value.
    """
    from bayeslm.inference import ENGINES

    if name not in ENGINES:
        raise UsageError(f"{where}: {name!r} is unknown{nearest(name, ENGINES)} Allowed names: {', '.join(ENGINES)}")
    engine = ENGINES[name]
    seed = settings.get("seed", run.seed)
    allowed = makers(dataclasses.replace(run, seed=seed), packed=not _trains(engine))
    try:
        check_names(name, engine, settings)
        made = {"seed": seed} | {key: _value(value, allowed) for key, value in settings.items()}
        learning = made.get("twist") if hasattr(made.get("twist"), "run") else None
        return Prepared(engine(**made | ({} if learning is None else {"twist": STAND_IN})), learning)
    except NeedsNetwork:
        return None
    except (TypeError, ValueError) as error:
        raise UsageError(f"{where}: {error}") from None


def _value(value: Any, allowed: Mapping[str, Callable[..., Any]]) -> Any:
    """Return a setting of a file as the engine takes it."""
    from bayeslm.inference import training

    if isinstance(value, str) and CALL.fullmatch(value):
        return evaluate(value, allowed, values={name: getattr(training, name) for name in VALUES})
    if isinstance(value, list):
        return [_value(x, allowed) for x in value]
    if isinstance(value, dict):
        return {name: _value(x, allowed) for name, x in value.items()}
    return value


def makers(run: Run, *, packed: bool = True) -> dict[str, Callable[..., Any]]:
    """Return what makes each object that a setting may name, by its class.

    :param packed: whether policies are for drawing and scoring only.
    """
    from bayeslm.inference import training
    from bayeslm.inference.sequential import TwistLearning as Learning
    from bayeslm.models import Twist as LearnedTwist
    from bayeslm.posterior import Posterior as Saved

    def network() -> Any:
        if run.lm is None:
            raise NeedsNetwork
        return run.lm

    @_reading
    def LanguageModel(folder: str) -> Any:
        """A policy that `SVI` has trained.

        :param folder: such as runs/weather/svi/policy.
        """
        policy = trained_policy(Path(folder), network())
        return policy.packed() if packed else policy

    @_reading
    def Twist(folder: str) -> Any:
        """A twist that `TwistLearning` has trained on the same prior.

        :param folder: such as runs/weather/smc-twist.
        """
        return LearnedTwist.from_pretrained(folder, network())

    @_reading
    def Posterior(folder: str) -> Any:
        """A saved posterior.

        :param folder: such as runs/weather/rejection.
        """
        return Saved.load(folder)

    @_reading
    def HeldOut(prompts: str, every: int = 25, num_particles: int = 64) -> Any:
        """Evaluation of the policy on other prompts while it is trained.

        :param prompts: a file of them.
        :param every: steps from one evaluation to the next.
        :param num_particles: completions of each prompt in an evaluation.
        """
        rows, columns = read_prompts(prompts)
        unseen = functools.partial(run.program(network()), rows, **columns)
        return training.HeldOut({"held out": unseen}, every, num_particles)

    @functools.wraps(Learning)
    def learning(*arguments: Any, **settings: Any) -> Any:
        return Learning(*arguments, **{"seed": run.seed} | settings)

    def policy(
        lora_rank: int | Literal["auto"] | None = "auto",
        start: Any = None,
        lora_layers: float = 1.0,
    ) -> Any:
        return functools.partial(training.AutoPolicy, lora_rank=lora_rank, start=start, lora_layers=lora_layers)

    policy.__name__, policy.__doc__ = "AutoPolicy", training.AutoPolicy.__doc__
    own = {x.__name__: x for x in (LanguageModel, Twist, Posterior, HeldOut)}
    others = {name: getattr(training, name) for name in OF_TRAINING}
    return dict(sorted((others | own | {"TwistLearning": learning, "AutoPolicy": policy}).items()))


def _reading(load: Callable[..., Any]) -> Callable[..., Any]:
    """Return a loader whose errors about a file are not those about a setting.

    :param load: makes an object of a file.
    :returns: the same, which raises `UnreadableFile` where ``load`` raises ValueError.
    """

    @functools.wraps(load)
    def loaded(*arguments: Any, **settings: Any) -> Any:
        try:
            return load(*arguments, **settings)
        except ValueError as error:
            raise UnreadableFile(str(error)) from error

    return loaded


def learn_twist(
    learning: Any, lm: Any, model: Any, prompts: list[Any], columns: dict[str, Any], kept: Path | None
) -> Any:
    """Train a twist and save it, or load the one that was kept.

    :param kept: its folder, or None.
    """
    from bayeslm.models import Twist

    if kept is not None and kept.is_dir():
        err_console.print(f"twist: already in {kept}")
        return Twist.from_pretrained(kept, lm)
    twist = learning.run(model, prompts, **columns)
    if kept is not None:
        try:
            twist.save_pretrained(kept)
            err_console.print(f'twist: saved in {kept}, for smc(twist=Twist("{kept}"))')
        except OSError as error:
            err_console.print(f"{error}; the run goes on with the twist", style="yellow")
    return twist
