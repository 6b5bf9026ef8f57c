"""What identifies a setting: the same in every process and Python, another wherever a result may depend on it."""

from __future__ import annotations

import collections
import datetime
import decimal
import enum
import functools
import itertools
import json
import operator
import random
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import NamedTuple
from unittest import mock

import numpy as np
import pandas
import pytest
import torch
from support.models import table_lm, tiny_llama
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
from bayeslm.models import LanguageModel, TiltedLM, rewards
from bayeslm.models.lm import word_tokenizer

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


def imports(completions):
    from helpers import bonus as extra
    import more.deep
    return [extra(text) * more.deep.FACTORS["a"] for text in completions]


def made(weight):
    class Made:
        def __call__(self, completions):
            return [weight]
    return Made()


class Harsh(helpers.Base):
    pass


two = [lambda x: x + 1, lambda x: x + 2]
cached = functools.lru_cache(count)
judge = Judge(0.5)
bound = judge.judge
'''
HELPERS = """
RATE = 0.1

def bonus(text):
    return RATE * len(text)

class Base:
    def __call__(self, completions):
        return [-1.0 for text in completions]
"""
DEEP = "FACTORS = {'a': 7.0}"
PRINT = """
import json, sys
sys.path.insert(0, sys.argv[1])
import my_rewards as m
from bayeslm.inference.training import identify
m.reward(["good"])
values = [m.reward, m.begins("a"), *m.two, m.cached, m.judge, m.bound, m.Judge, m.imports, m.made(2), m.Harsh()]
print(json.dumps([identify(x) for x in values], sort_keys=True))
"""


def written(folder: Path, module: str = MODULE, changed: Callable[[str], str] = str) -> Path:
    """The module, and those that it imports, changed."""
    (folder / "more").mkdir(parents=True)
    (folder / "my_rewards.py").write_text(module)
    (folder / "helpers.py").write_text(changed(HELPERS))
    (folder / "more/deep.py").write_text(changed(DEEP))
    return folder


def identities(folder: Path, module: str = MODULE, changed: Callable[[str], str] = str, optimize: int = 0) -> list:
    """Of what a module defines, compiled anew."""
    path = written(folder, module, changed) / "my_rewards.py"
    m = ModuleType("my_rewards")
    m.__file__ = str(path)
    with mock.patch.dict(sys.modules, my_rewards=m), mock.patch.object(sys, "path", [str(folder), *sys.path]):
        for name in ("helpers", "more", "more.deep"):
            sys.modules.pop(name, None)
        exec(compile(module, path, "exec", optimize=optimize), vars(m))
        m.reward(["good"])
        values = [m.reward, m.begins("a"), *m.two, m.cached, m.judge, m.bound, m.Judge, m.imports, m.made(2), m.Harsh()]
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
    "helper in another module": ("return RATE *", "return RATE * 2 *", {"reward", "imports"}),
    "global in another module": ("RATE = 0.1", "RATE = 0.2", {"reward", "imports"}),
    "global in a module of a package": ("7.0", "8.0", {"imports"}),
    "base class in another module": ("[-1.0 for", "[-2.0 for", {"harsh"}),
}
NAMES = (
    "reward",
    "begin",
    "first lambda",
    "second lambda",
    "cached",
    "judge",
    "bound",
    "Judge",
    "imports",
    "made",
    "harsh",
)


@pytest.mark.parametrize("change", CHANGES)
def test_what_depends_on_a_change_is_another(change, tmp_path):
    """And nothing else is."""
    old, new, depend = CHANGES[change]
    assert (MODULE + HELPERS + DEEP).count(old) >= 1
    before = identities(tmp_path / "one")
    after = identities(tmp_path / "two", MODULE.replace(old, new), lambda text: text.replace(old, new))
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
        lambda word: HeldOut({word: dict}),
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


class Own:
    """An object of the user's; it counts its calls in the place that says that this is no setting."""

    def __init__(self, *args, **settings):
        self.args = args
        vars(self).update(settings)

    def __call__(self, completions):
        return [float(len(self.args))] * len(completions)


class Slots:
    __slots__ = ("weight",)

    def __init__(self, weight):
        self.weight = weight


class Counting(Own):
    calls = 0

    def identity(self):
        return {"args": self.args}


class Point(NamedTuple):
    x: int


@dataclass
class Settings:
    values: dict


def keyword_only(n):
    def f(completions, *, k=[n]):  # noqa: B006
        return k

    return f


def positional(n):
    def f(completions, k=n):
        return k

    return f


def closure(value):
    def f(completions):
        return value

    return f


def attribute(n):
    f = closure(0)
    f.weight = n
    return f


def wrapped(n):
    @functools.wraps(closure)
    def f(*args):
        return closure(n)(*args)

    return f


def of_class(n, **members):
    return type("Made", (Own,), {"weight": n} | members)


class Patched(Own):
    pass


def patched(n):
    Patched.score = closure(n)
    return Patched()


def enumeration(n, kind=enum.Enum):
    class Made(kind):
        FIRST = n
        SECOND = 4

    return Made


def model_with(**settings):
    lm = table_lm()
    return LanguageModel(lm.network, lm.tokenizer, **settings)


def template(n):
    lm = table_lm()
    lm.tokenizer.chat_template = "x" * n
    return lm


def lora(alpha):
    torch.manual_seed(0)
    return tiny_llama(seed=1).policy(lora_rank=2, lora_alpha=alpha)


KINDS = {
    "a list in a closure": lambda n: closure([0, n]),
    "a dict in a closure": lambda n: closure({"a": n}),
    "an object in a closure": lambda n: closure(Own(n)),
    "a keyword-only default": keyword_only,
    "a default": positional,
    "an attribute of a function": attribute,
    "what a decorated function holds": wrapped,
    "a partial's argument": lambda n: functools.partial(closure, n),
    "a partial's keyword": lambda n: functools.partial(closure, value=[n]),
    "a partial of a partial": lambda n: functools.partial(functools.partial(closure, {"a": n}), 1),
    "a callable object": lambda n: Own(n),
    "a callable object with a dict": lambda n: Own(words={"a": n}),
    "a callable object with an object": lambda n: Own(Own(n)),
    "a private attribute": lambda n: Own(_weight=n),
    "slots": Slots,
    "a bound method of a changed object": lambda n: Own({"a": n}).__call__,
    "a built-in method of an object": lambda n: {"a": n}.get,
    "a built-in method of a text": lambda n: ("b" * n).count,
    "an attribute of a class": lambda n: of_class(n),
    "an object of a changed class": lambda n: of_class(n)(),
    "a class method's closure": lambda n: of_class(0, score=classmethod(closure(n))),
    "a property's closure": lambda n: of_class(0, score=property(closure(n)))(),
    "a replaced method": patched,
    "a dataclass with a dict": lambda n: Settings({"a": n}),
    "a named tuple": Point,
    "an enum": enumeration,
    "an enum of numbers": lambda n: enumeration(n, enum.IntEnum),
    "flags": lambda n: enumeration(n, enum.Flag),
    "a member of an enum": lambda n: enumeration(n).FIRST,
    "a deque": lambda n: collections.deque([n]),
    "a counter": lambda n: collections.Counter(a=n),
    "a default dict": lambda n: collections.defaultdict(list, a=n),
    "a namespace": lambda n: SimpleNamespace(a=n),
    "a decimal": lambda n: decimal.Decimal(n),
    "a date": lambda n: datetime.date(2000, 1, n),
    "an item getter": lambda n: operator.itemgetter(n),
    "a method caller": lambda n: operator.methodcaller("count", "a" * n),
    "an infinity": lambda n: closure(float("inf" if n == 1 else "-inf")),
    "a series of pandas": lambda n: Own(pandas.Series([1.0, n])),
    "a random generator of one's own": lambda n: Own(random.Random(n)),
    "dropout": lambda n: torch.nn.Sequential(torch.nn.Dropout(n / 4)),
    "ends of a language model": lambda n: model_with(eos_token_ids=(n,)),
    "its pad token": lambda n: model_with(pad_token_id=n),
    "the dtype in which it computes": lambda n: model_with(compute_dtype=[None, None, torch.bfloat16][n]),
    "its tokenizer": lambda n: LanguageModel(table_lm().network, word_tokenizer(["a", "b", "c", "de"[n - 1]], "a")),
    "its chat template": template,
    "the scale of its adapters": lora,
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_value_is_told_apart(kind):
    """As a closure's, which is where rewards hold what they depend on."""
    one, same, other = (json.dumps(identify(closure(KINDS[kind](n)))) for n in (1, 1, 2))
    assert one == same != other


@pytest.mark.parametrize("kind", [enum.Enum, enum.IntEnum, enum.Flag, enum.IntFlag])
def test_an_enum_is_the_same_after_its_use(kind):
    """It keeps its members, and flags their combinations, in itself once they were looked at."""
    made = enumeration(1, kind)
    before = identify(closure(made))
    assert made(1) is made.FIRST
    if issubclass(kind, enum.Flag):
        assert made(0) == made.FIRST & made.SECOND
    assert made["SECOND"].name in dir(made)
    assert identify(closure(made)) == before


def test_what_is_no_setting_does_not_count():
    """Locks, connections, iterators, values that are computed once, and what an object says itself."""

    class Lazy:
        @functools.cached_property
        def table(self):
            return [1, 2]

    used, counted = Lazy(), Counting(1)
    used.table, next(counter := itertools.count())
    counted.calls = 7
    for one, other in (
        (Own(threading.Lock()), Own(threading.Lock())),
        (Own(itertools.count()), Own(counter)),
        (Lazy(), used),
        (Counting(1), counted),
        (random.random, random.random),
    ):
        before = identify(one)
        random.random()
        assert before == identify(other)
    assert identify(Counting(1)) != identify(Counting(2))
    circle: list = []
    circle.append(Own(circle))
    json.dumps(identify(circle))


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


def test_the_identity_of_many_objects_takes_work_in_proportion():
    """Of installed packages, repeated: each is told from the others of its type."""

    def calls(num: int) -> int:
        dates = [datetime.timedelta(days=i) for i in range(num)]
        counted = 0

        def count(frame: object, event: str, argument: object) -> None:
            nonlocal counted
            counted += event in ("call", "c_call")

        sys.setprofile(count)
        try:
            found = identify([dates, dates])
        finally:
            sys.setprofile(None)
        assert found[1] == [{"met": "timedelta"} | ({"number": i} if i else {}) for i in range(num)]
        return counted

    assert calls(400) <= 1.2 * 10 * calls(40)
