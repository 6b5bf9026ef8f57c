"""Programs of several texts whose posteriors can be enumerated: an observed answer, a text after a text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import torch
from support.models import table_lm

from bayeslm.models import LanguageModel, Tool

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


def count_a(text: str) -> str | None:
    """A tool that a "c" calls: it answers how often the text has an "a"."""
    return " ".join("b" * (1 + text.count("a"))) if "c" in text else None


def dialogue(lm: LanguageModel | None = None, turns: int = 2) -> Callable[[list[Any]], None]:
    """Turns that go on while a tool is called, of stop strings, over what is left of a truncated prior."""
    prior = table_lm(order=4, seed=5, vocab=4) if lm is None else lm
    tool = Tool(count_a)

    def model(prompts: list[Any]) -> None:
        taken: torch.Tensor | None = None
        text: Any = prompts
        with pyro.plate("prompts", len(prompts)):
            for turn in range(turns):
                x = pyro.sample(f"turn_{turn}", prior(text, max_new_tokens=2, stop="c", where=taken))
                answers, taken = tool(prior.decode(x), taken)
                text = prior.join(text, x, answers)
            last = prior(prior.join(text, "a"), max_new_tokens=2)
            pyro.sample("answer", last, obs=prior.encode(["b", "a"][: len(prompts)], 2))

    return model
