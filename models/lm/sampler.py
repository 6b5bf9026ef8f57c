r"""Completions that another engine draws: what it is asked for, and what its draws are held against.

Of a completion that an engine drew two densities are known,

    log s(x | c)    the engine's own, which it returns with the draw: it is log q in every weight
    log p(x | c)    that of the network here, by its forward pass (`scoring`): the log p of record

so that a weight p / s is right whatever rounds the engine's numbers, and whatever old weights it drew by. How far both
differ is counted (`usage`), and beyond `LIMIT` a warning says so at once.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from bayeslm import DiagnosticsWarning

from .ahead import asked_ahead
from .encoding import Encoded
from .prefix import PromptedNetwork
from .scoring import token_scores
from .usage import note_drawn

LIMIT = 0.1  # nats a token, the mean of |log p - log s|, beyond which an engine does not draw what it is asked for
ROUNDING = 1e-3  # nats by which a log-probability may exceed 0


class SamplerError(RuntimeError):
    """An engine did not draw, or returned what cannot be a draw."""


class Weights(NamedTuple):
    """The weights that are to draw."""

    network: nn.Module
    version: Hashable
    """Changes with the weights."""
    has_adapters: bool
    departed: bool
    """Whether other weights than adapters differ from those of the model that the sampler was given to."""
    save: Callable[[Path], None]
    """Writes the adapters into a folder, in the format of PEFT."""


class DrawRequest(NamedTuple):
    """``counts[i]`` completions of ``prompts[i]``, which are token ids."""

    prompts: list[list[int]]
    counts: list[int]
    max_new_tokens: int
    temperature: float
    eos_token_ids: tuple[int, ...]
    """A completion ends at the first of these, which is its last token."""
    vocab_size: int
    seed: int
    weights: Weights


class Drawn(NamedTuple):
    """A completion with its end, and the engine's log-probability of each of its tokens."""

    ids: Sequence[int]
    log_probs: Sequence[float]


class Draws(NamedTuple):
    """The completions of each prompt of a request, and the version of the weights that drew them.

    A version other than the request's says that they are stale: they count with the density that they come with.
    """

    completions: list[list[Drawn]]
    version: Hashable


class Sampler(Protocol):
    """Who draws completions: `bayeslm.models.samplers` has them, and any object with this method is one.

    The log-probabilities must be those of the distribution that the engine drew from: at the temperature, and after
    all that cuts it.
    """

    def draw(self, request: DrawRequest, /) -> Draws:
        """Draw completions; raise an error where that takes too long or fails."""


class Densities:
    """The engine's log-probabilities of the values that it drew for a distribution, while these exist."""

    def __init__(self) -> None:
        self._kept = WeakTensorKeyDictionary()

    def keep(self, value: Tensor, log_s: Tensor, stale: bool) -> None:
        self._kept[value] = (_version(value), log_s, stale)

    def are_stale(self, value: Tensor) -> bool:
        """Return whether an engine has drawn a value by other weights than it was asked for."""
        return bool(self._kept.get(value, (None, None, False))[2])

    def of(self, value: Tensor) -> Tensor:
        """Return log s of each token of a value.

        :raises LookupError: if this is none of the engine's values.
        """
        version, log_s, _ = self._kept.get(value, (None, None, False))
        if log_s is None or version != _version(value):
            raise LookupError("the value is not one that the sampler drew: it was changed, or replaced, after")
        found: Tensor = log_s
        return found


def _version(value: Tensor) -> int:
    return -1 if value.is_inference() else value._version


def name_of(sampler: Sampler) -> str:
    """Return the name of a sampler for errors and figures."""
    return str(getattr(sampler, "name", type(sampler).__name__))


def _draw(sampler: Sampler, weights: Weights, prompted: PromptedNetwork, rows: Tensor) -> tuple[Tensor, Tensor, bool]:
    """Draw a completion of each of some prompts, ``rows`` (row,).

    :returns: completions and log s of their tokens, both (row, max_new_tokens), and whether they are stale.
    :raises SamplerError: if the engine fails, or its draws are malformed.
    """
    vocabulary, max_new_tokens = prompted.vocabulary, prompted.max_new_tokens
    prompts = Encoded(prompted.prompt_ids, prompted.prompt_mask).rows()
    counts = torch.bincount(rows, minlength=len(prompts)).tolist()
    asked = [i for i, count in enumerate(counts) if count]
    seed = int(torch.randint(2**62, ()))
    request = DrawRequest(
        [prompts[i] for i in asked],
        [counts[i] for i in asked],
        max_new_tokens,
        prompted.temperature,
        vocabulary.eos_token_ids,
        vocabulary.size,
        seed,
        weights,
    )
    try:
        lot = asked_ahead()
        draws = sampler.draw(request) if lot is None else lot.answer(sampler, request)
    except SamplerError:
        raise
    except Exception as error:
        what = " ".join(str(error).split())
        raise SamplerError(f"{name_of(sampler)} failed: {type(error).__name__}: {what:.300}") from error
    if [len(some) for some in draws.completions] != request.counts:
        numbers = [len(some) for some in draws.completions]
        raise SamplerError(f"{name_of(sampler)} was asked for {request.counts} completions, and returned {numbers}")
    order = rows.cpu().argsort(stable=True)
    drawn = [each for some in draws.completions for each in some]
    for each in drawn:
        _check(sampler, each, vocabulary.size, max_new_tokens)
    room = [max_new_tokens - len(each.ids) for each in drawn]
    padded = [[*each.ids, *[vocabulary.pad_token_id] * n] for each, n in zip(drawn, room, strict=True)]
    scores = [[*each.log_probs, *[0.0] * n] for each, n in zip(drawn, room, strict=True)]
    place = order.argsort()
    values, log_s = torch.tensor(padded)[place], torch.tensor(scores)[place]
    last = max_new_tokens - torch.tensor(room)[place]
    written = torch.arange(max_new_tokens) < last[:, None]
    ends = vocabulary.is_end(values)
    unfinished = (last < max_new_tokens) & ~(ends & written).any(-1)
    if unfinished.any():
        row = int(unfinished.nonzero()[0])
        raise SamplerError(
            f"{name_of(sampler)} returned a completion of {int(last[row])} of {max_new_tokens} tokens without an end "
            f"({list(vocabulary.eos_token_ids)} are ends): it stops at other tokens than this LanguageModel"
        )
    live = vocabulary.is_live(values)
    values, log_s = values.masked_fill(~live, vocabulary.pad_token_id), log_s.masked_fill(~live, 0.0)
    return values.to(rows.device), log_s.to(rows.device), draws.version != weights.version


def draw_scored(
    sampler: Sampler, weights: Weights, prompted: PromptedNetwork, rows: Tensor
) -> tuple[Tensor, Tensor, Tensor, bool]:
    """Draw completions of prompts ``rows`` (row,), and score them by the network here.

    :returns: completions, the network's scores of their tokens, and log s of these, all (row, max_new_tokens); and
        whether they were drawn by other weights than these.
    :raises ValueError: if the distribution is truncated, which engines do not draw.
    """
    if prompted.truncation is not None:
        raise ValueError(
            f"{name_of(sampler)} draws complete distributions, and top_k or top_p cuts this one: leave them out, "
            "or draw by a LanguageModel without a sampler"
        )
    vocabulary = prompted.vocabulary
    taken = torch.ones_like(rows, dtype=torch.bool) if prompted.taken is None else prompted.taken[rows]
    value = rows.new_full((len(rows), prompted.max_new_tokens), vocabulary.pad_token_id)
    log_s = torch.zeros(value.shape, dtype=torch.float32, device=value.device)
    value[~taken, 0] = next(iter(vocabulary.eos_token_ids), 0)
    some, stale = rows[taken], False
    if len(some):
        value[taken], log_s[taken], stale = _draw(sampler, weights, prompted, some)
    scores = token_scores(prompted, rows, value)
    compare(sampler, scores[taken], log_s[taken], vocabulary.is_live(value[taken]), stale)
    return value, scores, log_s, stale


def _check(sampler: Sampler, drawn: Drawn, size: int, max_new_tokens: int) -> None:
    """Refuse what cannot be a completion with its log-probabilities."""
    ids, log_probs = list(drawn.ids), list(drawn.log_probs)
    wrong = ""
    if not 1 <= len(ids) <= max_new_tokens:
        wrong = f"a completion of {len(ids)} tokens, and max_new_tokens is {max_new_tokens}"
    elif len(ids) != len(log_probs):
        wrong = f"{len(ids)} tokens with {len(log_probs)} log-probabilities"
    elif any(not isinstance(token, int) or not 0 <= token < size for token in ids):
        wrong = f"tokens outside 0..{size - 1}: {ids!r:.60}"
    elif bad := [x for x in log_probs if not isinstance(x, int | float) or not -math.inf < x < ROUNDING]:
        wrong = f"the log-probability {bad[0]!r}"
    if wrong:
        raise SamplerError(f"{name_of(sampler)} returned {wrong}")


def compare(sampler: Sampler, log_p: Tensor, log_s: Tensor, live: Tensor, stale: bool) -> None:
    """Count how far log p and log s (row, token) of drawn tokens differ, and warn beyond `LIMIT`, once a run.

    :param live: which tokens are part of the completions.
    """
    if not bool(live.any()):
        return
    difference = (log_p - log_s).where(live, 0.0).double().cpu()
    mean = float(difference.abs().sum() / live.sum())
    if note_drawn(difference, int(live.sum()), len(live) if stale else 0, mean > LIMIT) and mean > LIMIT:
        warnings.warn(
            f"{name_of(sampler)} draws by log-probabilities that differ from this network's by {mean:.2g} nats a token "
            f"(more than {LIMIT:g}): by another network, adapter, temperature or precision. Weights are right all the "
            'same, and have fewer effective draws: see stats["sampler_ess"]',
            DiagnosticsWarning,
            stacklevel=4,
        )
