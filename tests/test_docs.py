"""The code of README.md and of docs/: Python blocks run, and shell commands have the options that they are given.

Pages with code cells are notebooks, which `make docs` runs when it builds the site.
"""

from __future__ import annotations

import ast
import importlib
import os
import re
import shlex
import sys
import tomllib
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import typer.core
from support.models import llama_network
from support.oracles import kl_to
from typer.testing import CliRunner

from bayeslm.cli import app, engines, expressions, inputs
from bayeslm.inference import Exact
from bayeslm.models import LanguageModel, TiltedLM
from bayeslm.models.lm import word_tokenizer

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DOCS = ROOT / "docs"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
NOTEBOOK = re.compile(r"\A---\nfile_format: mystnb\n")


def name_of(page: Path) -> str:
    """The page as pages name each other: without its ending."""
    return page.relative_to(DOCS if page.is_relative_to(DOCS) else ROOT).with_suffix("").as_posix()


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
    assert README.read_text(encoding="utf-8").count("\n") <= 130


class Logger(SimpleNamespace):
    """In the place of wandb and trackio, whose packages are not installed: records what is logged."""

    def __init__(self) -> None:
        self.logged: list[tuple[dict[str, float], int | None]] = []

    def init(self, project: str, mode: str = "online") -> None:
        assert project

    def log(self, figures: dict[str, float], step: int | None = None) -> None:
        self.logged.append((figures, step))

    def finish(self) -> None:
        pass


LONG = ("training",)  # 25 s


@pytest.mark.parametrize(
    "page",
    [pytest.param(x, id=name_of(x), marks=[pytest.mark.long] * (name_of(x) in LONG)) for x in PAGES[1:] if blocks(x)],
)
def test_a_page_runs_from_top_to_bottom(page, workplace, monkeypatch):
    loggers = {name: Logger() for name in ("wandb", "trackio")}
    for name, logger in loggers.items():
        monkeypatch.setitem(sys.modules, name, logger)
    names = run(page)
    if name_of(page) == "howto/logging":
        for logger in loggers.values():
            assert all(np.isfinite(figures["elbo"]) for figures, _ in logger.logged[1:])
            assert len(logger.logged) == 6  # before the first step, and after each of five
        assert [step for _, step in loggers["wandb"].logged] == list(range(6))
    if name_of(page) == "training":
        exact = Exact().run(TiltedLM(names["lm"], names["letters"], 0.5, max_new_tokens=3), names["prompts"])
        for name in ("trained", "kept", "learned", "own", "further"):
            kl = kl_to(exact, names[name].policy or names["policy"], names["prompts"])
            assert (kl < 0.05).all(), (name, kl)
        assert np.isfinite(names["amortised"].stats["unseen_elbo"]).all()


def test_the_readme_runs_from_top_to_bottom(workplace, monkeypatch):
    """With a random network over the words of its strings for SmolLM2, which takes minutes."""
    strings = [node.value for block in blocks(README) for node in ast.walk(ast.parse(block)) if is_string(node)]
    words = sorted({word for string in strings for word in string.split()})

    def tiny(name: str, **settings: object) -> LanguageModel:
        assert name == "smollm2"
        network = llama_network(vocab_size=len(words) + 1, max_position_embeddings=128)
        lm = LanguageModel(network, word_tokenizer(["<eos>", *words], "<eos>"))
        lm.tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
        return lm

    monkeypatch.setattr(LanguageModel, "from_pretrained", tiny)
    run(README)


def is_string(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


@pytest.mark.long
def test_the_readme_runs_as_it_stands(workplace, smollm2):
    run(README)


@pytest.mark.parametrize("page", [page for page in PAGES if list(commands(page))], ids=name_of)
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


def toctrees(page: Path) -> list[str]:
    """The pages that the page's tables of contents list, by name."""
    trees = re.findall(r"^```\{toctree\}\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    entries = [line for tree in trees for line in tree.splitlines() if line and not line.startswith(":")]
    return [os.path.normpath(Path(name_of(page)).parent / entry) for entry in entries]


def test_every_page_is_listed_once():
    """The reference, api/index, is written by the build."""
    listed = [entry for page in PAGES if page.is_relative_to(DOCS) for entry in toctrees(page)]
    pages = {name_of(page) for page in PAGES if page.is_relative_to(DOCS)} | {"api/index"}
    assert sorted(listed) == sorted(pages - {"index"})


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_to_files(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if not link.startswith(("https://", "http://", "#")):
            file = page.parent / link.split("#")[0]
            assert file.exists() or file.with_suffix(".md").exists() or "/api/" in link, link


@pytest.mark.parametrize("page", PAGES[1:], ids=name_of)
def test_a_block_is_run_once(page):
    """By this file, or in a notebook by the build."""
    text = page.read_text(encoding="utf-8")
    if NOTEBOOK.match(text):
        assert not blocks(page)
        cells = re.findall(r"^```\{code-cell\} ipython3\n(?:^:.*\n)*(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
        assert cells
        for cell in cells:
            ast.parse(cell)
    else:
        assert "{code-cell}" not in text or page.name == "CONTRIBUTING.md"


def test_the_reference_has_every_public_name(monkeypatch, tmp_path):
    pytest.importorskip("sphinx")
    monkeypatch.syspath_prepend(DOCS / "extensions")
    pages = importlib.import_module("api_pages")
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    homes = pages.homes()
    assert set(packages) - {"bayeslm.cli"} <= set(homes)
    pages.write(tmp_path)
    for package in set(packages) - {"bayeslm.cli"}:
        text = (tmp_path / f"{package}.rst").read_text(encoding="utf-8")
        for name in importlib.import_module(package).__all__:
            is_module = name in {"diagnostics", "rewards", "samplers"}
            assert name.startswith("__") or is_module or re.search(rf"\b{name}\b", text), name


@pytest.mark.parametrize(
    ("typed", "shown"),
    [
        ("the shape is (chain, draw, *batch, *event)", r"the shape is (chain, draw, \*batch, \*event)"),
        (r"KL(q || \pi^*) of `SVI`", r"KL(q \|\| π^\*) of `SVI`"),
        (r"a *fixed* one, \hat Z and ``**kwargs``", "a *fixed* one, Z\u0302 and ``**kwargs``"),
        ("    x_t ~ \\psi_t(x) | y", "    x_t ~ ψ_t(x) | y"),
    ],
)
def test_a_docstring_is_plain_text(typed, shown, monkeypatch):
    pytest.importorskip("sphinx")  # of the extra docs, which `make docs` installs
    monkeypatch.syspath_prepend(DOCS / "extensions")
    docstrings = importlib.import_module("plain_docstrings")
    lines = docstrings.as_restructured_text(["First.", "", typed])
    assert lines == ["First.", "", *(["::", ""] if typed.startswith(" ") else []), shown]
