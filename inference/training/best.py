"""The best parameters of a training: its last ones, unless those of an earlier step, or the first, have a higher ELBO.

The ELBO of single steps is noisy, and so are choices by it. So a training is cut into ten parts. Its last parameters
are compared with those at the end of the part whose mean ELBO was the highest, and with the first ones, by new draws of
each, where the figures of the steps leave it open which is the highest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from .state import EMPTY, State, copies, under, within

PARTS = 10
ERRORS = 2.0  # standard errors: what is lower by more needs no draws


class Best:
    """The candidates of one training.

    ``step`` is that at the end of the best part, ``params`` the parameters then.
    """

    def __init__(self) -> None:
        self.step = 0
        self.params: State = EMPTY
        self._elbo, self._since = -np.inf, 0

    def note(self, elbo: Sequence[np.ndarray], share: float, before: float, params: Mapping[str, Tensor]) -> None:
        """Note a step.

        :param elbo: of all steps, this one included.
        :param share: of the budget that is used, and ``before`` this step.
        :param params: after the step, by name; they are copied.
        """
        if int(PARTS * share) == int(PARTS * before) or share >= 1.0:
            return
        mean = float(np.mean([x.mean() for x in elbo[self._since :]]))
        self._since = len(elbo)
        if mean > self._elbo:
            self.step, self._elbo = len(elbo), mean
            self.params = copies(params)

    def rivals(self, elbo: Sequence[np.ndarray]) -> list[int] | None:
        """Return the steps, 0 among them, whose parameters may have a higher ELBO than the last ones.

        None where a reward is -inf: no ELBO tells policies apart.
        """
        means = np.array([x.mean() for x in elbo])
        if not np.isfinite(means).all():
            return None
        last = means[-max(1, len(means) // PARTS) :]
        changes = np.diff(means)
        rivals = [0] if last.mean() - means[0] <= max(np.abs(changes), default=0.0) else []
        error = ERRORS * float(np.std(changes)) / len(last) ** 0.5 if len(changes) else 0.0
        return rivals + ([self.step] if self.step and self._elbo > last.mean() + error else [])

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return tensors and numbers for a checkpoint."""
        numbers = {"step": self.step, "elbo": self._elbo if self.step else None, "since": self._since}
        return under("best", self.params), numbers

    def restore(self, tensors: State, numbers: Mapping[str, Any]) -> None:
        """Put back what `state` returned."""
        self.params = within("best", tensors)
        self.step, self._since = numbers["step"], numbers["since"]
        self._elbo = -np.inf if numbers["elbo"] is None else numbers["elbo"]
