"""What a program is, in words and numbers: its name, its settings, and its prior."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import partial
from typing import Any

from bayeslm.models.lm import LanguageModel
from bayeslm.models.rewards import Reward
from bayeslm.validation import validated

from .program import Program

LONGEST = 200  # characters of a setting


@validated
def describe(program: Program) -> dict[str, Any]:
    """Return a ``program``'s name and its settings that can be written down, for the statistics of a run.

    They are the attributes of an object, such as a `TiltedLM`, or the arguments of a function, its defaults among them;
    of both those that are numbers, strings, tuples of strings, rewards or language models. ``prior`` is the name of the
    language model.
    """
    model = program.model
    named = getattr(model, "func", model) if isinstance(model, partial) else model
    is_function = hasattr(named, "__name__")
    settings = _arguments(program) if is_function else {k: v for k, v in vars(model).items() if k[0] != "_"}
    priors = [_prior_name(site.fn.lm) for site in program.completions]
    found = {"program": named.__name__ if is_function else type(model).__name__}
    found |= {"prior": ", ".join(dict.fromkeys(priors))} if priors else {}
    return found | {name: shown for name, value in settings.items() if (shown := written(value)) is not None}


def describe_object(value: Any) -> str:
    """Return an object's class with its settings that are numbers: ``ReverseKL(num_particles=8)``."""
    settings = vars(value) if hasattr(value, "__dict__") else {}
    simple = {k: written(v) for k, v in settings.items() if k[0] != "_" and not isinstance(v, str)}
    return f"{type(value).__name__}({', '.join(f'{k}={v}' for k, v in simple.items() if v is not None)})"


def written(value: Any) -> Any:
    """Return a value as JSON has it: a number, strings, or in words a reward or a language model; else None."""
    if isinstance(value, LanguageModel):
        return _prior_name(value)
    if isinstance(value, Reward):
        value = repr(value)
    if isinstance(value, tuple) and value and all(isinstance(each, str) for each in value):
        return list(value)
    if isinstance(value, str):
        return value if len(value) <= LONGEST else f"{value[:LONGEST]}…"
    return value if isinstance(value, bool | int | float) else None


def _prior_name(lm: Any) -> str:
    return getattr(lm, "name", None) or type(getattr(lm, "network", lm)).__name__


def _arguments(program: Program) -> Mapping[str, Any]:
    """Return the arguments of a function by name, with its defaults; none where they do not fit its signature."""
    try:
        bound = inspect.signature(program.model).bind(*program.args, **program.kwargs)
    except (TypeError, ValueError):
        return {}
    bound.apply_defaults()
    return bound.arguments
