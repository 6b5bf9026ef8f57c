r"""Rewards of unfinished texts, for engines that weigh a completion while it is written.

Twisted sequential Monte Carlo (Zhao et al. 2024, arXiv 2404.17546) weighs the first t tokens by an estimate

    \psi_t(x_{1:t}) = \exp(r_{prefix}(c, x_{1:t}) / \beta)  ~  E[\exp(r(c, x) / \beta) | c, x_{1:t}]

The estimates cancel from step to step. So any of them leads to the same posterior, and a better one sooner, if it is 0
only where the expectation is: r_prefix may be -inf only if every continuation of the text, the text itself being one,
scores -inf.

A program calls its rewards as always; within the context `prefixes` every `Reward` takes completions for unfinished
texts. A plain function that the program calls itself scores the text so far like a finished one, and whether its -inf
is final is not known; the -inf of a `Reward` is, and is recorded.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True, eq=False)
class UnfinishedTexts:
    """Which completions are finished, and which of them rewards have ruled out.

    :param finished: the completions that are finished texts, bool of the completions' batch shape.
    :param partial: score unfinished texts like finished ones where a reward has no ``prefix``.
    :param lost: the completions whose score by a `Reward` is a final -inf, of the same shape; rewards set it.
    """

    finished: np.ndarray
    partial: bool
    lost: np.ndarray

    def finished_of(self, text_shape: tuple[int, ...], shape: tuple[int, ...]) -> np.ndarray:
        """Return which texts are finished, flat, of texts of ``text_shape`` broadcast to ``shape``."""
        known = self.finished if self.finished.shape == text_shape else np.zeros(text_shape, dtype=bool)
        return np.broadcast_to(known, shape).ravel()

    def record(self, scores: np.ndarray) -> None:
        """Record which texts have the score -inf, if the scores are those of the completions."""
        if scores.shape == self.finished.shape:
            self.lost[...] |= np.isneginf(scores)


_current: ContextVar[UnfinishedTexts | None] = ContextVar("prefixes", default=None)


@contextmanager
def prefixes(finished: Any, *, partial: bool = False) -> Iterator[UnfinishedTexts]:
    """Within, rewards take completions for unfinished: `Reward.score` scores the finished, `Reward.prefix` the others.

    Completions of another shape than ``finished`` belong to another site, and are all taken for unfinished. Contexts
    nest, and each thread has its own.

    :param finished: which completions are finished texts: bool, tensor or array, of the completions' batch shape.
    :param partial: a reward without ``prefix`` scores the text so far like a finished one; its -inf, which may not be
        final, then counts as 0, or as the bound nearest to 0. Without it such a reward raises `RewardError`.
    :raises TypeError: if ``finished`` is not bool.
    """
    known = torch.as_tensor(finished)
    if known.dtype != torch.bool:
        raise TypeError(f"finished must be bool, got {known.dtype}")
    context = UnfinishedTexts(known.cpu().numpy(), partial, np.zeros(known.shape, dtype=bool))
    token = _current.set(context)
    try:
        yield context
    finally:
        _current.reset(token)


@contextmanager
def suspended() -> Iterator[UnfinishedTexts | None]:
    """Give the context and leave it for the block: rewards that a reward calls in turn score finished texts."""
    context = _current.get()
    token = _current.set(None)
    try:
        yield context
    finally:
        _current.reset(token)
