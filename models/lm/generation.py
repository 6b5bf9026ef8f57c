"""Texts of a language model, for those who want to read them: drawn from its distribution, and shown as they grow."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bayeslm.validation import validated

from .encoding import Encoded, Prompts
from .scopes import forked
from .texts import MISSING


class SampledText(NamedTuple):
    """A text that was drawn.

    :param text: what it adds to its prompt.
    :param log_prob: of its tokens, with the end, in nats; by the distribution that it was drawn from.
    :param num_tokens: their number.
    :param ended: whether an end token or a stop string ended it, or the limit did.
    """

    text: str
    log_prob: float
    num_tokens: int
    ended: bool


@validated
def sample_texts(
    lm: Any,
    prompts: Prompts,
    num_texts: int = 1,
    *,
    seed: int | None = None,
    on_text: Callable[[str], None] | None = None,
    **settings: Any,
) -> list[list[SampledText]]:
    """Draw texts that continue prompts: a list for each prompt.

    :param lm: a `LanguageModel`.
    :param num_texts: of each prompt, all drawn in one batch.
    :param seed: of the draws; the state of the random numbers is restored after. None: that state is used.
    :param on_text: called with each piece of the first text, as it grows.
    :param settings: of the distribution, such as ``max_new_tokens``: see `LanguageModel.forward`.
    :raises TypeError: if there is no tokenizer.
    """
    if lm.tokenizer is None:
        raise TypeError("this LanguageModel has no tokenizer to decode with: sample token ids, lm(prompts).sample()")
    dist = lm(prompts, **settings)
    ids, mask = dist.flat_prompts
    first = Encoded(ids[:1], None if mask is None else mask[:1])
    growing = None if on_text is None else _Growing(lambda ids: str(lm.decode(ids, first)[0]), on_text)
    with contextlib.nullcontext() if seed is None else _seeded(seed, lm.device):
        x = dist.sample((num_texts,), watch=growing)
    with torch.no_grad():
        log_probs = dist.log_prob(x)
    texts, lengths = dist.decode(x), dist.lengths(x)
    ended = ~dist.truncated(x)
    columns = (texts.reshape(num_texts, -1), *(y.reshape(num_texts, -1).tolist() for y in (log_probs, lengths, ended)))
    rows = [[SampledText(*entry) for entry in zip(*row, strict=True)] for row in zip(*columns, strict=True)]
    if growing is not None:
        growing.finish(rows[0][0].text)
    return [list(of_prompt) for of_prompt in zip(*rows, strict=True)]


class _Growing:
    """Gives each piece of a text once, when more tokens cannot change it."""

    def __init__(self, decode: Callable[[Tensor], str], on_text: Callable[[str], None]) -> None:
        self._decode, self._on_text, self._given = decode, on_text, ""

    def __call__(self, ids: Tensor) -> None:
        """Take the tokens so far, (max_new_tokens,), padded."""
        text = self._decode(ids[None]).rstrip(MISSING)  # the bytes of an incomplete character
        if text.startswith(self._given):
            self._give(text)

    def finish(self, text: str) -> None:
        """Give the rest of the whole text."""
        same = next((i for i, (a, b) in enumerate(zip(self._given, text, strict=False)) if a != b), len(self._given))
        self._given = self._given[:same]
        self._give(text)

    def _give(self, text: str) -> None:
        piece, self._given = text[len(self._given) :], text
        if piece:
            self._on_text(piece)


@contextlib.contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed the random numbers of the CPU and of a device for the block, and restore their state after it."""
    with contextlib.ExitStack() as held:
        held.enter_context(forked(seed))
        if device.type != "cpu":
            count = torch.get_device_module(device).device_count()
            held.enter_context(torch.random.fork_rng(range(count), device_type=device.type))
            torch.manual_seed(seed)
        yield
