"""Baselines of the score-function gradient: f less what is known of it without the particle itself."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .program import Program


def leave_one_out(name: str, f: Tensor) -> Tensor:
    """f_i (particle, prompt) less the mean of the other particles'; one particle has none.

    Kool, van Hoof and Welling 2019; RLOO, Ahmadian et al. 2024, arXiv 2402.14740. Also the gradient of the log-variance
    divergence (VarGrad, Richter et al. 2020, arXiv 2010.10436).
    """
    return less_others(f, f)


def less_others(f: Tensor, own: Tensor) -> Tensor:
    """``own`` (particle, prompt) less the mean of the other particles' ``f``; one particle has none."""
    n = len(f)
    return own if n == 1 else own - (f.sum(0) - f) / (n - 1)


class ExponentialAverage:
    """f less an exponential moving average of the steps before, over particles and prompts (Williams 1992).

    For groups of one particle, which leave no other to compare with.
    """

    def __init__(self, decay: float = 0.9) -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"ExponentialAverage: decay must be in [0, 1), got {decay}")
        self.decay = decay
        self._averages: dict[str, Tensor] = {}

    def reset(self, program: Program) -> None:
        """Forget the steps before: another training begins."""
        self._averages.clear()

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self._averages)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._averages = dict(state)

    def __call__(self, name: str, f: Tensor) -> Tensor:
        now = f.mean()
        before = self._averages.get(name, torch.zeros_like(now))
        self._averages[name] = self.decay * before + (1.0 - self.decay) * now if name in self._averages else now
        return f - before
