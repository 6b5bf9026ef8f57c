"""Answers that are compared with references: exact match and the F1 of words, verifiable rewards of question answering.

Both are SQuAD's (Rajpurkar et al. 2016, arXiv 1606.05250): texts are compared in lower case, without punctuation, the
articles a, an and the, and more than one space; of several references the best counts.
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bayeslm.validation import validated

from .reward import Reward

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


@validated
def normalised_answer(text: str) -> str:
    """Return what of an answer is compared: its words, in lower case, without punctuation and articles."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def is_missing(answer: Any) -> bool:
    """Return whether there is no answer: None, or NaN, which pandas has in its place."""
    return answer is None or (isinstance(answer, float) and math.isnan(answer))


def written(answer: Any) -> tuple[str, ...]:
    """Return the texts that an answer is: of a whole number that is a float, as in pandas, the whole number too."""
    whole = isinstance(answer, float) and answer.is_integer()
    return (str(answer), str(int(answer))) if whole else (str(answer),)


class ReferenceReward(Reward):
    """A reward that compares the completion with the references of its prompt; override `compare`."""

    column: str
    lower_bound, upper_bound = 0.0, 1.0

    def compare(self, answer: str, reference: str) -> float:
        """Return the score of an answer, both normalised."""
        raise NotImplementedError

    def score(self, prompts: list[Any], completions: list[str], **columns: Any) -> Sequence[float]:
        if self.column not in columns:
            self._fail(f"needs the column {self.column!r}", prompts[0], completions[0])
        scores = []
        for prompt, text, found in zip(prompts, completions, columns[self.column], strict=True):
            references = [found] if isinstance(found, str) or not isinstance(found, Sequence) else found
            if not references or any(map(is_missing, references)):
                self._fail(f"needs references in the column {self.column!r}, and has {found!r:.60}", prompt, text)
            answer = normalised_answer(text)
            texts = [normalised_answer(text) for reference in references for text in written(reference)]
            scores.append(max(self.compare(answer, reference) for reference in texts))
        return scores

    prefix = score  # an estimate: of the text so far


@validated
@dataclass(eq=False)
class ExactMatch(ReferenceReward):
    """1 if the completion is one of its prompt's references, up to case, punctuation and articles; else 0.

    :param column: name of the column of references: of each prompt one, or a list of those that are right.
    """

    column: str = "references"

    def compare(self, answer: str, reference: str) -> float:
        return float(answer == reference)


@validated
@dataclass(eq=False)
class TokenF1(ReferenceReward):
    """The F1 of the completion's words against those of its prompt's nearest reference, 0 to 1.

    :param column: name of the column of references: of each prompt one, or a list of those that are right.
    """

    column: str = "references"

    def compare(self, answer: str, reference: str) -> float:
        own, others = answer.split(), reference.split()
        if not own or not others:
            return float(own == others)
        common = (Counter(own) & Counter(others)).total()
        return 2 * common / (len(own) + len(others))
