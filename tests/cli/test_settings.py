"""Settings files: what is read, what is refused, and that what an output folder holds can be run again."""

from __future__ import annotations

import inspect
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from support.judge_server import Script, reply, serving
from typer.testing import CliRunner

from bayeslm.cli import app
from bayeslm.cli.console import UsageError
from bayeslm.cli.engines import Run, makers, prepare
from bayeslm.cli.expressions import calls, evaluate
from bayeslm.cli.infer import infer as command
from bayeslm.cli.plain_yaml import MAX_BYTES, read_yaml, write_yaml
from bayeslm.cli.settings import NAMES, RunSettings, read_settings
from bayeslm.inference import training
from bayeslm.models import LanguageModel, TiltedLM
from bayeslm.posterior import Posterior

MODULES = {
    "my_rewards": "def target(completions, answer, **kwargs):\n"
    "    return [float(a in text) for text, a in zip(completions, answer)]\n"
}


def run(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == code, result.output + repr(result.exception)
    return result.output


def arrays(out: str, engine: str) -> dict[str, np.ndarray]:
    found = Posterior.load(f"{out}/{engine}")
    return found.samples | {"log_weights": found.log_weights, "log Z": found.log_evidence}


# -- again ---------------------------------------------------------------------------------------------------------

ENGINES = {
    "importance": "importance(num_particles=8, seed=5)",
    "svi": "svi(num_steps=2, num_particles=4, num_samples=8, optimizer=Adam(1e-3), callbacks=[KLTarget(2.0)])",
    "smc": "smc(num_particles=8, num_chains=1, proposal=twist, top_k=4, "
    "twist=TwistLearning(num_particles=16, num_steps=2))",
}


def test_an_output_folder_says_how_to_run_it_again(folder):
    """Engines that were added by a second command, with another seed, run again with the first, in one command."""
    Path("run.yaml").write_text(
        "prompts:\n- {prompt: a b, answer: c}\n- {prompt: d, answer: 'no'}\nprior: model\n"
        "reward: 2 * my_rewards:target - length(target=2)\nbeta: 2\nmax_new_tokens: 4\nout: first\n"
    )
    run("infer", "--config", "run.yaml", "--engine", ENGINES["importance"])
    run("infer", "--config", "run.yaml", "--engine", f"{ENGINES['svi']}, {ENGINES['smc']}", "--seed", "3")
    said = yaml.safe_load(Path("first/run.yaml").read_text())
    assert list(said["engines"]) == list(ENGINES)
    assert [x["seed"] for x in said["engines"].values()] == [5, 3, 3]
    assert "out" not in said
    run("infer", "--config", "first/run.yaml", "--out", "second")
    assert Path("second/run.yaml").read_text() == Path("first/run.yaml").read_text()
    for name in ENGINES:
        first, second = arrays("first", name), arrays("second", name)
        for key, value in first.items():
            np.testing.assert_array_equal(second[key], value, err_msg=f"{name}: {key}")
    assert "importance: already in first" in run("infer", "--config", "first/run.yaml", "--out", "first")


def test_the_prior_is_what_its_options_and_its_file_say(folder):
    """Texts of the run end at its stop strings and have its likeliest tokens alone; run.yaml repeats it."""
    options = ["--top-k", "2", "--top-p", "0.9", "--stop", "a", "--stop", "c d", "--max-new-tokens", "4"]
    run("infer", "b", "--prior", "model", "--reward", "length", "--engine", "exact", *options, "--out", "first")
    run("infer", "--config", "first/run.yaml", "--out", "second")
    first, second = Posterior.load("first/exact"), Posterior.load("second/exact")
    stops = {"top_k": 2, "top_p": 0.9, "stop": ["a", "c d"]}
    assert stops.items() <= yaml.safe_load(Path("second/run.yaml").read_text()).items()
    assert stops.items() <= second.stats["program"].items()
    distribution = LanguageModel.from_pretrained("model")(["b"], 4, top_k=2, top_p=0.9, stop=["a", "c d"])
    x = distribution.enumerate_support()
    expected = distribution.log_prob(x) + 10 * torch.as_tensor(first.rewards["reward"][0])
    np.testing.assert_allclose(first.log_joint[0], expected, atol=1e-4)
    np.testing.assert_array_equal(first.log_joint, second.log_joint)
    assert "top_p was 0.9 and is null" in run(
        *("infer", "b", "--prior", "model", "--reward", "length", "--engine", "exact", "--top-k", "2"),
        *("--stop", "a", "--stop", "c d", "--max-new-tokens", "4", "--out", "first"),
        code=1,
    )


def test_a_judge_is_a_reward_of_the_command_line(folder, monkeypatch):
    """Its verdicts are the rewards of the texts that it was asked about; run.yaml asks it again."""
    pytest.importorskip("openai")
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    script = Script(reply(lambda message: str(message.split(" --- ")[1].count("a"))))
    with serving(script) as address:
        reward = f"2 * judge(model=m, instruction='{{prompt}} --- {{completion}} --- 0 to 9', base_url='{address}', "
        reward += "scores=(0, 9), key_variable=None, cache='verdicts.sqlite') - length"
        call = ["infer", "b", "--prior", "model", "--reward", reward, "--max-new-tokens", "2", "--engine", "exact"]
        run(*call, "--out", "first")
        asked = len(script.requests)
        run("infer", "--config", "first/run.yaml", "--out", "second")
    first, second = Posterior.load("first/exact"), Posterior.load("second/exact")
    texts, lengths = first.texts["completion"], first.lengths["completion"]
    expected = [2.0 * text.count("a") - len(text.split()) for text in texts.reshape(-1)]
    np.testing.assert_allclose(first.rewards["reward"].reshape(-1), expected, err_msg=str(lengths))
    np.testing.assert_array_equal(first.log_joint, second.log_joint)
    assert len(script.requests) == asked > 0


def test_a_folder_keeps_the_engines_that_have_results(folder):
    """One that has failed may have other settings; what is written is what has run."""
    call = ["infer", "a", "--prior", "model", "--reward", "length", "--max-new-tokens", "2", "--out", "run"]
    run(*call, "--engine", "importance(num_particles=4)")
    run(*call, "--engine", "rejection(num_samples=2)", code=1)  # the length has no bound
    run(*call, "--engine", "bestofn(n=2, num_samples=2)")
    said = yaml.safe_load(Path("run/run.yaml").read_text())["engines"]
    assert {name: len(own) for name, own in said.items()} == {"importance": 2, "bestofn": 3}
    out = run(*call, "--engine", "importance(num_particles=5)", code=1)
    assert "importance: num_particles was 4 and is 5" in out


# -- names and precedence ------------------------------------------------------------------------------------------


def test_names_are_those_of_python_and_of_the_options():
    options = set(inspect.signature(command).parameters)
    assert set(NAMES) - {"engines"} <= options
    assert options - set(NAMES) == {"ctx", "prompt", "config", "engine"}
    python = {*inspect.signature(TiltedLM).parameters, *inspect.signature(LanguageModel.from_pretrained).parameters}
    assert set(NAMES) - python == {"prompts", "timeout", "engines", "seed", "out"}


BASES = {"Callback", "Divergence", "Identified", "Objective", "ParticleObjective", "StatefulLoss"}
MADE_BY_A_RUN = {"Checkpoints", "Estimate", "LogDensities", "Plan", "Reply", "Saved", "StepRecord", "Texts", "Training"}
MADE_BY_THE_CRITIC = {"TokenBaseline", "TokenDistribution"}


def test_every_setting_of_a_training_can_be_named():
    """Every class that is public, but for those that nobody sets."""
    classes = {name for name in training.__all__ if inspect.isclass(getattr(training, name))}
    assert classes - BASES - MADE_BY_A_RUN - MADE_BY_THE_CRITIC <= set(makers(Run()))


FILE = {
    "prompts": ["a"],
    "beta": 0.3,
    "engines": {"importance": None, "svi": {"num_steps": 5, "optimizer": "Adam(0.1)", "seed": 9}},
}
BOTH = {"importance": {}, "svi": {"num_steps": 5, "optimizer": "Adam(0.1)"}}
SEEDED = {"importance": {}, "svi": {**BOTH["svi"], "seed": 9}}


@pytest.mark.parametrize(
    ("options", "engines", "expected"),
    [
        ({}, [], {"beta": 0.3, "engines": SEEDED, "seed": 0}),
        ({"beta": 0.5, "prompts": ["b"]}, [], {"beta": 0.5, "prompts": ["b"], "engines": SEEDED}),
        ({"seed": 1}, ["svi"], {"engines": {"svi": BOTH["svi"]}, "seed": 1}),
        ({}, ["svi(num_steps=6), exact"], {"engines": {"svi": {**SEEDED["svi"], "num_steps": 6}, "exact": {}}}),
        ({"seed": 1}, ["importance(seed=2), svi"], {"engines": {"importance": {"seed": 2}, "svi": BOTH["svi"]}}),
        ({"seed": 1}, ["smc", "mcmc(thin=2)"], {"engines": {"smc": {}, "mcmc": {"thin": 2}}, "seed": 1}),
    ],
)
def test_options_take_the_place_of_a_files_settings(tmp_path, options, engines, expected):
    (tmp_path / "run.yaml").write_text(write_yaml(FILE))
    found = read_settings(tmp_path / "run.yaml", options, engines)
    for name, value in expected.items():
        assert getattr(found, name) == value
    assert read_settings(None, options, engines or ["exact"]).beta == options.get("beta", RunSettings.beta)


# -- what is refused ---------------------------------------------------------------------------------------------

BOMB = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True))
REFUSED = {
    "share of tokens": ("top_p: 1.5", "top_p must be a number in (0, 1] or None, got 1.5"),
    "strings": ("stop: [3]", "stop[0] must be a string, got 3"),
    "unknown": ("promts: [a]", "'promts' is unknown, did you mean 'prompts'? Allowed are prompts, prior, reward"),
    "range": ("beta: -1", "beta must be positive and finite, got -1"),
    "type": ("max_new_tokens: many", "max_new_tokens must be a positive whole number, got 'many'"),
    "not a number": ("beta: .nan", "beta must be positive and finite, got nan"),
    "none": ("beta:", "beta must be positive and finite, got None"),
    "prompts": ("prompts: 3", "prompts must be a string, a list or None, got 3"),
    "word": ("gradient_checkpointing: yes", "gradient_checkpointing must be True or False, got 'yes'"),
    "engines": ("engines: svi", "engines must be a mapping from each engine to its settings"),
    "no engines": ("engines: {}", "engines must hold one engine at least"),
    "list of engines": ("engines: [svi]", "engines must be a mapping from each engine to its settings"),
    "engine's settings": ("engines: {svi: 5}", "engines: svi must be a mapping of settings"),
    "engine": ("engines: {sv: }", "engines sv: 'sv' is unknown, did you mean 'svi'? Allowed names: exact, importance"),
    "setting": ("engines: {svi: {steps: 1}}", "svi has no setting 'steps', did you mean 'num_steps'? Its settings are"),
    "value": ("engines: {svi: {num_steps: 0}}", "engines svi: SVI: num_steps must be a positive whole number"),
    "object": ("engines: {svi: {optimizer: Adan(1)}}", "'Adan' is unknown, did you mean 'Adam'?"),
    "object's setting": ("engines: {svi: {optimizer: Adam(lr=1)}}", "Adam has no setting 'lr'"),
    "row": ("prompts: [a, {promt: b}]", """prompts, row 2 must be an object with a "prompt", and has 'promt'"""),
    "reward": ("reward: sentimental", "reward sentimental: 'sentimental' is unknown, did you mean 'sentiment'?"),
    "twice": ("beta: 1\nseed: 0\nbeta: 2", "line 3: key 'beta' is repeated"),
    "twice inside": ("engines:\n  svi: {seed: 1, seed: 1}", "line 2: key 'seed' is repeated"),
    "bomb": (BOMB, "is an anchor or alias"),
    "merge": ("engines: {svi: {<<: {seed: 1}}}", "svi has no setting '<<'"),
    "tag": ("prior: !!python/object/apply:os.system [touch ran]", "is not allowed: write plain values"),
    "plain tag": ("prompts: !!set {a}", "is not allowed: write plain values"),
    "list": ("- a", "must be a mapping of settings"),
    "empty": ("", "must be a mapping of settings"),
    "text": ("beta", "must be a mapping of settings"),
    "two": ("beta: 1\n---\nbeta: 2", "another document"),
    "cut": ("prompts: [a", "line 1"),
    "tab": ("beta:\t- 1\n\t2", "line"),
    "key": ("[a]: 1", "line 1: key"),
    "digits": (f"seed: {'9' * 5000}", "Exceeds the limit"),
    "huge": (f"seed: {'9' * 50}", "seed must be"),
    "deep": ("[" * 100_000, "nested too deeply"),
    "deeper": ("prompts: " + "{a: " * 5000, "nested too deeply"),
    "control": ("prior: a\0b", "is not valid YAML"),
}


PROMPT: dict[str, list[str]] = {"row": []}


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_is_refused_in_one_line(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text, says = REFUSED[name]
    Path("my.yaml").write_text(text)
    began = time.monotonic()
    lines = run("infer", *PROMPT.get(name, ["a"]), "--config", "my.yaml", code=1 + (name != "row")).splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("bayeslm: my.yaml")
    assert says in lines[0]
    assert not Path("ran").exists()
    assert time.monotonic() - began < 10


def test_files_that_are_none(tmp_path):
    large = tmp_path / "large.yaml"
    large.write_bytes(b"#" * (MAX_BYTES + 1))
    latin = tmp_path / "latin.yaml"
    latin.write_bytes(b"prior: \xe9\xff")
    for path, says in {
        tmp_path: "is a folder",
        tmp_path / "no": "does not exist",
        large: "16 MB",
        latin: "YAML",
    }.items():
        with pytest.raises(UsageError, match=says) as caught:
            read_settings(path, {}, [])
        assert str(path) in str(caught.value)


# -- words ---------------------------------------------------------------------------------------------------------

WORDS = ["1e-3", "yes", "no", "on", "~", "null", "1:30", "2024-01-01", ".inf", "<<", "=", "0x10", "1_0", "x: y", "# c"]
WORDS += [" a", "a\nb", "\x1b[2J", "\u2028", "é🙂", "- a", "[a", "{", "", "true", "'", '"', "007", "+5", ".5"]
WORDS += ["!a", "&a", "*a"]


def test_what_is_written_is_read(tmp_path):
    value = {word: [word, {"inner": word}] for word in WORDS} | {"numbers": [1, -1, 0.1, 1e-20, 1e300, True, None, []]}
    (tmp_path / "a.yaml").write_text(write_yaml(value))
    assert read_yaml(tmp_path / "a.yaml") == value
    (tmp_path / "b.yaml").write_text("a: [1e-3, 1E3, -.5, 5., yes, No, 1:30, 2024-01-01, 007, 0o7, .inf, ~, true]")
    strings = ["yes", "No", "1:30", "2024-01-01", "007", "0o7"]
    assert read_yaml(tmp_path / "b.yaml")["a"] == [1e-3, 1e3, -0.5, 5.0, *strings, np.inf, None, True]


# -- expressions ---------------------------------------------------------------------------------------------------


def test_calls_are_read_as_python_reads_them():
    text = (
        "svi(num_steps=-2, a=[1, (2.5,)], b={'c': None}, d=True, e='f(', g=word, h=Adam(1e-3, x=y), i=[Adam()]), exact"
    )
    own = {"num_steps": -2, "a": [1, [2.5]], "b": {"c": None}, "d": True, "e": "f(", "g": "word"}
    assert calls(text) == [("svi", own | {"h": "Adam(0.001, x=y)", "i": ["Adam()"]}), ("exact", {})]


@pytest.mark.parametrize(
    "entries", ["-1: 2, 3: 4", "**b", "'a': 1, **b", "'a': 1, -2: 3", "(1,): 2", "a(): 1", "[]: 1"]
)
@pytest.mark.parametrize("wrap", ["a(x={%s})", "a(x=[{%s}])", "a(x={'y': {%s}})"])
def test_no_entry_of_a_dictionary_is_left_out(entries, wrap):
    text = wrap % entries
    for read in (calls, lambda x: evaluate(x, {"a": dict})):
        with pytest.raises(ValueError, match="write each key as a text in quotes"):
            read(text)


@pytest.mark.parametrize("entries", ["'a': 1, 'a': 2", "a: 1, 'a': 2"])
def test_a_key_is_not_repeated(entries):
    for read in (calls, lambda x: evaluate(x, {"a": dict})):
        with pytest.raises(ValueError, match="the key 'a' is repeated"):
            read(f"a(x={{{entries}}})")


@pytest.mark.parametrize("key", ["1", "1.5", "None", "True"])
def test_keys_of_settings_are_texts_as_in_a_file(key, tmp_path):
    with pytest.raises(ValueError, match="is a key that is no text: write it in quotes"):
        calls(f"a(x={{{key}: 2}})")
    (tmp_path / "a.yaml").write_text(f"engines: {{a: {{x: {{{'null' if key == 'None' else key.lower()}: 2}}}}}}")
    with pytest.raises(UsageError, match="must be a text"):
        read_settings(tmp_path / "a.yaml", {}, [])
    assert calls("a(x={'1': 2, b: 3})") == [("a", {"x": {"1": 2, "b": 3}})]


HOSTILE = ["__import__('os').system('touch ran')", "open('ran', 'w')", "a.b()", "(lambda: 1)()", "f'{1}'", "a(**b)"]
HOSTILE += ["[x for x in y]", "a if b else c", "2 ** 9999999", "'a' * 10 ** 9", "a[0]", "a(*b)", "a(x=1, x=2)", "b'x'"]
HOSTILE += ["a; b", "a := 1", "(" * 9999, "-" * 9999 + "1", "x" * 99_999 + "()", "\0", "\ud800", "a)+(b", "...", "1j"]
HOSTILE += ["Adam(" * 90 + ")" * 90, "Adam(__import__('os'))", "Adam(**a)", "Adam(learning_rate=open('ran', 'w'))"]


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: repr(text[:20]))
def test_other_code_is_refused_and_never_run(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for operand in (None, int):
        with pytest.raises(ValueError, match=r".") as caught:
            evaluate(text, {"f": lambda: 1}, operand=operand)
        assert len(str(caught.value)) < 300
    with pytest.raises(ValueError, match=r".") as caught:
        prepare("svi", dict(calls(f"svi(optimizer={text})"))["svi"], Run(), "--engine")
    assert len(str(caught.value)) < 600
    assert not list(tmp_path.iterdir())
