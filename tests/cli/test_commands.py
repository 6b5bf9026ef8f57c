"""Help, versions, completion, lists of engines and rewards; plain output in pipes; exit codes."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support.toys import from_prior
from typer.testing import CliRunner

from bayeslm.cli import app, completion
from bayeslm.cli.catalogue import entry
from bayeslm.cli.engines import Run, makers, prepare
from bayeslm.inference import ENGINES
from bayeslm.models.rewards import BUILT_IN
from bayeslm.version import __version__

BAYESLM = [sys.executable, "-m", "bayeslm"]
MODULES = {
    "my_rewards": """
import time

def slow(completions, **kwargs):
    time.sleep(60)

def never(completions, **kwargs):
    return [float("-inf")] * len(completions)
"""
}


def run(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == code, result.output + repr(result.exception)
    return result.output


# -- fast ----------------------------------------------------------------------------------------------------------

LIGHT = """
import os, sys
from bayeslm.cli import app
for arguments in (["--help"], ["--version"], *([name, "--help"] for name in sys.argv[1:]), ["nonsense"], []):
    try:
        app(arguments, prog_name="bayeslm")
    except SystemExit:
        pass
os.environ |= {"_BAYESLM_COMPLETE": "complete_bash", "COMP_CWORD": "3"}
os.environ["COMP_WORDS"] = "bayeslm infer --engine importance,s"
try:
    app(prog_name="bayeslm")
except SystemExit:
    pass
print("LOADED", *{"torch", "pyro", "transformers", "peft", "matplotlib", "yaml"} & set(sys.modules))
"""


def test_help_version_and_completion_import_no_torch():
    names = sorted(command.name or command.callback.__name__ for command in app.registered_commands)
    done = subprocess.run([sys.executable, "-c", LIGHT, *names], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1].split() == ["LOADED"]
    assert f"bayeslm {__version__}" in done.stdout.splitlines()
    assert [line for line in done.stdout.splitlines() if line in ("importance,smc", "importance,svi")]
    assert "\x1b" not in done.stdout + done.stderr


def test_completed_names_are_those_that_there_are():
    assert tuple(ENGINES) == completion.ENGINES
    assert tuple(BUILT_IN) == completion.REWARDS
    assert completion.complete_engine("") == list(ENGINES)
    assert completion.complete_engine("svi, ma") == []
    assert completion.complete_reward("sentiment + tox") == ["sentiment + toxicity"]


# -- lists -----------------------------------------------------------------------------------------------------------


def test_engines_and_rewards_are_listed_with_all_settings():
    listed = json.loads(run("engines", "--json"))
    assert [one["name"] for one in listed] == [*ENGINES, *makers(Run())]
    rewards = json.loads(run("rewards", "--json"))
    assert [one["name"] for one in rewards] == [*BUILT_IN, "Reward"]
    for one in (*listed, *rewards):
        assert one["description"]
        for setting in one["settings"]:
            assert setting["allowed"]
            assert setting["description"], (one["name"], setting["name"])
    printed = run("engines", "svi", "Adam", "ImportanceSampling").splitlines()
    assert [line.partition(":")[0] for line in printed if not line.startswith(" ")] == [
        "svi (SVI)",
        "Adam",
        "importance (ImportanceSampling)",
    ]
    assert "    num_steps = 200   [a positive whole number or a Budget]" in "\n".join(printed)
    assert "'svo' is unknown, did you mean 'svi'?" in run("engines", "svo", code=2)


@pytest.mark.parametrize("name", ENGINES)
def test_listed_defaults_are_the_engines(name):
    """Written into a settings file, they make the engine that no settings make."""
    listed = {x["name"]: x["default"] for x in entry(name, ENGINES[name])["settings"]} | {"seed": 7}
    assert prepare(name, listed, Run(7), "").identity() == prepare(name, {}, Run(7), "").identity()


# -- pipes and terminals -----------------------------------------------------------------------------------------


def in_a_terminal(*arguments: str, cwd: Path) -> str:
    """Return what a command writes to a terminal of 80 columns."""
    leader, follower = pty.openpty()
    env = {**os.environ, "COLUMNS": "80", "TERM": "xterm"}
    with subprocess.Popen([*BAYESLM, *arguments], stdout=follower, stderr=follower, cwd=cwd, env=env):
        os.close(follower)
        written = b""
        try:
            while part := os.read(leader, 65536):
                written += part
        except OSError:  # the end, on Linux
            pass
    os.close(leader)
    return written.decode()


def test_lines_are_whole_and_plain_in_a_pipe(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    posterior = from_prior(0)
    text = "word " * 60
    posterior.texts["completion"][:] = text
    posterior.save(tmp_path / "one")
    shown = run("show", str(tmp_path / "one"))
    assert "\x1b" not in shown
    assert any(text.strip() in line for line in shown.splitlines())


def test_help_is_plain_in_a_pipe_and_fits_a_terminal(tmp_path):
    piped = subprocess.run([*BAYESLM, "infer", "--help"], capture_output=True, text=True, check=True)
    assert not [c for c in piped.stdout if c in "\x1b─│╭"]
    assert max(map(len, piped.stdout.splitlines())) > 150
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", terminal := in_a_terminal("infer", "--help", cwd=tmp_path))
    assert shown != terminal
    assert max(map(len, shown.splitlines())) <= 80


@pytest.mark.long
def test_a_reader_may_close_the_pipe(tmp_path):
    from_prior(0).save(tmp_path / "one")
    script = f"set -o pipefail; {' '.join(BAYESLM)} show one | true"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode in (0, 1)  # 0 where all was written before the reader had gone
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("given", "policy"),
    [
        ({}, "passive"),
        ({"OMP_WAIT_POLICY": "active"}, "active"),
        ({"OMP_NUM_THREADS": "1"}, None),
    ],
)
def test_threads_wait_passively_unless_the_environment_says_otherwise(monkeypatch, given, policy):
    for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "")  # put back at the end
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    run("engines")
    assert os.environ.get("OMP_WAIT_POLICY") == policy


# -- exit codes ------------------------------------------------------------------------------------------------------


def code_of(*arguments: str, cwd: Path) -> tuple[int, str]:
    done = subprocess.run([*BAYESLM, *arguments], capture_output=True, text=True, check=False, cwd=cwd)
    assert "Traceback" not in done.stderr
    return done.returncode, done.stderr.strip()


@pytest.mark.parametrize(
    ("code", "arguments", "says"),
    [
        (0, ["--version"], ""),
        (1, ["show", "nowhere"], "bayeslm: nowhere"),
        (2, ["infer", "a", "--config", "none.yaml"], "bayeslm: none.yaml does not exist: give a settings file"),
    ],
)
def test_exit_codes(tmp_path, code, arguments, says):
    found, error = code_of(*arguments, cwd=tmp_path)
    assert found == code
    assert error.startswith(says)
    assert error.count("\n") == 0


LONG_CODES = [
    (0, ["--engine", "importance(num_particles=4)"], ""),
    (1, ["--prompts", "none.txt"], "bayeslm: none.txt does not exist: give a file of prompts"),
    (2, ["--engine", "importance(num_particles=0)"], "bayeslm: --engine importance: ImportanceSampling: num_particles"),
    (3, ["--reward", "my_rewards:never"], "bayeslm: "),
]


@pytest.mark.long
@pytest.mark.parametrize(("code", "arguments", "says"), LONG_CODES)
def test_exit_codes_of_runs(folder, code, arguments, says):
    prompts = [] if "--prompts" in arguments else ["a"]
    settings = ["--prior", "model", "--max-new-tokens", "2", "--reward", "length"]
    found, error = code_of("infer", *prompts, *settings, *arguments, cwd=folder)
    assert found == code, error
    assert says in error


class Interrupting:
    """Ctrl-C where a module is imported."""

    def __init__(self, module: str) -> None:
        self.module = module

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name == self.module:
            raise KeyboardInterrupt


@pytest.mark.parametrize("module", ["bayeslm.cli.settings", "bayeslm.cli.execution"])
def test_an_interruption_of_imports_is_130(module, monkeypatch):
    """Which take most of the seconds before a run."""
    monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setattr(sys, "meta_path", [Interrupting(module), *sys.meta_path])
    assert "bayeslm: interrupted: before there was a result" in run("infer", "a", code=130)


@pytest.mark.long
def test_an_interruption_of_a_run_is_130(folder):
    arguments = ["infer", "a", "--prior", "model", "--max-new-tokens", "2", "--reward", "my_rewards:slow"]
    with subprocess.Popen([*BAYESLM, *arguments], stderr=subprocess.PIPE, text=True, cwd=folder) as process:
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(30)
        process.send_signal(signal.SIGINT)
        error = process.communicate(timeout=60)[1]
    assert process.returncode == 130, error
    assert "Traceback" not in error
