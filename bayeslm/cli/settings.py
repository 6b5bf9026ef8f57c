"""What one `bayeslm infer` runs: the keys of a settings file, and the options of the same names."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from bayeslm.validation import Count, Positive, Seed, Within, validated

from .console import UsageError
from .expressions import calls, nearest
from .inputs import Dtype
from .plain_yaml import read_yaml

Engines = dict[str, dict[str, Any]]


@validated
@dataclasses.dataclass(frozen=True)
class RunSettings:
    """The settings of a run, by the names that they have in Python.

    :param prompts: a file of prompts, or a list of them, each a text, a chat, token ids, or a mapping of "prompt" and
        columns for the reward.
    :param prior: see `LanguageModel.from_pretrained`, as for ``device``, ``dtype``, ``batch_size``,
        ``gradient_checkpointing`` and ``compile``.
    :param reward: an expression of built-in rewards and addresses of functions, see `inputs.load_reward`.
    :param beta: see `TiltedLM`, as for ``max_new_tokens``, ``temperature``, ``top_k``, ``top_p``, ``stop`` and
        ``subsample_size``.
    :param timeout: seconds of the reward for a batch of texts.
    :param engines: settings of each engine, by its own names.
    :param seed: of all engines that have no other.
    :param out: a folder for the results.
    """

    prompts: str | list[Any] | None = None
    prior: str = "smollm2"
    reward: str = "sentiment"
    beta: Positive = 0.1
    timeout: Positive | None = None
    max_new_tokens: Count = 24
    temperature: Positive = 1.0
    top_k: Count | None = None
    top_p: Annotated[float, Within("(0, 1]")] | None = None
    stop: str | list[str] | None = None
    subsample_size: Count | None = None
    engines: Mapping[str, Any] = dataclasses.field(default_factory=lambda: {"importance": {}})
    device: str | None = None
    dtype: Dtype | None = None
    batch_size: Count | None = None
    gradient_checkpointing: bool = False
    compile: bool = False
    seed: Seed = 0
    out: str | None = None

    def compared(self) -> dict[str, Any]:
        """Return the settings that all results depend on, but for those that are compared by their content."""
        return {name: getattr(self, name) for name in NAMES if name not in NOT_COMPARED}

    def program(self, lm: Any, reward: Any, subsample_size: int | None = None) -> Any:
        """Make the program of a language model.

        :param lm: the prior, or a packed copy.
        :param reward: what ``self.reward`` says.
        :param subsample_size: of the program's prompts; None takes all.
        :returns: a `TiltedLM`.
        """
        from bayeslm.models import TiltedLM

        return TiltedLM(
            lm,
            reward,
            self.beta,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            stop=self.stop,
            subsample_size=subsample_size,
        )

    def as_file(self) -> dict[str, Any]:
        """Return what a settings file says to run this again; each engine has its seed, and there is no ``out``."""
        found = {name: getattr(self, name) for name in NAMES if name not in ("seed", "out")}
        found["engines"] = {name: {"seed": self.seed} | own for name, own in self.engines.items()}
        return {name: value for name, value in found.items() if value is not None}


NOT_COMPARED = ("prompts", "engines", "device", "compile", "timeout", "seed", "out")
NAMES = [field.name for field in dataclasses.fields(RunSettings)]


def read_settings(config: Path | None, options: dict[str, Any], engines: list[str]) -> RunSettings:
    """Return the settings in a file, with those of the command line in their place.

    :param options: those that were given, by name.
    :param engines: texts such as ``svi(num_steps=200), importance``. They choose the engines of the run; their settings
        take the place of the file's.
    :raises UsageError: if a setting is unknown or of the wrong type or range; with the file or the option.
    """
    found = {} if config is None else _read(config)
    if "seed" in options:  # it takes the place of the file's seeds, not of those in --engine
        for own in found.get("engines", {}).values():
            own.pop("seed", None)
    chosen: Engines = {}
    for text in engines:
        try:
            for name, settings in calls(text):
                if name in chosen:
                    raise ValueError(f"{name} is repeated")
                chosen[name] = found.get("engines", {}).get(name, {}) | settings
        except ValueError as error:
            raise UsageError(f"--engine: {error}") from None
    for name, value in options.items():
        _check(f"--{name.replace('_', '-')}", {name: value})
    merged = RunSettings(**found | options | ({"engines": chosen} if chosen else {}))
    if not merged.engines:
        raise UsageError(f"{config}: engines must hold one engine at least, such as {{importance: {{}}}}")
    return merged


def _read(config: Path) -> dict[str, Any]:
    """Return the settings in a file, checked."""
    try:
        found = read_yaml(config)
    except (ValueError, OSError) as error:
        raise UsageError(str(error)) from None
    for name in found:
        if name not in NAMES:
            raise UsageError(f"{config}: {name!r} is unknown{nearest(name, NAMES)} Allowed are {', '.join(NAMES)}")
    engines = found.get("engines", {})
    if not isinstance(engines, dict):
        raise UsageError(
            f"{config}: engines must be a mapping from each engine to its settings, such as "
            f"{{importance: {{}}, svi: {{num_steps: 200}}}}, got {engines!r:.60}"
        )
    for name, settings in engines.items():
        if not isinstance(settings, dict | None):
            raise UsageError(
                f"{config}: engines: {name} must be a mapping of settings, such as {{seed: 1}}, got {settings!r:.60}"
            )
    _check(str(config), found)
    return found | ({"engines": {name: x or {} for name, x in engines.items()}} if "engines" in found else {})


def _check(where: str, settings: Mapping[str, Any]) -> None:
    """Check types and ranges; an error begins with the file or the option."""
    try:
        RunSettings(**settings)
    except (TypeError, ValueError) as error:
        reason = str(error).removeprefix("RunSettings: ")
        if where.startswith("--"):
            reason = reason.partition(" ")[2]  # the option has the name
        raise UsageError(f"{where}{' ' if where.startswith('--') else ': '}{reason}") from None
