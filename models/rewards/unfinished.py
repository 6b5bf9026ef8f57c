r"""Rewards of unfinished texts, for engines that weigh a completion while it is written.

Twisted sequential Monte Carlo (Zhao et al. 2024, arXiv 2404.17546) weighs the first t tokens by a guess

    \psi_t(x_{1:t}) = \exp(r_{prefix}(c, x_{1:t}) / \beta)  ~  E[\exp(r(c, x) / \beta) | c, x_{1:t}]

The guesses cancel from step to step, so that any leads to the same posterior, the better the sooner, as long as it is
0 only where the truth is: r_prefix may be -inf only if no continuation of the text, the text itself being one, has
another score than -inf.

A program calls its rewards as always; this context tells them that what they see is unfinished. It reaches every
`Reward`. A plain function that the program calls itself scores the text so far as it is, and whether its -inf is final
nobody knows; that of a `Reward` is, and is noted.
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
class Prefixes:
    """What rewards are told: which completions are finished texts, and what to do without a ``prefix`` method.

    And what they tell: which completions are ``lost``, a `Reward` having said that nothing can come of them.
    """

    finished: np.ndarray  # bool, of the completions' batch shape
    partial: bool
    lost: np.ndarray  # bool, the same

    def finished_of(self, text_shape: tuple[int, ...], shape: tuple[int, ...]) -> np.ndarray:
        """Which of the texts are finished: texts of ``text_shape`` broadcast to ``shape``, flat."""
        known = self.finished if self.finished.shape == text_shape else np.zeros(text_shape, dtype=bool)
        return np.broadcast_to(known, shape).ravel()

    def note(self, scores: np.ndarray) -> None:
        """Take down which texts have the score -inf, where the scores are those of the completions."""
        if scores.shape == self.finished.shape:
            self.lost[...] |= np.isneginf(scores)


_current: ContextVar[Prefixes | None] = ContextVar("prefixes", default=None)


@contextmanager
def prefixes(finished: Any, *, partial: bool = False) -> Iterator[Prefixes]:
    """Within, rewards take completions for texts so far: `Reward.score` scores the finished, `Reward.prefix` the rest.

    Completions of another shape than ``finished`` belong to another site, and are all taken for unfinished. Contexts
    nest, and are each thread's own.

    :param finished: which completions are whole texts: bool, tensor or array, of the completions' batch shape.
    :param partial: a reward without ``prefix`` scores the text so far as it is; its -inf, which might be mended, then
        counts as 0, or as the bound nearest to 0. Without it such a reward raises `RewardError`.
    :raises TypeError: if ``finished`` is not bool.
    """
    known = torch.as_tensor(finished)
    if known.dtype != torch.bool:
        raise TypeError(f"finished must be bool, got {known.dtype}")
    told = Prefixes(known.cpu().numpy(), partial, np.zeros(known.shape, dtype=bool))
    token = _current.set(told)
    try:
        yield told
    finally:
        _current.reset(token)


@contextmanager
def suspended() -> Iterator[Prefixes | None]:
    """Gives the context, and switches it off within: what a reward calls in its turn scores texts as they are."""
    context = _current.get()
    token = _current.set(None)
    try:
        yield context
    finally:
        _current.reset(token)
