"""Decoding of completions token by token, many rows at once, for sampling and for particle methods.

Rows may be exchanged for one another between tokens (resampling); their key-value caches follow, and nothing is
computed again.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bayeslm.progress import wrote
from bayeslm.validation import validated

from .compiled import FixedPrefix
from .encoding import Vocabulary
from .prefix import Prefix, PromptedNetwork, extend


@validated
class Decoder:
    """Unfinished completions, one a row.

    ``values`` (row, max_new_tokens) holds the tokens so far and padding after them, ``scores`` (same shape) their
    log-probabilities; ``finished`` (row,) is True for rows that have ended; ``t`` counts the tokens written.

    :param prompted: the network and its prompts.
    :param prefix: the prompts after their forward pass, one a row; its cache is written to.
    :param room: the most tokens of each row, (row,); None for ``max_new_tokens``.
    :param states: of the stop strings, after what of each completion is part of its prefix, (row,).
    """

    def __init__(
        self, prompted: PromptedNetwork, prefix: Prefix, room: Tensor | None = None, states: Tensor | None = None
    ) -> None:
        self.prompted = prompted
        self.t = 0
        self._room = room
        self._longest = prompted.max_new_tokens if room is None else int(room.max())
        hidden = prefix.hidden
        shape = (len(hidden), prompted.max_new_tokens)
        pad_token_id = prompted.vocabulary.pad_token_id
        self.values = torch.full(shape, pad_token_id, dtype=torch.long, device=hidden.device)
        self.scores = torch.zeros(shape, dtype=torch.float32, device=hidden.device)
        self.finished = torch.zeros(len(hidden), dtype=torch.bool, device=hidden.device)
        stops = prompted.vocabulary.stops
        self._states = stops.start(len(hidden)) if stops is not None and states is None else states
        self._truncating: Decoder | None = None  # the same completions, by the network whose tokens remain
        if prompted.truncating is not None and prefix.truncating is not None:
            self._truncating = Decoder(prompted.truncating, prefix.truncating, room, states)
        self._prefix: Prefix | FixedPrefix = prefix
        self._hidden = hidden
        self._pending: Tensor | None = None  # the last tokens, until the network has processed them
        self._logits: Tensor | None = None
        # Whether all rows have ended is known on the device, and the host waits for it: there it is asked less often.
        self._ask_every = 1 if hidden.device.type == "cpu" else 8

    @property
    def done(self) -> bool:
        """Whether every row has ended, or is full."""
        return self.t == self._longest or self.idle == 1.0

    @property
    def idle(self) -> float:
        """The share of rows that have ended; 0 at steps where a GPU is not asked for it."""
        if len(self.finished) == 0:
            return 1.0
        if self.t == 0 or self.t % self._ask_every:
            return 0.0
        return float(self.finished.float().mean())

    @property
    def hidden(self) -> Tensor:
        """The network's hidden states (row, width) after the tokens so far."""
        if self._pending is not None:
            network, done = self.prompted.network, self.t - 1
            if network.compiled is not None and isinstance(self._prefix, Prefix):
                self._prefix = FixedPrefix(network, self._prefix, self._longest - self.t)
            if isinstance(self._prefix, FixedPrefix):
                self._hidden = self._prefix.extend(network, self._pending, done)
            else:
                self._hidden = extend(network, self._prefix, self._pending[:, None], done)[:, -1]
            self._pending = None
        return self._hidden

    @property
    def logits(self) -> Tensor:
        """Float32 logits (row, vocabulary) of the next token, divided by the temperature and truncated."""
        if self._logits is None:
            prompted = self.prompted
            self._logits = prompted.network.logits(self.hidden, prompted.temperature)
            if prompted.truncation is not None:
                of = None if self._truncating is None else self._truncating.logits
                self._logits = prompted.truncation(self._logits, of)
            if self.t == 0 and isinstance(self._prefix, Prefix) and self._prefix.taken is not None:
                self._logits = only_end(self._logits, self._prefix.taken, prompted.vocabulary)
        return self._logits

    def ends_with(self, tokens: Tensor) -> Tensor:
        """Return whether each of some next tokens (row, k) would end the text, bool (row, k)."""
        ends, stops = self.prompted.vocabulary.is_eos(tokens), self.prompted.vocabulary.stops
        if stops is None or self._states is None:
            return ends
        return ends | (stops.after(self._states[:, None], tokens) == stops.ended)

    def append(self, token: Tensor, score: Tensor) -> None:
        """Write tokens (row,) with their log-probabilities (row,); rows that have ended are padded instead."""
        vocabulary = self.prompted.vocabulary
        self.values[:, self.t] = torch.where(self.finished, vocabulary.pad_token_id, token)
        self.scores[:, self.t] = score.masked_fill(self.finished, 0.0)
        self.finished = self.finished | self.ends_with(token[:, None])[:, 0]
        if vocabulary.stops is not None and self._states is not None:
            self._states = vocabulary.stops.after(self._states, token)
        self.t += 1
        if self._room is not None:
            self.finished = self.finished | (self.t >= self._room)
        self._pending = token  # rows that have ended are processed too; the result is not used
        self._logits = None
        if self._truncating is not None:
            self._truncating.append(token, score)

    def select(self, rows: Tensor) -> None:
        """Replace row i by row ``rows[i]``."""
        self._index(rows)
        self._prefix.select(rows)
        if self._truncating is not None:
            self._truncating.select(rows)

    def keep(self, rows: Tensor) -> None:
        """Drop all rows but these."""
        self._index(rows)
        self._prefix.keep(rows)
        if self._truncating is not None:
            self._truncating.keep(rows)

    def _index(self, rows: Tensor) -> None:
        self.values, self.scores, self.finished = (x[rows] for x in (self.values, self.scores, self.finished))
        self._hidden = self._hidden[rows]
        if self._pending is not None:
            self._pending = self._pending[rows]
        if self._logits is not None:
            self._logits = self._logits[rows]
        if self._room is not None:
            self._room = self._room[rows]
        if self._states is not None:
            self._states = self._states[rows]


def generate(decoder: Decoder, watch: Callable[[Tensor], None] | None = None) -> tuple[Tensor, Tensor]:
    """Draw every row to its end: ids and token log-probabilities, each (row, max_new_tokens).

    Rows that have ended leave the batch once they are half of it.

    :param watch: called with the ids (max_new_tokens,) of the first row, padded, after each of its tokens.
    """
    values, scores = torch.empty_like(decoder.values), torch.empty_like(decoder.scores)
    rows = torch.arange(len(values), device=values.device)
    while not decoder.done:
        decoder.append(*categorical(decoder.logits))
        wrote(len(values))
        if watch is not None and rows[0] == 0:
            watch(decoder.values[0])
        if 0.5 <= decoder.idle < 1.0:
            values[rows], scores[rows] = decoder.values, decoder.scores
            live = (~decoder.finished).nonzero().squeeze(-1)
            decoder.keep(live)
            rows = rows[live]
    wrote(len(values) * (values.shape[-1] - decoder.t))  # those that were not needed
    values[rows], scores[rows] = decoder.values, decoder.scores
    return values, scores


def only_end(logits: Tensor, taken: Tensor, vocabulary: Vocabulary) -> Tensor:
    """Return logits (..., vocabulary) of a first token that ends the text with probability 1 where not ``taken``."""
    end = torch.full_like(logits, -torch.inf)
    end[..., vocabulary.eos_token_ids[0]] = 0.0
    return torch.where(taken[..., None], logits, end)


def categorical(logits: Tensor, block: int = 256) -> tuple[Tensor, Tensor]:
    """Draw from softmax(logits) by inverting its CDF: tokens (row,) and their log-probabilities (row,).

    One uniform a row picks a block of the vocabulary and then a token in it: about ten times faster than one
    exponential or Gumbel variate a token, and float64 sums over blocks keep the CDF exact to float32.

    :param logits: (row, vocabulary).
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
    token = token.clamp_max(logits.shape[-1] - 1)  # of logits that are NaN, and so is their score
    score = logits.gather(-1, token) - top - cdf[:, -1:].log().to(logits.dtype)
    return token.squeeze(-1), score.squeeze(-1)


def _invert(cdf: Tensor, u: Tensor) -> Tensor:
    """Return the first entry whose cdf is above u, kept below the total so that rounding picks none of no mass."""
    return torch.searchsorted(cdf, torch.minimum(u, torch.nextafter(cdf[:, -1:], torch.zeros_like(u))), right=True)
