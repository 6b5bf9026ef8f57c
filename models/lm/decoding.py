"""Completions written token by token, many rows at once: what sampling and particle methods share.

Rows may be exchanged for one another between tokens (resampling); their key-value caches follow, and nothing is
computed again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .prefix import Prefix, extend

if TYPE_CHECKING:
    from .autoregressive import Autoregressive


class Steps:
    """One unfinished completion a row.

    ``values`` (rows, max_new_tokens) holds the tokens so far and padding after, ``scores`` their log-probabilities
    under the law, ``finished`` (rows,) says which have ended, ``t`` counts the tokens written.

    :param law: of the completions.
    :param prefix: the prompts after their forward pass, one a row; its cache is written to.
    :param room: the most tokens of each row (rows,); None for ``max_new_tokens``.
    """

    def __init__(self, law: Autoregressive, prefix: Prefix, room: Tensor | None = None) -> None:
        self.law = law
        self.t = 0
        self._room = room
        self._longest = law.max_new_tokens if room is None else int(room.max())
        hidden = prefix.hidden
        shape = (len(hidden), law.max_new_tokens)
        self.values = torch.full(shape, law.lm.pad_token_id, dtype=torch.long, device=hidden.device)
        self.scores = torch.zeros(shape, dtype=torch.float32, device=hidden.device)
        self.finished = torch.zeros(len(hidden), dtype=torch.bool, device=hidden.device)
        self._prefix = prefix
        self._hidden = hidden
        self._unread: Tensor | None = None  # tokens written that the network has not read
        self._logits: Tensor | None = None
        # Asking whether all have ended makes the host wait for an accelerator, so there it is asked less often.
        self._ask_every = 1 if hidden.device.type == "cpu" else 8

    @property
    def done(self) -> bool:
        """Whether every row has ended, or is full."""
        return self.t == self._longest or self.idle == 1.0

    @property
    def idle(self) -> float:
        """The share of rows that have ended; 0 where it is not worth asking."""
        if len(self.finished) == 0:
            return 1.0
        if self.t == 0 or self.t % self._ask_every:
            return 0.0
        return float(self.finished.float().mean())

    @property
    def hidden(self) -> Tensor:
        """The network's hidden states (rows, width) after the tokens so far."""
        if self._unread is not None:
            self._hidden = extend(self.law.lm.causal, self._prefix, self._unread[:, None], done=self.t - 1)[:, -1]
            self._unread = None
        return self._hidden

    @property
    def logits(self) -> Tensor:
        """Float32 logits (rows, vocabulary) of the next token, at the law's temperature."""
        if self._logits is None:
            self._logits = self.law.lm.causal.logits(self.hidden, self.law.temperature)
        return self._logits

    def append(self, token: Tensor, score: Tensor) -> None:
        """Write tokens (rows,) with their log-probabilities (rows,); rows that have ended are padded instead."""
        self.values[:, self.t] = torch.where(self.finished, self.law.lm.pad_token_id, token)
        self.scores[:, self.t] = score.masked_fill(self.finished, 0.0)
        self.finished = self.finished | self.law.is_eos(token)
        self.t += 1
        if self._room is not None:
            self.finished = self.finished | (self.t >= self._room)
        self._unread = token  # of a row that has ended: idle
        self._logits = None

    def select(self, rows: Tensor) -> None:
        """Row i becomes what row ``rows[i]`` is."""
        self._index(rows)
        self._prefix.select(rows)

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows alone."""
        self._index(rows)
        self._prefix = self._prefix.fork(rows)

    def _index(self, rows: Tensor) -> None:
        self.values, self.scores, self.finished = (x[rows] for x in (self.values, self.scores, self.finished))
        self._hidden = self._hidden[rows]
        if self._unread is not None:
            self._unread = self._unread[rows]
        if self._logits is not None:
            self._logits = self._logits[rows]
        if self._room is not None:
            self._room = self._room[rows]


def write(steps: Steps) -> tuple[Tensor, Tensor]:
    """Draw every row to its end: ids and token log-probabilities, (rows, max_new_tokens).

    Rows that have ended leave the batch once they are half of it.
    """
    values, scores = torch.empty_like(steps.values), torch.empty_like(steps.scores)
    rows = torch.arange(len(values), device=values.device)
    while not steps.done:
        steps.append(*categorical(steps.logits))
        if 0.5 <= steps.idle < 1.0:
            values[rows], scores[rows] = steps.values, steps.scores
            live = (~steps.finished).nonzero().squeeze(-1)
            steps.keep(live)
            rows = rows[live]
    values[rows], scores[rows] = steps.values, steps.scores
    return values, scores


def categorical(logits: Tensor, block: int = 256) -> tuple[Tensor, Tensor]:
    """Draw from softmax(logits) (rows, vocabulary) by inverting its CDF; give the draws and their log-probabilities.

    One uniform a row picks a block of the vocabulary and then a token in it: some ten times faster than one
    exponential or Gumbel variate a token, and float64 sums over blocks keep the CDF exact to float32.
    """
    top = logits.amax(-1, keepdim=True)
    mass = (logits - top).exp_()
    wide = torch.float32 if mass.device.type == "mps" else torch.float64  # Apple's GPUs have no float64
    u = torch.rand((len(mass), 1), dtype=wide, device=mass.device)
    if mass.shape[-1] <= 4 * block:
        cdf = mass.cumsum(-1, dtype=wide)
        token = _invert(cdf, u * cdf[:, -1:])
    else:
        padding = -mass.shape[-1] % block
        blocks = torch.nn.functional.pad(mass, (0, padding)) if padding else mass
        blocks = blocks.unflatten(-1, (-1, block))
        cdf = blocks.sum(-1, dtype=wide).cumsum(-1)
        u = u * cdf[:, -1:]
        which = torch.searchsorted(cdf, u, right=True).clamp_max(cdf.shape[-1] - 1)
        inside = blocks.gather(1, which[:, :, None].expand(-1, -1, block)).squeeze(1).to(wide).cumsum(-1)
        token = which * block + _invert(inside, (u - (cdf.gather(-1, which) - inside[:, -1:])).clamp_min(0.0))
    token = token.clamp_max(logits.shape[-1] - 1)  # logits that are NaN: their score will say so
    score = logits.gather(-1, token) - top - cdf[:, -1:].log().to(logits.dtype)
    return token.squeeze(-1), score.squeeze(-1)


def _invert(cdf: Tensor, u: Tensor) -> Tensor:
    """The first entry whose cdf is above u, which is kept under the total: rounding never picks one of no mass."""
    return torch.searchsorted(cdf, torch.minimum(u, torch.nextafter(cdf[:, -1:], torch.zeros_like(u))), right=True)
