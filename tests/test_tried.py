"""What was tried with bad intentions and came out wrong: each is one of a kind, whose other members stand beside it."""

from __future__ import annotations

import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from support.models import table_lm
from typer.testing import CliRunner

from bayeslm.cli import app
from bayeslm.inference import ImportanceSampling
from bayeslm.inference.training.identity import identify
from bayeslm.models import LanguageModel, TiltedLM, Tool, rewards
from bayeslm.models.preferences import Comparisons

LM = table_lm(order=2, seed=1, vocab=5)
HALF = "a \ud800 b"  # half of a character
RUN = {"seed": 0, "progress": False}


def tilted(**columns):
    reward = rewards.Reward(lambda completions, answer: [float(len(text)) for text in completions])
    ImportanceSampling(num_particles=4, **RUN).run(TiltedLM(LM, reward, max_new_tokens=2), ["a"], **columns)


TEXTS = {
    "prompts[0]": lambda: LM([HALF], 2),
    "texts[0]": lambda: LM.encode([HALF], 4),
    "part 1": lambda: LM.join(["a"], HALF),
    "stop": lambda: LM(["a"], 2, stop=HALF),
    "texts[0] ": lambda: table_lm().fit([HALF], num_steps=1),
    "vocabulary[1]": lambda: LanguageModel.tabular(["<eos>", HALF]),
    "column 'answer'": lambda: tilted(answer=[HALF]),
    "column 'answer'[0]": lambda: tilted(answer=[["b", {"c": HALF}]]),
    "column 'answer' ": lambda: tilted(answer=np.array([HALF], dtype=object)),
    "completions[1]": lambda: rewards.Length()(["a", "b"], ["c", HALF]),
    "prompts[0] ": lambda: rewards.Length()([[{"role": "user", "content": HALF}]], ["c"]),
    "Matches: pattern": lambda: rewards.Matches(HALF),
    "Contains: phrase": lambda: rewards.Contains(HALF),
    "Grammar: regex": lambda: rewards.Grammar(regex=HALF),
    "Similarity: reference": lambda: rewards.Similarity(HALF),
    "Tool: failure": lambda: Tool(str, failure=HALF),
    "row 0": lambda: Comparisons.from_rows([{"prompt": "a", "chosen": HALF, "rejected": "b"}]),
}


@pytest.mark.parametrize("name", TEXTS)
def test_a_text_that_has_no_encoding_is_refused_wherever_it_comes_in(name):
    with pytest.raises(
        ValueError, match=r"the lone surrogate '.ud800' at character 2, which is half of a character"
    ) as e:
        TEXTS[name]()
    assert name.strip() in str(e.value)


# -- what an object remembers is no setting ------------------------------------------------------------------------


def used_tool():
    tool = Tool(lambda text: "b")
    yield tool
    tool(np.array(["a", "c"], dtype=object))


def used_grammar():
    grammar = rewards.Grammar(regex="a*")
    yield grammar
    grammar(["p"], ["a"])


def used_judge():
    judge = rewards.Judge("m", "{completion}", key_variable=None)
    yield judge
    judge.usage.prompt_tokens += 3


@pytest.mark.parametrize("use", [used_tool, used_grammar, used_judge])
def test_an_object_that_was_used_has_the_identity_of_a_new_one(use):
    steps = use()
    thing = next(steps)
    before = identify(thing)
    next(steps, None)
    assert identify(thing) == before


# -- what would be paid, or allocated, for nothing -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"model": "other"}, "'model', which the judge sets itself"),
        ({"stream": True}, "'stream', which the judge sets itself"),
        ({"temprature": 1.0}, "'temprature', which openai does not know"),
        ({"temperature": float("nan")}, "options must be JSON"),
    ],
)
def test_options_of_a_judge_are_refused_before_a_request(options, says):
    with pytest.raises(ValueError, match=says):
        rewards.Judge("m", "{completion}", options=options)


@pytest.mark.parametrize("name", ["a\0b", "\ud800"])
def test_what_cannot_be_the_name_of_a_file_is_refused(name):
    with pytest.raises(ValueError, match="cache must be the name of a file"):
        rewards.Judge("m", "{completion}", key_variable=None, cache=name)


@pytest.mark.parametrize("place", ["file/cache", "folder"])
def test_a_cache_that_cannot_be_written_is_refused_before_a_request(place, tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    judge = rewards.Judge("m", "{completion}", key_variable=None, cache=str(tmp_path / place))
    with pytest.raises(rewards.RewardError, match="cannot be used as a cache of verdicts"):
        judge(["a"], ["b"])


def test_stop_strings_are_short():
    with pytest.raises(ValueError, match="stop has 40000 characters, and may have 512"):
        LM(["a"], 2, stop="ab" * 20_000)


@pytest.mark.parametrize("schema", ["text", "mapping"])
def test_a_schema_that_is_too_deep_is_refused_by_name(schema):
    deep = {}
    for _ in range(5000):
        deep = {"items": deep}
    text = '{"items":' * 30_000 + "{}" + "}" * 30_000
    with pytest.raises(ValueError, match="Grammar: json_schema is no JSON"):
        rewards.Grammar(json_schema=text if schema == "text" else deep)


# -- answers of a user's function ----------------------------------------------------------------------------------


def test_a_text_is_neither_true_nor_a_number():
    with pytest.raises(rewards.RewardError, match="needs its predicate to say True or False, got 'no'"):
        rewards.Constraint(lambda text: "no")(["a"], ["b"])
    model = TiltedLM(LM, rewards.Length(), max_new_tokens=2)
    posterior = ImportanceSampling(num_particles=8, **RUN).run(model, ["a"])
    with pytest.raises(ValueError, match="a utility must return a number, and returned '1'"):
        posterior.decide(lambda one, other: "1")


@pytest.mark.parametrize("value", [torch.tensor([[1.5, 0.0]]), torch.tensor([[float("nan"), 0.0]]), "a"])
def test_the_probability_of_what_is_no_token_ids_is_refused(value):
    with pytest.raises(TypeError, match="value must be a tensor of token ids, whole numbers, got"):
        LM(["a"], 2).log_prob(value)


# -- prompts and columns whose entries have no order, or are no text ---------------------------------------------------

UNORDERED = {
    "column 'answer' must be a list, got a set": lambda: tilted(answer={"b"}),
    "column 'answer' must be a list, got a table": lambda: tilted(answer=pd.DataFrame({"a": ["b"]})),
    "prompts must be a list, got a set": lambda: TiltedLM(LM, rewards.Length())({"a", "b"}),
    "prompts must be a list of prompts, got a generator": lambda: TiltedLM(LM, rewards.Length())(x for x in "ab"),
    "prompts must be a list of prompts, got": lambda: LM({"a", "b"}),
    "prompts and columns must be lists, got a frozenset": lambda: rewards.Length()(frozenset("ab"), ["c", "d"]),
    "prompts.0. is b'.x01', a": lambda: LM([b"\x01"]),
    "prompts.0. is .True, False.: a": lambda: LM([[True, False]]),
    "prompts.0. is .1, 2.: a": lambda: LM([{1, 2}]),
}


@pytest.mark.parametrize("says", UNORDERED)
def test_what_has_no_order_or_is_no_prompt_is_refused(says):
    """A set's order is another in each process; bytes would be token ids."""
    with pytest.raises(TypeError, match=says.replace("', a", "': a")):
        UNORDERED[says]()


def test_a_missing_entry_of_a_masked_array_is_none():
    seen = []

    def reward(completions, answer):
        seen.extend(answer)
        return [0.0 for _ in completions]

    masked = np.ma.array([1.0, 5.0], mask=[False, True])
    ImportanceSampling(num_particles=4, **RUN).run(TiltedLM(LM, reward, max_new_tokens=2), ["a", "b"], answer=masked)
    assert set(seen) == {1.0, None}


# -- a result that has lost a file -----------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["posterior.json", "posterior.nc", "texts.json"])
def test_a_result_that_has_lost_a_file_is_not_left_out_of_a_table(file, tmp_path):
    model = TiltedLM(LM, rewards.Length(), max_new_tokens=2)
    posterior = ImportanceSampling(num_particles=8, **RUN).run(model, ["a"])
    posterior.save(tmp_path / "run/one")
    shutil.copytree(tmp_path / "run/one", tmp_path / "run/two")
    (tmp_path / "run/two" / file).unlink()
    result = CliRunner().invoke(app, ["show", str(tmp_path / "run")])
    assert result.exit_code == 1
    assert file in result.output
