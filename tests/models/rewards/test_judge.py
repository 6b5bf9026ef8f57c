"""`Judge` against a server on the loopback: scores, faults, the cache, the cost, and a key that is nowhere."""

from __future__ import annotations

import logging
import re
import sqlite3
import threading
import time

import pytest
import torch
from support.judge_server import Script, chat, cut, drip, drop, raw, reply, serving, slow
from support.models import table_lm

from bayeslm.inference import ImportanceSampling
from bayeslm.models import TiltedLM
from bayeslm.models.rewards import Judge, Length, Reward, RewardError

openai = pytest.importorskip("openai")
KEY = "sk-this-is-a-secret-7f3a"
ASK = "Rate the answer. {prompt} --- {completion} --- Say a number from 0 to 9."


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    """A key, no proxy, and retries without long delays."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)


def judge(address, **settings):
    return Judge("m", ASK, **({"scores": (0, 9), "base_url": address, "patience": 20.0} | settings))


def length(message):
    return str(len(message.split(" --- ")[1]))


def test_each_text_has_its_own_score_and_equal_ones_are_asked_once():
    script = Script(reply(length))
    with serving(script) as address:
        reward = judge(address, prices=(1.0, 10.0))
        scores = reward(["p", "q"], [["a", "bb"], ["a", "cccc"]])
    torch.testing.assert_close(scores, torch.tensor([[1.0, 2.0], [1.0, 4.0]]))
    assert len(script.requests) == 3
    assert script.requests[0]["model"] == "m"
    assert script.requests[0]["temperature"] == 0.0
    assert set(script.keys) == {f"Bearer {KEY}"}
    assert (reward.usage.replies, reward.usage.prompt_tokens, reward.usage.completion_tokens) == (3, 30, 6)
    assert reward.cost == pytest.approx((30 * 1.0 + 6 * 10.0) / 1e6)
    assert (reward.lower_bound, reward.upper_bound) == (0.0, 9.0)


def test_requests_run_at_once_up_to_the_limit():
    four = threading.Barrier(4, timeout=20.0)  # which one request alone does not pass

    def together(handler):
        four.wait()
        reply("5")(handler)

    script = Script(together)
    with serving(script) as address:
        judge(address, concurrency=4)(["p"] * 8, [str(i) for i in range(8)])
    assert len(script.requests) == 8
    assert script.most_at_once == 4


LIMITED = raw(429, b'{"error": {"message": "slow down"}}', Retry_After="0.07")
FAULTS = {
    "429": (raw(429, b"{}"), {}),
    "429, with Retry-After": (LIMITED, {}),
    "500": (raw(500, b"oops"), {}),
    "503": (raw(503, b""), {}),
    "cut": (cut, {}),
    "dropped": (drop, {}),
    "hangs": (slow(2.0, reply("5")), {"request_timeout": 0.5}),
    "garbage": (raw(200, b"\xff\x00<html>"), {}),
    "garbage, of a type": (raw(200, b"<html>", Content_Type="text/html"), {}),
    "other JSON": (raw(200, b'{"choices": []}'), {}),
    "a list": (raw(200, b"[1, 2]"), {}),
    "no content": (raw(200, chat(None)), {}),
    "no score": (reply("I would say 7"), {}),
    "out of range": (reply("10"), {}),
    "not finite": (reply("nan"), {}),
    "two numbers": (reply("7 8"), {}),
    "another alphabet's digit": (reply("٧"), {}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_after_a_fault_the_verdict_is_asked_for_again(fault, monkeypatch):
    """Twice, then it is there; and after the time that the server asks for."""
    step, settings = FAULTS[fault]
    waits, own = [], openai._base_client.BaseClient._calculate_retry_timeout

    def waiting(*arguments):
        waits.append(own(*arguments))
        return waits[-1]

    monkeypatch.setattr(openai._base_client.BaseClient, "_calculate_retry_timeout", waiting)
    script = Script(step, step, reply(" 7\n"))
    with serving(script) as address:
        assert judge(address, **settings)(["p"], ["x"]).tolist() == [7.0]
    assert len(script.requests) == 3
    assert waits == [0.07, 0.07] or "Retry-After" not in fault


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_stays_is_an_error_with_the_text(fault):
    step, settings = FAULTS[fault]
    script = Script(step)
    message = r"reward 'judge' (has no verdict of 'm'|needs a number)"
    with serving(script) as address, pytest.raises(RewardError, match=message) as caught:
        judge(address, max_retries=1, **settings)(["the prompt"], ["the text"])
    assert len(script.requests) == 2
    assert "'the text'" in str(caught.value)


@pytest.mark.parametrize("status", [400, 401, 404])
def test_what_a_repetition_cannot_mend_is_not_repeated(status):
    script = Script(raw(status, b'{"error": {"message": "no"}}'))
    with serving(script) as address, pytest.raises(RewardError, match=f"{status}"):
        judge(address)(["p"], ["x"])
    assert len(script.requests) == 1


def test_a_server_that_never_ends_is_left_at_the_limit():
    with serving(Script(drip)) as address:
        start = time.monotonic()
        with pytest.raises(RewardError, match=r"no verdict of 'm' after 0.5 s"):
            judge(address, patience=0.5)(["p"], ["x"])
        with pytest.raises(RewardError, match=r"time limit of 0.5 s"):
            judge(address).with_timeout(0.5)(["p"], ["x"])
        assert time.monotonic() - start < 8.0  # the server would take 10


def test_no_server_is_an_error():
    with serving(Script(reply("1"))) as address:
        pass
    with pytest.raises(RewardError, match="APIConnectionError"):
        judge(address, max_retries=1)(["p"], ["x"])


def test_words_have_the_scores_that_they_are_given():
    script = Script(reply("yes"), reply("no"), reply("Yes, it is"), reply("yes"))
    with serving(script) as address:
        reward = judge(address, scores={"yes": 1.0, "no": -1.0}, concurrency=1)
        assert reward(["p"], ["x"]).tolist() == [1.0]
        assert reward(["p"], ["y"]).tolist() == [-1.0]
        assert reward(["p"], ["z"]).tolist() == [1.0]
    assert reward.usage.unparseable == 1
    assert (reward.lower_bound, reward.upper_bound) == (-1.0, 1.0)


def test_it_abstains_where_that_is_wanted():
    with serving(Script(reply("?"))) as address:
        reward = judge(address, unparseable="abstain", max_retries=1)
        assert (reward + Length())(["p"], ["two words"]).tolist() == [2.0]
        with pytest.raises(RewardError, match="abstained"):
            reward(["p"], ["x"])
    with serving(Script(raw(500, b""))) as address, pytest.raises(RewardError, match="InternalServerError"):
        judge(address, unparseable="abstain", max_retries=0)(["p"], ["x"])  # no answer is none of these


def test_fields_are_replaced_once_and_columns_too():
    script = Script(reply("1"))
    with serving(script) as address:
        reward = Judge("m", "{prompt}|{completion}|{answer}|{other}", scores=(0, 1), base_url=address, concurrency=1)
        chat_prompt = [{"role": "user", "content": "hi {completion}"}]
        reward([tuple(chat_prompt), "q"], ["{answer}", "b"], answer=["A", "B"])
    sent = [request["messages"][0]["content"] for request in script.requests]
    assert sorted(sent) == ["q|b|B|{other}", "user: hi {completion}|{answer}|A|{other}"]


# -- the cache ---------------------------------------------------------------------------------------------------


def test_verdicts_are_kept_by_model_prompt_and_text(tmp_path):
    path = tmp_path / "folder" / "verdicts.sqlite"
    with serving(Script(reply(length))) as address:
        first = judge(address, cache=path)
        assert first(["p"] * 2, ["a", "bb"]).tolist() == [1.0, 2.0]
    silent = Script(raw(500, b""))
    again = judge(address, cache=path, max_retries=0)  # of a server that is gone
    assert again(["p"] * 2, ["a", "bb"]).tolist() == [1.0, 2.0]
    assert (again.usage.replies, again.usage.cached) == (0, 2)
    for other in (
        {"model": "n"},
        {"instruction": ASK + "!"},
        {"options": {"temperature": 1.0}},
        {"scores": (0, 5)},
    ):
        settings = {"model": "m", "instruction": ASK, "scores": (0, 9), "base_url": address, "cache": path}
        with pytest.raises(RewardError, match="no verdict"):
            Judge(**(settings | {"max_retries": 0} | other))(["p"], ["a"])
    with pytest.raises(RewardError, match="no verdict"):
        again(["another prompt"], ["a"])
    assert not silent.requests


def test_verdicts_that_came_before_an_error_are_kept(tmp_path):
    path = tmp_path / "verdicts.sqlite"
    script = Script(reply("3"), reply("4"), raw(400, b"{}"))
    with serving(script) as address:
        reward = judge(address, cache=path, concurrency=1, max_retries=0)
        with pytest.raises(RewardError, match="400"):
            reward(["p"] * 3, ["a", "b", "c"])
        script.steps[-1] = reply("5")
        assert sorted(reward(["p"] * 3, ["a", "b", "c"]).tolist()) == [3.0, 4.0, 5.0]
    assert len(script.requests) == 4


@pytest.mark.parametrize("damage", ["text", "score"])
def test_a_damaged_cache_is_an_error_that_names_it(tmp_path, damage):
    path = tmp_path / "verdicts.sqlite"
    with serving(Script(reply("3"))) as address:
        reward = judge(address, cache=path)
        reward(["p"], ["a"])
        if damage == "text":
            path.write_bytes(b"not a database at all, but something longer than a header" * 40)
        else:
            with sqlite3.connect(path) as connection:
                connection.execute("UPDATE verdicts SET score = 'high'")
        with pytest.raises(RewardError, match=re.escape(str(path))):
            reward(["p"], ["a"])


# -- the key -----------------------------------------------------------------------------------------------------


def echo(handler):
    """An error that repeats the key, as some servers' do."""
    raw(401, b'{"error": {"message": "wrong key: ' + handler.headers["Authorization"].encode() + b'"}}')(handler)


def test_the_key_is_nowhere(tmp_path, monkeypatch, caplog):
    """Not in the reward, an error, a log, a cache or a posterior."""
    caplog.set_level(logging.DEBUG)
    path = tmp_path / "verdicts.sqlite"
    with serving(Script(reply(lambda message: f"{len(message) % 10}"))) as address:
        reward = judge(address, cache=path)
        model = TiltedLM(table_lm(2, vocab=3), reward, 5.0, max_new_tokens=2)
        posterior = ImportanceSampling(num_particles=8, seed=0, progress=False).run(model, ["a", "b"])
        posterior.save(tmp_path / "posterior")
    with serving(Script(reply(f"your key is {KEY}"))) as address, pytest.raises(RewardError) as caught:
        judge(address, max_retries=0)(["p"], ["x"])
    with serving(Script(echo)) as address, pytest.raises(RewardError, match=r"wrong key: Bearer \*\*\*") as echoed:
        judge(address)(["p"], ["x"])
    assert echoed.value.__cause__ is None
    texts = [
        repr(reward),
        repr(vars(reward)),
        str(reward.identity()),
        str(caught.value),
        str(echoed.value),
        caplog.text,
    ]
    assert not any(KEY in text for text in texts)
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert path in files
    assert not any(KEY.encode() in file.read_bytes() for file in files)
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(RewardError, match="needs a key in the environment variable OPENAI_API_KEY"):
        reward(["p"], ["x"])


def test_a_server_without_keys_gets_none_of_the_environment():
    script = Script(reply("1"))
    with serving(script) as address:
        judge(address, key_variable=None)(["p"], ["x"])
    assert script.keys == ["Bearer none"]


def test_usage_is_no_part_of_the_identity():
    with serving(Script(reply("1"))) as address:
        reward = judge(address)
        before = dict(reward.identity())
        reward(["p"], ["x"])
    assert reward.identity() == before
    assert judge(address, scores=(0, 5)).identity() != before


WRONG = {
    "no completion": ({"instruction": "Rate it"}, r"must have \{completion\}"),
    "a password": ({"base_url": "https://me:secret@host/v1"}, "must not have a name or password"),
    "no address": ({"base_url": "localhost"}, "must be an address"),
    "crossed scores": ({"scores": (5.0, 1.0)}, "scores must be"),
    "no words": ({"scores": {}}, "scores must be"),
    "no concurrency": ({"concurrency": 0}, "concurrency must be a positive whole number"),
    "another answer to no score": ({"unparseable": "zero"}, "unparseable must be"),
    "negative retries": ({"max_retries": -1}, "max_retries must be"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_settings_are_refused(what):
    settings, message = WRONG[what]
    with pytest.raises(ValueError, match=message) as caught:
        Judge(**({"model": "m", "instruction": ASK} | settings))
    assert "secret" not in str(caught.value)


def test_it_is_a_reward_like_others():
    assert isinstance(Judge("m", ASK), Reward)
