"""What a program is, in words and numbers: its name, its settings, its prior, and its prompts."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from bayeslm.chats import has_speakers
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


@validated
def prompt_labels(program: Program) -> list[str]:
    """Return the name of each prompt as errors and warnings say it: of chats the user's last turn."""
    texts, turns = prompt_texts(program), chat_turns(program)
    return turns if len(turns) == len(texts) else texts  # a part of a program's prompts has texts of its own


@validated
def prompt_texts(program: Program) -> list[str]:
    """Return the text of each prompt, if a completion site has one text a prompt, else its number."""
    if program.in_chunks:
        return of_all(program, [prompt_texts(chunk) for chunk in program.chunks])
    for site in program.completions:
        if site.fn.prompt_ids.shape[:-1].numel() == program.num_prompts:
            return site.fn.prompt_texts()
    return [str(i) for i in range(program.num_prompts)]


def chat_turns(program: Program) -> list[str]:
    """Return the last user's turn of each prompt, if the prompts are chats, or chats and texts; else an empty list.

    The prompts are that argument of the program whose turns are in the texts that the language model reads: a column
    of the reward may hold chats too.
    """
    for value in (*program.args, *program.kwargs.values()):
        if isinstance(value, list | tuple) and len(value) == program.full_size and any(map(has_speakers, value)):
            turns = [_last_turn(prompt) if has_speakers(prompt) else prompt for prompt in value]
            texts = prompt_texts(program)
            if len(texts) == len(turns) and all(map(_is_in, turns, texts)):
                return turns
    return []


def _is_in(turn: Any, text: str) -> bool:
    return isinstance(turn, str) and " ".join(turn.split()) in " ".join(text.split())


def of_all(program: Program, parts: list[list[Any]]) -> list[Any]:
    """Return the values of all prompts, from those of each of a program's `chunks`, the last of which may overlap."""
    *before, last = parts
    return [*itertools.chain(*before), *last[sum(map(len, parts)) - program.full_size :]]


def _last_turn(chat: Sequence[Mapping[str, Any]]) -> str:
    """Return the content of the user's last message, or of the last one; of a list of parts their texts."""
    turn = next((turn for turn in reversed(chat) if turn["role"] == "user"), chat[-1])
    content = turn.get("content") or ""
    parts = [content] if isinstance(content, str) else content
    return " ".join(part if isinstance(part, str) else str(part.get("text", "")) for part in parts)
