"""Rewards by name, for the command line."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Iterable
from typing import Any

from bayeslm.validation import validated

from .answers import ExactMatch, TokenF1
from .classifier import Classifier
from .grammar import Grammar
from .judge import Judge
from .reward import Reward
from .text_rewards import Sentiment, Similarity, Toxicity
from .verifiable import Constraint, Contains, Length, Matches

BUILT_IN: dict[str, type[Reward]] = {
    reward.__qualname__.lower(): reward
    for reward in (
        *(Classifier, Constraint, Contains, ExactMatch, Grammar, Judge, Length, Matches, Sentiment, Similarity),
        *(TokenF1, Toxicity),
    )
}


@validated
def get(name: str, /, **settings: Any) -> Reward:
    """Return a built-in reward by its name in lower case, with settings: ``get("length", target=20)``.

    :raises ValueError: if there is none of that name, with the nearest one, or settings are missing or unknown.
    """
    if name not in BUILT_IN:
        raise ValueError(f"no reward has the name {name!r}{_nearest(name, BUILT_IN)}; there are {', '.join(BUILT_IN)}")
    return _make(BUILT_IN[name], name, settings)


@validated
def load(address: str) -> Reward:
    """Import a reward: a function in TRL's convention, a `Reward`, or a class of one.

    :param address: ``"package.module:name"``.
    :raises ValueError: if the address is malformed, no such module or name exists, or a class needs settings.
    :raises TypeError: if the object of that name cannot be called.
    """
    module_name, colon, name = address.partition(":")
    if not (module_name and colon and name):
        raise ValueError(f"write a reward's address as package.module:name, got {address!r}")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module exists, and another that it imports does not
        raise ValueError(f"cannot load {address!r}: there is no module {error.name!r}") from error
    if not hasattr(module, name):
        raise ValueError(f"cannot load {address!r}: {module_name} has no {name!r}{_nearest(name, vars(module))}")
    found = getattr(module, name)
    if inspect.isclass(found) and issubclass(found, Reward):
        found = _make(found, address, {})
    return found if isinstance(found, Reward) else Reward(found)


def _make(reward: type[Reward], name: str, settings: dict[str, Any]) -> Reward:
    """Make a reward of its settings.

    :raises ValueError: if settings are missing or unknown.
    """
    accepted = {k: p for k, p in inspect.signature(reward).parameters.items() if p.kind is not p.VAR_KEYWORD}
    required = [k for k, p in accepted.items() if p.default is p.empty and p.kind is not p.VAR_POSITIONAL]
    if missing := [k for k in required if k not in settings]:
        how = f"write one with its settings, as a name in its module, in place of {name!r}"
        settings_of = ", ".join(f"{k}=..." for k in missing)
        if name in BUILT_IN:
            how = f"write get({name!r}, {settings_of}), or on the command line {name}({settings_of})"
        raise ValueError(f"reward {name!r} needs the settings {', '.join(missing)}: {how}")
    takes_any = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(reward).parameters.values())
    if not takes_any and (unknown := [k for k in settings if k not in accepted]):
        near, there_are = _nearest(unknown[0], accepted), ", ".join(accepted) or "none"
        raise ValueError(f"reward {name!r} has no setting {unknown[0]!r}{near}; its settings are {there_are}")
    return reward(**settings)


def _nearest(name: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.5)
    return f", did you mean {close[0]!r}?" if close else ""
