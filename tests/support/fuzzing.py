"""Random arguments for everything public, plausible ones by annotation and wrong ones, and what an error must be."""

from __future__ import annotations

import collections.abc
import functools
import importlib
import inspect
import math
import os
import re
import sys
import time
import traceback
import types
import typing
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import torch
from hypothesis import strategies as st
from support.models import table_lm
from torch import Tensor

from bayeslm import Posterior
from bayeslm.inference import Exact, ImportanceSampling, RunError
from bayeslm.inference.control import Thompson
from bayeslm.inference.training import Adam, ReverseKL
from bayeslm.models import LanguageModel, TiltedLM, rewards
from bayeslm.models.control import TabularEnvironment, river_swim
from bayeslm.validation import Unchecked, Within, annotations_of

ROOMS = {
    "inference": ("control", "markov", "preferences", "program", "sequential", "training"),
    "models": ("control", "lm", "preferences", "rewards", "samplers"),
}
FACE = ("advice", "bounds", "calibration", "decisions", "diagnostics", "moments", "plots", "reliability", "report")
FACE += ("summaries", "weights")
PACKAGES = [*ROOMS, *(f"{floor}.{room}" for floor, rooms in ROOMS.items() for room in rooms)]
ROOT = Path(__file__).parents[2]

# The suite tries the same few examples at each run; ``make fuzz`` many, and others at each run.
LARGE = os.environ.get("FUZZ") == "large"
hypothesis.settings.register_profile(
    "fuzzing",
    derandomize=not LARGE,
    database=None,
    deadline=None,
    print_blob=LARGE,
    suppress_health_check=list(hypothesis.HealthCheck),
    phases=[phase for phase in hypothesis.Phase if LARGE or phase != hypothesis.Phase.shrink],
)


def budget(small: int, large: int) -> Callable[[Any], Any]:
    """Set the number of examples in the suite, and in `make fuzz`, which counts them."""
    number = large if LARGE else small
    settings = hypothesis.settings(hypothesis.settings.get_profile("fuzzing"), max_examples=number)

    def decorate(test: Any) -> Any:
        test.hypothesis.inner_test = _counted(test.hypothesis.inner_test, number)
        return settings(test)

    return decorate


class Progress:
    """Says how far the test that runs has come: every half minute, and at its end."""

    def __init__(self, name: str, say: Callable[[str], None]) -> None:
        self.name, self.say = name, say
        self.examples, self.start, self.said = 0, time.monotonic(), time.monotonic()
        self.used = time.process_time()

    def count(self, number: int) -> None:
        self.examples += 1
        if time.monotonic() - self.said > 30:
            self.said = time.monotonic()
            self.say(f"{self.name}: {self.examples} examples of about {number}, {self.seconds:.0f} s")

    def end(self) -> None:
        used = time.process_time() - self.used
        self.say(f"{self.name}: {self.examples} examples in {self.seconds:.1f} s, {used:.1f} s of a core")

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.start


progress: ContextVar[Progress | None] = ContextVar("progress", default=None)


def _counted(test: Callable[..., None], number: int) -> Callable[..., None]:
    @functools.wraps(test)
    def counted(*args: Any, **kwargs: Any) -> None:
        if (current := progress.get()) is not None:
            current.count(number)
        test(*args, **kwargs)

    return counted


def public_classes() -> dict[str, type]:
    """All classes in the `__all__` of `PACKAGES`, but errors, protocols, abstract classes and named tuples."""
    found: dict[str, type] = {}
    for package in PACKAGES:
        module = importlib.import_module(f"bayeslm.{package}")
        for name in module.__all__:
            cls = getattr(module, name)
            if not isinstance(cls, type) or issubclass(cls, tuple | Exception):
                continue
            if not (inspect.isabstract(cls) or getattr(cls, "_is_protocol", False)):
                found[f"{package}.{name}"] = cls
    return found


def public_functions() -> dict[str, Callable[..., Any]]:
    """Functions that a user calls, and methods of the objects that a user has most to do with."""
    found: dict[str, Callable[..., Any]] = {}
    for room in (*FACE, *PACKAGES):
        module = importlib.import_module(f"bayeslm.{room}")
        functions = {name: x for name, x in vars(module).items() if inspect.isfunction(x) and name[0] != "_"}
        found |= {f"{room}.{name}": x for name, x in functions.items() if x.__module__ == module.__name__}
        found |= {f"{room}.{name}": getattr(module, name) for name in getattr(module, "__all__", ())}
    found = {name: x for name, x in found.items() if name.split(".")[-1] not in UNCHECKED | UNCALLED}
    for x in (posterior(), lm(), TabularEnvironment(river_swim(3))):
        own = [vars(cls) for cls in type(x).__mro__ if cls.__module__.startswith("bayeslm")]
        names = [name for name in dir(x) if name[0] != "_" and any(name in names for names in own)]
        found |= {f"{type(x).__name__}.{name}": getattr(x, name) for name in names if name not in UNCALLED}
    return {name: x for name, x in found.items() if inspect.isroutine(x) and inspect.signature(x).parameters}


# Machinery between rooms that does not check its arguments (docs/architecture.md): what runs at each step, token or
# call of a reward, and, in the second part, what the project's own classes hand to one another.
UNCHECKED = set(
    """
    all_to_numpy along assign_values broadcast call categorical copied draw_latents gathered generate in_prompts
    leave_one_out log_softmax_at num_draws on_host own_part particles_of put_on_host redraw run_particles
    sample_sites sampled_terms score_sites score_unconstrained score_values site_value sweep tempered to_numpy
    traces
    check_retained digest_of_values draw over_prompts posterior read_table refuse_sharded sample_texts learned_evidence
    stack_chains whole_offer without_index
    """.split()  # noqa: SIM905
)
UNCALLED = {"outcome", "push_to_hub", "from_pretrained", "sentence_embeddings"}  # the last three load networks
UNCALLED |= {"inspect", "inspect_or_reuse"}  # which call a program, whose errors are its own


@cache
def lm() -> LanguageModel:
    return table_lm(2, vocab=3)


@cache
def posterior() -> Posterior:
    return Exact(seed=0).run(TiltedLM(lm(), rewards.Length(), max_new_tokens=2), ["a"])


@cache
def objects() -> list[Any]:
    """One of each class of arguments."""
    engine = ImportanceSampling(num_particles=2, progress=False)
    environment = TabularEnvironment(river_swim(3))
    return [lm(), posterior(), rewards.Length(), Adam(), ReverseKL(), engine, environment, river_swim(3), Thompson()]


TENSORS = [torch.ones(2), torch.ones(2, 3) / 3, torch.zeros(3, 2, 3), torch.ones(3, 2, 3) / 3, torch.zeros(3).bool()]
TENSORS += [torch.tensor(0.5), torch.tensor([math.nan]), torch.zeros(0), torch.arange(4), -torch.ones(2)]
WRONG: list[Any] = [None, True, -1, 0, 1.5, math.nan, math.inf, -math.inf, 10**30, -(10**400), 1e300, 1j, "", "abc"]
WRONG += ["\ud800", b"x", [], [1, 2, 3], ["a", None], {}, {"a": 1}, (), {1}, object(), int, len, print, range(3)]
WRONG += [np.float32("nan"), np.int64(-3), np.bool_(True), np.array([1.0, 2.0]), np.array("a"), types.SimpleNamespace()]
WRONG += [lambda: None, *TENSORS]


def plausible(hint: Any) -> st.SearchStrategy[Any]:
    """Values that an annotation allows, as far as it says; small ones."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated and Unchecked in arguments:
        return plausible(arguments[0])
    if origin is typing.Annotated:
        interval = next((x for x in arguments[1:] if isinstance(x, Within)), None)
        if interval is None:
            return plausible(arguments[0])
        numbers = [0, 1, 2, 3, 8] if arguments[0] is int else [0.0, 1e-3, 0.5, 1, 1.0, 2.0]
        numpy = [np.int64(2)] if arguments[0] is int else [np.float32(0.5)]
        return st.sampled_from([x for x in numbers + numpy if x in interval])
    if hint is float:
        return st.sampled_from([-1.0, 0.0, 0.5, 2, math.inf])
    if origin in (typing.Union, types.UnionType):
        return st.one_of(*map(plausible, arguments))
    if origin is typing.Literal:
        return st.sampled_from(arguments)
    if hint is None or hint is types.NoneType:
        return st.none()
    simple: dict[Any, st.SearchStrategy[Any]] = {
        bool: st.booleans(),
        int: st.integers(0, 8),
        str: st.sampled_from(["a", "partial", "reward"]),
        Tensor: st.sampled_from(TENSORS),
        os.PathLike: st.just(Path("nowhere")),
    }
    cls = origin or hint
    if cls in simple:
        return simple[cls]
    if cls is collections.abc.Callable:
        return st.sampled_from([lambda *args, **kwargs: [0.0], lambda *args: torch.zeros(2, 2)])
    if cls in (list, collections.abc.Sequence, collections.abc.Collection):
        return st.lists(plausible(arguments[0]), max_size=3)
    if cls is tuple:
        return st.tuples(*(plausible(x) for x in arguments if x is not Ellipsis))
    if cls in (dict, collections.abc.Mapping):
        return st.dictionaries(*map(plausible, arguments), max_size=2)
    is_class = isinstance(cls, type) and hint is not Any and getattr(cls, "_is_runtime_protocol", True)
    known = [x for x in objects() if is_class and isinstance(x, cls)]
    return st.sampled_from(known or WRONG)


def arguments_of(cls: type, wrong: float) -> st.SearchStrategy[dict[str, Any]]:
    """Keyword arguments of a constructor, of which the share ``wrong`` are any values."""
    hints = annotations_of(cls)
    of_one: dict[str, st.SearchStrategy[Any]] = {}
    required = set()
    for name, parameter in inspect.signature(cls).parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if parameter.default is parameter.empty:
            required.add(name)
        good = plausible(hints.get(name, Any))
        share = st.integers(0, 99).map(lambda x: x < 100 * wrong)
        of_one[name] = share.flatmap(lambda bad, good=good: st.sampled_from(WRONG) if bad else good)
    optional = {name: strategy for name, strategy in of_one.items() if name not in required}
    return st.fixed_dictionaries({name: of_one[name] for name in of_one if name in required}, optional=optional)


def our_own(error: BaseException) -> bool:
    """Whether an error was raised by this project's code (or by a call of it, as Python's for a missing argument)."""
    last = traceback.extract_tb(error.__traceback__)[-1].filename
    return Path(last).is_relative_to(ROOT) and ".venv" not in Path(last).parts


def assert_clear(error: Exception, names: Iterator[str] | list[str]) -> None:
    """A TypeError or ValueError of our own that names an argument, or of programs, rewards or files.

    A position that there is not is Python's IndexError, which says what it got. Of a run that had results, what stopped
    it.
    """
    if isinstance(error, RunError):
        assert isinstance(error.__cause__, Exception)
        error = error.__cause__
    domain = type(error).__name__.endswith(("ProgramError", "EvidenceError", "RewardError", "PreferenceError"))
    named = any(re.search(rf"\b{re.escape(name)}\b", str(error)) for name in names)
    kind = isinstance(error, TypeError | ValueError) and (named or domain)
    kind |= isinstance(error, IndexError) and named and "got" in str(error)
    kind |= isinstance(error, ImportError | OSError) and bool(str(error))
    if not (kind and our_own(error)):
        print("".join(traceback.format_exception(error)[-4:]), file=sys.stderr)
    assert kind, f"{type(error).__name__} names none of {', '.join(names)}: {error}"
    assert our_own(error), f"{type(error).__name__} was raised elsewhere: {error}"
