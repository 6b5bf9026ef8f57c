"""`bayeslm label` on a tiny model in a folder of its own, by a person at the terminal and by a reward."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from bayeslm.cli import app
from bayeslm.cli.console import out_console
from bayeslm.cli.terminal_judge import TerminalJudge, one_line
from bayeslm.models.preferences import Comparisons

JUDGES = """
calls = 0

def letters(completions, **kwargs):
    return [float(text.count("a")) for text in completions]

def tires(completions, **kwargs):
    global calls
    calls += 1
    if calls > 3:
        raise RuntimeError("the judge went home")
    return letters(completions)

def hangs(completions, **kwargs):
    global calls
    calls += 1
    while calls > 3:
        pass
    return letters(completions)

def interrupts(completions, **kwargs):
    global calls
    calls += 1
    if calls > 3:
        raise KeyboardInterrupt
    return letters(completions)

def is_told(completions, **kwargs):
    global calls
    calls += 1
    if calls > 3:
        __import__("signal").raise_signal(15)
    return letters(completions)
"""


MODULES = {"judges": JUDGES}


def label(*arguments: str, code: int = 0, keys: str | None = None) -> str:
    settings = ["--model", "model", "--features", "hidden", "--components", "4", "--completions", "8"]
    result = CliRunner().invoke(app, ["label", *settings, "--max-new-tokens", "4", *arguments], input=keys)
    assert result.exit_code == code, result.output + repr(result.exception)
    return " ".join(result.output.split())


def rows(path: str = "labels.jsonl") -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines() if line]


def test_a_person_labels_skips_undoes_and_resumes(folder):
    out = label("a b", "c", keys="1\n2\ns\n7\n1\nu\n2\nq\n")
    assert "'7' is none of 1, 2, s, u, q" in out
    assert "labels.jsonl: 3 labels" in out
    first = rows()
    assert [row["first_is_better"] for row in first] == [True, False, False]
    assert len(rows("labels.skipped.jsonl")) == 1
    assert {row["prompt"] for row in first} <= {"a b", "c"}
    data = Comparisons.from_jsonl("labels.jsonl")
    pool = {(row["prompt"], row["completion"]) for row in rows("labels.pool.jsonl")}
    assert {(p, c) for p, c in zip(data.prompts * 2, data.chosen + data.rejected, strict=True)} <= pool
    out = label(keys="2\n")  # no prompts: those of the pool; and the input ends
    assert "4 labels · " in out
    assert rows()[:3] == first
    assert "predicted" in out
    assert "uncertainty" in out


def test_undo_asks_the_same_pair_again(folder):
    once = label("a b", keys="1\n1\nq\n")
    asked = once.split("better:")
    again = label("a b", "--out", "other.jsonl", keys="u\n1\n1\nu\nu\n1\n1\nq\n")
    assert "there is no answer to take back" in again
    assert rows("other.jsonl") == rows()
    for part in asked[:2]:
        assert part[-30:].split("2 ")[-1].split("(s")[0] in again


def test_resuming_equals_never_having_stopped(folder):
    """Killed after any label, with an incomplete last line: the same file in the end."""
    judge = ["--judge", "judges:letters", "--temperature", "1.0"]
    label("a b", "c", *judge, "--number", "6", "--out", "whole.jsonl")
    label("a b", "c", *judge, "--number", "3", "--out", "parts.jsonl")
    with open("parts.jsonl", "a") as file:
        file.write('{"prompt": "a b", "cho')
    out = label(*judge, "--number", "6", "--out", "parts.jsonl")
    assert "removed an incomplete last line" in out
    assert Path("parts.jsonl").read_bytes() == Path("whole.jsonl").read_bytes()
    assert len(rows("whole.jsonl")) == 6
    label("a b", "c", *judge, "--number", "6", "--out", "other.jsonl", "--seed", "1")
    assert Path("other.jsonl").read_bytes() != Path("whole.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("judge", "code", "says"),
    [("tires", 1, "went home"), ("interrupts", 130, "3 labels"), ("is_told", 143, "3 labels")],
)
def test_a_judge_who_raises_loses_nothing(folder, judge, code, says):
    assert says in label("a b", "--judge", f"judges:{judge}", code=code)
    assert len(rows()) == 3
    assert "labels.jsonl: 5 labels" in label("--judge", "judges:letters", "--number", "5")


def test_a_judge_who_hangs_is_stopped_and_loses_nothing(folder):
    out = label("a b", "--judge", "judges:hangs", "--timeout", "0.3", "--number", "9", code=1)
    assert "the judge reached its time limit of 0.3 s" in out
    assert len(rows()) == 3
    assert "labels.jsonl: 4 labels" in label("a b", "--judge", "judges:letters", "--number", "4")


def test_it_ends_when_no_pair_is_left(folder):
    torch.manual_seed(0)
    out = label("a b", "--judge", "judges:letters", "--ask", "random", "--completions", "5")
    assert "no pair is left" in out
    pool = rows("labels.pool.jsonl")
    assert len(rows()) == len(pool) * (len(pool) - 1) // 2


def test_undo_after_a_restart_takes_back_what_came_last(folder):
    label("a b", keys="1\n2\ns\nq\n")
    labels = rows()
    assert "taken back: skipped" in label(keys="u\nq\n")
    assert rows("labels.skipped.jsonl") == []
    assert rows() == labels
    label(keys="s\n1\ns\nq\n")
    out = label(keys="u\nu\nu\nu\nq\n")  # skip, label, skip, label
    said = [part.split(",")[0] for part in out.split("taken back: ")[1:]]
    assert said == ["skipped", "1 is better", "skipped", "2 is better"]
    assert rows() == labels[:1]


def test_after_a_restart_skips_lead_to_the_same_questions(folder):
    label("a b", "--out", "whole.jsonl", keys="s\n1\ns\ns\n2\n1\nq\n")
    for keys in ("s\n1\ns\nq\n", "s\nq\n", "2\n1\nq\n"):
        label("a b", "--out", "parts.jsonl", keys=keys)
    for kind in ("", ".skipped"):
        assert rows(f"parts{kind}.jsonl") == rows(f"whole{kind}.jsonl")


@pytest.mark.parametrize("left", [1, pytest.param(2, marks=pytest.mark.long), 5])
def test_an_interrupted_pool_is_drawn_again(folder, left):
    """Killed after any row: the same completions and questions in the end, and not a prompt with one text."""
    judge = ["--judge", "judges:letters", "--number", "3"]
    label("a b", "c", *judge, "--out", "whole.jsonl")
    lines = Path("whole.pool.jsonl").read_text().splitlines(keepends=True)
    assert len(lines) > left
    Path("parts.pool.jsonl").write_text("".join(lines[:left]))
    label("a b", "c", *judge, "--out", "parts.jsonl")
    assert rows("parts.jsonl") == rows("whole.jsonl")
    assert {row["completion"] for row in rows("parts.pool.jsonl")} == {
        row["completion"] for row in rows("whole.pool.jsonl")
    }
    after = Path("parts.pool.jsonl").read_bytes()
    label(*judge, "--out", "parts.jsonl")
    assert Path("parts.pool.jsonl").read_bytes() == after


def test_a_pool_of_one_row_without_a_prompt_given(folder):
    Path("labels.pool.jsonl").write_text('{"prompt": "a b", "completion": "c"}\n')
    label("--judge", "judges:letters", "--number", "2")
    assert len(rows()) == 2


def test_more_completions_are_drawn_of_prompts_that_have_fewer(folder):
    judge = ["--judge", "judges:letters", "--number", "1"]
    label("a b", *judge)
    before = rows("labels.pool.jsonl")
    label(*judge, "--completions", "40")
    after = rows("labels.pool.jsonl")
    assert len({row["completion"] for row in after}) > len(before)
    assert after[-1]["drawn"] == 40


def test_a_pool_does_not_change_without_a_number_of_completions(folder):
    label("a b", "--judge", "judges:letters", "--number", "1")
    before = Path("labels.pool.jsonl").read_bytes()
    settings = ["--model", "model", "--features", "hidden", "--components", "4"]
    result = CliRunner().invoke(app, ["label", *settings, "--judge", "judges:letters", "--number", "2"])
    assert result.exit_code == 0, result.output
    assert Path("labels.pool.jsonl").read_bytes() == before


def test_each_file_of_labels_has_a_pool_of_its_own(folder):
    for name in ("taste.alice", "taste.bob"):
        label("a b" if "alice" in name else "c", "--out", name, keys="q\n")
    assert {row["prompt"] for row in rows("taste.alice.pool.jsonl")} == {"a b"}
    assert {row["prompt"] for row in rows("taste.bob.pool.jsonl")} == {"c"}


def test_labels_do_not_go_into_the_file_of_prompts(folder):
    Path("prompts.txt").write_text("a b")
    assert "are both prompts.txt" in label("--prompts", "prompts.txt", "--out", "./prompts.txt", code=2)
    assert Path("prompts.txt").read_text() == "a b"


def test_texts_are_printed_unchanged(capsys):
    """Without emoji and markup; with all whitespace if two texts differ in nothing else."""
    first, second = one_line(" a  b\n", "a b c")
    assert (first, second) == ("a b", "a b c")
    assert one_line("a b", "a b\n") == ("'a b'", "'a b\\n'")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(out_console, "input", lambda prompt: "1")
        assert TerminalJudge()("at :smile:", ":cat: [b]", "x")
    printed = capsys.readouterr().out
    assert "at :smile:" in printed
    assert ":cat: [b]" in printed


@pytest.mark.parametrize("ask", ["information", "thompson", "epsilon-greedy", "random"])
def test_every_way_to_ask(folder, ask):
    label("a b", "--judge", "judges:letters", "--ask", ask, "--number", "3")
    assert len(rows()) == 3


def test_new_prompts_join_the_pool(folder):
    label("a b", "--judge", "judges:letters", "--number", "2")
    before = rows("labels.pool.jsonl")
    label("c", "--judge", "judges:letters", "--number", "3")
    after = rows("labels.pool.jsonl")
    assert after[: len(before)] == before
    assert {row["prompt"] for row in after[len(before) :]} == {"c"}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "no prompts"),
        (["a", "--ask", "bald"], "--ask bald is unknown: choose one of information"),
        (["a", "--features", "bag"], "is unknown: choose one of sentence, hidden"),
        (["a", "--components", "0"], "--components must be at least 1"),
        (["a", "--completions", "1"], "--completions must be at least 2"),
        (["a", "--judge", "sentimnt"], "did you mean 'sentiment'"),
        (["a", "--judge", "length", "--temperature", "-1"], "temperature must be non-negative"),
        (["a", "--number", "0"], "--number must be at least 1"),
        (["a", "--timeout", "1"], "--timeout is for --judge"),
        (["a", "--judge", "length", "--timeout", "-1"], "--timeout must be a positive number of seconds"),
        (["a", "--prompts", "nowhere.txt"], "not both"),
        (["--prompts", "nowhere.txt"], "nowhere.txt does not exist"),
    ],
)
def test_mistakes_are_one_clear_line(folder, arguments, says):
    settings = ["--model", "model", *([] if "--features" in arguments else ["--features", "hidden"])]
    result = CliRunner().invoke(app, ["label", *arguments, *settings], input="q\n")
    assert result.exit_code == (1 if "does not exist" in says or "non-negative" in says else 2), result.output
    assert says in " ".join(result.output.split())
    assert "Traceback" not in result.output
    assert not list(Path().glob("labels*"))  # nothing was made


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ('{"prompt": "a b", "chosen": "x"}', "line 1 lacks 'rejected'"),
        ('{"prompt": "a b", "chosen": "x", "rejected": "x"}', "line 1 compares a text with itself"),
        ("nonsense", "line 1 is not a JSON object"),
        *[
            (json.dumps({"prompt": "a b", "chosen": "x", "rejected": "y"} | wrong), says)
            for wrong, says in [
                ({"probability": math.nan}, "row 1: Answer: probability must be a number in [0, 1], got nan"),
                ({"probability": -1}, "row 1: Answer: probability must be a number in [0, 1], got -1"),
                ({"probability": 1.5}, "row 1: Answer: probability must be a number in [0, 1], got 1.5"),
                ({"probability": "0.5"}, "row 1: Answer: probability must be a number in [0, 1], got '0.5'"),
                ({"probability": True}, "row 1: Answer: probability must be a number in [0, 1], got True"),
                ({"first_is_better": "yes"}, "row 1: first_is_better must be true or false, got 'yes'"),
                ({"chosen": "\ud800"}, "line 1 is no text: 'chosen' holds the lone surrogate"),
            ]
        ],
    ],
)
def test_bad_labels_are_refused_with_their_line(folder, row, says):
    Path("labels.jsonl").write_text(f"{row}\n")
    assert says in label("a b", keys="1\n", code=1)
    assert Path("labels.jsonl").read_text() == f"{row}\n"


@pytest.mark.parametrize(
    ("wrong", "says"),
    [({"after": "1"}, "after must be a number of labels"), ({"after": -1}, "got -1"), ({"first": 3}, "must be texts")],
)
def test_bad_skips_are_refused_with_their_row(folder, wrong, says):
    row = {"prompt": "a b", "first": "x", "second": "y", "after": 0} | wrong
    Path("labels.skipped.jsonl").write_text(json.dumps(row) + "\n")
    out = label("a b", keys="1\n", code=1)
    assert "labels.skipped.jsonl: row 1: " in out
    assert says in out


def test_a_chat_cannot_be_labelled(folder):
    Path("chats.jsonl").write_text(json.dumps({"prompt": [{"role": "user", "content": "a"}]}))
    assert "this command needs prompts that are texts" in label("--prompts", "chats.jsonl", code=1)


def test_prompts_of_a_file_with_columns(folder):
    Path("prompts.tsv").write_text("id\tprompt\n1\ta b\n2\tc\n")
    label("--prompts", "prompts.tsv", "--judge", "judges:letters", "--number", "2")
    assert {row["prompt"] for row in rows("labels.pool.jsonl")} == {"a b", "c"}


def test_labels_of_another_tool_count(folder):
    Path("labels.jsonl").write_text('{"prompt": "a b", "chosen": "a a", "rejected": "b"}\n')
    assert "labels.jsonl: 2 labels" in label("a b", keys="1\n")


def test_labels_in_every_form_that_comparisons_have_count(folder):
    ask, good, bad = (
        {"role": role, "content": text} for role, text in (("user", "a b"), ("assistant", "a"), ("assistant", "b"))
    )
    forms = [
        {"chosen": [ask, good], "rejected": [ask, bad]},
        {"prompt": [ask], "chosen": [good], "rejected": [bad]},
        {"prompt": "a b", "chosen": "a", "rejected": "b", "probability": None, "first_is_better": None},
    ]
    Path("labels.jsonl").write_text("\n\n".join(map(json.dumps, forms)))
    assert "labels.jsonl: 4 labels" in label("a b", keys="1\n")
    assert rows()[-1].keys() >= {"first_is_better", "probability"}
