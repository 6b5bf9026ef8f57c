"""Tools: one answer a text, for the turns that were taken; what fails says so, or gives the answer for it."""

import time

import numpy as np
import pytest
import torch

from bayeslm.models import Tool, ToolError

TEXTS = np.array([["1 + 1", "hello"], ["1 + 1", "2 + 2"]], dtype=object)


def test_each_text_is_asked_once_and_only_where_a_turn_was_taken():
    asked = []

    def add(text):
        asked.append(text)
        return str(sum(map(int, text.split("+")))) if "+" in text else None

    tool = Tool(add)
    answers, called = tool(TEXTS)
    assert answers.tolist() == [["2", None], ["2", "4"]]
    assert called.tolist() == [[True, False], [True, True]]
    answers, called = tool(TEXTS, torch.tensor([True, False]))
    assert answers.tolist() == [["2", None], ["2", None]]
    assert called.tolist() == [[True, False], [True, False]]
    assert asked == ["1 + 1", "hello", "2 + 2"]


def test_a_list_of_texts_is_an_array_of_them():
    answers, called = Tool(lambda text: text.upper() if text else None)(["a", ""])
    assert answers.tolist() == ["A", None]
    assert called.tolist() == [True, False]
    with pytest.raises(TypeError, match="where must be a Tensor or None, got"):
        Tool(str.upper)(["a"], [True])


def test_a_coroutine_is_awaited():
    async def upper(text):
        return text.upper()

    assert Tool(upper)(np.array(["a"], dtype=object))[0].tolist() == ["A"]


def _slow(text):
    time.sleep(5)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda text: 1 / 0, r"the tool raised ZeroDivisionError \(division by zero\) for 'a': let it return a text"),
        (lambda text: 3, "the tool returned 3 for 'a': it must be a text, or None"),
        (_slow, r"the tool took longer than timeout=0.05 seconds for 'a': raise timeout, or set failure"),
    ],
)
def test_a_tool_that_fails_says_so(function, message):
    texts = np.array(["a"], dtype=object)
    with pytest.raises(ToolError, match=message):
        Tool(function, timeout=0.05)(texts)
    if "returned" not in message:
        assert Tool(function, timeout=0.05, failure="error")(texts)[0].tolist() == ["error"]


def test_a_time_limit_must_be_positive():
    with pytest.raises(ValueError, match="timeout"):
        Tool(str.upper, timeout=0)
