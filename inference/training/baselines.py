"""Baselines of the score-function gradient: f less what is known of it without the particle itself.

A baseline is called with the name of a latent, f (particle, prompt), and the indices (prompt,) of its prompts where
they are a minibatch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn.functional import pad

from bayeslm.inference.program import Program

Baseline = Callable[[str, Tensor, Tensor | None], Tensor]


def leave_one_out(name: str, f: Tensor, prompts: Tensor | None = None) -> Tensor:
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
    """f less an exponential moving average of the steps before, of the same prompt's particles (Williams 1992).

    For groups of one particle, which leave no other to compare with. A prompt that was never seen has the mean of the
    others' averages.
    """

    def __init__(self, decay: float = 0.9) -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"ExponentialAverage: decay must be in [0, 1), got {decay}")
        self.decay = decay
        self._averages: dict[str, Tensor] = {}  # (prompt,) a latent, NaN of those that were never seen

    def reset(self, program: Program) -> None:
        """Forget the steps before: another training begins."""
        self._averages.clear()

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self._averages)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._averages = dict(state)

    def __call__(self, name: str, f: Tensor, prompts: Tensor | None = None) -> Tensor:
        rows = torch.arange(f.shape[-1]) if prompts is None else prompts
        averages = self._averages.get(name, f.new_empty(0))
        averages = pad(averages, (0, max(0, int(rows.max()) + 1 - len(averages))), value=torch.nan)
        rows = rows.to(f.device)
        own, now = averages[rows], f.mean(0)
        before = own.where(~own.isnan(), averages.nanmean().nan_to_num(0.0))
        self._averages[name] = averages.index_copy(
            0, rows, torch.where(own.isnan(), now, self.decay * own + (1.0 - self.decay) * now)
        )
        return f - before
