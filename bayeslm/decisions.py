r"""Decisions: the text of highest expected utility under a posterior (minimum Bayes risk).

    h* = argmax_h U(h),    U(h) = E_{y ~ \pi*}[ u(h, y) ] = \sum_i w_i u(h, y_i) / \sum_i w_i

The utility u of a pair says how good the candidate h is where the draw y is right. Candidates are texts that were
drawn; the expectation is over all draws. Special cases: the answer of most weight, which is self-consistency
(`SameAnswer`), and the text of highest reward, a utility that no draw changes.
Source: Kumar and Byrne 2004, Minimum Bayes-risk decoding for statistical machine translation; Eikema and Aziz 2022,
arXiv 2108.04718; Wang et al. 2023, Self-consistency, arXiv 2203.11171; Bertsch et al. 2023, It's MBR all the way down,
arXiv 2310.01387.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from bayeslm.diagnostics import expectation
from bayeslm.posterior_draws import PosteriorDraws
from bayeslm.validation import Count, Unchecked, show, validated
from bayeslm.weights import Array, Estimate


class Utility:
    """A utility of pairs of texts, of which many can be computed at once.

    Any function of two texts is a utility too. Inherit from this class where a table is faster, or where texts are
    alike.
    """

    def __call__(self, candidate: str, draw: str) -> float:
        return float(self.table([candidate], [draw])[0, 0])

    def table(self, candidates: list[str], draws: list[str]) -> Array:
        """Return the utility of each pair, (candidate, draw). Override this."""
        raise NotImplementedError

    def key(self, text: str) -> Hashable:
        """Return what of a text its utilities depend on: one text stands for all that have the same."""
        return text


@validated
class FunctionUtility(Utility):
    """Any function of two texts, (candidate, draw)."""

    def __init__(self, function: Callable[[str, str], float]) -> None:
        self.function = function

    def table(self, candidates: list[str], draws: list[str]) -> Array:
        return np.array([[self._of(candidate, draw) for draw in draws] for candidate in candidates])

    def _of(self, candidate: str, draw: str) -> float:
        pair = f"the candidate {candidate!r:.60} and the draw {draw!r:.60}"
        try:
            found = self.function(candidate, draw)
        except Exception as error:
            raise ValueError(f"the utility raised {type(error).__name__}: {error}, for {pair}") from error
        try:
            if isinstance(found, str | bytes):
                raise TypeError
            return float(found)
        except (TypeError, ValueError):
            raise ValueError(f"a utility must return a number, and returned {found!r:.60} for {pair}") from None


@validated
class SameAnswer(Utility):
    """1 where two texts have the same answer, else 0: the decision is the answer of highest probability.

    :param answer: finds the answer in a text, and None where it has none: such a text agrees with no other. The default
        is the whole text, without the spaces around it: exact match.
    """

    def __init__(self, answer: Callable[[str], Hashable | None] = str.strip) -> None:
        self.answer = answer

    def table(self, candidates: list[str], draws: list[str]) -> Array:
        found = [self.key(text) for text in draws]
        rows = [[mine is not None and mine == other for other in found] for mine in map(self.key, candidates)]
        return np.array(rows, dtype=float)

    def key(self, text: str) -> Hashable:
        try:
            found = self.answer(text)
        except Exception as error:
            what = f"SameAnswer: the function raised {type(error).__name__} ({error}) for {text!r:.60}"
            raise ValueError(f"{what}: return None where a text has no answer") from error
        if not isinstance(found, Hashable):
            what = "an answer must be a string, a number, a tuple or None"
            raise ValueError(f"SameAnswer: {what}, got {found!r:.60} for {text!r:.60}")
        return found


@validated
class ChrF(Utility):
    """The F-score of character n-grams, 0 to 100, by sacrebleu: of the candidate, with the draw as the reference.

    A pair of sentences takes about 0.3 ms. Source: Popović 2015, chrF; Post 2018, A call for clarity in reporting BLEU
    scores.

    :param word_order: the longest n-gram of words that counts too: 0 for chrF, 2 for chrF++.
    :raises ImportError: if sacrebleu is not installed.
    """

    def __init__(self, word_order: Literal[0, 1, 2] = 0) -> None:
        try:
            from sacrebleu.metrics.chrf import CHRF
        except ModuleNotFoundError as error:
            raise ImportError(f'this utility needs {error.name}: pip install "bayeslm[translation]"') from error
        self._metric = CHRF(word_order=word_order)

    def table(self, candidates: list[str], draws: list[str]) -> Array:
        return np.array([[self._score(candidate, draw) for draw in draws] for candidate in candidates])

    def _score(self, candidate: str, draw: str) -> float:
        if candidate == draw:  # two empty texts too, which sacrebleu gives 0
            return 100.0
        return float(self._metric.sentence_score(candidate, [draw]).score)


@validated
class EmbeddingSimilarity(Utility):
    """The cosine of the angle between the vectors of two texts, -1 to 1; 0 where one has the vector 0.

    :param embed: makes vectors of texts, (text, dimension), such as `bayeslm.models.rewards.sentence_embeddings`.
    """

    def __init__(self, embed: Callable[[list[str]], ArrayLike]) -> None:
        self.embed = embed

    def table(self, candidates: list[str], draws: list[str]) -> Array:
        every = list(dict.fromkeys([*draws, *candidates]))
        vectors = np.asarray(self.embed(every), dtype=float)
        if vectors.ndim != 2 or len(vectors) != len(every):
            raise ValueError(f"embed must return vectors ({len(every)}, dimension), not {vectors.shape}")
        vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), np.finfo(float).tiny)
        row = {text: i for i, text in enumerate(every)}
        own, others = ([row[text] for text in texts] for texts in (candidates, draws))
        return np.asarray(vectors[own] @ vectors[others].T)


class Candidate(NamedTuple):
    """A text that was drawn, and what it is worth."""

    text: str
    weight: float
    """The share of the posterior's weight that texts of its `Utility.key` have."""
    expected_utility: float
    stderr: float
    """The standard error of the expected utility, from the weights of the draws."""


@dataclass(frozen=True)
class Decision:
    """The best candidate of each prompt.

    The best of several estimates is high by chance, by up to about its standard error. Where that matters, decide by
    one posterior and estimate by another.
    """

    candidates: list[list[Candidate]]
    """Of each prompt, the best first."""
    lead: Array
    """(prompt,): by how much the expected utility of the best exceeds that of the second; inf if there is no second."""
    lead_stderr: Array
    """(prompt,): its standard error, from the same draws of both."""
    pairs: int
    """The number of utilities that were computed."""

    @property
    def texts(self) -> list[str]:
        """The decision of each prompt."""
        return [candidates[0].text for candidates in self.candidates]

    @property
    def expected_utility(self) -> Array:
        """(prompt,): of the decisions."""
        return np.array([candidates[0].expected_utility for candidates in self.candidates])

    @property
    def stderr(self) -> Array:
        """(prompt,): the standard errors of `expected_utility`."""
        return np.array([candidates[0].stderr for candidates in self.candidates])


@validated
def decide(
    posterior: Annotated[PosteriorDraws, Unchecked],
    utility: Callable[[str, str], float] | Literal["reward"],
    *,
    num_candidates: Count = 32,
    also: Sequence[str] = (),
    site: str | None = None,
) -> Decision:
    """Return the text of highest expected utility for each prompt.

    It costs one utility for each pair of a candidate and a distinct text that was drawn: at most ``num_candidates``
    times the number of draws, a prompt.

    :param utility: of a pair (candidate, draw): a `Utility`, or any function of two texts. "reward": the candidate's
        own reward, so that the decision is the first of `Posterior.best`, at no cost.
    :param num_candidates: the most candidates of a prompt: those of largest weight, of equal ones those that were drawn
        first; with "reward" those of highest reward.
    :param also: further candidates of every prompt, that need not have been drawn: "I don't know", whose utility is the
        price of an abstention. Not with "reward".
    :param site: the completion site, where the model has several.
    :raises ValueError: if ``site`` is needed and missing, or unknown, or has several texts a prompt; if every weight of
        a prompt is zero, or a utility is not a finite number, with the pair.
    """
    if not hasattr(posterior, "decide"):
        raise TypeError(f"decide: posterior must be a Posterior, got {show(posterior)}")
    columns = _columns(posterior, _site(posterior, site), utility)
    if isinstance(utility, str):
        if also:
            raise ValueError('decide("reward") knows the rewards of draws alone: leave also out, or give a function')
        return _by_reward(posterior, columns, num_candidates, site)
    chosen = [_candidates(utility, column, num_candidates, also) for column in columns]
    tables = [_table(utility, column, list(some)) for column, some in zip(columns, chosen, strict=True)]
    ranks = range(max(map(len, chosen)))
    estimates = [_expectation(posterior, columns, [t[min(k, len(t) - 1)] for t in tables]) for k in ranks]
    means, errors = np.moveaxis(np.array(estimates), 1, 0)  # (candidate, prompt); repeated where a prompt has fewer
    orders = [np.argsort(-means[: len(some), p], kind="stable") for p, some in enumerate(chosen)]
    gaps = [table[order[0]] - table[order[min(1, len(order) - 1)]] for table, order in zip(tables, orders, strict=True)]
    lead, lead_stderr = _expectation(posterior, columns, gaps)
    alone = np.array([len(order) == 1 for order in orders])
    candidates = []
    for p, (some, order) in enumerate(zip(chosen, orders, strict=True)):
        weighted = list(some.items())
        worth = zip((weighted[i] for i in order), means[order, p].tolist(), errors[order, p].tolist(), strict=True)
        candidates.append([Candidate(text, weight, mean, se) for (text, weight), mean, se in worth])
    lead, lead_stderr = np.where(alone, np.inf, lead), np.where(alone, 0.0, lead_stderr)
    return Decision(candidates, lead, lead_stderr, pairs=sum(table.size for table in tables))


class _Column(NamedTuple):
    """The texts of a prompt, one for each key."""

    texts: list[str]
    weights: Array
    """(text,): the weight of all draws of its key."""
    place: Array
    """(chain, draw): which text stands for each draw; 0 for draws of zero weight, which count nowhere."""


def _site(posterior: PosteriorDraws, site: str | None) -> str:
    """Return the completion site, which must have one text a prompt, or one for all."""
    site = posterior.completion_site(site)
    if (dims := posterior.dims[site][:-1]) not in ((), ("prompt",)):
        raise ValueError(f"a decision is about one text a prompt, and texts[{site!r}] has the axes {dims}")
    return site


def _columns(posterior: PosteriorDraws, site: str, utility: Callable[[str, str], float] | str) -> list[_Column]:
    key = utility.key if isinstance(utility, Utility) else str
    weights, texts = posterior.weights(), posterior.texts[site]
    texts = texts if texts.ndim == 3 else texts[..., None]
    weights = np.broadcast_to(weights, (*weights.shape[:2], texts.shape[2]))
    return [_column(texts[..., prompt], weights[..., prompt], key) for prompt in range(texts.shape[2])]


def _column(texts: Array, weights: Array, key: Callable[[str], Hashable]) -> _Column:
    """Group the draws of a prompt, texts and weights (chain, draw), by their keys; the heaviest draw stands for all."""
    keys: dict[str, Hashable] = {}
    number: dict[Hashable, int] = {}
    index = np.zeros(texts.size, dtype=int)
    heaviest: list[int] = []
    flat, w = texts.ravel().tolist(), weights.ravel()
    for i in np.flatnonzero(w > 0).tolist():
        if flat[i] not in keys:
            keys[flat[i]] = key(flat[i])
        group = index[i] = number.setdefault(keys[flat[i]], len(number))
        if group == len(heaviest):
            heaviest.append(i)
        elif w[i] > w[heaviest[group]]:
            heaviest[group] = i
    total = np.bincount(index, w, minlength=len(heaviest))
    return _Column([flat[i] for i in heaviest], total, index.reshape(texts.shape))


def _candidates(utility: Any, column: _Column, num: int, also: Sequence[str]) -> dict[str, float]:
    """Return the candidates of a prompt with their weights: the ``num`` heaviest texts, and others that are wanted."""
    key = utility.key if isinstance(utility, Utility) else str
    heaviest = np.argsort(-column.weights, kind="stable")[:num].tolist()
    found = {column.texts[i]: float(column.weights[i]) for i in heaviest}
    drawn = {key(text): weight for text, weight in zip(column.texts, column.weights.tolist(), strict=True)}
    have = {key(text) for text in found}
    return found | {text: drawn.get(key(text), 0.0) for text in also if key(text) not in have}


def _table(utility: Callable[[str, str], float], column: _Column, candidates: list[str]) -> Array:
    """Return utilities (candidate, text).

    :raises ValueError: if one is not a finite number, or the table has another shape.
    """
    utility = utility if isinstance(utility, Utility) else FunctionUtility(utility)
    table = np.asarray(utility.table(candidates, column.texts), dtype=float)
    if table.shape != (len(candidates), len(column.texts)):
        raise ValueError(f"a table of utilities must be {(len(candidates), len(column.texts))}, not {table.shape}")
    if (bad := np.argwhere(~np.isfinite(table))).size:
        k, i = bad[0]
        pair = f"the candidate {candidates[k]!r:.60} and the draw {column.texts[i]!r:.60}"
        raise ValueError(f"a utility must be a finite number, and is {table[k, i]} for {pair}")
    return table


def _expectation(posterior: PosteriorDraws, columns: list[_Column], rows: list[Array]) -> Estimate:
    """Return the expected utility of one candidate of each prompt, given its utilities (text,)."""
    values = np.stack([row[column.place] for row, column in zip(rows, columns, strict=True)], axis=2)
    return expectation(posterior, values)


def _by_reward(posterior: PosteriorDraws, columns: list[_Column], num_candidates: int, site: str | None) -> Decision:
    """Return the decision by the candidates' own rewards, which are known without an error."""
    candidates, leads = [], []
    for p, column in enumerate(columns):
        weight = dict(zip(column.texts, column.weights.tolist(), strict=True))
        found = posterior.best(p, num_candidates + 1, site)
        leads.append(found[0][1] - found[1][1] if len(found) > 1 else np.inf)
        best = found[:num_candidates]
        candidates.append([Candidate(text, weight.get(text, 0.0), reward, 0.0) for text, reward in best])
    return Decision(candidates, np.array(leads), np.zeros(len(leads)), pairs=0)
