r"""Baselines of the score-function gradient: the part of f that can be predicted without the particle itself.

A `Baseline` returns the advantage, f less the baseline. A `TokenBaseline` also has one for every token of a completion
or a trajectory, which may depend on the tokens before.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn.functional import pad

from bayeslm.inference.program import ranks
from bayeslm.validation import Within, validated

from .state import EMPTY, State

Baseline = Callable[[str, Tensor, Tensor | None, State], tuple[Tensor, State]]
"""``baseline(name, f, prompts, state)`` returns the advantage and the next state.

``name`` is a latent site's, ``f`` (particle, prompt), ``prompts`` (prompt,) the indices of a minibatch's prompts or
None, and ``state`` what the baseline has remembered of this site. Each process of a run calls it with its own
particles; ``ranks().summed(f)`` is the sum over those of all, and their number. The next state is the same on each.
"""


@runtime_checkable
class TokenDistribution(Protocol):
    """A distribution of sequences: `Autoregressive`, or that of a trajectory, whose tokens are actions."""

    def token_log_prob(self, value: Tensor) -> Tensor:
        """Return log-probabilities (*batch, token), 0 on padding."""

    def token_log_prob_and_hidden(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """Return the same without gradient, and the hidden state before each token, (*batch, token, width)."""

    def lengths(self, value: Tensor) -> Tensor:
        """Return the number of tokens before the padding, (*batch,)."""


@validated
@dataclass(frozen=True)
class Texts:
    r"""The sequences of one site as a `TokenBaseline` gets them, without gradient.

    A prompt has one text, or more of them in a plate of its own.

    :param hidden: (particle, prompt, text, token, width), the hidden state before each token.
    :param past: (particle, prompt, text, token), \sum_{s<t} log p(x_s) - log q(x_s).
    :param live: (particle, prompt, text, token), which tokens are not padding.
    :param earned: (particle, prompt, text or 1, token), the sum of the factors of earlier tokens, where the program has
        a factor for each token, in a plate ``steps``.
    :param prompts: (prompt,), the indices of a minibatch's prompts.
    """

    hidden: Tensor
    past: Tensor
    live: Tensor
    earned: Tensor
    prompts: Tensor | None = None


@runtime_checkable
class TokenBaseline(Protocol):
    """A baseline for every token; as a `Baseline` it serves the latents that are no sequences.

    Each process of a run calls it with its own particles, as it calls a `Baseline`.
    """

    def __call__(self, name: str, f: Tensor, prompts: Tensor | None, state: State) -> tuple[Tensor, State]:
        """Return the advantage (particle, prompt) of a latent that is no sequence, and the next state."""

    def of_tokens(self, name: str, f: Tensor, texts: Texts, state: State) -> tuple[Tensor, State]:
        """Return the advantages (particle, prompt, text, token), and the next state.

        :param f: (particle, prompt), or (particle, 1) where all prompts are one posterior.
        """


def leave_one_out(name: str, f: Tensor, prompts: Tensor | None = None, state: State = EMPTY) -> tuple[Tensor, State]:
    """Return f_i (particle, prompt) less the mean of the other particles' f; a single particle has no baseline.

    Kool, van Hoof and Welling 2019; RLOO, Ahmadian et al. 2024, arXiv 2402.14740. Also the gradient of the log-variance
    divergence (VarGrad, Richter et al. 2020, arXiv 2010.10436).
    """
    return less_others(f, f, *ranks().summed(f)), state


def less_others(own: Tensor, f: Tensor, total: Tensor, num: int) -> Tensor:
    """Return ``own`` (particle, prompt) less the mean of the other particles' ``f``, 0 if there is no other.

    :param total: the sum of f, (prompt,).
    :param num: over how many particles.
    """
    return own if num == 1 else own - (total - f) / (num - 1)


@validated
@dataclass(frozen=True)
class ExponentialAverage:
    """The baseline is an exponential moving average of earlier steps' f, of the same prompt (Williams 1992).

    For groups of one particle, which have no other to compare with. A prompt without an average yet has the mean of the
    other prompts' averages.

    :param decay: the weight of the earlier steps, in [0, 1).
    :raises ValueError: if ``decay`` is out of range.
    """

    decay: Annotated[float, Within("[0, 1)")] = 0.9

    def __call__(
        self, name: str, f: Tensor, prompts: Tensor | None = None, state: State = EMPTY
    ) -> tuple[Tensor, State]:
        """Return f (particle, prompt) less the averages, and these updated: ``average`` (prompt,), NaN of new ones."""
        rows = torch.arange(f.shape[-1]) if prompts is None else prompts
        averages = state.get("average", f.new_empty(0))
        averages = pad(averages, (0, max(0, int(rows.max()) + 1 - len(averages))), value=torch.nan)
        rows = rows.to(f.device)
        total, num = ranks().summed(f)
        own, now = averages[rows], total / num
        before = own.where(~own.isnan(), averages.nanmean().nan_to_num(0.0))
        after = torch.where(own.isnan(), now, self.decay * own + (1.0 - self.decay) * now)
        return f - before, {"average": averages.index_copy(0, rows, after)}
