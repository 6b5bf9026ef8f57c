"""Settings run: each engine on the program that they say, into their output folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

from . import resume
from .comparison import compare
from .console import UsageError
from .engines import Prepared, Run, learn_twist, prepare
from .inputs import language_model, load_reward, read_prompts
from .settings import RunSettings

SUBSAMPLED = ("svi", "importance")  # engines of programs whose prompts are subsampled


def execute(settings: RunSettings, place: Callable[[str, str], str]) -> None:
    """Run every engine of the settings that has no result in their output folder, and print the comparison.

    :param place: returns where a setting is from, for errors, of its name and its option.
    :raises UsageError: if a setting is unfit, with its place.
    """
    if settings.subsample_size is not None and (others := [x for x in settings.engines if x not in SUBSAMPLED]):
        raise UsageError(
            f"{place('subsample_size', '--subsample-size')} is for the engines {' and '.join(SUBSAMPLED)}; "
            f"{others[0]} takes all prompts at once"
        )
    run, at_engine = Run(settings.seed), place("engines", "--engine")
    found = {name: prepare(name, own, run, f"{at_engine} {name}") for name, own in settings.engines.items()}
    texts, columns = read_prompts(settings.prompts, place("prompts", "prompts"))
    scores = load_reward(settings.reward, place("reward", "--reward"))
    reward_in_time = scores if settings.timeout is None else scores.with_timeout(settings.timeout)
    with resume.Results(None if settings.out is None else Path(settings.out)) as results:
        known = settings.compared() | resume.identities({"prompts": texts, "columns": columns, "reward's code": scores})
        results.require_same(known, {name: x.identity() for name, x in found.items() if x is not None})
        run.lm = lm = language_model(
            settings.prior,
            settings.device,
            settings.dtype,
            batch_size=settings.batch_size,
            gradient_checkpointing=settings.gradient_checkpointing,
            compile=settings.compile,
        )
        run.program = program = partial(settings.program, reward=reward_in_time)
        engines: dict[str, Prepared] = {}
        for name, own in settings.engines.items():
            prepared = found[name] or prepare(name, own, run, f"{at_engine} {name}")
            assert prepared is not None  # there is a language model now
            engines[name] = prepared
        if results.out is not None:  # else nothing is compared, and the weights need not be read through
            known |= resume.identities({"prior's content": lm})
            results.begin(known, {name: x.identity() for name, x in engines.items()}, settings.as_file())
        packed = cache(lm.packed)  # for engines that train nothing

        def model(name: str) -> Any:
            prior_of = lm if engines[name].trains else packed()
            return program(prior_of, subsample_size=settings.subsample_size)

        for name, x in engines.items():
            if x.learning is not None:
                kept = None if results.out is None else results.out / f"{name}-twist"
                twist = learn_twist(x.learning, run.lm, model(name), texts, columns, kept)
                x.engine = dataclasses.replace(x.engine, twist=twist)
        compare(model, texts, columns, {name: x.engine for name, x in engines.items()}, results)
