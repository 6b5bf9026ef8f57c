"""What a screen shows of engines, programs and results: short, and prompts by the user's turn of a chat."""

from __future__ import annotations

from typing import Any

import pytest
from support.engines import ENGINES
from support.models import table_lm
from support.processes import random_mdp

from bayeslm.inference import MCMC, SVI, ImportanceSampling
from bayeslm.inference.control import PSRL, EpisodicTask
from bayeslm.inference.training import Adam
from bayeslm.models import LanguageModel, TiltedLM, rewards
from bayeslm.models.control import TabularEnvironment, Worlds

TEMPLATE = (
    "{% for turn in messages %}{{ turn['role'] + ' ' + turn['content'] + ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant' }}{% endif %}"
)


@pytest.mark.parametrize("name", ENGINES)
def test_engines_have_a_short_repr(name: str) -> None:
    text = repr(ENGINES[name].make(0, 1.0, 1))
    assert len(text) < 200
    assert "\n" not in text
    assert "seed=0" in text


def test_settings_that_differ_from_the_defaults_are_shown() -> None:
    lm = table_lm(order=2, vocab=4)
    assert repr(MCMC()) == "MCMC()"
    assert repr(MCMC(5, seed=3)) == "MCMC(num_samples=5, seed=3)"
    assert repr(ImportanceSampling(guide=lm)) == "ImportanceSampling(guide=LanguageModel)"
    assert repr(SVI(optimizer=Adam(0.5))) == "SVI(optimizer=Adam(learning_rate=0.5))"
    program = TiltedLM(lm, rewards.Length(), 0.5)
    assert repr(program).startswith("TiltedLM(prior=LanguageModel, reward=length, beta=0.5, max_new_tokens=24")


def test_learning_has_a_short_repr() -> None:
    task = EpisodicTask(TabularEnvironment(random_mdp()), 4)
    learning = PSRL(3, num_runs=2, seed=0, progress=False).run(task, Worlds.prior(4, 2))
    assert repr(learning).startswith("Learning(2 runs of 3 episodes, mean regret ")
    assert len(repr(learning)) < 120


CHATS = [[{"role": "system", "content": "a a a a"}, {"role": "user", "content": turn}] for turn in ("b", "a b")]


@pytest.mark.parametrize(
    ("chats", "names"),
    [
        (CHATS, ["b", "a b"]),
        ([[*chat, {"role": "assistant", "content": "a"}, {"role": "user", "content": "b b"}] for chat in CHATS], None),
        ([[{"role": "user", "content": [{"type": "text", "text": "a b"}]}]], ["a b"]),
        ([[{"role": "system", "content": "a"}]], ["a"]),
    ],
)
def test_prompts_are_labelled_by_the_users_turn(chats: list[Any], names: list[str] | None) -> None:
    lm = LanguageModel.tabular(["<eos>", "a", "b", "system", "user", "assistant"], order=2, seed=0)
    lm.tokenizer.chat_template = TEMPLATE
    model = TiltedLM(lm, rewards.Length(), max_new_tokens=2)
    posterior = ImportanceSampling(50, seed=0, progress=False).run(model, chats)
    assert posterior.prompt_names == (names or ["b b", "b b"])
    assert posterior.prompt_labels == (names or ["[0] b b", "[1] b b"])
    assert all("assistant" in text or "system" in text for text in posterior.prompts)
    plain = ImportanceSampling(50, seed=0, progress=False).run(model, ["a", "b"])
    assert plain.prompt_names == []
