"""What people, models and files wrote reaches the terminal as text: no commands to it, no markup, nothing hidden."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import unicodedata
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.table import Table
from rich.text import Text
from support.models import tiny_llama
from support.toys import from_prior
from typer.testing import CliRunner

from bayeslm import DiagnosticsWarning, progress
from bayeslm.cli import app, console, inputs, tables, terminal_judge
from bayeslm.cli.console import PlainConsole, content, one_line_errors
from bayeslm.posterior import Posterior
from bayeslm.visible import visible

HOSTILE = {
    "title": "\x1b]0;owned\x07",
    "clipboard": "\x1b]52;c;aGk=\x1b\\",
    "link": "\x1b]8;;http://evil\x1b\\text\x1b]8;;\x1b\\",
    "clear": "\x1b[2J\x1b[H",
    "C1": "\x9b2J\x9d0;owned\x9c",
    "bidi": "abc\u202ecba\u2066x\u2069\u200f",
    "zero width": "a\u200bb\u200d\u2060\ufeffc\u00ad\U000e0041\U000e0101\u3164\u034f",
    "return": "good\rbad",
    "backspace": "good\b\b\b\bbad\x7f",
    "other controls": "\x00\x05\x0b\x0c\x0e\x85\u2028\u2029",
    "surrogate": "\ud83d",
    "markup": "[/b][bold red]x[/] [link=http://evil]y[/link] :smile: [v1]",
}
SHOWN = "é 你好\u3000🙂 e\u0301 عربي −β ‖\t[x]"


def assert_harmless(output: str) -> None:
    assert not [c for c in output if c != "\n" and unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")]


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_hidden_characters_are_escaped_and_the_text_is_not_lost(text: str) -> None:
    shown = visible(text)
    assert_harmless(shown)
    if "\\" not in text:
        assert shown.encode().decode("unicode_escape") == text
    assert visible(shown) == shown


def test_other_texts_are_shown_as_they_are() -> None:
    assert visible(SHOWN + "\n") == SHOWN + "\n"


def _print(out: PlainConsole, text: str) -> None:
    out.print(text, style="bold")


def _table(out: PlainConsole, text: str) -> None:
    table = Table(text, title=text, caption=text)
    table.add_row(text)
    table.add_row(content(text, "dim") + content(text))
    out.print(table)


def _text(out: PlainConsole, text: str) -> None:
    out.print(Text("a ") + Text(text.replace("\b", "").replace("\r", "")))


def _status(out: PlainConsole, text: str) -> None:
    with out.status(f"loading {text}"):
        pass
    out.print(out.status(text))


def _report(out: PlainConsole, text: str) -> None:
    posterior = from_prior(0)
    posterior.prompts = [text, *posterior.prompts[1:]]
    posterior.texts["completion"][:] = text
    tables.show({f"engine {text}": posterior}, out)


PRINTERS = [_print, _table, _text, _status, _report]


@pytest.mark.parametrize("write", PRINTERS)
def test_nothing_that_is_printed_is_obeyed(write: Callable[[PlainConsole, str], None]) -> None:
    for text in ["".join(HOSTILE.values())] if write is _report else HOSTILE.values():
        file = io.StringIO()
        write(PlainConsole(file=file, width=400, soft_wrap=True), text)
        assert_harmless(file.getvalue())
        flat = " ".join(file.getvalue().split())
        for word in re.findall(r"\[/b\]|\[v1\]|http://evil|owned|:smile:", text):
            assert word in flat


def test_errors_and_progress(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for text in HOSTILE.values():
        with pytest.raises(BaseException), one_line_errors():  # noqa: B017, PT011, of typer
            raise ValueError(f"no model {text}")
        with progress.track(text, 2) as step:
            step(1, {text: 1.0})
    assert_harmless(capsys.readouterr().err)


def test_the_judge_sees_escapes(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda: "1")
    for text in HOSTILE.values():
        assert terminal_judge.TerminalJudge()(text, text + " 1", text + "  1")
    assert_harmless(capsys.readouterr().out)


# -- the commands --------------------------------------------------------------------------------------------

REWARDS = "def letters(completions, **kwargs):\n    return [float(text.count('a')) for text in completions]\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a model and a reward."""
    tiny_llama(scale=1.0).save_pretrained(tmp_path / "model")
    (tmp_path / "my_terminal_rewards.py").write_text(REWARDS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


def run(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "400"})
    assert result.exit_code == code, result.output + repr(result.exception)
    return result.output


def test_paths_and_prompts_are_printed_as_they_are(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing dies after the run, and files keep the texts themselves."""
    for one in (console.out_console, console.err_console):
        monkeypatch.setattr(one, "_width", 400)
    out = "o[v1] [/b] \x1b[2J"
    settings = [
        "--reward",
        "my_terminal_rewards:letters",
        "--max-new-tokens",
        "2",
        "--engine",
        "importance(num_particles=8)",
    ]
    printed = run("infer", "a $b$ $", "--prior", "model", *settings, "--out", out)
    assert_harmless(printed)
    assert f"written to {visible(out)}:" in printed
    posterior = Posterior.load(folder / out / "importance")
    posterior.prompts = [HOSTILE["title"] + "[/b]"]
    posterior.texts["completion"][:] = HOSTILE["bidi"] + "[bold]"
    posterior.save(folder / "p" / "second[v1]")
    shown = run("show", "p")
    assert_harmless(shown)
    for text in (posterior.prompts[0], "second[v1]", HOSTILE["bidi"] + "[bold]"):
        assert visible(text) in shown
    header = json.loads((folder / "p" / "second[v1]" / "posterior.json").read_text())
    assert header["fields"]["prompts"] == posterior.prompts
    assert f"bayeslm: {visible(out)}/x" in run("show", f"{out}/x", code=1)


# -- whose code runs -----------------------------------------------------------------------------------------

EVIL = "import pathlib\npathlib.Path(__file__).with_suffix('.ran').touch()\n"
NAMES = ("vaderSentiment", "numpy", "torch", "peft", "rich", "typing_extensions", "json", "matplotlib", "typer")


@pytest.mark.parametrize("arguments", [["--help"], pytest.param(["show", "nothing"], marks=pytest.mark.long)])
def test_nothing_is_imported_from_the_working_folder(tmp_path: Path, arguments: list[str]) -> None:
    for name in NAMES:
        (tmp_path / f"{name}.py").write_text(EVIL)
    command = [sys.executable, "-m", "bayeslm", *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert arguments[-1] in done.stdout + done.stderr
    assert not list(tmp_path.glob("*.ran"))


def test_a_reward_of_the_working_folder_alone_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("vaderSentiment", "mine_alone"):
        (tmp_path / f"{name}.py").write_text(EVIL + REWARDS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", str(tmp_path))])
    before = list(sys.path)
    for module in [name for name in sys.modules if name.partition(".")[0] == "vaderSentiment"]:
        monkeypatch.delitem(sys.modules, module)
    from bayeslm.models.rewards import text_rewards

    text_rewards.vader.cache_clear()
    inputs.load_reward("sentiment")
    assert sys.path == before
    reward: Any = inputs.load_reward("mine_alone:letters")
    assert sys.path == [*before, str(tmp_path)]
    assert reward(["p"], ["aa"]).tolist() == [2.0]
    text_rewards.vader.cache_clear()
    for module in [name for name in sys.modules if name.partition(".")[0] == "vaderSentiment"]:
        monkeypatch.delitem(sys.modules, module)
    inputs.load_reward("sentiment")
    assert [path.name for path in tmp_path.glob("*.ran")] == ["mine_alone.ran"]


def test_a_warning_is_a_line_without_a_place_in_our_code(capsys):
    with one_line_errors():
        warnings.simplefilter("always")
        warnings.warn("read\nthis \x1b[2J", stacklevel=1)
        warnings.warn("and this", DiagnosticsWarning, stacklevel=1)
        warnings.warn("a library will change", FutureWarning, stacklevel=1)
        warnings.warn("divided by zero", RuntimeWarning, stacklevel=1)
    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == ["! read this \\x1b[2J", "! and this"]
    assert re.fullmatch(r"! divided by zero \(RuntimeWarning, .*test_terminal.py:\d+\)", lines[2])
    assert len(lines) == 3
