"""The applications in examples/: each runs from its options to its table and picture, and its figures are right."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bayeslm import diagnostics
from bayeslm.inference import Exact, ImportanceSampling
from bayeslm.models import LanguageModel, TiltedLM, rewards

pytest.importorskip("matplotlib")  # they draw
EXAMPLES = Path(__file__).parents[1] / "examples"
WORDS = ["<eos>", "I", "don't", "know", "sea", "good", "bad", "African", "Africa", "Asia", "Lima", "and"]


def tiny() -> LanguageModel:
    return LanguageModel.tabular(WORDS, order=2, seed=0)


@pytest.mark.parametrize(
    ("name", "wrong", "says"),
    [
        ("question_answering", ["--price", "1.5"], "argument --price: must be between 0 and 1, got '1.5'"),
        ("question_answering", ["--steps", "0"], "argument --steps: must be a positive whole number, got '0'"),
        ("over_fitting", ["--beta", "-1"], "argument --beta: must be positive and finite, got '-1'"),
        ("over_fitting", ["--folder", __file__], "is a file: give a folder"),
    ],
)
def test_wrong_options_end_an_application_before_it_begins(name, wrong, says, load_example, capsys):
    with pytest.raises(SystemExit, match="2"):
        load_example(name).main(wrong, None)
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("model", ["tiny", pytest.param("smollm2", marks=pytest.mark.long)])
@pytest.mark.parametrize(
    "name", [pytest.param("generation", marks=pytest.mark.long), "question_answering", "over_fitting"]
)
def test_an_application_runs_from_options_to_figures(name, model, load_example, tmp_path, monkeypatch, request):
    script = load_example(name)
    if name == "question_answering":
        pytest.importorskip("countryinfo")
    if model == "tiny" and name == "generation":  # without the sentence encoder and its seconds
        monkeypatch.setattr(script.rewards, "Similarity", lambda topic: rewards.Contains("sea"))
    lm = tiny() if model == "tiny" else request.getfixturevalue("smollm2")
    found = script.main(["--quick", "--folder", str(tmp_path)], lm)
    assert found
    lines = (tmp_path / "figures.md").read_text(encoding="utf-8").splitlines()
    cells = {line.count("|") for line in lines if line.startswith("|")}
    assert len(cells) == 1
    assert sum(" ± " in line for line in lines) >= 4  # figures have errors
    (picture,) = tmp_path.glob("*.png")
    assert 10_000 < picture.stat().st_size < 150_000


def test_abstaining_is_decided_where_its_price_is_above_the_probability_of_the_answer(load_example):
    """Of draws whose answers are known, against shares counted by hand; no draw has to abstain for it."""
    script = load_example("question_answering")
    rows = [{"prompt": "Lima", "references": ["Lima"]}, {"prompt": "sea", "references": ["Asia"]}]
    held = script.HeldOut(tiny(), rows, 40)
    shares = []
    for question in range(2):
        answers = [script.answer(text) for text in held.said[:, question]]
        shares.append(max(answers.count(one) for one in answers if one is not None) / 40)
    np.testing.assert_allclose(held.confidence, shares)
    for price in (0.01, *(share + e for share in shares for e in (-0.01, 0.01)), 0.99):
        assert held.answered(price).tolist() == [share > price for share in shares]
        np.testing.assert_allclose(held.score(price), np.where(held.answered(price), held.right, price))
    assert script.answer(" I don't know.\n") is None
    assert script.answer(" The Lima!") == "lima"


def test_questions_have_references_of_their_row(load_example):
    pytest.importorskip("countryinfo")
    script = load_example("question_answering")
    countries = script.questions()
    assert len(countries) > 140
    assert {len(rows) for rows in countries} == {4}
    by_prompt = {row["prompt"].splitlines()[-2]: row["references"] for rows in countries for row in rows}
    assert by_prompt["Q: What is the capital of Brazil?"] == ["Brasília", "Brasilia"]
    assert "Hungary" in by_prompt["Q: Budapest is the capital of which country?"]
    assert rewards.ExactMatch()(["q"], [" Brasilia\n"], references=[["Brasília", "Brasilia"]]).item() == 1.0


def test_the_frontier_is_that_of_the_exact_posteriors(load_example):
    """KL and reward of `point` against enumeration, of weighted draws at other betas and of an enumeration itself."""
    script = load_example("generation")

    def letters(completions: list[str], **columns: object) -> list[float]:
        return [float(len(text)) / 5 for text in completions]

    model = TiltedLM(tiny(), letters, 1.0, max_new_tokens=2)
    exact = Exact(progress=False).run(model, ["sea", "bad"])
    drawn = ImportanceSampling(500, 4, seed=0, progress=False).run(model, ["sea", "bad"])
    for beta in (2.0, 1.0, 0.4):
        truth, point = (script.point(script.at_beta(run, beta)) for run in (exact, drawn))
        assert truth.kl[1] == truth.reward[1] == 0.0
        for (value, error), (right, _) in zip(point, truth, strict=True):
            assert abs(value - right) < 4.5 * error
    tilted = diagnostics.kl_to_prior(
        Exact(progress=False).run(TiltedLM(tiny(), letters, 0.4, max_new_tokens=2), ["sea", "bad"])
    )
    assert script.point(script.at_beta(exact, 0.4)).kl[0] == pytest.approx(tilted[0].mean(), rel=1e-5)


def test_the_reader_dislikes_repetition_and_the_proxy_learns_words(load_example):
    script = load_example("over_fitting")
    assert script.repeated(["good good bad bad", "a b c", ""]) == [0.5, 0.0, 0.0]
    once, often = script.gold(["p"] * 2, ["good food", "good good good good"]).tolist()
    assert once > often
    features = script.word_counts(["good food", "good sea", "bad food", "sea"])
    counts = features([], ["good good sea", "unknown"])  # food, good and sea are in two texts
    assert (counts > 0).tolist() == [[False, True, True], [False, False, False]]
    assert counts[0, 1] == pytest.approx(2 * counts[0, 2].item())  # all three are equally spread
