"""Texts as tokens: what the tokens of completions spell, and the states of a grammar after them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from bayeslm.inference.program import token_bytes
from bayeslm.models.lm import Autoregressive, Encoded
from bayeslm.models.rewards import Constraint, Grammar, fewest_tokens, prefixes

ENUMERABLE = 1024  # tokens of a vocabulary that are tried one by one, where masks are not known otherwise


class TextState(Protocol):
    """What a grammar says of the text so far."""

    @property
    def mask(self) -> np.ndarray:
        """The tokens that some text of the language continues with, bool (token,)."""

    @property
    def accepts(self) -> bool:
        """Whether the text is in the language."""

    @property
    def forced(self) -> bytes:
        """The bytes that all texts of the language continue with, as far as they are known."""

    def after(self, token: int) -> TextState | None:
        """Return the state after one more token; None if the mask does not have it."""


class Spelling:
    """The texts of a distribution's completions.

    :param distribution: of the completions.
    :param prompts: the prompt that each row continues, (row,).
    """

    def __init__(self, distribution: Autoregressive, prompts: Tensor) -> None:
        self.distribution = distribution
        self.prompts: list[int] = prompts.tolist()
        self._ids, self._mask = distribution.flat_prompts
        self.prompt_texts = distribution.prompt_texts()

    def select(self, rows: Tensor) -> None:
        """Replace row i by row ``rows[i]``."""
        self.prompts = [self.prompts[row] for row in rows.tolist()]

    @cached_property
    def token_bytes(self) -> tuple[bytes, ...] | None:
        """The bytes of each token, b"" of those that end a text; None if they depend on a token's neighbours."""
        return token_bytes(self.distribution)

    def texts(self, values: Tensor, prompts: Sequence[int]) -> list[str]:
        """Return the texts that completions (row, token) add to their prompts, by the indices of these."""
        if values.shape[-1] == 0:
            return [""] * len(values)
        of = torch.tensor(prompts, device=self._ids.device)
        encoded = Encoded(self._ids[of], None if self._mask is None else self._mask[of])
        return list(self.distribution.lm.decode(values, encoded))

    def check(
        self, constraint: Grammar | Constraint, values: Tensor, prompts: Sequence[int], finished: Sequence[bool]
    ) -> list[bool]:
        """Return which texts a constraint allows: those that are finished, and those that can still be completed."""
        with prefixes(torch.tensor(finished)):
            scores = constraint([self.prompt_texts[i] for i in prompts], self.texts(values, prompts))
        return (scores > -torch.inf).tolist()

    def shortest(self, text: bytes) -> float:
        """Return the least number of tokens that a text which begins with ``text`` takes, as far as it is known."""
        return 0 if self.token_bytes is None else fewest_tokens(text, self.token_bytes)


class SpelledState:
    """A grammar's state after tokens of which neighbours change the text: every token is tried.

    :param grammar: the language.
    :param spelling: the texts of tokens.
    :param prompt: the index of the prompt.
    :param tokens: the tokens so far.
    """

    forced = b""

    def __init__(self, grammar: Grammar, spelling: Spelling, prompt: int, tokens: tuple[int, ...] = ()) -> None:
        self._grammar = grammar
        self._spelling = spelling
        self._prompt = prompt
        self._tokens = tokens
        self._next: dict[int, SpelledState] = {}

    @cached_property
    def mask(self) -> np.ndarray:
        size = self._spelling.distribution.vocabulary.size
        return self._check([(*self._tokens, token) for token in range(size)], finished=False)

    @cached_property
    def accepts(self) -> bool:
        return bool(self._check([self._tokens], finished=True)[0])

    def after(self, token: int) -> SpelledState | None:
        if not self.mask[token]:
            return None
        if token not in self._next:
            self._next[token] = SpelledState(self._grammar, self._spelling, self._prompt, (*self._tokens, token))
        return self._next[token]

    def _check(self, rows: list[tuple[int, ...]], finished: bool) -> np.ndarray:
        values = torch.tensor(rows, dtype=torch.long)
        prompts, ended = [self._prompt] * len(rows), [finished] * len(rows)
        return np.array(self._spelling.check(self._grammar, values, prompts, ended))


def first_states(grammar: Grammar, spelling: Spelling) -> list[TextState] | None:
    """Return the state of each row before its first token, or None where masks would cost too much."""
    if spelling.token_bytes is not None:
        return [grammar.over(spelling.token_bytes).root] * len(spelling.prompts)
    if spelling.distribution.vocabulary.size > ENUMERABLE:
        return None
    roots = {prompt: SpelledState(grammar, spelling, prompt) for prompt in set(spelling.prompts)}
    return [roots[prompt] for prompt in spelling.prompts]
