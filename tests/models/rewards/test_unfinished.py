"""Rewards of unfinished texts."""

import itertools
import math
import re
import threading

import numpy as np
import pyro
import pytest
import torch
from support.models import table_lm

from bayeslm.models import TiltedLM
from bayeslm.models.rewards import (
    Constraint,
    Contains,
    Length,
    Matches,
    Reward,
    RewardError,
    Sentiment,
    Toxicity,
    prefixes,
)

NEG_INF = -math.inf


def so_far(reward, texts, *, partial=False, **columns):
    """Scores of unfinished texts, one a prompt."""
    with prefixes(torch.zeros(len(texts), dtype=torch.bool), partial=partial):
        return reward(["p"] * len(texts), texts, **columns).tolist()


class Recorder(Reward):
    """Scores are 10 x, estimates x; records its arguments."""

    def __init__(self):
        self.calls = []

    def score(self, prompts, completions, **columns):
        self.calls.append(("score", prompts, completions, columns))
        return [10 * float(text) for text in completions]

    def prefix(self, prompts, completions, **columns):
        self.calls.append(("prefix", prompts, completions, columns))
        return [float(text) for text in completions]


# -- the context ---------------------------------------------------------------------------------------------


def test_the_finished_are_scored_and_the_rest_by_prefix_in_one_call_each():
    reward = Recorder()
    finished = torch.tensor([[True, False], [False, False], [True, True]])
    texts = np.array([["1", "2"], ["3", "4"], ["5", "6"]], dtype=object)
    with prefixes(finished):
        scores = reward(["p", "q"], texts, answer=["x", "y"], setting=None)
    assert scores.tolist() == [[10, 2], [3, 4], [50, 60]]
    assert scores.dtype == torch.get_default_dtype()
    assert reward.calls == [
        ("score", ["p", "p", "q"], ["1", "5", "6"], {"answer": ["x", "x", "y"], "setting": None}),
        ("prefix", ["q", "p", "q"], ["2", "3", "4"], {"answer": ["y", "x", "y"], "setting": None}),
    ]


@pytest.mark.parametrize("finished", [True, False])
def test_no_call_is_made_for_nothing(finished):
    reward = Recorder()
    with prefixes(np.full(2, finished)):
        assert reward(["p", "q"], ["1", "2"]).tolist() == ([10, 20] if finished else [1, 2])
        assert reward([], []).shape == (0,)
    assert [call[0] for call in reward.calls] == ["score" if finished else "prefix"]


def test_completions_of_another_shape_are_unfinished():
    with prefixes(torch.tensor([[True, True]])):
        assert Recorder()(["p", "q"], [["1", "2"]]).tolist() == [[10, 20]]
        for texts in (["1", "2"], [["1", "2"], ["3", "4"]], [[["1", "2"]]]):
            assert torch.equal(Recorder()(["p", "q"], texts), torch.tensor(np.array(texts, dtype=np.float32)))
    with prefixes(torch.tensor([True, False, True])):  # of the texts' shape, before they broadcast with prompts
        scores = Recorder()(np.array([["p"], ["q"]], dtype=object), ["1", "2", "3"])
    assert scores.tolist() == [[10, 2, 30]] * 2
    with prefixes(torch.tensor(True)):
        assert Recorder()(["p"], np.array("1", dtype=object)).tolist() == [10]


def test_contexts_nest_and_end_with_their_block():
    def value():
        return Recorder()(["p"], ["1"]).item()

    with prefixes(torch.tensor([False])):
        with prefixes(torch.tensor([True])):
            assert value() == 10
        assert value() == 1
        with pytest.raises(ZeroDivisionError), prefixes(torch.tensor([True])):
            raise ZeroDivisionError
        assert value() == 1
        with pytest.raises(RewardError):
            Sentiment()(["p"], ["1"])
        assert value() == 1  # a reward that failed leaves the context as it was
        seen = []
        thread = threading.Thread(target=lambda: seen.append(value()))
        thread.start()
        thread.join()
        assert seen == [10]  # another thread runs another program
    assert value() == 10


def test_finished_must_be_bool():
    with pytest.raises(TypeError, match=r"finished must be bool, got torch.int64"), prefixes(torch.tensor([1])):
        pass


def test_rewards_that_a_reward_calls_score_finished_texts():
    """Also the way to have one reward of a sum scored on the text so far: Reward(r, prefix=r)."""
    inner = Recorder()

    def outer(prompts, completions):
        return inner(prompts, completions)

    with prefixes(torch.tensor([True, False])):
        assert Reward(outer, prefix=outer)(["p", "q"], ["1", "2"]).tolist() == [10, 20]
    good = Sentiment()
    assert so_far(Reward(good, prefix=good), [" a great", " a"]) == pytest.approx(
        good(["p"], [" a great", " a"]).tolist()
    )


def test_a_character_of_which_bytes_are_missing_is_not_judged():
    plain = Constraint(str.isascii, prefix_closed=True)
    latin = Constraint(lambda text: "\ufffd" not in text, prefix_closed=True)
    assert so_far(plain + latin, ["caf\ufffd", "caf\ufffd\ufffd", "caf"]) == [0, 0, 0]
    assert so_far(latin, ["caf\ufffd s"]) == [NEG_INF]  # in the midst it is there to stay
    with prefixes(torch.tensor([True])):
        assert latin(["p"], ["caf\ufffd"]).item() == NEG_INF


# -- values of a prefix function -----------------------------------------------------------------------------


def test_a_function_and_its_prefix_in_trls_convention():
    def right(completions, answer):
        return [float(text == a) for text, a in zip(completions, answer, strict=True)]

    def on_the_way(prompts, completions, answer, **columns):
        return [0.5 * a.startswith(text) for text, a in zip(completions, answer, strict=True)]

    reward = Reward(right, prefix=on_the_way)
    assert so_far(reward, ["4", "5"], answer=["42", "42"], other=[0, 0]) == [0.5, 0.0]
    assert reward(["p"], ["4"], answer=["4"]).item() == 1.0  # without a context nothing is new
    with pytest.raises(RewardError, match="'right' needs answer"):
        so_far(reward, ["4"])

    def polite(completions):
        return [float(c[0]["role"] == "assistant") for c in completions]

    assert so_far(Reward(polite, prefix=polite, conversational=True), ["x"]) == [1.0]
    with pytest.raises(TypeError, match="must be a function or None, got 3"):
        Reward(right, prefix=3)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ([1.0, math.nan], "gave nan instead of a number"),
        ([1.0, math.inf], r"gave inf: a score must be below \+inf"),
        ([1.0, 2.5], r"gave 2.5, outside its bounds \[0.0, 2.0\]"),
        ([1.0, NEG_INF], r"gave -inf, outside its bounds \[0.0, 2.0\]"),  # with a lower bound no text can be ruled out
        ([1.0], "gave 1 scores for 2 completions"),
        (3, "gave int instead of a list of 2 scores"),
        (ZeroDivisionError("oh"), "raised ZeroDivisionError: oh on a batch of 2"),
    ],
)
@pytest.mark.parametrize("combine", [lambda r: r, lambda r: 2 * r + Length(3), lambda r: r.map(math.exp)])
def test_a_bad_prefix_score_is_shown_with_its_prompt_and_completion(result, message, combine):
    def guess(completions):
        if isinstance(result, Exception):
            raise result
        return result

    reward = combine(Reward(len, prefix=guess, lower_bound=0.0, upper_bound=2.0))
    with pytest.raises(RewardError, match=rf"reward 'len.prefix' {message}") as caught:
        so_far(reward, ["first", "second"])
    one, of = ("first", "first " * ("raised" in message)) if re.search("scores|raised", message) else ("second", "")
    assert f"{of}prompt:     'p'\n  {of}completion: '{one}'" in str(caught.value)


def test_minus_infinity_rules_a_text_out():
    reward = Reward(lambda completions: [0.0] * len(completions), prefix=lambda completions: [NEG_INF, -1.0])
    assert so_far(reward, ["a", "b"]) == [NEG_INF, -1.0]
    assert so_far(3 * reward + 1, ["a", "b"]) == [NEG_INF, -2.0]
    with pytest.raises(RewardError, match=r"negates the -inf of '<lambda>.prefix'.*\n.*\n.*'a'"):
        so_far(-reward, ["a", "b"])


# -- rewards without a prefix --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reward", "name"),
    [
        (Sentiment(), "sentiment"),
        (Contains("a") - 2 * Toxicity(), "toxicity"),
        ((1 + Sentiment()).map(math.tanh), "sentiment"),
        (Reward(lambda completions: [0.0] * len(completions)), "<lambda>"),
    ],
)
def test_a_reward_that_cannot_score_unfinished_texts_says_so(reward, name):
    message = (
        rf"reward '{name}' cannot score unfinished texts: give it a `prefix`.*Reward\(f, prefix=g\).*twist=\"partial\""
    )
    with pytest.raises(RewardError, match=message):
        so_far(reward, ["a"])
    with pytest.raises(RewardError, match=message):
        reward.prefix(["p"], ["a"])
    with prefixes(torch.tensor([True])):
        assert torch.equal(reward(["p"], ["a"]), reward(["p"], ["a"]))
    so_far(reward, ["a"], partial=True)


def test_partial_scores_the_text_so_far_where_there_is_no_prefix():
    texts = [" a great", " a terrible, terrible idea", ""]
    total = Sentiment() - 0.5 * Toxicity() + Recorder().map(lambda x: x / 4) - 1
    with pytest.raises(RewardError, match="sentiment"):
        so_far(total, ["1", "2"])
    assert so_far(total, ["4", "8"], partial=True) == pytest.approx(
        (Sentiment() - 0.5 * Toxicity())(["p"], ["4", "8"]).add(torch.tensor([0.0, 1.0])).tolist()
    )
    assert so_far(Sentiment(), texts, partial=True) == Sentiment()(["p"], texts).tolist()
    assert so_far(Constraint(Contains("x")), texts, partial=True) == [0, 0, 0]  # it has a prefix


def test_partial_rules_nothing_out():
    """A text so far that breaks a hard constraint of unknown kind may yet be mended."""

    def must_end(completions):
        return [1.0 if text.endswith(".") else NEG_INF for text in completions]

    for bounds, kept in (({}, 0.0), ({"upper_bound": 7.0}, 0.0), ({"upper_bound": -2.0}, -2.0)):
        reward = Reward(lambda completions: [c - 3 for c in must_end(completions)], **bounds)
        assert so_far(reward, ["Yes", "Yes."], partial=True) == [kept, -2.0]
    found = Contains("Yes").map(lambda s: -2 - s if s else NEG_INF, upper_bound=-2.0)
    assert so_far(found, ["No", "Yes"]) == [-2.0, -3.0]
    own = Reward(must_end, prefix=must_end)  # whose -inf is final
    assert so_far(own, ["Yes", "Yes."], partial=True) == [NEG_INF, 1.0]


# -- built-in rewards ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reward", "expected"),
    [
        (Contains("please"), [0, 0, 1, 1]),
        (Matches(r"please\b"), [0, 0, 1, 1]),
        (Matches(r"\A\w+\Z"), [0, 1, 1, 0]),
        (Length(), [0, 1, 1, 2]),
        (Length(unit="characters"), [0, 4, 6, 10]),
        (Length(1), [0, 0, 0, -1]),
        (Length(1.5), [0, 0, 0, -0.5]),
        (Length(5, unit="characters"), [0, 0, -1, -5]),
        (Length(0, unit=lambda text: text.count("e")), [0, -1, -2, -2]),
        (Constraint(Contains("please")), [0, 0, 0, 0]),
        (Constraint(Contains("absent")), [0, 0, 0, 0]),
        (Constraint(Matches(r"\A\Z")), [0, 0, 0, 0]),
        (Constraint(lambda text: "now" not in text), [0, 0, 0, 0]),
        (Constraint(lambda text: "now" not in text, prefix_closed=True), [0, 0, 0, NEG_INF]),
        (Constraint(Matches(r"\A\w*\Z"), prefix_closed=True), [0, 0, 0, NEG_INF]),
        (2 * Contains("please") - 0.5 * Length() + 1, [1, 0.5, 2.5, 2]),
        (Length(1).map(math.exp), [1, 1, 1, math.exp(-1)]),
    ],
)
def test_built_in_rewards_of_unfinished_texts(reward, expected):
    texts = ["", "plea", "please", "please now"]
    assert so_far(reward, texts) == pytest.approx(expected)
    assert so_far(reward, texts, partial=True) == pytest.approx(expected)
    assert list(reward.prefix(["p"] * 4, texts)) == pytest.approx(expected)


def test_matches_with_a_column_expects_the_answer_so_far():
    reward = Matches(r"#### (\d+)", column="answer")
    assert so_far(reward, ["#### 4", "#### 42", "a"], answer=["42"] * 3) == [0, 1, 0]
    assert so_far(Constraint(reward), ["#### 4", "a"], answer=["42"] * 2) == [0, 0]


def test_predicates_that_are_not_prefix_closed_are_refused():
    for predicate in (Contains("a"), lambda text: "a" in text, str.isupper):
        with pytest.raises(ValueError, match="a prefix-closed predicate holds for the empty text"):
            Constraint(predicate, prefix_closed=True)
    needy = Reward(lambda completions, banned: [float(b not in t) for t, b in zip(completions, banned, strict=True)])
    constraint = Constraint(needy, prefix_closed=True)  # cannot be tried before its column is there
    assert so_far(constraint, ["ab", "b"], banned=["a", "a"]) == [NEG_INF, 0]


# -- properties ----------------------------------------------------------------------------------------------

WHOLE = ["".join(letters) for n in range(5) for letters in itertools.product("ab ", repeat=n)]
NO_BB = Constraint(lambda text: "bb" not in text, prefix_closed=True)
ENDS_A = Constraint(lambda text: text.endswith("a"))
COUNT = Reward(lambda completions: [float(c.count("a")) for c in completions])
RULES = {
    "closed": NO_BB,
    "open": ENDS_A,
    "contains": Constraint(Contains("ab")),
    "matches": Constraint(Matches(r"\A(a|b)+\Z")),
    "closed by a reward": Constraint(Matches(r"\A(a| )*\Z"), prefix_closed=True),
    "sum": 2 * NO_BB + 0.5 * ENDS_A - Length(2) + 3,
    "mapped, -inf from 0 and 1": Contains("ab").map(lambda s: 0.0 if s else NEG_INF),
    "a constraint's opposite": ENDS_A.map(lambda s: 0.0 if s == NEG_INF else NEG_INF),
    "a prefix-closed constraint's opposite": NO_BB.map(lambda s: 0.0 if s == NEG_INF else NEG_INF),
    "mapped sum": (NO_BB + Length(2)).map(lambda s: s if s > -1 else NEG_INF),
    "given a prefix": Reward(
        lambda completions: [0.0 if c == "ab" else NEG_INF for c in completions],
        prefix=lambda completions: [0.0 if "ab".startswith(c) else NEG_INF for c in completions],
    ),
    "plain": Reward(lambda completions: [1.0 if c.endswith("b") else NEG_INF for c in completions]),
    "plain, mapped": COUNT.map(lambda s: s if s == 2 else NEG_INF, upper_bound=4.0),
    "plain, in a sum": COUNT + NO_BB,
}


def best_continuation(reward):
    """The highest score that a text can still have, by enumeration of all its continuations to 4 letters."""
    scores = dict(zip(WHOLE, reward(["p"], WHOLE).tolist(), strict=True))
    return [max(score for whole, score in scores.items() if whole.startswith(text)) for text in WHOLE]


@pytest.mark.parametrize("name", RULES)
def test_no_text_is_ruled_out_that_could_be_mended(name):
    """The property that exact inference needs: prefix(x) = -inf only if every continuation scores -inf."""
    reward = RULES[name]
    partial = name.startswith("plain")
    expected = so_far(reward, WHOLE, partial=partial)
    assert not any(math.isnan(e) for e in expected)
    for text, e, best in zip(WHOLE, expected, best_continuation(reward), strict=True):
        assert e > NEG_INF or best == NEG_INF, text
    with prefixes(torch.ones(len(WHOLE), dtype=torch.bool), partial=partial):
        finished = reward(["p"] * len(WHOLE), WHOLE)
    assert torch.equal(finished, reward(["p"], WHOLE))


@pytest.mark.parametrize(
    "name", ["closed", "closed by a reward", "sum", "mapped sum", "given a prefix", "plain, in a sum"]
)
def test_a_text_dies_as_soon_as_a_final_constraint_is_broken(name):
    if name == "given a prefix":
        broken = [not "ab".startswith(text) for text in WHOLE]
    else:
        broken = [bool(re.search("b" if name == "closed by a reward" else "bb", text)) for text in WHOLE]
    assert [e == NEG_INF for e in so_far(RULES[name], WHOLE, partial=True)] == broken
    assert any(broken)


@pytest.mark.parametrize("target", [0, 1, 3, 4])
def test_a_target_length_expects_the_best_within_reach(target):
    reward = Length(target, unit="characters")
    assert so_far(reward, WHOLE) == best_continuation(reward)


# -- in a program --------------------------------------------------------------------------------------------


def test_the_context_reaches_the_rewards_of_a_program():
    """A Pyro program's factors are r_prefix / beta of padded completions and r / beta of finished ones."""
    lm = table_lm()  # words: <eos> a b c ...
    reward = Constraint(lambda text: "c" not in text, prefix_closed=True) + Constraint(Contains("a")) - Length()
    program = TiltedLM(lm, reward, beta=0.5, max_new_tokens=4)
    words = [["a b", "b"], ["b c", "a"], ["b", "a c"]]
    tokens = {"a": 1, "b": 2, "c": 3}
    x = torch.zeros(3, 2, 4, dtype=torch.long)  # ends where the text so far does
    for i, j in itertools.product(range(3), range(2)):
        for t, word in enumerate(words[i][j].split()):
            x[i, j, t] = tokens[word]
    finished = torch.tensor([[True, False], [False, True], [True, False]])
    conditioned = pyro.condition(program, {"completion": x})
    with pyro.plate("particles", 3, dim=-2), prefixes(finished):
        trace = pyro.poutine.trace(conditioned).get_trace(["a", "b"])
    trace.compute_log_prob()
    expected = [[-4, -2], [NEG_INF, -2], [NEG_INF, NEG_INF]]
    assert trace.nodes["reward"]["log_prob"].tolist() == expected
