"""Random arguments, runs, command lines and damaged folders: no native error, nothing silently wrong.

The suite tries a few, always the same. `make fuzz` tries others at each run, for about 20 minutes on one core, and says
how far it has come.
"""

from __future__ import annotations

import inspect
import json
import re
import shutil
import sys
import warnings
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.folders import USES, write_folders
from support.fuzzing import (
    LARGE,
    Progress,
    arguments_of,
    assert_clear,
    budget,
    lm,
    progress,
    public_classes,
    public_functions,
)
from typer.testing import CliRunner

from bayeslm import diagnostics
from bayeslm.cli import app
from bayeslm.inference import ENGINES, SVI, Laplace
from bayeslm.models import TiltedLM, rewards
from bayeslm.models.rewards import text_rewards

CALLED = {**public_classes(), **public_functions()}
RUN = {**ENGINES, "laplace": Laplace}


@pytest.fixture(autouse=True)
def _somewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(text_rewards, "sentence_embeddings", lambda texts: torch.zeros(len(texts), 384))


@pytest.fixture(autouse=True)
def _progress(request):
    """In `make fuzz`, say how far each test has come."""
    if not LARGE:
        yield
        return
    capture = request.config.pluginmanager.getplugin("capturemanager")

    def say(text: str) -> None:
        with capture.global_and_fixture_disabled():
            print(text, flush=True)

    token = progress.set(Progress(request.node.name, say))
    yield
    progress.get().end()
    progress.reset(token)


# -- calls -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CALLED)
def test_calls_refuse_by_name_or_return(name):
    """Of constructors, functions and methods."""
    called = CALLED[name]
    parameters = inspect.signature(called).parameters
    by_position = [name for name, p in parameters.items() if p.kind == p.POSITIONAL_ONLY]

    @budget(2, 300)
    @given(data=st.data())
    def check(data):
        arguments = data.draw(st.sampled_from([0.3, 0.05]).flatmap(lambda wrong: arguments_of(called, wrong)))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                called(*[arguments.pop(name) for name in by_position if name in arguments], **arguments)
        except Exception as error:
            assert_clear(error, list(parameters))

    check()


# -- runs ------------------------------------------------------------------------------------------------------


def tilted(prompts=("a", "b a")):
    TiltedLM(lm(), rewards.Length(), max_new_tokens=2)(list(prompts))


def constrained(prompts=("a", "b a")):
    TiltedLM(lm(), rewards.Constraint(lambda text: "a" not in text), max_new_tokens=2)(list(prompts))


def mixed(prompts=("a", "b a")):
    mood = pyro.sample("mood", dist.Normal(0.0, 1.0))
    with pyro.plate("prompts", len(prompts)):
        x = pyro.sample("completion", lm()(list(prompts), max_new_tokens=2))
        pyro.factor("reward", mood * (x == 1).sum(-1))


def continuous():
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(mu, 1.0), obs=torch.tensor(0.5))


@pytest.mark.parametrize("name", RUN)
def test_runs_give_a_finite_normalised_posterior_or_say_why_not(name):
    cls = RUN[name]
    names = list(inspect.signature(cls).parameters)

    @budget(2, 250)
    @given(settings=arguments_of(cls, 0.0), model=st.sampled_from([tilted, constrained, mixed, continuous]))
    def check(settings, model):
        small = {"progress": False, "seed": 1, "num_samples": 4, "warmup": 2, "num_steps": 2, "max_tree_depth": 2}
        settings = {name: x for name, x in small.items() if name in names} | settings
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                found = cls(**settings | {"progress": False} if "progress" in names else settings).run(model)
            except Exception as error:
                assert_clear(error, names)
                return
            table = diagnostics.summary(found)
        weights = found.weights()
        np.testing.assert_allclose(weights.sum((0, 1)), 1.0, rtol=1e-6)
        alive = np.broadcast_to(weights > 0, found.log_joint.shape)
        if name != "bestofn":  # which keeps the best of n, be it impossible
            assert np.isfinite(found.log_joint[alive]).all()
            assert all(np.isfinite(x[alive.all(-1)]).all() for x in found.samples.values())
        assert not any(np.isnan(x).any() or (x == np.inf).any() for x in found.samples.values())
        assert np.isnan(found.log_evidence).all() if found.kind == "markov" else np.isfinite(found.log_evidence).all()
        assert len(table) == len(found.prompts)

    check()


# -- command lines ---------------------------------------------------------------------------------------------

NUMBERS = ["-1", "0", "1", "2", "1e20", "100000000000000000000", "nan", "inf", "", "x"]
WORDS = ["", "x", "[/b]", "o[v1]", "\x1b[2J", "nowhere", ".", "model", "policy", "{", "[" * 5000, "a:b", "é"]
ENGINE_TEXTS = ["exact(max_atoms=9)", "imp", "importance,", "importance(", "(" * 5000, "smc()()", "smc, smc", "mcmc(1)"]
ENGINE_SETTINGS = ["importance(num_particles={})", "smc(num_particles=4, twist={})", "importance(guide={})"]
ENGINE_SETTINGS += ["mcmc(num_samples=2, warmup={})", "importance(num_particles=4, seed={})", "bestofn(n={})"]
VALUES = ["0", "2", "-1", "1e20", "None", "x", "''", "[1]", "Twist('twist')", "LanguageModel('policy')", "partial"]
VALUES += ["TwistLearning(num_particles=8, num_steps=1)", "Posterior('posterior')", "Adam()", "(" * 300, "lambda: 0"]
OPTIONS = {
    "--prompts": ["nowhere", ".", "empty.jsonl", "deep.jsonl", "binary.txt", "good.jsonl"],
    "--prior": ["model", "nowhere", ".", "posterior", "empty"],
    "--reward": ["length", "lenght", "nowhere:f", "os:getcwd", ":", "constraint", "matches", "-2 * length", "1 + 1"],
    "--config": ["nowhere", ".", "empty.jsonl", "deep.jsonl", "binary.txt", "good.jsonl", "good.yaml", "bad.yaml"],
    "--engine": [*ENGINE_TEXTS, *(text.format(x) for text in ENGINE_SETTINGS for x in VALUES)],
    "--device": ["cpu", "meta", "cuda:99", "tpu", ""],
    "--dtype": ["float32", "int8", ""],
    "--out": ["model", "good.jsonl", "good.jsonl/x", "\0"],
}
OPTIONS |= {f"--{name}": NUMBERS for name in ("beta", "temperature", "batch-size", "max-new-tokens", "seed")}
OPTIONS |= {f"--{name}": NUMBERS for name in ("subsample-size", "timeout")}
GIVEN = {"--prior": "model", "--reward": "length", "--max-new-tokens": "2", "--engine": "importance(num_particles=4)"}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A folder with a model, a posterior, a twist, adapters, and files of prompts."""
    folder = write_folders(tmp_path_factory.mktemp("files"))
    (folder / "empty").mkdir()
    (folder / "empty.jsonl").touch()
    (folder / "good.jsonl").write_text('{"prompt": "a", "answer": "b"}\n')
    (folder / "deep.jsonl").write_text("[" * 100_000)
    (folder / "binary.txt").write_bytes(bytes(range(256)))
    (folder / "good.yaml").write_text("prompts: [a]\nengines: {importance: {num_particles: 4}}\n")
    (folder / "bad.yaml").write_text("prompts: [a]\nengines: {importance: {num_particles: [}}\n")
    return folder


def command(*arguments: str) -> tuple[int, str]:
    """Run a command line; it must end in an exit code, and in a line that is no traceback."""
    path = list(sys.path)
    try:
        result = CliRunner().invoke(app, arguments)
    finally:
        sys.path[:] = path
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code in (0, 1, 2, 3), result.output
    assert "Traceback" not in result.output
    assert "Aborted" not in result.output
    assert "bayeslm: unexpected" not in result.output, result.output  # how an error is printed that nobody has foreseen
    return result.exit_code, result.output


def words_of(output: str) -> str:
    """The output without the frame and the line breaks that the terminal's width makes."""
    return re.sub(r"[\s│╭╮╰╯─]+", "", output)


@budget(12, 1500)
@given(
    prompts=st.lists(st.sampled_from(["a", "b c", *WORDS]), max_size=2),
    options=st.dictionaries(st.sampled_from(sorted(OPTIONS)), st.integers(0, 99), min_size=1, max_size=3),
)
def test_command_lines_end_in_one_line_that_names_the_option(files, monkeypatch, prompts, options):
    monkeypatch.chdir(files)
    chosen = {name: OPTIONS[name][i % len(OPTIONS[name])] for name, i in options.items()}
    line = [word for pair in (GIVEN | chosen).items() for word in pair]
    code, output = command("infer", *line, "--", *prompts)
    if code in (1, 2):
        said = words_of(output)
        things = [*(name.lstrip("-") for name in chosen), *chosen.values(), "prompts", "prompt"]
        named = [x for x in things if x and words_of(x.replace("-", "_"))[:20] in said.replace("-", "_")]
        assert named, f"{' '.join(line)}: {output}"


# -- damaged folders -------------------------------------------------------------------------------------------


def damage(path: Path, how: str, where: float) -> None:
    """Damage one file."""
    content = path.read_bytes()
    at = int(where * max(0, len(content) - 1))
    if how == "remove":
        path.unlink()
    elif how == "folder":
        path.unlink()
        path.mkdir()
    elif how == "cut":
        path.write_bytes(content[:at])
    elif how == "flip":
        path.write_bytes(content[:at] + bytes([content[at] ^ 0x41]) + content[at + 1 :] if content else b"x")
    elif how == "deep":
        path.write_text("[" * 100_000)
    elif how == "other":
        path.write_text('{"a": [1, null, "b"]}')
    elif path.suffix == ".json":  # one entry less, or of another type
        value = json.loads(content)
        holders = list(_mappings(value))
        holder = holders[int(where * (len(holders) - 1))]
        if holder:
            key = sorted(holder)[int(where * (len(holder) - 1))]
            if how == "entry":
                del holder[key]
            else:
                holder[key] = {"nan": float("nan"), "list": [None], "text": "x", "number": -1}[how]
        path.write_text(json.dumps(value))


def _mappings(value):
    if isinstance(value, dict):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _mappings(inner)


HOW = st.sampled_from(["remove", "folder", "cut", "flip", "deep", "other", "entry", "nan", "list", "text", "number"])
SHARE = st.floats(0, 1)


@pytest.mark.parametrize("name", USES)
def test_damaged_folders_end_in_one_line_that_names_the_file(name, files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    @budget(*{"posterior": (16, 2000)}.get(name, (3, 250)))
    @given(how=HOW, which=SHARE, where=SHARE)
    def check(how, which, where):
        for folder in USES:
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(files / folder, folder)
        paths = sorted(path for path in Path(name).rglob("*") if path.is_file())
        path = paths[int(which * (len(paths) - 1))]
        damage(path, how, where)
        code, output = command(*USES[name])
        if code:
            assert name in words_of(output), f"{path}, {how} at {where}: {output}"

    check()


def test_damaged_checkpoints_are_refused_or_passed_over(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = TiltedLM(lm(), rewards.Length(), max_new_tokens=2)
    engine = SVI(num_steps=2, num_particles=2, num_samples=2, checkpoint="whole", seed=0, progress=False)
    expected = engine.run(model, ["a"])

    @budget(5, 1000)
    @given(how=HOW, which=SHARE, where=SHARE)
    def check(how, which, where):
        shutil.rmtree("checkpoints", ignore_errors=True)
        shutil.copytree("whole", "checkpoints")
        paths = sorted(path for path in Path("checkpoints").rglob("*") if path.is_file() and path.parent.name[0] == "c")
        path = paths[int(which * (len(paths) - 1))]
        damage(path, how, where)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = SVI(**vars(engine) | {"checkpoint": "checkpoints"}).run(model, ["a"])
        except Exception as error:
            assert_clear(error, ["checkpoint", "checkpoints"])
        else:
            np.testing.assert_array_equal(found.log_joint, expected.log_joint)

    check()
