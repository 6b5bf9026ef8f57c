"""The ready program against the same program written out."""

from __future__ import annotations

import numpy as np
import pyro
import pytest
from support.models import table_lm

from bayeslm.inference import Exact, ImportanceSampling, match_moments
from bayeslm.models import LanguageModel, Moment, TiltedLM, rewards
from bayeslm.models.moments import moment_target


def test_wrong_arguments_are_refused_with_what_to_write() -> None:
    lm = table_lm()
    with pytest.raises(TypeError, match=r"got the class Sentiment: write Sentiment\(\.\.\.\)"):
        TiltedLM(lm, rewards.Sentiment)
    with pytest.raises(ValueError, match="prompts is empty: give at least one"):
        ImportanceSampling(2, progress=False).run(TiltedLM(lm, rewards.Length()), [])
    with pytest.raises(TypeError, match=r"engine must be .* that is a class, write ImportanceSampling\(\.\.\.\)"):
        match_moments(TiltedLM(lm, None), [[1]], [Moment(rewards.Length(), 2.0)], engine=ImportanceSampling)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="tokenizer must be a tokenizer of transformers or None, got 'bart'"):
        LanguageModel(lm.network, "bart")


def test_stop_strings_end_its_completions() -> None:
    """As `LanguageModel.forward` says it: log Z by enumeration, the texts that are drawn, and a target made of it."""
    lm, reward, prompts = table_lm(), rewards.Length(), [[2], [3, 4]]

    def written_out(prompts: list[list[int]]) -> None:
        with pyro.plate("prompts", len(prompts)):
            x = pyro.sample("completion", lm(prompts, max_new_tokens=3, stop=["b", "c"]))
            rewards.factor("reward", reward(prompts, lm.decode(x)), 2.0)

    model = TiltedLM(lm, reward, 2.0, max_new_tokens=3, stop=["b", "c"])
    exact = Exact(progress=False).run(written_out, prompts)
    np.testing.assert_allclose(Exact(progress=False).run(model, prompts).log_evidence, exact.log_evidence, rtol=1e-6)
    free = Exact(progress=False).run(TiltedLM(lm, reward, 2.0, max_new_tokens=3), prompts)
    assert (np.abs(free.log_evidence - exact.log_evidence) > 0.01).all()
    target = moment_target(model, [Moment(rewards.Contains("d"), 0.5)], [0.0])
    np.testing.assert_allclose(Exact(progress=False).run(target, prompts).log_evidence, exact.log_evidence, rtol=1e-6)
    drawn = ImportanceSampling(200, seed=0, progress=False).run(model, prompts).texts["completion"]
    assert not any(word in text[:-1] for text in drawn.flat for word in "bc")
