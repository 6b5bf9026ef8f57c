"""Reasoning and summaries in examples/: what they compute with, against what it should be, and each at a small size."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from support.models import llama_network
from support.tokenizers import byte_level

from bayeslm.models import LanguageModel

pytest.importorskip("matplotlib")  # they draw
EXAMPLES = Path(__file__).parents[1] / "examples"


def embed(texts):
    """One-hot vectors of the number of words, whose cosine is 1 or 0."""
    return torch.nn.functional.one_hot(torch.tensor([len(text.split()) % 4 for text in texts]), 4).float()


def test_sums_are_right_in_every_step_and_in_one_split(load_example):
    reasoning = load_example("_sums")
    *splits, more = reasoning.splits(extra=5)
    questions = [q for split in [*splits, more] for q, _, _ in split]
    assert len(set(questions)) == len(questions) == sum(map(len, splits)) + 5
    for question, steps, answer in splits[1]:
        value = eval(question.replace(" ", "").rstrip("="))
        assert int(answer.replace(" ", "")) == value
        for step in re.split("[=:]", steps)[:-1]:
            assert eval(step.replace(" ", "")) == value
        text = f"{steps} {answer}"
        assert len(text.split()) < reasoning.LONGEST  # with its end
        assert reasoning.answer_of(text) == answer
        assert reasoning.answer_of(f"{text} : 1") is reasoning.answer_of(steps[:-2]) is None
        assert reasoning.RIGHT([question] * 2, [text, f"{text} 0"], answer=[answer] * 2).tolist() == [1.0, 0.0]


def test_the_reward_of_a_summary(load_example, monkeypatch):
    """Words and copied ones have their price."""
    summaries = load_example("summaries")
    monkeypatch.setattr(summaries.rewards, "sentence_embeddings", embed)
    article = "One two three four five six seven eight"
    assert summaries.longest_run("and Two, three four; FIVE seven", article) == 4
    assert summaries.longest_run("none of it", article) == 0
    found = summaries.summary(["two three four five", "a b c"], article=[article] * 2)
    np.testing.assert_allclose(found, [1 - 4 * 0.01 - 0.05, -3 * 0.01], atol=1e-6)
    articles = summaries.articles(["networkx"])
    assert len(articles) > 20
    assert all(30 <= len(article["text"].split()) <= 60 for article in articles)


def test_sentences_of_the_prompt_the_training_and_the_held_out_ones_differ(load_example):
    """And the dictionary has a stem for each word of the translation, which begins with it."""
    pytest.importorskip("sacrebleu")
    script = load_example("translation_smollm2")
    shown, train, held_out = script.sentences((script.SHOWN, script.TRAIN, script.HELD_OUT))
    every = [english for english, _ in [*shown, *train, *held_out]]
    assert len(set(every)) == len(every) == script.SHOWN + script.TRAIN + script.HELD_OUT
    for english, tavi in held_out:
        stems, words = script.stems(english).split(), tavi.split()
        assert len(stems) == len(words)
        assert all(any(word.startswith(stem) for word in words) for stem in stems)
        assert all(any(word.startswith(stem) for stem in stems) for word in words)
        solved = script.problem(english, tavi)
        assert f": {' '.join(stems)}\n" in solved
        assert solved.startswith(script.problem(english))


@pytest.mark.parametrize(
    ("name", "extra"),
    [
        ("reasoning", None),
        pytest.param("summaries", None, marks=pytest.mark.long),
        ("reasoning_smollm2", "reasoning_gym"),
        pytest.param("translation", "sacrebleu", marks=pytest.mark.long),
        pytest.param("translation_smollm2", "sacrebleu", marks=pytest.mark.long),
    ],
)
def test_an_application_runs_at_a_small_size(name, extra, load_example, monkeypatch, tmp_path):
    if extra is not None:
        pytest.importorskip(extra)
    script, given, options = load_example(name), [], ["--quick", "--folder", str(tmp_path)]
    if name == "translation":
        options += ["--seeds", "2"]
    elif name != "reasoning":
        lm = LanguageModel(llama_network(vocab_size=300), byte_level())
        if name in ("summaries", "translation_smollm2"):  # whose prompts are long
            lm = LanguageModel.tabular(["<eos>", "a", "graph", "is", "nodes", "edges"], order=2)
            lm.tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
        monkeypatch.setattr("bayeslm.models.rewards.sentence_embeddings", embed)
        given = [lm]
    lines = script.main(options, *given)
    cells = {line.count("|") for line in lines if line.startswith("|")}
    assert len(cells) == 1
    assert sum(" ± " in line for line in lines) >= 3
    assert "nan" not in "".join(lines)
    assert (tmp_path / "figures.md").read_text(encoding="utf-8").startswith(lines[0])
    assert len(list(tmp_path.glob("*.png"))) == 1
