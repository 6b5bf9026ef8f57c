"""Functions of a text that a program calls between the turns of a dialogue: a calculator, a search in a table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bayeslm.models.rewards import TimeLimitError, call
from bayeslm.validation import Positive, validated


class ToolError(RuntimeError):
    """A tool raised, took longer than its time limit, or returned no text."""


@validated
class Tool:
    """A function from the text of a turn to what the tool answers, or to None where the turn calls no tool.

    In a program, its answers become part of the next turn's prompt (`LanguageModel.join`), and the turns that called it
    are those after which there is a next one:

        answers, called = calculator(lm.decode(x))
        y = pyro.sample("reply", lm(lm.join(prompts, x, answers), where=called))

    The answer is a function of the text, and no draw: nobody's log-probability contains it. So a text has one answer:
    it is kept, and a function that is random or asks the world is called once for each text.

    :param function: from a text to a text or None; awaited if it is asynchronous.
    :param timeout: the time limit of a call in seconds; None for no limit.
    :param failure: the answer where the function raises or takes longer; None: an error that ends the run.
    :raises ValueError: if ``timeout`` is not positive.
    """

    def __init__(
        self, function: Callable[[str], Any], *, timeout: Positive | None = 10.0, failure: str | None = None
    ) -> None:
        self.function = function
        self.timeout = timeout
        self.failure = failure
        self._known: dict[str, str | None] = {}

    def identity(self) -> Mapping[str, Any]:
        """Return the settings on which answers depend, without the answers, by which checkpoints tell runs apart."""
        return {"function": self.function, "failure": self.failure}

    @validated
    def __call__(self, texts: np.ndarray | Sequence[str], where: Tensor | None = None) -> tuple[np.ndarray, Tensor]:
        """Return the answers, None where there is none, and which turns have one, a bool tensor of the same shape.

        :param texts: of the turns, an object array, as `LanguageModel.decode` gives it, or a list.
        :param where: the turns that were taken, bool, in a shape that broadcasts to that of the texts; the tool is not
            called for others. None: all.
        :raises ToolError: if the function fails and there is no ``failure``, or it returns anything but a text or None.
        """
        texts = np.asarray(texts, dtype=object)
        taken = np.broadcast_to(np.True_ if where is None else where.cpu().numpy(), texts.shape)
        answers = np.empty(texts.shape, dtype=object)
        for index, text in np.ndenumerate(texts):
            answers[index] = self._answer(text) if taken[index] else None
        called = torch.tensor([answer is not None for answer in answers.reshape(-1)]).reshape(texts.shape)
        return answers, called if where is None else called.to(where.device)

    def _answer(self, text: str) -> str | None:
        if text not in self._known:
            self._known[text] = self._call(text)
        return self._known[text]

    def _call(self, text: str) -> str | None:
        try:
            answer = call(partial(self.function, text), self.timeout)
        except TimeLimitError:
            if self.failure is not None:
                return self.failure
            raise ToolError(
                f"the tool took longer than timeout={self.timeout:g} seconds for {text!r:.200}: raise timeout, or set "
                "failure, the answer in such a case"
            ) from None
        except Exception as error:
            if self.failure is not None:
                return self.failure
            raise ToolError(
                f"the tool raised {type(error).__name__} ({error}) for {text!r:.200}: let it return a text or None, or "
                "set failure, the answer in such a case"
            ) from error
        if not isinstance(answer, str | None):
            raise ToolError(f"the tool returned {answer!r:.60} for {text!r:.200}: it must be a text, or None")
        return answer
