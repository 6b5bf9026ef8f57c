"""The applications in examples/: what they compute with, against what it should be, and each at a small size."""

import importlib.util
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"


def example(name, monkeypatch):
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def test_sums_are_right_in_every_step_and_in_one_split(monkeypatch):
    reasoning = example("reasoning", monkeypatch)
    *splits, more = reasoning.splits(extra=5)
    questions = [q for split in [*splits, more] for q, _, _ in split]
    assert len(set(questions)) == len(questions) == sum(map(len, splits)) + 5
    for question, steps, answer in splits[1]:
        value = eval(question.replace(" ", "").rstrip("="))
        assert int(answer.replace(" ", "")) == value
        for step in re.split("[=:]", steps)[:-1]:
            assert eval(step.replace(" ", "")) == value
        text = f"{steps} {answer}"
        assert reasoning.answer_of(text) == answer
        assert reasoning.answer_of(f"{text} : 1") is reasoning.answer_of(steps[:-2]) is None
        assert reasoning.RIGHT([question] * 2, [text, f"{text} 0"], answer=[answer] * 2).tolist() == [1.0, 0.0]


def test_the_reward_of_a_summary(monkeypatch):
    """The cosine of one-hot embeddings is 1 or 0; words and copied ones have their price."""
    summaries = example("summaries", monkeypatch)

    def embed(texts):
        return torch.nn.functional.one_hot(torch.tensor([len(text.split()) % 4 for text in texts]), 4).float()

    article = "One two three four five six seven eight"
    assert summaries.longest_run("and Two, three four; FIVE seven", article) == 4
    assert summaries.longest_run("none of it", article) == 0
    texts = ["two three four five", "a b c"]
    found = summaries.reward_of(embed)([""] * 2, texts, article=[article] * 2)
    np.testing.assert_allclose(found, [1 - 4 * 0.01 - 0.05, -3 * 0.01], atol=1e-6)
    articles = summaries.articles(["networkx"])
    assert len(articles) > 20
    assert all(45 <= len(article["text"].split()) <= 90 for article in articles)


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("reasoning", ["figures.md", "reasoning.png", "policy"]),
        ("summaries", ["figures.md", "summaries.png", "policy"]),
        ("reasoning_smollm2", ["figures.md"]),
    ],
)
def test_an_application_runs_at_a_small_size(name, files, monkeypatch, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    if name == "reasoning_smollm2":
        pytest.importorskip("reasoning_gym")
    example(name, monkeypatch).main(tmp_path, quick=True)
    assert all((tmp_path / file).exists() for file in files)
    table = (tmp_path / "figures.md").read_text(encoding="utf-8")
    assert table in capsys.readouterr().out
    assert "nan" not in table
