"""The calling convention of rewards, their shapes and errors, and rewards by name."""

import math
import sys
import types
from functools import partial

import numpy as np
import pytest
import torch

from bayeslm.models import rewards
from bayeslm.models.rewards import Reward, RewardError, Sentiment


def length(completions, **kwargs):
    """A plain function, as a user of TRL writes it."""
    return [float(len(text)) for text in completions]


def right(prompts, completions, answer):
    """A function of a column, without **kwargs."""
    return [float(text.strip() == a) for text, a in zip(completions, answer, strict=True)]


def objects(nested):
    array = np.empty(np.shape(nested), dtype=object)
    array[:] = nested
    return array


# -- shapes and the calling convention -----------------------------------------------------------------------


def test_called_by_keyword_as_trl_does():
    seen = {}

    def reward(prompts, completions, **kwargs):
        seen.update(prompts=prompts, completions=completions, **kwargs)
        return [1.0, 2.0]

    log = print
    scores = Reward(reward)(
        prompts=["a", "b"],
        completions=[[{"role": "assistant", "content": "x"}], "y"],
        completion_ids=[[1, 2], [3]],
        answer=["4", "5"],
        log_extra=log,
        trainer_state=None,
    )
    assert scores.tolist() == [1.0, 2.0]
    assert seen == {
        "prompts": ["a", "b"],
        "completions": ["x", "y"],
        "completion_ids": [[1, 2], [3]],
        "answer": ["4", "5"],
        "log_extra": log,
        "trainer_state": None,
    }


def test_a_function_gets_the_arguments_that_it_declares():
    prompts, texts = ["1+1=", "2+2="], ["2", " 5"]
    assert Reward(right)(prompts, texts, answer=["2", "4"], other=[0, 0]).tolist() == [1.0, 0.0]
    assert Reward(lambda completions: [3.0, 4.0])(prompts, texts, answer=["2", "4"]).tolist() == [3.0, 4.0]
    assert Reward(partial(right, answer=["2", "5"]))(prompts, texts).tolist() == [1.0, 1.0]
    assert Reward(Reward(right))(prompts, texts, answer=["2", "4"]).tolist() == [1.0, 0.0]


def test_conversational_functions_get_messages():
    def think_format(completions, **kwargs):  # as in trl.rewards
        return [float(c[0]["content"].startswith("<think>") and c[0]["role"] == "assistant") for c in completions]

    chats = [[{"role": "user", "content": "Why?"}]] * 2
    assert Reward(think_format, conversational=True)(chats, ["<think>", "no"]).tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    ("prompts", "completions", "shape"),
    [
        (["p", "q"], ["a", "bb"], (2,)),
        (["p", "q"], [["a", "bb"], ["ccc", ""], ["d", "e"]], (3, 2)),
        (["p", "q", "r"], [["a"], ["bb"]], (2, 3)),
        (["p"], ["a", "bb", "ccc"], (3,)),
        (["p", "q"], objects([[["a", "bb"]], [["c", ""]]]), (2, 1, 2)),
        (objects([["p"], ["q"]]), objects(["a", "bb", "c"]), (2, 3)),
        (["p", "q"], np.array(["a", "bb"]), (2,)),
        (["p"], np.array("abc", dtype=object), (1,)),
        ([], [], (0,)),
        (["p"], np.empty((0, 1), dtype=object), (0, 1)),
    ],
)
def test_shape_is_the_broadcast_of_prompts_and_completions(prompts, completions, shape):
    calls = []

    def both(prompts, completions, **kwargs):
        calls.append(list(zip(prompts, completions, strict=True)))
        return length(completions)

    scores = Reward(both)(prompts, completions)
    assert scores.shape == shape
    p, c = np.broadcast_arrays(np.array(prompts, dtype=object), np.array(completions, dtype=object))
    assert scores.tolist() == np.vectorize(len, otypes=[float])(c).tolist() if c.size else True
    assert calls == ([list(zip(p.flat, c.flat, strict=True))] if c.size else [])


@pytest.mark.parametrize(
    "prompts",
    [
        [[{"role": "user", "content": "hi"}], [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]],
        [[1, 2], [3, 4]],
        [[1, 2, 3], [4]],
    ],
)
def test_a_prompt_is_never_taken_apart(prompts):
    seen = []

    def reward(prompts, completions):
        seen.extend(prompts)
        return length(c if isinstance(c, str) else c[0]["content"] for c in completions)

    assert Reward(reward)(prompts, [["a", "bb"], ["ccc", ""]]).tolist() == [[1.0, 2.0], [3.0, 0.0]]
    assert seen == prompts * 2
    rows = torch.tensor([[1, 2], [3, 4]])  # a tensor's rows are prompts too
    assert Reward(reward)(rows, ["a", "bb"]).tolist() == [1.0, 2.0]


def test_columns_broadcast_as_prompts_do():
    seen = {}

    def reward(completions, **columns):
        seen.update(columns)
        return length(completions)

    Reward(reward)(
        ["p", "q"],
        [["a", "b"], ["c", "d"], ["e", "f"]],
        answer=["x", "y"],
        solution=[[1, 2], [3, 4]],
        weight=torch.tensor([0.5, 1.0]),
        each=np.arange(6).reshape(3, 2),
        prompts_=None,
    )
    assert seen["answer"] == ["x", "y"] * 3
    assert seen["solution"] == [[1, 2], [3, 4]] * 3
    assert seen["weight"] == [0.5, 1.0] * 3
    assert seen["each"] == [0, 1, 2, 3, 4, 5]


def test_scores_are_of_the_default_dtype_and_carry_no_gradient():
    parameter = torch.tensor([1.0, 2.0], requires_grad=True)
    scores = Reward(lambda completions: parameter * 2)(["p", "q"], ["a", "b"])
    assert scores.dtype == torch.get_default_dtype()
    assert not scores.requires_grad
    for result in (np.array([1, 2]), (True, 2), [np.float32(1), torch.tensor(2)], torch.tensor([1, 2])):
        assert Reward(lambda completions, r=result: r)(["p", "q"], ["a", "b"]).tolist() == [1.0, 2.0]
    torch.set_default_dtype(torch.float64)
    try:
        assert Reward(lambda completions: [0.1])(["p"], ["a"]).item() == 0.1
    finally:
        torch.set_default_dtype(torch.float32)


# -- errors --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (None, r"abstained \(gave None\) on a completion, and no other reward scores it"),
        (math.nan, "gave nan instead of a number"),
        ("0.5", "gave '0.5' instead of a number"),
        ([0.5], r"gave \[0.5\] instead of a number"),
        (1j, "gave 1j instead of a number"),
        (math.inf, r"gave inf: a score must be below \+inf"),
        (1e39, r"gave 1e\+39: a score must be below \+inf"),  # float32 has no such number
        (torch.tensor(math.nan), "instead of a number"),
    ],
)
def test_a_bad_score_is_shown_with_its_prompt_and_completion(bad, message):
    def reward(completions, **kwargs):
        return [bad if text == "worst" else 1.0 for text in completions]

    with pytest.raises(RewardError, match=message) as caught:
        Reward(reward)(["first", "second"], [["a", "b"], ["c", "worst"]])
    assert all(part in str(caught.value) for part in ("reward 'reward'", "prompt:     'second'", "'worst'"))
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ([1.0], "gave 1 scores for 2 completions"),
        ([1.0, 2.0, 3.0], "gave 3 scores for 2 completions"),
        (torch.ones(2, 1), r"gave \[1.0\] instead of a number"),
        (1.0, "gave float instead of a list of 2 scores"),
        (None, "gave NoneType instead of a list of 2 scores"),
        ({1.0, 2.0}, "gave set instead of a list of 2 scores"),
        ("12", "gave str instead of a list of 2 scores"),
    ],
)
def test_a_result_that_is_no_list_of_scores(result, message):
    with pytest.raises(RewardError, match=message) as caught:
        Reward(lambda completions: result)(["the prompt", "q"], ["the text", "b"])
    assert "'the prompt'" in str(caught.value)
    assert "'the text'" in str(caught.value)


def test_a_function_that_raises_is_shown_with_the_first_texts_of_its_batch():
    def last_word(completions, weight, **kwargs):
        return [w * len(text.split()[-1]) for w, text in zip(weight, completions, strict=True)]

    texts = [f"text {i}" for i in range(100)]
    texts[37] = texts[80] = " "
    message = "'last_word' raised IndexError: list index out of range on a batch of 100 texts"
    with pytest.raises(RewardError, match=message) as caught:
        Reward(last_word)([f"prompt {i}" for i in range(100)], texts, weight=[1.0] * 100)
    assert "first prompt:     'prompt 0'\n  first completion: 'text 0'" in str(caught.value)
    assert isinstance(caught.value.__cause__, IndexError)


def test_a_missing_column_is_named():
    with pytest.raises(
        RewardError, match="'right' needs answer; its arguments are prompts, completions, label, by name"
    ):
        Reward(right)(["p"], ["a"], label=[1])


def test_long_texts_are_shortened():
    with pytest.raises(RewardError) as caught:
        Reward(lambda completions: [None])(["p" * 5000], ["c" * 5000])
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("prompts", "completions", "columns", "error", "message"),
    [
        ("p", ["a"], {}, TypeError, r"prompts must be a list of prompts, got one string: write \['p'\]"),
        ([{"role": "user", "content": "x"}], ["a"], {}, TypeError, "got one chat"),
        ([1, 2, 3], ["a"], {}, TypeError, "one prompt's token ids"),
        (np.array([[1, 2], [3, 4]]), ["a"], {}, TypeError, "one prompt's token ids"),
        (["p"], "a", {}, TypeError, r"completions must be a list of texts, got one string: write \['a'\]"),
        (["p"], torch.tensor([[1, 2]]), {}, TypeError, "completions must hold texts, got Tensor; lm.decode"),
        (["p"], [[1, 2]], {}, TypeError, "completions must hold texts, got int"),
        (["p"], [None], {}, TypeError, "completions must hold texts, got NoneType"),
        (["p"], [[{"role": "assistant"}]], {}, TypeError, "completions must hold texts"),
        (["p"], [["a", "b"], ["c"]], {}, ValueError, "nested completions are ragged"),
        (["p", "q"], ["a", "b", "c"], {}, ValueError, r"prompts \(2,\) and completions \(3,\) do not broadcast"),
        (["p", "q"], ["a", "b"], {"answer": [1, 2, 3]}, ValueError, r"column 'answer' of shape \(3,\)"),
        (["p"], ["a"], {"answer": np.ones((2, 1))}, ValueError, r"'answer' of shape \(2, 1\) does not broadcast"),
        (["p"], ["a"], {"answer": "42"}, TypeError, "column 'answer' must hold one value a prompt, got one string"),
    ],
)
def test_bad_arguments(prompts, completions, columns, error, message):
    with pytest.raises(error, match=message):
        Reward(length)(prompts, completions, **columns)


def test_objects_that_cannot_be_a_reward():
    for function, message in ((3, "must be a function or None, got 3"), (None, "needs a function")):
        with pytest.raises(TypeError, match=message):
            Reward(function)
    for bounds in (
        {"upper_bound": 0, "lower_bound": 1},
        {"lower_bound": math.inf},
    ):
        with pytest.raises(ValueError, match="lower_bound must not be above"):
            Reward(length, **bounds)
    with pytest.raises(ValueError, match="upper_bound must be a number or None, got nan"):
        Reward(length, upper_bound=math.nan)


def test_scores_outside_declared_bounds_are_refused_and_rounding_is_not():
    reward = Reward(lambda completions: [float(text) for text in completions], upper_bound=1.0, lower_bound=0.0)
    assert reward(["p"], ["1.0000001", "-1e-8"]).tolist() == [1.0, 0.0]
    for text in ("1.1", "-0.1", "-inf"):
        with pytest.raises(RewardError, match=rf"outside its bounds \[0.0, 1.0\] .*\n.*'p'\n.*'{text}'"):
            reward(["p"], ["0.5", text])


# -- by name -------------------------------------------------------------------------------------------------


def test_get():
    assert isinstance(rewards.get("sentiment"), Sentiment)
    assert rewards.get("length", target=3, unit="characters")(["p"], ["abcd"]).item() == -1
    with pytest.raises(ValueError, match="no reward has the name 'sentimant', did you mean 'sentiment'") as caught:
        rewards.get("sentimant")
    names = (
        "classifier, constraint, contains, exactmatch, grammar, judge, length, matches, sentiment, similarity, tokenf1"
    )
    assert f"{names}, toxicity" in str(caught.value)
    with pytest.raises(ValueError, match="no reward has the name 'xyzzy'; there are"):
        rewards.get("xyzzy")


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        (
            "contains",
            {},
            r"reward 'contains' needs the settings phrase: write get\('contains', phrase=\.\.\.\), or on",
        ),
        ("similarity", {}, "needs the settings reference"),
        ("classifier", {}, "needs the settings model"),
        ("constraint", {"prefix_closed": True}, "needs the settings predicate"),
        ("matches", {"column": "a"}, "needs the settings pattern"),
        ("length", {"targt": 3}, "has no setting 'targt', did you mean 'target'.; its settings are target, unit"),
        ("sentiment", {"self": 3}, "has no setting 'self'"),
    ],
)
def test_settings_that_are_missing_or_unknown(name, settings, message):
    with pytest.raises(ValueError, match=message):
        rewards.get(name, **settings)


def test_load(monkeypatch):
    module = types.ModuleType("my_rewards")
    module.length, module.ready, module.Kind, module.number = length, Sentiment(), Sentiment, 3
    module.Needy = rewards.Contains
    monkeypatch.setitem(sys.modules, "my_rewards", module)
    assert rewards.load("my_rewards:length")(["p"], ["abc"]).item() == 3.0
    assert rewards.load("my_rewards:ready") is module.ready
    assert isinstance(rewards.load("my_rewards:Kind"), Sentiment)
    for address, error, message in [
        ("length", ValueError, "write a reward's address as package.module:name, got 'length'"),
        ("my_rewards:", ValueError, "write a reward's address"),
        ("my_rewards:lenght", ValueError, "my_rewards has no 'lenght', did you mean 'length'?"),
        ("no_such_package.rewards:f", ValueError, "there is no module 'no_such_package'"),
        ("email.rewards:f", ValueError, "there is no module 'email.rewards'"),
        ("my_rewards:number", TypeError, "must be a function or None, got 3"),
        ("my_rewards:Needy", ValueError, "'my_rewards:Needy' needs the settings phrase: write one with its settings"),
    ]:
        with pytest.raises(error, match=message):
            rewards.load(address)


def test_load_does_not_hide_the_failing_import_of_a_module(tmp_path, monkeypatch):
    (tmp_path / "needy_rewards.py").write_text("import a_package_nobody_has\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="a_package_nobody_has"):
        rewards.load("needy_rewards:f")
