"""Functions that users write, as rewards: what they change, TRL's convention, one call a batch, time limits."""

import asyncio
import math
import threading
import time
from array import array
from collections import deque
from typing import NamedTuple
from zlib import crc32

import numpy as np
import pytest
import torch
from support.models import table_lm, tiny_llama

from bayeslm.inference import ImportanceSampling, RunError
from bayeslm.inference.preferences import Elicitation, InformationGain, Pool
from bayeslm.models import TiltedLM
from bayeslm.models.preferences import Answer, BradleyTerry
from bayeslm.models.rewards import Constraint, Contains, Length, Matches, Reward, RewardError, prefixes

NEG_INF = -math.inf

# -- what a function changes, nobody else reads --------------------------------------------------------------


class Pair(NamedTuple):
    left: list
    right: int


def vandalise(value):
    """Change everything in a value that can be changed in place."""
    if isinstance(value, dict):
        for x in value.values():
            vandalise(x)
        value["new"] = "vandal"
    elif isinstance(value, list):
        for x in value:
            vandalise(x)
        value[:] = ["vandal"]
    elif isinstance(value, tuple):
        for x in value:
            vandalise(x)
    elif isinstance(value, set):
        value.add("vandal")
    elif isinstance(value, deque | array | bytearray):
        value.append(7)
    elif isinstance(value, np.ndarray | torch.Tensor):
        value[:] = 7


def vandal(prompts, completions, **columns):
    n = len(completions)
    vandalise([prompts, completions, columns])
    return [0.0] * n


def tally(prompts, completions, **columns):
    """Return numbers that differ for any other arguments."""
    rows = zip(prompts, completions, *columns.values(), strict=True)
    return [float(crc32(repr(row).encode()) % 1000) for row in rows]


class VandalClass(Reward):
    def score(self, prompts, completions, **columns):
        return vandal(prompts, completions, **columns)

    prefix = score


def arguments():
    chats = [[{"role": "user", "content": "hi", "tags": ["a"]}], [{"role": "user", "content": "yo", "tags": []}]]
    columns = {
        "answer": ["x", "y"],
        "options": [["a", "b"], ["c"]],
        "facts": [{"k": [1]}, {"k": [2]}],
        "pairs": [([1], 2), ([3], 4)],
        "named": [Pair([1], 2), Pair([3], 4)],
        "others": [deque([1]), [array("i", [1]), bytearray(b"a")]],
        "words": [{"s"}, set()],
        "vector": [np.arange(3), np.ones(2)],
        "tensor": [torch.ones(2), torch.zeros(1)],
        "objects": np.array([[1], [2, 3]], dtype=object),
    }
    return (chats, ["one", "two"]), columns


COMPOSITIONS = {
    "sum": lambda bad, good: bad + good,
    "sum, the other way": lambda bad, good: good + bad + 0 * good,
    "scaled": lambda bad, good: 2 * bad + good,
    "mapped": lambda bad, good: bad.map(lambda s: 0 * s) + good,
    "a limit": lambda bad, good: bad.with_timeout(60) + good,
    "wrapped": lambda bad, good: Reward(bad, prefix=bad) + good,
    "constraint": lambda bad, good: Constraint(bad.map(lambda s: 1.0)) + good,
}


@pytest.mark.parametrize("bad", [Reward(vandal, prefix=vandal), VandalClass()], ids=["function", "class"])
@pytest.mark.parametrize("composition", COMPOSITIONS)
def test_a_reward_that_edits_its_lists_changes_nothing_for_others(composition, bad):
    good = Reward(tally, prefix=tally)
    total = COMPOSITIONS[composition](bad, good)
    positional, columns = arguments()
    expected = good(*positional, **columns)
    assert torch.equal(total(*positional, **columns), expected)
    for finished in (torch.tensor([True, False]), torch.tensor([False, False])):
        with prefixes(finished):
            assert torch.equal(total(*positional, **columns), expected)
    assert repr((positional, columns)) == repr(arguments())  # those of the caller


def test_a_program_keeps_its_prompts_and_columns():
    lm = table_lm(vocab=4)
    prompts, columns = [[1, 2], [2]], {"answer": [["a"], ["b"]]}

    def count(completions, answer, **kwargs):
        return [float(text.count(a[0])) for text, a in zip(completions, answer, strict=True)]

    engine = ImportanceSampling(num_particles=16, seed=0, progress=False)
    found = engine.run(TiltedLM(lm, Reward(vandal) + Reward(count), 1.0, max_new_tokens=3), prompts, **columns)
    expected = engine.run(TiltedLM(lm, count, 1.0, max_new_tokens=3), prompts, **columns)
    assert (found.log_weights == expected.log_weights).all()
    assert found.log_weights.std() > 0.1
    assert (prompts, columns) == ([[1, 2], [2]], {"answer": [["a"], ["b"]]})


def test_features_and_acquisitions_that_edit_change_no_question():
    def features(prompts, completions):
        x = torch.tensor([[float(c.count("a")), float(len(c))] for c in completions])
        vandalise([prompts, completions])
        return x

    class VandalAcquisition(InformationGain):
        def choose(self, rewards, pairs, prompts):
            chosen = super().choose(rewards, pairs, prompts)
            vandalise([rewards, pairs, prompts])
            return chosen

    pool = Pool(["p"] * 4 + ["q"] * 2, ["a", "b b", "aa", "ab a", "c", "a c a"])
    answers = [Answer("p", "a", "b b", 0.5, True)]
    indices = pool.prompt_indices.clone()
    rules = (VandalAcquisition(), InformationGain())
    questions = [Elicitation(BradleyTerry(features), rule).ask(pool, answers) for rule in rules]
    assert questions[0] == questions[1]
    assert torch.equal(pool.prompt_indices, indices)


# -- TRL's convention ----------------------------------------------------------------------------------------

CHATS = [[{"role": "user", "content": "a b"}], [{"role": "user", "content": "c"}]]


def content(completions, **kwargs):
    """As in TRL's documentation, for its conversational format."""
    return [float(len(completion[0]["content"])) for completion in completions]


def tokens(completion_ids, **kwargs):
    return [float(len(ids)) for ids in completion_ids]


def logs(completions, log_extra, log_metric, trainer_state, **kwargs):
    log_extra("texts", list(completions))
    log_metric("mean", 0.5)
    return [1.0] * len(completions)


async def later(completions, **kwargs):
    await asyncio.sleep(0.001)
    return [float(len(text)) for text in completions]


class Later(Reward):
    async def score(self, prompts, completions, **columns):
        return await later(completions)


class LaterCallable:
    async def __call__(self, completions, **kwargs):
        return await later(completions)


def test_completions_of_chats_are_messages_for_functions_as_in_trl():
    texts = [["", "xx"], ["yyy", "z"]]
    lengths = [[0.0, 2.0], [3.0, 1.0]]
    assert Reward(content)(CHATS, texts).tolist() == lengths
    assert Reward(content, conversational=True)(["p", "q"], texts).tolist() == lengths
    assert Reward(later, conversational=False)(CHATS, texts).tolist() == lengths
    assert Reward(later)(["p", [1, 2]], texts).tolist() == lengths
    assert Length(unit="characters")(CHATS, texts).tolist() == lengths  # a method of a class reads texts
    with prefixes(torch.tensor([False, False])):
        assert Reward(content, prefix=content)(CHATS, ["u", ""]).tolist() == [1.0, 0.0]


def test_a_program_passes_what_trls_trainer_passes():
    """Token ids with the end, one list a completion of any batch shape; what a reward logs is dropped."""
    lm = table_lm(vocab=3)  # 0 ends a text
    seen = []

    def check(prompts, completions, completion_ids, trainer_state, **kwargs):
        seen.extend(zip(completions, completion_ids, strict=True))
        assert trainer_state is None
        return tokens(completion_ids)

    reward = Reward(check) + Reward(logs)
    posterior = ImportanceSampling(num_particles=32, seed=0, progress=False).run(
        TiltedLM(lm, reward, 1.0, max_new_tokens=3), [[1], [2, 1]]
    )
    assert (posterior.log_likelihood["reward"] == posterior.lengths["completion"] + 1.0).all()
    assert {len(ids) for _, ids in seen} == {1, 2, 3}
    for text, ids in seen:
        assert text == " ".join("ab"[i - 1] for i in ids if i)
        assert 0 not in ids[:-1]
    same = torch.tensor([[1, 2], [2, 1]])  # of equal lengths
    assert lm.token_ids(same).tolist() == [[1, 2], [2, 1]]
    assert lm.token_ids(same).shape == (2,)


@pytest.mark.parametrize(
    "name", ["prompts", "completions", "self", "fn", "model", "args", "name", "my column", "prompt"]
)
def test_names_of_columns(name):
    """Reserved ones are refused by name, and all others reach the reward."""
    seen = {}

    def reward(completions, **columns):
        seen.update(columns)
        return [0.0] * len(completions)

    model = TiltedLM(table_lm(vocab=3), reward, 1.0, max_new_tokens=1)
    engine = ImportanceSampling(num_particles=2, seed=0, progress=False)
    if name in ("prompts", "completions", "self", "fn"):
        with pytest.raises(ValueError, match=f"column is called '{name}'.* rename it"):
            engine.run(model, [[1]], **{name: ["x"]})
    else:
        engine.run(model, [[1]], **{name: ["x"]})
        assert seen[name] == ["x", "x"]
    if name == "self":
        with pytest.raises(ValueError, match="column is called 'self'"):
            Length()(["p"], ["a"], self=["x"])


@pytest.mark.parametrize("reward", [Reward(later), Later(), Reward(LaterCallable()), Reward(lambda **k: later(**k))])
def test_coroutines_are_awaited(reward):
    texts = ["a", "bb", ""]
    assert reward(["p"], texts).tolist() == [1.0, 2.0, 0.0]
    assert (2 * reward + reward.with_timeout(60))(["p"], texts).tolist() == [3.0, 6.0, 0.0]

    async def notebook():  # where an event loop is running already
        return reward(["p"], texts).tolist()

    assert asyncio.run(notebook()) == [1.0, 2.0, 0.0]

    async def outer(completions):  # a coroutine that calls a reward of coroutines
        return reward(["p"], completions)

    assert Reward(outer)(["p"], texts).tolist() == [1.0, 2.0, 0.0]


def test_errors_of_coroutines_are_those_of_a_reward():
    calls = []

    async def broken(completions):
        calls.append(len(completions))
        raise TimeoutError("the server is down")

    with pytest.raises(RewardError, match="'broken' raised TimeoutError: the server is down on a batch of 2 texts"):
        Reward(broken, timeout=60)(["p"], ["a", "b"])
    assert calls == [2]


def only(letter, score):
    """Return a reward that scores texts with a letter, and abstains from all others."""
    return Reward(lambda completions: [score if letter in text else None for text in completions])


@pytest.mark.parametrize(
    ("reward", "expected"),
    [
        (only("a", 2.0) + only("b", 3.0), [2.0, 3.0, 5.0]),
        (2 * only("a", 2.0) - only("b", 3.0) + 7, [11.0, 4.0, 8.0]),
        (only("a", 2.0) + Length(unit="characters"), [3.0, 1.0, 5.0]),
        (only("a", 2.0).map(lambda s: s**2) + only("b", 3.0), [4.0, 3.0, 7.0]),
        ((only("a", 2.0) + 1).map(lambda s: s**2) + only("b", 3.0), [9.0, 3.0, 12.0]),
        (Constraint(only("a", 0.0)) + only("b", 3.0), [NEG_INF, 3.0, NEG_INF]),
        (only("a", NEG_INF) + only("b", 3.0), [NEG_INF, 3.0, NEG_INF]),
        (Reward(only("a", 2.0)) + only("b", 3.0), [2.0, 3.0, 5.0]),
        (only("a", 2.0).with_timeout(60) + only("b", 3.0), [2.0, 3.0, 5.0]),
        (Reward(lambda completions: np.array([None, 3.0, 1.0])) + only("a", 1.0), [1.0, 3.0, 2.0]),
    ],
)
def test_abstaining_adds_nothing(reward, expected):
    texts = ["a", "b", "a b"]
    assert reward(["p"], texts).tolist() == expected
    with prefixes(torch.zeros(3, dtype=torch.bool), partial=True):
        so_far = reward(["p"], texts).tolist()  # whose -inf may be mended
    assert all(s == e or e == NEG_INF for s, e in zip(so_far, expected, strict=True))


@pytest.mark.parametrize(
    "reward",
    [
        only("a", 1.0),
        only("a", 1.0) + only("b", 1.0),
        2 * only("a", 1.0) + 7,
        only("a", 1.0).map(abs),
        Constraint(only("a", 1.0)),
        only("a", 1.0) + 0 * Length(),
    ],
)
def test_a_text_from_which_all_abstain_is_an_error(reward):
    with pytest.raises(RewardError, match=r"abstained .* no other reward scores it.*\n  prompt:     'q'\n.*'c'"):
        reward(["p", "q"], ["a", "c"])


def test_abstaining_keeps_bounds_right():
    """A sum's bounds are those of its parts, so that 0, which an abstaining part adds, must be within the part's."""
    low = Reward(lambda completions: [None for _ in completions], upper_bound=-1.0)
    with pytest.raises(RewardError, match=r"abstained \(gave None\), which adds 0, outside its bounds \[-inf, -1.0\]"):
        (low + Length())(["p"], ["a"])


# -- one call, and a time limit ------------------------------------------------------------------------------


@pytest.mark.parametrize("compose", [lambda r: r, lambda r: 2 * r + 1, lambda r: r.map(abs), lambda r: Reward(r)])
@pytest.mark.parametrize("kind", ["raises", "async", "class"])
def test_a_failing_judge_is_paid_once(kind, compose):
    calls = []

    def judge(completions, **kwargs):
        calls.append(len(completions))
        raise RuntimeError("no credit")

    async def ajudge(completions, **kwargs):
        judge(completions)

    class Judging(Reward):
        def score(self, prompts, completions, **columns):
            judge(completions)

    reward = compose({"raises": Reward(judge), "async": Reward(ajudge), "class": Judging()}[kind])
    with pytest.raises(RewardError, match="raised RuntimeError: no credit on a batch of 64 texts"):
        reward(["p"], ["a"] * 64)
    assert calls == [64]


def test_functions_of_one_text_show_the_text():
    def fussy(text):
        return 1 / len(text)

    for reward in (Constraint(fussy), Length(unit=fussy), Length(unit="characters").map(lambda n: 1 / n)):
        with pytest.raises(RewardError, match=r"raised ZeroDivisionError.*\n  prompt:     'q'\n  completion: ''"):
            reward(["p", "q", "r"], ["a", "", "b"])


def sleeps(completions, **kwargs):
    time.sleep(30)


def loops(completions, **kwargs):
    while True:
        pass


def catches(completions, **kwargs):
    try:
        time.sleep(30)
    except:  # noqa: E722
        return [0.0] * len(completions)


async def waits(completions, **kwargs):
    await asyncio.sleep(30)


async def blocks(completions, **kwargs):
    time.sleep(1)


LIMITED = {
    "sleeps": Reward(sleeps, timeout=0.05),
    "loops": Reward(loops, timeout=0.05),
    "catches": Reward(catches, timeout=0.05),
    "waits": Reward(waits, timeout=0.05),
    "blocks": Reward(blocks, timeout=0.05),
    "matches": Matches("(a|aa)+$", timeout=0.05),
    "finds": Matches("(a|aa)+$", column="answer", timeout=0.05),
    "inside": Reward(sleeps, timeout=0.05) + Length(),
    "outside": (Reward(sleeps, timeout=60) + Length()).with_timeout(0.05),
    "constraint": Constraint(lambda text: sleeps(text)).with_timeout(0.05),
    "mapped": Length().map(sleeps).with_timeout(0.05),
    "prefix": (0.5 * Reward(len, prefix=sleeps)).with_timeout(0.05),
}


@pytest.mark.parametrize("name", LIMITED)
@pytest.mark.parametrize("place", ["main", "thread"])
def test_a_batch_ends_at_its_time_limit(name, place):
    reward = LIMITED[name]
    if place == "thread" and name == "loops":
        pytest.skip("a thread that computes for ever goes on after it is abandoned")
    found = []

    def score():
        with pytest.raises(RewardError) as caught, prefixes(torch.tensor([name != "prefix"] * 2)):
            reward(["p"], ["a" * 45 + "b"] * 2, answer=["a"])
        found.append(str(caught.value))

    start = time.monotonic()
    if place == "main":
        score()
    else:
        thread = threading.Thread(target=score)
        thread.start()
        thread.join()
    assert time.monotonic() - start < 10
    assert "reached its time limit of 0.05 s on a batch of 2 texts" in found[0]
    assert Reward(later, timeout=60)(["p"], ["a"]).tolist() == [1.0]  # later calls work


def test_no_limit_for_what_is_fast_and_another_timer_goes_on():
    signal = pytest.importorskip("signal")
    rung = []
    before = signal.signal(signal.SIGALRM, lambda *_: rung.append(1))
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    try:
        limited = Contains("a").with_timeout(60)
        assert limited(["p"], ["a", "b"]).tolist() == [1.0, 0.0]
        assert 0 < signal.getitimer(signal.ITIMER_REAL)[0] <= 0.1
        assert Reward(lambda completions: [time.sleep(0.2) or 1.0], timeout=60)(["p"], ["a"]).item() == 1.0
        assert rung == [1]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    for timeout in (0, -1, 1e30, math.inf, math.nan):
        for make in (lambda t: Reward(len, timeout=t), Length().with_timeout, lambda t: Matches("a", timeout=t)):
            with pytest.raises((TypeError, ValueError), match="timeout must be a"):
                make(timeout)


def test_a_run_keeps_what_it_has_at_a_time_limit():
    calls = []

    def tires(completions, **kwargs):
        calls.append(len(completions))
        if len(calls) > 3:
            time.sleep(30)
        return [0.0] * len(completions)

    model = TiltedLM(tiny_llama(), Reward(tires, timeout=0.3), 1.0, max_new_tokens=2)
    engine = ImportanceSampling(num_particles=20, batch_size=4, seed=0, progress=False)
    with pytest.raises(RunError, match=r"'tires' reached its time limit of 0.3 s on a batch of 4 texts") as caught:
        engine.run(model, ["a b"])
    assert calls == [1, 4, 4, 4]  # the inspection, and three batches
    assert len(caught.value.so_far.particles) == 8
    assert isinstance(caught.value.__cause__, RewardError)
