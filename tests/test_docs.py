"""The code of README.md and of docs/: Python blocks run, and shell commands have the options that they are given."""

from __future__ import annotations

import ast
import re
import shlex
import tomllib
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import typer.core
from support.oracles import kl_to
from typer.testing import CliRunner

from bayeslm.cli import app, engines, expressions, inputs
from bayeslm.inference import Exact
from bayeslm.models import LanguageModel, TiltedLM

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path) -> list[str]:
    """The page's Python blocks."""
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def commands(page: Path) -> Iterator[list[str]]:
    """The words of each command of the page's other code, indented or fenced, without comments."""
    text = re.sub(r"^```python\n.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    code = re.findall(r"^ {4}(.*)$", text, flags=re.MULTILINE)
    code += "\n".join(re.findall(r"^```\w*\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)).splitlines()
    for line in "\n".join(code).replace("\\\n", " ").splitlines():
        if re.match(r"(\$ )?(bayeslm|make|pip|python) ", line):
            yield shlex.split(line.removeprefix("$ "), comments=True)


def run(page: Path) -> dict[str, object]:
    """Run a page's blocks from top to bottom in one namespace, as a reader does."""
    names: dict[str, object] = {}
    text = page.read_text(encoding="utf-8")
    for block in blocks(page):
        above = text[: text.index(block)].count("\n")  # so that `inspect` finds the source of the page's functions
        exec(compile("\n" * above + block, str(page), "exec"), names)
    return names


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """An empty working directory; pages draw figures."""
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)


def test_the_readme_has_python_and_commands():
    assert blocks(README)
    assert list(commands(README))


@pytest.mark.parametrize("page", [page for page in PAGES[1:] if blocks(page)], ids=lambda page: page.stem)
def test_a_page_runs_from_top_to_bottom(page, workplace):
    names = run(page)
    if page.stem == "training":
        exact = Exact().run(TiltedLM(names["lm"], names["letters"], 0.5, max_new_tokens=3), names["prompts"])
        for name in ("trained", "kept", "learned", "own", "further"):
            kl = kl_to(exact, names[name].policy or names["policy"], names["prompts"])
            assert (kl < 0.05).all(), (name, kl)
        assert np.isfinite(names["amortised"].stats["unseen_elbo"]).all()


def test_the_readme_runs_from_top_to_bottom(workplace, monkeypatch):
    """With a bigram table over the words of its strings for SmolLM2, which takes minutes."""
    strings = [node.value for block in blocks(README) for node in ast.walk(ast.parse(block)) if is_string(node)]
    words = sorted({word for string in strings for word in string.split()})

    def tiny(name: str, **settings: object) -> LanguageModel:
        assert name == "smollm2"
        return LanguageModel.tabular(["<eos>", *words], order=2, seed=0)

    monkeypatch.setattr(LanguageModel, "from_pretrained", tiny)
    run(README)


def is_string(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


@pytest.mark.long
def test_the_readme_runs_as_it_stands(workplace, smollm2):
    run(README)


@pytest.mark.parametrize("page", [page for page in PAGES if list(commands(page))], ids=lambda page: page.stem)
def test_commands_exist_and_have_their_options(page):
    for program, *words in commands(page):
        {"bayeslm": parse, "make": has_target, "pip": has_extras, "python": has_script}[program](words)


def parse(words: list[str]) -> None:
    """Parse a command line of `bayeslm` without running the command."""
    with mock.patch.object(typer.core.TyperCommand, "invoke", return_value=None):
        result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    for option, text in pairwise(words):
        if option == "--engine":
            for name, settings in expressions.calls(text):
                engines.prepare(name, settings, engines.Run(), option)
        if option == "--reward" and ":" not in text:
            inputs.load_reward(text)


def has_target(words: list[str]) -> None:
    for word in words:
        assert re.search(rf"^{word}:", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE), word


def has_extras(words: list[str]) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for names in re.findall(r"bayeslm\[(.*?)\]", " ".join(words)):
        assert set(names.split(",")) <= set(extras), names


def has_script(words: list[str]) -> None:
    assert (ROOT / words[0]).is_file(), words


@pytest.mark.parametrize("line", ["infer a --betas 1", "infers a", "infer a --beta many"])
def test_a_wrong_command_is_found(line):
    with pytest.raises(AssertionError, match="Usage: bayeslm"):
        parse(line.split())
