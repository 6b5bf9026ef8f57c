"""Decisions of minimum Bayes risk, against sums over enumerated posteriors."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import norm
from support.statistics import assert_estimate
from support.toys import (
    MAKERS,
    PRIOR,
    TARGET,
    WORDS,
    Gaussian,
    assert_calibrated,
    autoregression,
    discrete,
    enumerated,
    from_prior,
    shared_weighted,
)

from bayeslm.decisions import ChrF, EmbeddingSimilarity, SameAnswer, Utility

TABLE = np.array([[1.0, 0.2, 0.4, 0.0], [0.3, 1.0, 0.5, 0.9], [0.4, 0.5, 1.0, 0.55], [0.0, 0.7, 0.6, 1.0]])  # of WORDS


def closeness(candidate, draw):
    return TABLE[WORDS.tolist().index(candidate), WORDS.tolist().index(draw)]


class Closeness(Utility):
    def table(self, candidates, draws):
        return np.array([[closeness(c, d) for d in draws] for c in candidates])


class Letters(Utility):
    """Texts with the same first letter are alike."""

    def table(self, candidates, draws):
        return np.array([[float(ord(c[0]) < ord(d[0])) for d in draws] for c in candidates])

    def key(self, text):
        return text[0]


def has_letter(letter):
    return SameAnswer(lambda text: letter if letter in text else None)


UTILITIES = {
    "function": closeness,
    "class": Closeness(),
    "key": Letters(),
    "exact match": SameAnswer(),
    "answer": has_letter("e"),
    "ChrF": ChrF(),
    "embedding": EmbeddingSimilarity(lambda texts: [[len(t), t.count("e") - 1.0, ord(t[0]) % 7] for t in texts]),
}


def expected(utility, prompt):
    """U of every word, by the definition."""
    return np.array([sum(w * utility(c, d) for w, d in zip(TARGET[prompt], WORDS, strict=True)) for c in WORDS])


@pytest.mark.parametrize("name", UTILITIES)
def test_an_enumerated_posterior_decides_as_the_sum_over_it(name):
    utility = UTILITIES[name]
    decision = enumerated().decide(utility)
    for prompt, candidates in enumerate(decision.candidates):
        exact = expected(utility, prompt)
        assert [c.expected_utility for c in candidates] == sorted(
            (c.expected_utility for c in candidates), reverse=True
        )
        for c in candidates:
            assert c.expected_utility == pytest.approx(exact[WORDS.tolist().index(c.text)])
        alive = TARGET[prompt] > 0
        assert decision.expected_utility[prompt] == pytest.approx(exact[alive].max())
        ranked = [c.expected_utility for c in candidates]
        assert decision.lead[prompt] == pytest.approx(ranked[0] - ranked[1] if ranked[1:] else np.inf)
    np.testing.assert_array_equal(decision.stderr, 0.0)
    assert decision.pairs <= 4 * 4 + 3 * 3  # of draws of positive weight alone


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", ["class", "exact match", "answer", "ChrF"])
def test_weighted_draws_estimate_every_candidate(name, seed):
    decision = from_prior(seed).decide(UTILITIES[name])
    for prompt, candidates in enumerate(decision.candidates):
        exact = expected(UTILITIES[name], prompt)
        estimates = np.array([(c.expected_utility, c.stderr, exact[WORDS.tolist().index(c.text)]) for c in candidates])
        assert_estimate(*estimates.T)
        assert (estimates[:, 1] < 0.03 * (100 if name == "ChrF" else 1)).all()


def of_words(index, weights=None, kind="weighted", **fields):
    """Draws of the four words, of many prompts."""
    prompts = index.shape[2]
    log_weights = np.zeros(index.shape) if weights is None else np.log(weights)[index]
    return replace(
        Gaussian().posterior(0, kind="markov", prompts=prompts),
        samples={"completion": index[..., None]},
        dims={"completion": ("prompt", "token")},
        texts={"completion": WORDS[index]},
        log_weights=log_weights,
        log_joint=log_weights,
        log_likelihood={"reward": log_weights},
        prior={},
        kind=kind,
        **fields,
    )


@pytest.mark.parametrize("kind", ["weighted", "exact", "markov"])
def test_errors_are_calibrated(kind):
    """Of one candidate and of the lead, in 200 replicates: weighted, independent and correlated draws."""
    rng = np.random.default_rng(3)
    target = TARGET[0]
    uniform = norm.cdf(autoregression(rng, (4, 250, 200))) if kind == "markov" else rng.random((4, 250, 200))
    q = PRIOR if kind == "weighted" else target
    index = np.minimum(np.searchsorted(np.cumsum(q), uniform), 3)
    posterior = of_words(index, target / PRIOR if kind == "weighted" else None, kind)
    decision = posterior.decide(Closeness())
    by_text = [{c.text: c for c in candidates} for candidates in decision.candidates]
    for word, exact in zip(WORDS, expected(closeness, 0), strict=True):
        worth = np.array([(found[word].expected_utility, found[word].stderr) for found in by_text])
        assert_calibrated(*worth.T, exact)
    exact = np.sort(expected(closeness, 0))
    assert (np.array(decision.texts) == "yes").all(), "a lead of chance alone has another mean"
    assert_calibrated(decision.lead, decision.lead_stderr, exact[-1] - exact[-2])


def test_majority_is_the_answer_of_most_weight_whatever_the_texts():
    """All texts differ, and two of three end with the same answer, which the first candidates do not have."""
    texts = np.array([[[f"because {i} so {'7' if i % 3 else '5'}"] for i in range(90)]], dtype=object)
    ids = np.arange(90)[None, :, None, None]
    posterior = replace(
        of_words(np.zeros((1, 90, 1), dtype=int)), samples={"completion": ids}, texts={"completion": texts}
    )
    answer = SameAnswer(lambda text: text.split()[-1])
    decision = posterior.decide(answer, num_candidates=1)
    assert decision.texts == ["because 1 so 7"]
    assert decision.expected_utility[0] == pytest.approx(2 / 3)
    assert decision.pairs == 2
    whole = posterior.decide(answer)
    assert [(c.text.split()[-1], round(c.weight, 6)) for c in whole.candidates[0]] == [("7", 0.666667), ("5", 0.333333)]
    log_weights = np.zeros((1, 90, 1))
    log_weights[0, 4] = 1.0  # the text of most weight among those with the answer
    heavy = replace(posterior, log_weights=log_weights, kind="weighted").decide(answer)
    assert heavy.texts == ["because 4 so 7"]
    assert posterior.decide(SameAnswer(lambda text: None)).expected_utility == [0.0]  # no answer agrees with none


@pytest.mark.parametrize("maker", [enumerated, lambda: from_prior(0)])
def test_best_is_the_decision_by_reward(maker):
    posterior = maker()
    decision = posterior.decide("reward", num_candidates=3)
    for prompt, candidates in enumerate(decision.candidates):
        assert [(c.text, c.expected_utility) for c in candidates] == posterior.best(prompt, k=3)
        by_hand = dict(posterior.best(prompt, k=9))
        same = posterior.decide(lambda c, d, r=by_hand: max(r.get(c, -9.0), -9.0))
        assert same.texts[prompt] == decision.texts[prompt]
    assert decision.pairs == 0
    np.testing.assert_array_equal(decision.stderr, 0.0)


@pytest.mark.parametrize("kind", MAKERS)
def test_every_kind_of_draws_decides(kind):
    """Of toys with texts; the expected utility is `expectation` of the utilities of all draws."""
    posterior = MAKERS[kind]()
    if not posterior.texts:
        with pytest.raises(ValueError, match="site must be one of"):
            posterior.decide(SameAnswer())
        return
    decision = posterior.decide(SameAnswer(), num_candidates=2)
    assert len(decision.texts) == len(posterior.prompts)
    assert all(len(candidates) <= 2 for candidates in decision.candidates)
    for prompt, candidates in enumerate(decision.candidates):
        for c in candidates:
            matches = posterior.texts["completion"][..., prompt] == c.text
            weights = posterior.weights()
            assert c.weight == pytest.approx((weights[..., min(prompt, weights.shape[2] - 1)] * matches).sum())


def test_prompts_that_share_a_latent_decide_by_their_joint_weights():
    posterior = shared_weighted()
    decision = posterior.decide(lambda c, d: -abs(float(c) - float(d)), num_candidates=100)
    weights = np.exp(posterior.log_weights[..., 0])
    weights, numbers = weights.ravel() / weights.sum(), posterior.texts["completion"][..., 0].ravel().astype(float)
    exact = -(weights * np.abs(numbers[:, None] - numbers)).sum(1)
    np.testing.assert_allclose(decision.expected_utility, exact.max())


def impossible(candidate, draw):
    return np.nan if draw == "yes" else 1.0


WRONG = {
    "a utility that is no number": ({"utility": impossible}, "finite number, and is nan for the candidate"),
    "a utility that is a text": (
        {"utility": lambda c, d: d},
        "must return a number, and returned '",
    ),
    "a table of another shape": (
        {"utility": type("Bad", (Utility,), {"table": lambda s, c, d: np.zeros(2)})()},
        "must be",
    ),
    "vectors of another number": (
        {"utility": EmbeddingSimilarity(lambda texts: np.zeros((1, 2)))},
        "embed must return",
    ),
    "an answer that is a list": (
        {"utility": SameAnswer(str.split)},
        r"an answer must be a string, a number, a tuple or None, got \['",
    ),
    "an answer that is not found": (
        {"utility": SameAnswer(lambda text: text.split()[9])},
        r"the function raised IndexError \(.*\) for '.*': return None where a text has no answer",
    ),
    "a class": ({"utility": SameAnswer}, r"that is a class, write SameAnswer\(\.\.\.\)"),
    "a site that is unknown": ({"utility": SameAnswer(), "site": "draft"}, r"site must be one of \['completion'\]"),
    "no candidates": ({"utility": SameAnswer(), "num_candidates": 0}, "num_candidates must be a positive whole number"),
    "an unknown name": ({"utility": "rewards"}, "utility must be"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_arguments_are_refused(what):
    arguments, message = WRONG[what]
    with pytest.raises((ValueError, TypeError), match=message):
        enumerated().decide(**arguments)


def test_a_prompt_without_a_possible_draw_is_refused():
    posterior = from_prior(0)
    log_weights = posterior.log_weights.copy()
    log_weights[..., 1] = -np.inf
    with pytest.raises(ValueError, match="every draw of prompt 1 has weight zero"):
        replace(posterior, log_weights=log_weights).decide(SameAnswer())


def test_draws_of_zero_weight_are_neither_candidates_nor_asked():
    asked = []
    index = np.broadcast_to(np.arange(4)[:, None], (1, 4, 2)).copy()
    posterior = discrete(index, np.full(index.shape, -np.log(4.0)), "enumerated")
    posterior.decide(lambda c, d: asked.append((c, d)) or 0.0)
    assert len(asked) == 16 + 9  # "yes" breaks the second prompt's constraint


@pytest.mark.parametrize("price", [0.2, 0.5, 0.95])
@pytest.mark.parametrize("name", ["function", "class"])
def test_a_text_that_was_not_drawn_may_be_decided(name, price):
    """To abstain is decided where its price is above the probability of the best answer; a drawn text stays itself."""

    def priced(candidate, draw):
        return price if candidate == "unknown" else float(candidate == draw)

    class Priced(Utility):
        def table(self, candidates, draws):
            return np.array([[priced(c, d) for d in draws] for c in candidates])

    decision = enumerated().decide(priced if name == "function" else Priced(), also=["unknown", "yes"])
    best = TARGET.max(1)
    np.testing.assert_allclose(decision.expected_utility, np.maximum(best, price))
    for own, text in zip(TARGET, decision.texts, strict=True):
        assert text == ("unknown" if price > own.max() else WORDS[own.argmax()])
    weights = [{c.text: c.weight for c in candidates} for candidates in decision.candidates]
    assert [w["unknown"] for w in weights] == [0.0, 0.0]
    np.testing.assert_allclose([w["yes"] for w in weights], TARGET[:, 1])
    assert [len(w) for w in weights] == [sum(own > 0) + (1 if own[1] > 0 else 2) for own in TARGET]
    fewer = enumerated().decide(priced, num_candidates=1, also=["no", "maybe"])  # drawn, and one is not the heaviest
    weights = [{c.text: c.weight for c in candidates} for candidates in fewer.candidates]
    np.testing.assert_allclose([[w["no"], w["maybe"]] for w in weights], TARGET[:, [0, 2]])
    for bad, also in (("reward", ["unknown"]), (priced, "unknown")):
        with pytest.raises((ValueError, TypeError), match="also"):
            enumerated().decide(bad, also=also)
