"""The ready program against the same program written out."""

from __future__ import annotations

import numpy as np
import pyro
from support.models import table_lm

from bayeslm.inference import Exact, ImportanceSampling
from bayeslm.models import Moment, TiltedLM, rewards
from bayeslm.models.moments import moment_target


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
