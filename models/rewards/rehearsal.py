"""Runs of a program that try it: other scores in the place of rewards', and whether functions seed random numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any
from zlib import crc32

import torch
from torch import Tensor

from .broadcasting import Flat

_MARK = torch.tensor(list(b"bayeslm."), dtype=torch.uint8)  # a seed that nobody sets
_active: ContextVar[str | None] = ContextVar("rehearsal", default=None)


class RememberedScores:
    """The scores that rewards gave in a run: by reward, prompt, completion and columns."""

    def __init__(self) -> None:
        self._known: dict[int, float] = {}

    def add(self, reward: Any, flat: Flat, scores: Sequence[float]) -> None:
        """Add scores; two different ones of the same text are none, since the reward is random."""
        for key, score in zip(_keys(reward, flat), scores, strict=True):
            if self._known.setdefault(key, score) != score:
                self._known[key] = math.nan

    def find(self, reward: Any, flat: Flat) -> list[float]:
        """Return the scores; arbitrary ones of texts that the run did not have.

        :raises LookupError: if the reward is random.
        """
        others = zip(_keys(reward, flat), arbitrary_scores(*flat[:2]), strict=True)
        found = [self._known.get(key, other) for key, other in others]
        if any(map(math.isnan, found)):
            raise LookupError("the reward has different scores of the same text")
        return found


def _keys(reward: Any, flat: Flat) -> Iterator[int]:
    prompts, completions, columns = flat
    texts: dict[int, str] = {}  # of the objects in these lists, of which each may stand there many times

    def text(value: Any) -> str:
        if id(value) not in texts:
            texts[id(value)] = repr(value)
        return texts[id(value)]

    lists = [column for _, column in sorted(columns.items()) if isinstance(column, list)]
    for row in zip(prompts, completions, *lists, strict=True):
        yield hash((id(reward), *map(text, row)))


_remembered: ContextVar[RememberedScores | None] = ContextVar("remembered scores", default=None)
_repeated: ContextVar[RememberedScores | None] = ContextVar("repeated scores", default=None)


@contextmanager
def remembering_scores() -> Iterator[RememberedScores]:
    """Within, the scores of finished texts are added to the yielded ones."""
    token = _remembered.set(scores := RememberedScores())
    try:
        yield scores
    finally:
        _remembered.reset(token)


_asked: ContextVar[list[bool] | None] = ContextVar("whether it was asked", default=None)


@contextmanager
def repeating(scores: RememberedScores) -> Iterator[list[bool]]:
    """Within, rewards give these scores, and call no function.

    Yields a list that is empty as long as no program asks `is_rehearsal`: one that does is another then.
    """
    asked: list[bool] = []
    tokens = _repeated.set(scores), _asked.set(asked)
    try:
        yield asked
    finally:
        _repeated.reset(tokens[0])
        _asked.reset(tokens[1])


def remember(reward: Any, flat: Flat, scores: Sequence[float]) -> None:
    """Add the scores of a reward to those that are remembered, if any are."""
    if (remembered := _remembered.get()) is not None:
        remembered.add(reward, flat, scores)


def repeated(reward: Any, flat: Flat) -> list[float] | None:
    """Return the scores that a reward is to repeat, if it is."""
    return None if (scores := _repeated.get()) is None else scores.find(reward, flat)


@contextmanager
def rehearsal(*, calls: bool = False) -> Iterator[None]:
    """Within, each `Reward` gives a number between 0 and 1 that depends on prompt and completion alone.

    :param calls: call the reward's function too, and check what it returns, so that its errors appear early.
    """
    token = _active.set("calls" if calls else "silent")
    try:
        yield
    finally:
        _active.reset(token)


def is_rehearsal() -> bool:
    """Return whether rewards are to give arbitrary scores, and call no function; or earlier ones, see `repeating`."""
    if (asked := _asked.get()) is not None:
        asked.append(True)
        return True
    return _active.get() == "silent"


def is_trial() -> bool:
    """Return whether rewards are to give arbitrary scores after they have called their functions."""
    return _active.get() == "calls"


def arbitrary_scores(prompts: Sequence[Any], completions: Sequence[str]) -> list[float]:
    """Return a number for each completion."""
    pairs = zip(prompts, completions, strict=True)
    return [crc32(repr(pair).encode("utf-8", "surrogatepass")) / 2**32 for pair in pairs]


@contextmanager
def watching_seed() -> Iterator[list[bool]]:
    """Undo it where the block seeds torch's random numbers; the yielded list is empty where it does not.

    The generator has a seed of ours in the block, and the numbers that it would have: a seed that is the same as before
    shows too.
    """
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    before = torch.get_rng_state()
    found: list[bool] = []
    torch.set_rng_state(_with_seed(before, _MARK))
    try:
        yield found
    finally:
        after = torch.get_rng_state()
        if torch.equal(after[: len(_MARK)], _MARK):
            torch.set_rng_state(_with_seed(after, before[: len(_MARK)]))
        else:
            found.append(True)
            torch.set_rng_state(before)
            for i, state in enumerate(cuda):
                torch.cuda.set_rng_state(state, i)


def _with_seed(state: Tensor, seed: Tensor) -> Tensor:
    """Return the state of torch's generator on the CPU with another seed, which is in its first bytes."""
    return torch.cat([seed, state[len(seed) :]])
