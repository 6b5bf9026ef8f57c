"""Programs of several texts whose posteriors can be enumerated: an observed answer, a text after a text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
from support.models import table_lm

ANSWERS = ["b a", "c"]


def reasoned(eos: bool = True, tokens: int = 2) -> Callable[[list[Any]], None]:
    """A latent rationale of so many tokens before an observed answer, which ends or goes on in any way."""
    lm = table_lm(order=4, seed=2, vocab=4)

    def model(prompts: list[Any]) -> None:
        with pyro.plate("prompts", len(prompts)):
            x = pyro.sample("rationale", lm(prompts, max_new_tokens=tokens))
            answer = lm(lm.join(prompts, x, "c"), max_new_tokens=3)
            pyro.sample("answer", answer, obs=lm.encode(ANSWERS[: len(prompts)], 3, eos=eos))

    return model


def continued(tokens: int = 2) -> Callable[[list[Any]], None]:
    """A text after a text, token for token, and a factor of both."""
    lm = table_lm(order=4, seed=3, vocab=4)

    def model(prompts: list[Any]) -> None:
        with pyro.plate("prompts", len(prompts)):
            x = pyro.sample("draft", lm(prompts, max_new_tokens=tokens))
            y = pyro.sample("revision", lm(lm.join(prompts, x, "a"), max_new_tokens=2))
            pyro.factor("kept", 1.5 * ((x == 2).sum(-1) == (y == 2).sum(-1)).float())

    return model
