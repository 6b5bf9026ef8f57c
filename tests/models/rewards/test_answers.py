"""Exact match and F1 of words against SQuAD's own rules, worked by hand, and in a program with references a row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from bayeslm.inference import Exact
from bayeslm.models import LanguageModel, TiltedLM
from bayeslm.models.rewards import ExactMatch, Matches, RewardError, TokenF1, get, normalised_answer

CASES = [  # completion, references, exact match, F1
    (" The Eiffel Tower.\n", ["eiffel tower"], 1, 1),
    ("Port-au-Prince", "port au prince", 0, 0),  # hyphens are left out, as SQuAD does
    ("the city of Lima", ["Lima", "Lima, Peru"], 0, 0.5),
    ("Lima Peru", ["Quito", "Lima, Peru"], 1, 1),
    ("Paris Paris", ["Paris"], 0, 2 / 3),
    ("", ["Paris"], 0, 0),
    ("the", ["a"], 1, 1),  # no words on both sides
    ("42", [42], 1, 1),
    ("anthem", ["them"], 0, 0),  # articles are words, not parts of words
]


@pytest.mark.parametrize(("text", "references", "match", "f1"), CASES)
def test_answers_by_hand(text: str, references: object, match: float, f1: float) -> None:
    for reward, right in ((ExactMatch(), match), (TokenF1(), f1)):
        assert reward(["q"], [text], references=[references]).item() == pytest.approx(right)
        assert reward.lower_bound <= right <= reward.upper_bound
    assert normalised_answer(" The  A-b. ") == "ab"


@pytest.mark.parametrize("reward", [ExactMatch("answer"), TokenF1("answer"), Matches(r"\S+", "answer")])
def test_an_answer_that_is_a_number_may_be_a_float_and_must_not_be_missing(reward: Any) -> None:
    """Pandas makes floats of whole numbers where others are missing."""
    for text, answer, right in (("7", 7.0, 1), ("7.0", 7.0, 1), ("1.5", 1.5, 1), ("7", 7, 1), ("8", 7.0, 0)):
        assert reward(["q"], [text], answer=[answer]).item() == right
    for missing in (None, float("nan")):
        with pytest.raises(RewardError, match="in the column 'answer', and has"):
            reward(["q", "q"], ["nan", "nan"], answer=["nan", missing])


@pytest.mark.parametrize("make", [ExactMatch, TokenF1])
def test_references_are_those_of_the_row(make: Callable[..., ExactMatch | TokenF1]) -> None:
    """In a program, of ragged lists, in any order of prompts; and the price of abstaining adds to it."""
    lm = LanguageModel.tabular(["<eos>", "lima", "rome", "unknown"], seed=0)
    model = TiltedLM(lm, make("right") + 0.4 * Matches("^ ?unknown$"), beta=0.5, max_new_tokens=2)
    prompts, right = ["lima", "rome"], [["lima", "lima lima"], ["rome"]]
    exact = Exact(progress=False).run(model, prompts, right=right)
    for i, own in enumerate(("lima", "rome")):
        scores = dict(zip(exact.texts["completion"][0, :, i], exact.rewards["reward"][0, :, i], strict=True))
        assert scores[own] == pytest.approx(1.0)
        assert scores["unknown"] == pytest.approx(0.4)
        assert scores["lima lima"] == pytest.approx(1.0 if own == "lima" else 0.0)
    assert get(make.__name__.lower(), column="right").column == "right"


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({}, "needs the column 'references'"),
        ({"references": [[]]}, r"needs references in the column 'references', and has \[\]"),
        ({"references": [None]}, "has None"),
        ({"references": [["x", None]]}, "has "),
    ],
)
def test_what_is_missing_is_said(columns: dict[str, object], says: str) -> None:
    for reward in (ExactMatch(), TokenF1()):
        with pytest.raises(RewardError, match=says):
            reward(["q"], ["text"], **columns)
