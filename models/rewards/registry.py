"""Rewards by name, for the command line."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Iterable
from typing import Any

from bayeslm.validation import validated

from .classifier import Classifier
from .reward import Reward
from .text_rewards import Sentiment, Similarity, Toxicity
from .verifiable import Constraint, Contains, Length, Matches

BUILT_IN: dict[str, type[Reward]] = {
    reward.__qualname__.lower(): reward
    for reward in (Classifier, Constraint, Contains, Length, Matches, Sentiment, Similarity, Toxicity)
}


@validated
def get(name: str, **settings: Any) -> Reward:
    """Return a built-in reward by its name in lower case, with settings: ``get("length", target=20)``.

    :raises ValueError: if there is none of that name; the message has the nearest one.
    """
    if name not in BUILT_IN:
        raise ValueError(f"no reward is called {name!r}{_nearest(name, BUILT_IN)}; there are {', '.join(BUILT_IN)}")
    return BUILT_IN[name](**settings)


@validated
def load(address: str) -> Reward:
    """Import a reward: a function in TRL's convention, a `Reward`, or a class of one.

    :param address: ``"package.module:name"``.
    :raises ValueError: if the address is malformed, or no such module or name exists.
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
        found = found()
    return found if isinstance(found, Reward) else Reward(found)


def _nearest(name: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.5)
    return f", did you mean {close[0]!r}?" if close else ""
