"""What identifies a setting: the same in every process and Python, another wherever a result may depend on it."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from unittest import mock

import numpy as np
import pytest
import torch
from support.models import table_lm
from support.programs import PROMPTS, TOKENS
from support.trainings import LM, SMALL, every_5

from bayeslm.inference import SVI
from bayeslm.inference.training import (
    Adam,
    AutoPolicy,
    Checkpointing,
    Critic,
    HeldOut,
    LogVariance,
    Replay,
    ReverseKL,
    alpha_divergence,
    identify,
)
from bayeslm.inference.training.identity import has_unreadable
from bayeslm.models import TiltedLM, rewards

MODULE = '''
from __future__ import annotations

import functools
import math
import re
from typing import Optional

import helpers

WORDS = ["good", "bad"]
PATTERN = re.compile("x+")
calls = 0


def count(text: Optional[str]) -> float:
    """One of the two that call each other."""
    assert text is not None
    return sum(text.count(word) for word in WORDS) + (again(text[1:]) if text else 0.0)


def again(text):
    return count(text) if PATTERN.match(text) else len([word for word in WORDS if word in text])


class Judge:
    factor = 2.0

    def __init__(self, weight):
        self.weight, self._lock = weight, object()

    def __call__(self, completions, **columns):
        """Of which a text
stands at the margin."""
        return [self.weight * self.factor * again(text) for text in completions]

    def judge(self, completions):
        return self(completions)


def reward(completions, scale=1.0, *, power=2.0, **columns):
    global calls
    calls += 1
    return [scale * count(text) ** power + helpers.bonus(text) + math.sqrt(len(text)) for text in completions]


def begins(word):
    def begin(completions, **columns):
        return [float(text.startswith(word)) for text in completions]

    return begin


two = [lambda x: x + 1, lambda x: x + 2]
cached = functools.lru_cache(count)
judge = Judge(0.5)
bound = judge.judge
'''
HELPERS = "def bonus(text):\n    return 0.1 * len(text)\n"
PRINT = """
import json, sys
sys.path.insert(0, sys.argv[1])
import my_rewards as m
from bayeslm.inference.training import identify
m.reward(["good"])
values = [m.reward, m.begins("a"), *m.two, m.cached, m.judge, m.bound, m.Judge]
print(json.dumps([identify(x) for x in values], sort_keys=True))
"""


def written(folder: Path, module: str = MODULE) -> Path:
    folder.mkdir()
    (folder / "my_rewards.py").write_text(module)
    (folder / "helpers.py").write_text(HELPERS)
    return folder


def identities(folder: Path, module: str = MODULE, optimize: int = 0) -> list:
    """Of what a module defines, compiled anew."""
    path = written(folder, module) / "my_rewards.py"
    m = ModuleType("my_rewards")
    m.__file__ = str(path)
    with mock.patch.dict(sys.modules, my_rewards=m), mock.patch.object(sys, "path", [str(folder), *sys.path]):
        sys.modules.pop("helpers", None)
        exec(compile(module, path, "exec", optimize=optimize), vars(m))
        m.reward(["good"])
        values = [m.reward, m.begins("a"), *m.two, m.cached, m.judge, m.bound, m.Judge]
        return json.loads(json.dumps([identify(x) for x in values]))


def test_it_is_of_the_source_and_not_of_the_process_nor_of_byte_code(tmp_path):
    """Without assertions byte code is another, as another Python's is; and code may move in its file."""
    first = identities(tmp_path / "one")
    assert not has_unreadable(first)
    command = [sys.executable, "-c", PRINT, str(written(tmp_path / "two"))]
    assert json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout) == first
    assert identities(tmp_path / "optimised", optimize=2) == first
    assert identities(tmp_path / "three", MODULE.replace("calls = 0\n", "calls = 0\nUNUSED = 3\n\n\n\n")) == first


CHANGES = {
    "text of a global": ('"bad"]', '"poor"]', {"reward", "cached", "judge", "bound", "Judge"}),
    "pattern": ('"x+"', '"y+"', {"reward", "cached", "judge", "bound", "Judge"}),
    "helper": ("else 0.0", "else 1.0", {"reward", "cached", "judge", "bound", "Judge"}),
    "default": ("scale=1.0", "scale=1.5", {"reward"}),
    "keyword default": ("power=2.0", "power=3.0", {"reward"}),
    "first lambda": ("x + 1", "x + 9", {"first lambda"}),
    "second lambda": ("x + 2", "x + 9", {"second lambda"}),
    "setting of an object": ("Judge(0.5)", "Judge(0.6)", {"judge", "bound"}),
    "class attribute": ("factor = 2.0", "factor = 3.0", {"judge", "bound", "Judge"}),
    "method": ("return self(completions)", "return self(completions)[:]", {"judge", "bound", "Judge"}),
}
NAMES = ("reward", "begin", "first lambda", "second lambda", "cached", "judge", "bound", "Judge")


@pytest.mark.parametrize("change", CHANGES)
def test_what_depends_on_a_change_is_another(change, tmp_path):
    """And nothing else is."""
    old, new, depend = CHANGES[change]
    before, after = identities(tmp_path / "one"), identities(tmp_path / "two", MODULE.replace(old, new))
    assert {name for name, x, y in zip(NAMES, before, after, strict=True) if x != y} == depend


def begins(word):
    def begin(completions, **columns):
        return [float(text.startswith(word)) for text in completions]

    return begin


def counting(n):
    calls = 0

    def count(completions, **columns):
        nonlocal calls
        calls += n
        return [float(calls) for _ in completions]

    return count


LENGTH = 3


@pytest.mark.parametrize(
    "make",
    [
        begins,
        lambda word: functools.partial(begins("a"), word),
        lambda word: rewards.Reward(begins(word)),
        lambda word: TiltedLM(LM, begins(word)),
        lambda word: 0.5 * rewards.Reward(begins(word)) + rewards.Length(target=3),
        lambda word: HeldOut({word: len}),
        lambda word: ReverseKL(4, Critic(width=len(word))),
        lambda word: LogVariance(4, Replay(every=len(word))),
        lambda word: alpha_divergence(0.5 / len(word)),
        lambda word: Adam(schedule="linear" if len(word) == 1 else "cosine"),
        lambda word: functools.partial(AutoPolicy, lora_rank=len(word)),
        lambda word: np.array([len(word)]),
        lambda word: np.int64(len(word)),
        lambda word: {word, "c"},
        lambda word: word.encode(),
        lambda word: torch.float32 if word == "a" else torch.float64,
        lambda word: table_lm(seed=len(word)),
        counting,
    ],
    ids=range(18),
)
def test_settings_and_closures(make):
    if make is counting:
        one, same, other = counting(1), counting(1), counting(2)
        one([]), same([]), same([])  # what it counts is not a setting
    else:
        one, same, other = make("a"), make("a"), make("bb")
    assert identify(one) == identify(same) != identify(other)
    json.dumps(identify(one))


def test_weights_of_what_is_trained_are_left_out():
    policy = LM.policy()

    def guide(prompts):
        return policy(prompts, LENGTH)

    before = identify(guide, weights=False), identify(guide)
    with torch.no_grad():
        next(policy.parameters()).add_(1.0)
    assert identify(guide, weights=False) == before[0]
    assert identify(guide) != before[1]


def test_where_no_source_can_be_read_resuming_asks_for_a_version(tmp_path):
    names = {"LM": LM, "TOKENS": TOKENS}
    exec("def length(completions, **columns):\n    return [float(len(text)) for text in completions]", names)
    model = TiltedLM(LM, names["length"], 1.0, max_new_tokens=3)
    assert has_unreadable(identify(model))
    SVI(**SMALL, checkpoint=every_5(tmp_path / "begun")).run(model, PROMPTS)
    with pytest.raises(ValueError, match=r"source of a function of this run cannot be read.*version="):
        SVI(**SMALL, checkpoint=every_5(tmp_path / "begun")).run(model, PROMPTS)
    SVI(**SMALL, checkpoint=Checkpointing(tmp_path / "begun", version="1")).run(model, PROMPTS)
    SVI(**SMALL, checkpoint=Checkpointing(tmp_path / "named", version="1")).run(model, PROMPTS)
    SVI(**SMALL, checkpoint=Checkpointing(tmp_path / "named", version="1")).run(model, PROMPTS)
    with pytest.raises(ValueError, match='code version was "1" and is "2"'):
        SVI(**SMALL, checkpoint=Checkpointing(tmp_path / "named", version="2")).run(model, PROMPTS)
