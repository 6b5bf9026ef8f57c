"""Preference data: all supported formats, and errors with the number of each bad row."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from support.models import tiny_llama

from bayeslm.models import LanguageModel
from bayeslm.models.preferences import Comparisons, LastHidden, PreferenceError, Rankings, Ratings, Standardised

GOOD = {"prompt": "Say hi.", "chosen": "Hi!", "rejected": "No."}


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def test_strings_and_conversations():
    ask, good, bad = message("user", "Say hi."), message("assistant", "Hi!"), message("assistant", "No.")
    earlier = [message("system", "Be kind."), ask]
    rows = [
        GOOD,
        {"prompt": [ask], "chosen": [good], "rejected": [bad]},
        {"chosen": [ask, good], "rejected": [ask, bad]},  # the prompt is the common beginning
        {"chosen": [*earlier, good], "rejected": [*earlier, bad], "prompt": None},
    ]
    data = Comparisons.from_rows(rows)
    assert data.prompts == ["Say hi."] * 3 + ["system: Be kind.\n\nuser: Say hi."]
    assert (data.chosen, data.rejected) == (["Hi!"] * 4, ["No."] * 4)
    template = Comparisons.from_rows(rows[1:], template=lambda ms: "".join(f"<{m['role']}>{m['content']}" for m in ms))
    assert (template.prompts[2], template.chosen[0]) == ("<system>Be kind.<user>Say hi.", "<assistant>Hi!")


@pytest.mark.parametrize("listed", [False, True])
def test_a_prompt_that_begins_the_conversations_is_removed(listed: bool):
    """As in ``HuggingFaceH4/ultrafeedback_binarized``; further fields of a message are ignored."""
    ask, good, bad = message("user", "Say hi."), message("assistant", "Hi!"), message("assistant", "No.")
    more = message("user", "Thanks.")
    prompt = [ask | {"id": "7"}] if listed else "Say hi."
    rows = [
        {"prompt": prompt, "chosen": [ask, good], "rejected": [ask, bad]},
        {"prompt": prompt, "chosen": [ask, good, more], "rejected": [ask, bad]},
        {"prompt": prompt, "chosen": [good], "rejected": [bad]},
        {"prompt": prompt, "chosen": [ask, good], "rejected": [bad]},  # only one of them begins with the prompt
        {"prompt": prompt, "chosen": [ask], "rejected": [ask, bad]},  # the prompt alone is a completion
        {"prompt": prompt, "chosen": [message("assistant", "Say hi."), good], "rejected": [ask, bad]},
    ]
    data = Comparisons.from_rows(rows)
    assert data.prompts == ["Say hi."] * 6
    assert data.chosen[:3] == ["Hi!", "assistant: Hi!\n\nuser: Thanks.", "Hi!"]
    assert data.rejected[:3] == ["No."] * 3
    assert data.chosen[3:5] == ["user: Say hi.\n\nassistant: Hi!", "Say hi."]
    assert data.rejected[3:] == ["No.", *["user: Say hi.\n\nassistant: No."] * 2]


ASK, HI, NO = message("user", "Say hi."), message("assistant", "Hi!"), message("assistant", "No.")
SYSTEM, EARLIER = message("system", "Be kind."), [message("user", "Hey."), message("assistant", "Yes?")]
PARTS = message("user", [{"type": "text", "text": "Say "}, {"type": "text", "text": "hi."}])
TRL_FORMATS = {
    "explicit, standard": (GOOD, "Say hi."),
    "implicit, standard": ({"chosen": "Say hi. Hi!", "rejected": "Say hi. No."}, "Say hi."),
    "explicit, conversational": ({"prompt": [ASK], "chosen": [HI], "rejected": [NO]}, "user: Say hi."),
    "implicit, conversational": ({"chosen": [ASK, HI], "rejected": [ASK, NO]}, "user: Say hi."),
    "a prompt of NaN": ({"prompt": float("nan"), "chosen": [ASK, HI], "rejected": [ASK, NO]}, "user: Say hi."),
    "other ids of one message": ({"chosen": [ASK | {"id": 1}, HI], "rejected": [ASK | {"id": 2}, NO]}, "user: Say hi."),
    "text and messages": ({"prompt": "Say hi.", "chosen": [HI], "rejected": [NO]}, "Say hi."),
    "messages and text": ({"prompt": [ASK], "chosen": "Hi!", "rejected": "No."}, "user: Say hi."),
    "text repeated": ({"prompt": "Say hi.", "chosen": [ASK, HI], "rejected": [ASK, NO]}, "Say hi."),
    "messages repeated": ({"prompt": [ASK], "chosen": [ASK, HI], "rejected": [ASK, NO]}, "user: Say hi."),
    "parts": ({"prompt": [PARTS], "chosen": [ASK, HI], "rejected": [PARTS, NO]}, "user: Say hi."),
    **{
        f"system turn, {name}": (row, "system: Be kind.\n\nuser: Say hi.")
        for name, row in {
            "explicit": {"prompt": [SYSTEM, ASK], "chosen": [HI], "rejected": [NO]},
            "implicit": {"chosen": [SYSTEM, ASK, HI], "rejected": [SYSTEM, ASK, NO]},
            "text": {"prompt": "Say hi.", "chosen": [SYSTEM, ASK, HI], "rejected": [SYSTEM, ASK, NO]},
            "messages without": {"prompt": [ASK], "chosen": [SYSTEM, ASK, HI], "rejected": [SYSTEM, ASK, NO]},
            "repeated": {"prompt": [SYSTEM, ASK], "chosen": [SYSTEM, ASK, HI], "rejected": [SYSTEM, ASK, NO]},
            "of the prompt alone": {"prompt": [SYSTEM, ASK], "chosen": [ASK, HI], "rejected": [ASK, NO]},
        }.items()
    },
    "a line feed after the prompt": (
        {"prompt": "Say hi.\n", "chosen": [ASK, HI], "rejected": [ASK, NO]},
        "Say hi.\n",
    ),
    "arrays, as in rows of pandas": (
        {"prompt": np.array([ASK]), "chosen": np.array([ASK, HI]), "rejected": np.array([ASK, NO])},
        "user: Say hi.",
    ),
    "earlier turns": (
        {"prompt": "Say hi.", "chosen": [SYSTEM, *EARLIER, ASK, HI], "rejected": [SYSTEM, *EARLIER, ASK, NO]},
        "system: Be kind.\n\nuser: Hey.\n\nassistant: Yes?\n\nuser: Say hi.",
    ),
}


@pytest.mark.parametrize("name", TRL_FORMATS)
def test_every_format_of_trl_is_the_same_comparison(name: str):
    row, prompt = TRL_FORMATS[name]
    spaced = isinstance(row.get("chosen"), str) and "prompt" not in row
    data = Comparisons.from_rows([row], template=lambda ms: "\n\n".join(f"{m['role']}: {m['content']}" for m in ms))
    assert data.prompts == [prompt]
    written = [text.removeprefix("assistant: ") for text in (*data.chosen, *data.rejected)]
    assert written == ([" Hi!", " No."] if spaced else ["Hi!", "No."])


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("The sky is blue.", "The sky is green.", "The sky is"),
        ("The sky is blue.", "The sky is black.", "The sky is bl"),
        ("a\n\nb", "a\n\nc", "a\n\n"),
        ("\n\nHuman: Hi\n\nAssistant: Yes", "\n\nHuman: Hi\n\nAssistant: No", "\n\nHuman: Hi\n\nAssistant:"),
    ],
)
def test_implicit_prompts_are_cut_where_trl_cuts_them(chosen: str, rejected: str, prompt: str):
    data = Comparisons.from_rows([{"chosen": chosen, "rejected": rejected}])
    assert (data.prompts, data.chosen, data.rejected) == ([prompt], [chosen[len(prompt) :]], [rejected[len(prompt) :]])


def test_an_answer_that_quotes_the_prompt_later_is_whole():
    chosen, rejected = [HI, ASK, HI], [NO, ASK, NO]
    data = Comparisons.from_rows([{"prompt": "Say hi.", "chosen": chosen, "rejected": rejected}])
    assert data.prompts == ["Say hi."]
    assert data.chosen == ["assistant: Hi!\n\nuser: Say hi.\n\nassistant: Hi!"]


def test_files_round_trip(tmp_path: Path):
    data = Comparisons(["p", "é\n"], ["a", "ü\u2028"], ["b", "c"])
    data.to_jsonl(tmp_path / "pairs.jsonl")
    assert Comparisons.from_jsonl(tmp_path / "pairs.jsonl") == data
    raw = b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r\n\n" + json.dumps(GOOD).encode()
    (tmp_path / "other.jsonl").write_bytes(raw)
    assert len(Comparisons.from_jsonl(tmp_path / "other.jsonl")) == 2


def test_split_take_add():
    data = Comparisons([f"p{i}" for i in range(10)], ["a"] * 10, ["b"] * 10)
    first, rest = data.split(0.7, seed=1)
    assert (len(first), len(rest)) == (7, 3)
    assert sorted((first + rest).prompts) == data.prompts
    assert data.split(0.7, seed=1)[0] == first != data.split(0.7, seed=2)[0]
    assert data.take([3, 1]).prompts == ["p3", "p1"]
    with pytest.raises(ValueError, match="leaves one part empty"):
        data.split(0.01)


BAD = {
    "lacks 'rejected' .it has prompt, chosen.: add it": {"prompt": "p", "chosen": "a"},
    "differ from the beginning on": {"chosen": "a", "rejected": "b"},
    "one begins the other": {"chosen": "The sky", "rejected": "The sky is blue"},
    "lacks 'chosen' and 'rejected' .it has prompt, completion, label": {
        "prompt": "p",
        "completion": "a",
        "label": True,
    },
    "has other turns before the prompt": {
        "prompt": "x",
        "chosen": [message("system", "s"), message("user", "x"), message("assistant", "y")],
        "rejected": [message("system", "t"), message("user", "x"), message("assistant", "z")],
    },
    "for 'chosen': it must be a string, or a list of role and content, which is a text": {
        "prompt": "p",
        "chosen": [message("assistant", [{"type": "image", "url": "u"}])],
        "rejected": [message("assistant", "a")],
    },
    "'prompt' holds the lone surrogate": GOOD | {"prompt": "\ud83d"},
    "has 3 for 'chosen': it must be a string": GOOD | {"chosen": 3},
    "has no text for 'rejected': fill it in": GOOD | {"rejected": " "},
    "compares a text with itself .'Hi!'.: drop it": GOOD | {"rejected": "Hi!"},
    "is a tie .both scores are 4.: drop it": GOOD | {"score_chosen": 4, "score_rejected": 4},
    "no common prompt: add the field 'prompt'": {
        "chosen": [message("user", "x"), message("assistant", "y")],
        "rejected": [message("user", "x"), message("assistant", "y")],
    },
    "for 'rejected': it must be a string, or a list of role": {
        "prompt": "p",
        "chosen": [message("assistant", "a")],
        "rejected": "b",
    },
    "for 'prompt': it must be a string": GOOD | {"prompt": 1},
    "is \\[1\\], no object": [1],
}


@pytest.mark.parametrize("says", BAD)
def test_bad_rows(says: str, tmp_path: Path):
    with pytest.raises(PreferenceError, match=f"^row 1 .*{says}"):
        Comparisons.from_rows([GOOD, BAD[says]])
    path = tmp_path / "bad.jsonl"
    path.write_text("\n".join([json.dumps(GOOD), "", json.dumps(BAD[says])]))
    with pytest.raises(PreferenceError, match=f"bad.jsonl: line 3 .*{says}"):
        Comparisons.from_jsonl(path)


def test_all_bad_lines_are_named(tmp_path: Path):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b"\n".join([json.dumps(GOOD).encode(), b"{nothing", b'{"prompt": "\xff"}', b"[" * 100_000]))
    with pytest.raises(PreferenceError) as caught:
        Comparisons.from_jsonl(path)
    lines = str(caught.value).splitlines()
    assert ["line 2 is no JSON" in lines[0], "line 3 is not UTF-8" in lines[1], "line 4 is no JSON" in lines[2]] == [
        True
    ] * 3
    with pytest.raises(PreferenceError) as caught:
        Comparisons.from_rows([{}] * 25)
    assert str(caught.value).count("row ") == 10
    assert str(caught.value).endswith("and 15 more")
    with pytest.raises(PreferenceError, match="at least one row"):
        Comparisons.from_rows([])
    with pytest.raises(PreferenceError, match="one length, not 2, 1 and 1"):
        Comparisons(["p", "p"], ["a"], ["b"])
    with pytest.raises(PreferenceError, match="row 0 compares a text with itself"):
        Comparisons(["p"], ["a"], ["a"])


def test_rankings_and_ratings(tmp_path: Path):
    rows = [{"prompt": "p", "completions": ["a", "b", "c"]}, {"prompt": "q", "completions": ["a", "b"]}]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    assert Rankings.from_jsonl(path) == Rankings.from_rows(rows) == Rankings(["p", "q"], [["a", "b", "c"], ["a", "b"]])
    for completions, says in [(["a"], "two texts or more"), (["a", "b", "a"], "ranks 'a' twice"), (["a", 1], "string")]:
        with pytest.raises(PreferenceError, match=f"row 1 .*{says}"):
            Rankings.from_rows([rows[0], {"prompt": "p", "completions": completions}])
    rated = [{"prompt": "p", "completion": "a", "rating": 4}]
    path.write_text(json.dumps(rated[0]))
    assert Ratings.from_jsonl(path) == Ratings.from_rows(rated) == Ratings(["p"], ["a"], [4.0])
    assert Ratings.from_rows([rated[0] | {"rating": x} for x in (np.float32(4), np.int64(4))]).ratings == [4.0, 4.0]
    assert Rankings.from_rows([rows[0] | {"completions": np.array(["a", "b"])}]).completions == [["a", "b"]]
    for rating in ("4", None, True, float("nan"), 10**400, -(10**400), 1j):
        with pytest.raises(PreferenceError, match=r"row 0 .*rating"):
            Ratings.from_rows([rated[0] | {"rating": rating}])


# -- features --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [None, 1, 2])
def test_last_hidden_is_the_networks_own(batch_size: int | None):
    lm = tiny_llama(batch_size=batch_size)
    prompts, completions = ["a", "b c ", "", "d d"], [" b c d e", "f", "g", " e f g a b"]
    features = LastHidden(lm, suffix=" c")(prompts, completions)
    for prompt, completion, found in zip(prompts, completions, features, strict=True):
        ids = torch.tensor([lm.tokenizer(prompt + completion + " c")["input_ids"]])
        expected = lm.network(input_ids=ids, output_hidden_states=True).hidden_states[-1][0, -1]
        torch.testing.assert_close(found, expected.detach(), rtol=1e-4, atol=1e-5)


def test_features_of_a_text_are_computed_once(monkeypatch: pytest.MonkeyPatch):
    lm = tiny_llama()
    features = LastHidden(lm)
    observed: list[int] = []
    compute = features.compute
    monkeypatch.setattr(features, "compute", lambda p, c: (observed.append(len(p)), compute(p, c))[1])
    first = features(["a", "a", "a"], [" b", " c", " b"])
    assert torch.equal(first[0], first[2])
    again = features(["a", "b"], [" c", " c"])
    torch.testing.assert_close(again[0], first[1])
    assert observed == [2, 1]  # once in a call, and not again in the next
    with pytest.raises(ValueError, match="features of no texts"):
        features([], [])


def test_the_oldest_features_are_forgotten(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("bayeslm.models.preferences.features.CACHE_SIZE", 3)
    features = LastHidden(tiny_llama())
    texts = [" a", " b", " c", " d", " e"]
    computed: list[list[str]] = []
    compute = features.compute
    monkeypatch.setattr(features, "compute", lambda p, c: (computed.append(c), compute(p, c))[1])
    features(["a"] * 5, texts)
    features(["a"] * 3, texts[2:])  # the newest three are kept
    features(["a"], texts[:1])
    features(["a"], texts[1:2])
    assert computed == [texts, texts[:1], texts[1:2]]


def correlated(prompts: list[str], completions: list[str]) -> torch.Tensor:
    """Return five features of a text that are linear in three numbers."""
    x = torch.tensor([[len(c), c.count("a"), c.count("b")] for c in completions], dtype=torch.float32)
    return x @ torch.tensor([[1.0, 0.5, 2.0, 0.0, 1.0], [0.0, 3.0, 1.0, 1.0, 1.0], [2.0, 0.0, 1.0, 5.0, 1.0]]) + 7.0


def test_standardised():
    texts = ["a", "bb", "abab", "cccccc", "aaab", "abcabcabc", "b"]
    prompts = [""] * len(texts)
    features = Standardised(correlated, prompts, texts)
    z = features(prompts, texts)
    assert z.shape == (7, 3)
    assert z.dtype == torch.float32
    torch.testing.assert_close(z.mean(0), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(z.T @ z / 7, torch.eye(3), atol=1e-5, rtol=0)
    assert features.explained == pytest.approx(1.0)
    two = Standardised(correlated, prompts, texts, components=2)
    torch.testing.assert_close(two(prompts, texts), z[:, :2])
    x = correlated(prompts, texts)
    variances = torch.linalg.eigvalsh(torch.cov(x.T)).flip(0)
    assert two.explained == pytest.approx(float(variances[:2].sum() / variances.sum()), rel=1e-4)
    with pytest.raises(ValueError, match="components must be a positive whole number or None, got 0"):
        Standardised(correlated, prompts, texts, components=0)
    with pytest.raises(ValueError, match="components must be between 1 and 3"):
        Standardised(correlated, prompts, texts, components=4)
    with pytest.raises(ValueError, match="between 1 and 0"):
        Standardised(correlated, ["", ""], ["a", "a"])


def test_real_features(smollm2: LanguageModel):
    """Features of a padded batch equal those of one text at a time."""
    prompts, completions = ["My dinner was"] * 2, [" good.", " a disaster from its beginning to its very end."]
    together = LastHidden(smollm2)(prompts, completions)
    apart = [LastHidden(smollm2)([p], [c]) for p, c in zip(prompts, completions, strict=True)]
    torch.testing.assert_close(together, torch.cat(apart), rtol=1e-3, atol=1e-3)
