"""docs/architecture.md is true, and the check of imports finds what it must."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


@pytest.fixture
def rules(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "docs")
    return importlib.import_module("check_imports")


@pytest.mark.parametrize(
    ("file", "line", "problem"),
    [
        ("models/lm/network.py", "from bayeslm.inference import SVI", "bayeslm.models.lm imports up from"),
        ("inference/markov/moves.py", "from bayeslm.inference.training import loop", "imports sideways from"),
        ("inference/svi.py", "def f():\n    from bayeslm.models.lm import _hidden", "_hidden: not in the __all__ of"),
        ("inference/svi.py", "from bayeslm.models.lm.network import Net", "is an inner file of bayeslm.models.lm"),
        ("inference/svi.py", "from ..models.lm import Net", "import absolutely"),
        ("inference/svi.py", "from bayeslm.inference.smc import SMC", "import it relatively"),
        (
            "inference/training/loop.py",
            "import typing\nif typing.TYPE_CHECKING:\n    from .epochs import E",
            "a circle",
        ),
        (
            "inference/training/loop.py",
            "import importlib\nimportlib.import_module('bayeslm.inference.training.epochs')",
            "a circle",
        ),
        ("bayeslm/weights.py", "import torch", "the face imports torch"),
    ],
)
def test_a_forbidden_import_is_found(
    rules: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, line: str, problem: str
) -> None:
    for module, path in rules.modules().items():  # the packages of the project, with a few files
        if module in rules.FLOOR or path.stem in ("network", "moves", "svi", "smc", "loop", "epochs", "weights"):
            copy = tmp_path / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_text("")
    (tmp_path / "models/lm/__init__.py").write_text('from .network import Net\n\n__all__ = ["Net"]\n')
    (tmp_path / "inference/__init__.py").write_text('from .svi import SVI\n\n__all__ = ["SVI"]\n')
    (tmp_path / "inference/training/epochs.py").write_text("from .loop import Training\n")
    monkeypatch.setattr(rules, "ROOT", tmp_path)
    clear(rules)
    try:
        assert rules.violations() == []
        (tmp_path / file).write_text(f"{line}\n")
        clear(rules)
        found = rules.violations()
        assert any(f"{file}:" in each and problem in each for each in found), found
    finally:
        clear(rules)


def clear(rules: ModuleType) -> None:
    for function in (rules.modules, rules.tree, rules.room, rules.exports):
        function.cache_clear()


def test_the_project_keeps_the_rules(rules: ModuleType) -> None:
    assert rules.violations() == []


def test_class_names_are_unique(rules: ModuleType) -> None:
    places: dict[str, list[str]] = {}
    for module in rules.modules():
        for node in ast.walk(rules.tree(module)):
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name, []).append(f"{module}:{node.lineno}")
    assert {name: where for name, where in places.items() if len(where) > 1} == {}


def test_the_picture_is_up_to_date(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "docs")
    drawing = importlib.import_module("draw_architecture")
    assert drawing.PICTURE.read_text(encoding="utf-8") == drawing.picture()


def test_the_paths_of_the_page_are_those_of_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    calls = importlib.import_module("call_depth").count()
    for name, files, depth in (("ImportanceSampling.run", 36, 9), ("one step of SVI", 34, 15)):
        section = PAGE.split(f"{name}\n\n", 1)[1].split("\n## ")[0]
        listed = re.findall(r"^\| `([a-z_/]+\.py)` \|", section, re.MULTILINE)
        found = calls["a program written out", name]
        assert sorted(listed) == found.files
        assert len(found.files) <= files  # one of which is the network's own
        assert len(found.deepest) <= depth
