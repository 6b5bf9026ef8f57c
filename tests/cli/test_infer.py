"""`bayeslm infer` and `bayeslm show`, on a tiny model in a temporary folder."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from support.models import tiny_llama
from typer.testing import CliRunner

from bayeslm.checksums import write_checksums
from bayeslm.cli import app, resume
from bayeslm.models import LanguageModel
from bayeslm.models.lm import compiled, read_tensors, write_tensors
from bayeslm.posterior import Posterior

REWARDS = """
calls = 0

def letters(completions, **kwargs):
    return [float(text.count("a")) for text in completions]

def target(completions, answer, **kwargs):
    return [float(a in text) for text, a in zip(completions, answer)]

def broken(completions, **kwargs):
    return [float("nan") for _ in completions]

def hopeless(completions, **kwargs):
    return [float("-inf") for _ in completions]

def breaks_later(completions, **kwargs):
    global calls
    calls += 1
    if calls > 4:
        raise RuntimeError("the judge went home")
    return [0.1 * len(text) for text in completions]

def hangs(completions, **kwargs):
    while True:
        pass

def interrupts(completions, **kwargs):
    global calls
    calls += 1
    if calls > 4:
        raise KeyboardInterrupt
    return [0.1 * len(text) for text in completions]
"""


@pytest.fixture
def folder(saved_model, tmp_path, monkeypatch) -> Path:
    """A working directory with a model and a module of rewards."""
    shutil.copytree(saved_model, tmp_path / "model")
    (tmp_path / "my_rewards.py").write_text(REWARDS)
    enter(tmp_path, monkeypatch)
    return tmp_path


def enter(folder: Path, monkeypatch) -> None:
    """Work there, with its own modules."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    sys.modules.pop("my_rewards", None)
    sys.modules.pop("helpers", None)


def run(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == code, result.output + repr(result.exception)
    return result.output


def infer(*arguments: str, code: int = 0) -> str:
    settings = {"--prior": "model", "--reward": "my_rewards:letters", "--beta": "0.5", "--max-new-tokens": "4"}
    missing = (word for pair in settings.items() if pair[0] not in arguments for word in pair)
    return run("infer", *arguments, *missing, code=code)


def test_particles_and_chains(folder, pictures):
    engines = ["--engine", "exact, smc(num_particles=40, num_chains=4, twist=partial, proposal=twist, top_k=3)"]
    engines += ["--engine", "annealed(num_particles=40)", "--engine", "mcmc(num_samples=20, num_chains=4, warmup=10)"]
    out = infer("a b", "c", *engines, "--out", "run")
    for word in ("exact", "smc", "annealed", "mcmc"):
        assert word in out
    exact = Posterior.load("run/exact")
    smc, annealed, mcmc = (Posterior.load(f"run/{name}") for name in ("smc", "annealed", "mcmc"))
    assert smc.log_weights.shape == annealed.log_weights.shape == (4, 40, 2)
    assert mcmc.log_weights.shape == (4, 20, 2)
    for posterior in (smc, annealed):
        gap = abs(posterior.log_evidence - exact.log_evidence) / posterior.log_evidence_stderr
        assert (gap < 5).all()
    assert "annealed" in run("show", "run")


QUICK = "num_particles=64, num_steps=10"


@pytest.mark.parametrize("learning", [f"TwistLearning({QUICK})", f"TwistLearning({QUICK}, reads_reward=True)"])
def test_a_twist_is_learned_kept_and_used_again(folder, learning):
    def smc(twist: str) -> list[str]:
        return ["a b", "--engine", f"smc(num_particles=20, proposal=twist, top_k=4, twist={twist})"]

    infer(*smc(learning), "--out", "one")
    infer(*smc("Twist('one/smc-twist')"), "--out", "two")
    one, two = (Posterior.load(f"{name}/smc") for name in ("one", "two"))
    assert (one.samples["completion"] == two.samples["completion"]).all()
    assert "nowhere" in infer(*smc("Twist('nowhere')"), code=1)
    assert "has no setting 'twist'" in infer("a b", "--engine", "importance(twist=partial)", code=2)
    assert "needs a twist" in infer(*smc("None"), code=2)
    assert "cannot score unfinished texts" in infer("a b", "--engine", "smc(twist=prefix)", code=1)


def test_infer_compares_engines_and_show_repeats_it(folder, pictures):
    out = infer(
        "a b", "c", *["--engine", "exact", "--engine", "importance", "--engine", "svi(num_steps=3)", "--out", "run"]
    )
    for word in ("exact", "importance", "svi: policy", "svi: weighted", "log Z", "written to run"):
        assert word in out
    assert {p.name for p in Path("run").iterdir()} == {
        ".lock",
        "call.json",
        "tables.txt",
        "summary.csv",
        "run.yaml",
        "exact",
        "importance",
        "svi",
        "rewards.png",
        "training.png",
    }
    posterior = Posterior.load("run/svi")
    assert posterior.prompts == ["a b", "c"]
    again = LanguageModel.from_pretrained(posterior.policy_path)
    assert again(["a b"], max_new_tokens=2).support_size == 57
    assert "svi: policy" in run("show", "run")
    assert "importance" in run("show", "run/importance")


def test_a_seed_reproduces_the_run(folder):
    for seed in ("7", "7", "8"):
        infer(
            "a",
            "--engine",
            "importance(num_particles=30)",
            "--seed",
            seed,
            "--out",
            f"run{len(list(Path().glob('run*')))}",
        )
    first, same, other = (Posterior.load(f"run{i}/importance").samples["completion"] for i in range(3))
    assert (first == same).all()
    assert (first != other).any()


def test_a_file_of_prompts_with_columns(folder):
    rows = [{"prompt": "a b", "answer": "c"}, {"prompt": "d", "answer": "e"}]
    Path("prompts.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    Path("prompts.txt").write_text("a b\n\nd\n")
    infer("--prompts", "prompts.jsonl", "--reward", "my_rewards:target", "--out", "json")
    assert Posterior.load("json/importance").prompts == ["a b", "d"]
    infer("--prompts", "prompts.txt", "--out", "plain")
    assert Posterior.load("plain/importance").prompts == ["a b", "d"]
    Path("bad.jsonl").write_text('{"prompt": "a"}\n\n{"text": "b"}')
    assert "line 3" in infer("--prompts", "bad.jsonl", code=1)
    Path("prompts.CSV").write_text("answer,prompt\nc,a b\ne,d\n", encoding="utf-8-sig")
    infer("--prompts", "prompts.CSV", "--reward", "my_rewards:target", "--out", "csv")
    found, expected = (Posterior.load(f"{name}/importance") for name in ("csv", "json"))
    assert found.prompts == expected.prompts
    assert (found.log_weights == expected.log_weights).all()
    for name in ("prompts", "completions", "self"):
        Path("taken.csv").write_text(f"prompt,{name}\na,b\n")
        assert f"a column is called '{name}'" in " ".join(infer("--prompts", "taken.csv", code=1).split())


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["a", "--engine", "importanc"], 2, "--engine importanc: 'importanc' is unknown, did you mean 'importance'?"),
        (["a", "--engine", "importance("], 2, "--engine: 'importance(' is not written as in Python"),
        (["a", "--engine", "svi, svi(seed=1)"], 2, "--engine: svi is repeated"),
        (
            ["a", "--engine", "svi(num_stps=1)"],
            2,
            "svi has no setting 'num_stps', did you mean 'num_steps'?",
        ),
        (["a", "--engine", "svi(optimizer=Adm(1e-3))"], 2, "'Adm' is unknown, did you mean 'Adam'?"),
        (
            ["a", "--engine", "svi(optimizer=Adam(0))"],
            2,
            "Adam: learning_rate must be positive and finite",
        ),
        (["a", "--engine", "svi(num_steps='x')"], 2, "--engine svi: SVI: num_steps must be"),
        (["a", "--engine", "importance(num_particles=0)"], 2, "num_particles must be a positive whole number, got 0"),
        (["a", "--engine", "importance(guide=LanguageModel('no'))"], 1, "no is not a folder with a policy"),
        (["a", "--reward", "sentimnt"], 2, "'sentimnt' is unknown, did you mean 'sentiment'?"),
        (["a", "--reward", "my_rewards:leters"], 2, "did you mean 'letters'"),
        (["a", "--reward", "contains"], 2, "--reward contains: reward 'contains' needs the settings phrase"),
        (["a", "--reward", "length(targt=1)"], 2, "'targt', did you mean 'target'?"),
        (["a", "--reward", "length(target='a')"], 2, "--reward length(target='a'): Length: target must"),
        (["a", "--reward", "length / 2"], 2, "--reward length / 2: 'length / 2' is not understood"),
        (["a", "--reward", "2"], 2, "--reward 2: it is no reward"),
        (["a", "--reward", "my_rewards:hangs", "--timeout", "0.2"], 1, "'hangs' reached its time limit of 0.2 s"),
        (["a", "--timeout", "0"], 2, "--timeout must be positive and finite or None, got 0"),
        (["a\udc80"], 1, "prompts, row 1: the prompt holds the lone surrogate"),
        (["--prompts", "."], 1, ". is a folder"),
        (["--prompts", "none.txt"], 1, "none.txt does not exist: give a file of prompts"),
        (["a", "--prompts", "none.txt"], 2, "give prompts either on the command line or by --prompts"),
        (["a", "--prior", "smolm2"], 1, "did you mean 'smollm2'"),
        (["a", "--beta", "0"], 2, "--beta must be positive"),
        (["a", "--beta", "nan"], 2, "--beta must be positive"),
        (
            ["a", "--dtype", "float8"],
            2,
            "Invalid value for '--dtype': Value error, 'float8' is not one of 'float32', 'bfloat16', 'float16'",
        ),
        (["a", "--subsample-size", "0"], 2, "--subsample-size must be"),
        (["a", "--engine", "exact", "--subsample-size", "1"], 2, "exact takes all prompts at once"),
        ([], 2, "no prompts"),
        (["a " * 70], 1, "prompts[0] has 70 tokens"),
        (["a", "--reward", "my_rewards:broken"], 1, "nan"),
        (["a", "--reward", "my_rewards:hopeless"], 3, "the posterior does not exist"),
        (["a", "--engine", "rejection"], 1, "upper bound"),
        (["a", "--max-new-tokens", "12", "--engine", "exact"], 1, "are more than max_atoms"),
        (["--no-such-option"], 2, "No such option"),
    ],
    ids=lambda x: " ".join(x)[:40] if isinstance(x, list) else None,
)
def test_mistakes_are_one_clear_line(folder, arguments, code, says):
    out = infer(*arguments, code=code)
    assert says in " ".join(out.split()), out
    assert "Traceback" not in out


def test_results_are_never_overwritten(folder):
    Path("run").mkdir()
    Path("run/mine.txt").write_text("precious")
    assert "exists and is not empty" in " ".join(infer("a", "--out", "run", code=1).split())
    assert [p.name for p in Path("run").iterdir()] == ["mine.txt"]


def test_an_error_in_mid_training_keeps_the_policy(folder):
    out = " ".join(infer("a", "--engine", "svi", "--reward", "my_rewards:breaks_later", "--out", "run", code=1).split())
    assert "the judge went home" in out
    assert "SVI stopped at step" in out
    kept = LanguageModel.from_pretrained("run/svi-policy-so-far")
    assert kept(["a"], max_new_tokens=2).support_size == 57


def test_ctrl_c_in_training_ends_it_and_keeps_the_policy(folder, pictures):
    """Interrupted in the third step; the posterior's draws are of the policy trained in two steps."""
    Path("my_rewards.py").write_text(REWARDS.replace("calls > 4", "calls == 4"))
    out = infer(
        "a",
        *[
            "--engine",
            "svi(objective=ReverseKL(), num_samples=8)",
            "--reward",
            "my_rewards:interrupts",
            "--out",
            "run",
        ],
        code=130,
    )
    assert "was interrupted" in out
    posterior = Posterior.load("run/svi")
    assert posterior.stats["interrupted"]
    assert posterior.stats["steps"] == 2
    assert posterior.policy_path is not None


def test_training_in_minibatches_at_a_target_of_the_kl(folder):
    (folder / "prompts.txt").write_text("a\nb\nc\nd\ne\n")
    training = ["--engine", "svi(num_steps=12, num_samples=8, callbacks=[KLTarget(9.0)])", "--subsample-size", "2"]
    infer("--prompts", "prompts.txt", *training, "--dtype", "bfloat16", "--out", "run")
    posterior = Posterior.load("run/svi")
    assert posterior.samples["completion"].shape == (1, 8, 5, 4)
    assert posterior.stats["prompts"].shape == (1, 12, 2)
    assert posterior.stats["inverse_temperature"][0, -1] == pytest.approx(
        0.98**-11
    )  # the limit of the change in 11 steps
    assert LanguageModel.from_pretrained("run/svi/policy").network.dtype == torch.bfloat16  # as it was trained


def test_a_failed_training_resumes_from_its_checkpoint(folder):
    """After a reward that raised once; the policy is that of an uninterrupted run."""
    settings = "num_steps=16, num_samples=8, objective=LogVariance(8, Replay())"
    logged = f"svi({settings}, checkpoint=Checkpointing('kept', every=5), callbacks=[TensorBoard('curves')])"
    # in step 12: the reward is called at the inspection and at every fourth step
    Path("my_rewards.py").write_text(REWARDS.replace("calls > 4", "calls == 5"))
    call = ["a", "--reward", "my_rewards:breaks_later", "--engine"]
    assert "the last checkpoint is" in " ".join(infer(*call, logged, "--out", "again", code=1).split())
    infer(*call, logged, "--out", "again")
    infer(*call, f"svi({settings})", "--out", "anew")
    again, anew = (Posterior.load(f"{name}/svi") for name in ("again", "anew"))
    assert (again.samples["completion"] == anew.samples["completion"]).all()
    assert list(Path("curves").glob("events*"))


# -- the same command again -------------------------------------------------------------------------------------


def stamps(folder: str) -> dict[str, int]:
    return {path.parent.name: path.stat().st_mtime_ns for path in Path(folder).glob("*/posterior.json")}


def test_a_repeated_command_runs_the_engines_that_have_no_result(folder):
    call = ["a", "b", "--out", "run"]
    svi = "svi(num_samples=8, num_steps=4)"
    infer(*call, "--engine", "importance")
    before = stamps("run")
    out = infer(*call, "--engine", f"importance, {svi}")
    assert "importance: already in run" in out
    assert "svi: already in" not in out
    assert {**stamps("run"), "svi": 0} == {**before, "svi": 0}
    both = infer(*call, "--engine", svi, "--engine", "importance")
    assert "svi: already in run" in both
    for other, says in {
        ("--beta", "0.7"): "beta was",
        ("--reward", "length"): "reward was",
        ("--seed", "3"): "importance: seed was",
        ("--engine", "svi(num_steps=5)"): "svi: num_steps was",
    }.items():
        out = " ".join(infer(*call, *other, code=1).split())
        assert "run holds results of other settings" in out
        assert says in out
    assert "prompts was" in " ".join(infer("a", "--out", "run", code=1).split())


def test_a_command_without_results_does_not_occupy_its_folder(folder):
    infer("a", "--reward", "my_rewards:broken", "--out", "run", code=1)
    infer("a", "--out", "run")
    assert Posterior.load("run/importance").prompts == ["a"]


HELPED = """
import helpers

WORDS = ["a"]

def helped(completions, **kwargs):
    return [float(sum(text.count(word) for word in WORDS)) + helpers.bonus(text) for text in completions]
"""


def edit(path: str, old: str, new: str) -> None:
    text = Path(path).read_text()
    assert old in text
    written = Path(path).stat().st_mtime
    Path(path).write_text(text.replace(old, new))
    os.utime(path, (written + 10, written + 10))  # of the same size in the same second, its byte code is used again


OTHER_CALLS = {
    "beta was": lambda: ["--beta", "0.6"],
    "seed was": lambda: ["--seed", "1"],
    "reward's code": lambda: edit("my_rewards.py", "text.count(word)", "2 * text.count(word)"),
    "reward's code: function: uses: WORDS was": lambda: edit("my_rewards.py", 'WORDS = ["a"]', 'WORDS = ["b"]'),
    "bonus: code": lambda: edit("helpers.py", "0.1 *", "0.2 *"),
    "prior's content: network: weights was": lambda: tiny_llama(seed=5).save_pretrained("model"),
    "prior's content: eos_token_ids was": lambda: edit(
        "model/generation_config.json", '"eos_token_id": 0', '"eos_token_id": 1'
    ),
    "prompts was": lambda: Path("prompts.txt").write_text("a b\n"),
    "version was": list,
}


CALL = [
    "--prompts",
    "prompts.txt",
    "--reward",
    "my_rewards:helped",
    "--engine",
    "importance(num_particles=8)",
    "--out",
    "run",
]


@pytest.fixture(scope="module")
def begun(tmp_path_factory) -> Path:
    """A working directory with the results of `CALL`."""
    folder = tmp_path_factory.mktemp("begun")
    tiny_llama(scale=1.0).save_pretrained(folder / "model")
    (folder / "my_rewards.py").write_text(HELPED)
    (folder / "helpers.py").write_text("def bonus(text):\n    return 0.1 * len(text)\n")
    (folder / "prompts.txt").write_text("a\n")
    with pytest.MonkeyPatch.context() as patched:
        enter(folder, patched)
        infer(*CALL)
    return folder


@pytest.mark.parametrize("says", OTHER_CALLS)
def test_results_of_another_call_are_refused_with_what_differs(begun, tmp_path, monkeypatch, says):
    shutil.copytree(begun, tmp_path, dirs_exist_ok=True)
    enter(tmp_path, monkeypatch)
    before = stamps("run")
    more = OTHER_CALLS[says]()
    if says == "version was":
        monkeypatch.setattr(resume, "__version__", "9")
    out = " ".join(infer(*CALL, *(more if isinstance(more, list) else []), "--engine", "smc", code=1).split())
    assert "run holds results of other settings" in out
    assert says in out
    assert stamps("run") == before


@pytest.mark.parametrize("content", ["policy", pytest.param("twist", marks=pytest.mark.long)])
def test_other_weights_in_a_folder_that_is_given(folder, content):
    if content == "twist":
        engine = "smc(num_particles=8, proposal=twist, top_k=2, twist={})"
        infer("a", "--engine", engine.format("TwistLearning()"), "--out", "made")
        given = "made/smc-twist"
        engine = engine.format(f"Twist('{given}')")
    else:
        LanguageModel.from_pretrained("model").save_pretrained(given := "made")
        engine = f"importance(num_particles=8, guide=LanguageModel('{given}'))"
    call = ["a", "--engine", engine, "--out", "run"]
    infer(*call)
    assert "already in run" in infer(*call)
    if content == "twist":
        change_weights(Path(given))
    else:
        tiny_llama(seed=5).save_pretrained("made")
    changed = "smc: twist" if content == "twist" else "importance: guide"
    assert changed in " ".join(infer(*call, code=1).split())


def change_weights(twist: Path) -> None:
    tensors = read_tensors(twist / "twist.safetensors")
    write_tensors(twist / "twist.safetensors", {name: x if name == "probe" else 2 * x for name, x in tensors.items()})
    write_checksums(twist)


def test_a_result_of_another_call_in_its_place_is_refused(folder):
    """Folders that are whole, but exchanged: between engines, and between calls."""
    for out, beta in (("one", "0.5"), ("two", "0.7")):
        infer("a", "--engine", "importance, smc", "--beta", beta, "--out", out)
    for source in ("two/importance", "one/smc"):
        shutil.rmtree("one/importance")
        shutil.copytree(source, "one/importance")
        out = " ".join(infer("a", "--engine", "importance", "--out", "one", code=1).split())
        assert "one/importance is not a result of importance in this call" in out
    assert "one/importance: left out, a copy or a result of another call" in " ".join(run("show", "one").split())
    edit("one/call.json", '"beta": 0.5', '"beta": 0.7')
    assert "one/call.json is damaged" in " ".join(infer("a", "--beta", "0.7", "--out", "one", code=1).split())


def test_one_command_at_a_time_writes_to_a_folder(folder):
    """The second says at once that the first holds it, and has touched nothing."""
    infer("a", "--out", "run")
    with resume.Results(Path("run")):
        before = {path: path.stat().st_mtime_ns for path in Path("run").rglob("*")}
        for call in (["a"], ["b"]):  # the same call, and another
            out = " ".join(infer(*call, "--prior", "no-such-model", "--out", "run", code=1).split())
            assert "run is written by another command: wait for its end, or choose another --out" in out
        assert {path: path.stat().st_mtime_ns for path in Path("run").rglob("*")} == before
    assert "already in run" in infer("a", "--out", "run")


@pytest.mark.parametrize(
    ("name", "code", "engine"),
    [
        ("SIGTERM", 143, "svi(num_steps=6, objective=ReverseKL(), num_samples=8)"),
        ("SIGHUP", 129, "importance(num_particles=6, batch_size=2)"),
    ],
)
def test_a_signal_that_asks_for_the_end_keeps_what_ctrl_c_keeps(name, code, engine, folder):
    """And the handlers of the caller are put back; one that ignores a signal keeps ignoring it."""
    number = getattr(signal, name)
    ends = REWARDS.replace("calls > 4", "calls == 4")
    ends = ends.replace("raise KeyboardInterrupt", f"__import__('signal').raise_signal({int(number)})")
    Path("my_rewards.py").write_text(ends)
    command = ["a", "--engine", engine, "--reward", "my_rewards:interrupts", "--out", "run"]
    ours = signal.signal(number, signal.SIG_DFL)  # these tests may have been started by nohup, which ignores one
    before = signal.getsignal(number)
    assert "was interrupted" in infer(*command, code=code)
    place = f"run/{engine.partition('(')[0]}"
    posterior = Posterior.load(place)
    assert posterior.stats["interrupted"]
    assert posterior.samples["completion"].size > 0
    assert signal.getsignal(number) == before
    signal.signal(number, signal.SIG_IGN)
    try:
        sys.modules.pop("my_rewards")
        infer(*command)  # from the start, and to its end
    finally:
        signal.signal(number, ours)
    assert not Posterior.load(place).stats.get("interrupted")


@pytest.mark.parametrize("what", ["out", "new out", "checkpoint", "export", "report"])
def test_a_read_only_folder_is_one_line_before_the_work(what, folder, monkeypatch):
    """The system of these tests may run as root, who may write everywhere but on a read-only disk."""
    Path("fixed").mkdir()
    denied = folder / "fixed"
    real = os.access

    def access(path, *arguments, **more) -> bool:
        return not Path(path).is_relative_to(denied) and real(path, *arguments, **more)

    monkeypatch.setattr(os, "access", access)
    svi = "svi(num_steps=2, num_samples=8, checkpoint='fixed')"
    broken = ["a", "--reward", "my_rewards:broken"]  # which no engine survives: nothing has run
    command = {
        "out": ["infer", *broken, "--prior", "model", "--out", "fixed"],
        "new out": ["infer", *broken, "--prior", "model", "--out", "fixed/new/run"],
        "checkpoint": ["infer", "a", "--reward", "my_rewards:letters", "--prior", "model", "--engine", svi],
        "export": ["export", "model", "fixed/exported"],
        "report": ["report", "model", "--output", "fixed/report.html"],
    }[what]
    output = run(*command, code=1)
    assert re.search(r"bayeslm: \S*fixed\S* could not be written: \S*fixed is read-only for you", output), output
    assert {path.name for path in denied.rglob("*")} <= {".lock"}


def test_after_ctrl_c_the_repeated_command_resumes(folder):
    """From its checkpoint; the interrupted result stays until the engine has finished."""
    svi = "svi(objective=ReverseKL(), num_steps=6, num_samples=8{})"
    Path("my_rewards.py").write_text(REWARDS.replace("calls > 4", "calls == 4"))
    call = ["a", "--reward", "my_rewards:interrupts", "--engine"]
    resumed = [*call, svi.format(", checkpoint=Checkpointing('kept', minutes=2)")]
    infer(*resumed, "--out", "run", code=130)
    interrupted = Posterior.load("run/svi")
    assert interrupted.stats["interrupted"]
    infer(*resumed, "--out", "run")
    assert [path.name for path in Path("run").glob("svi*")] == ["svi"]
    sys.modules.pop("my_rewards")
    infer(*call, svi.format(""), "--out", "anew", code=130)
    infer(*call, svi.format(""), "--out", "anew")
    again, anew = (Posterior.load(f"{name}/svi") for name in ("run", "anew"))
    assert not again.stats["interrupted"]
    assert again.stats["steps"] == anew.stats["steps"] == 6
    assert (again.samples["completion"] == anew.samples["completion"]).all()


def test_ctrl_c_in_the_first_draws_after_a_training(folder):
    """There is no posterior yet, but the training is kept, in a checkpoint or as a policy."""
    Path("my_rewards.py").write_text(REWARDS.replace("calls > 4", "calls == 8"))  # an inspection, six steps, and draws
    svi = "svi(objective=ReverseKL(), num_steps=6, num_samples=8{})"
    call = ["a", "--reward", "my_rewards:interrupts", "--engine"]
    resumed = [*call, svi.format(", checkpoint=Checkpointing('kept', minutes=2)"), "--out", "run"]
    output = " ".join(infer(*resumed, code=130).split())
    assert "interrupted: " in output
    assert "the training so far is saved in kept: repeat the command to resume it" in output
    infer(*resumed)
    assert Posterior.load("run/svi").stats["steps"] == 6
    sys.modules.pop("my_rewards")
    output = " ".join(infer(*call, svi.format(""), "--out", "other", code=130).split())
    assert "the policy trained so far is saved in other/svi-policy-so-far" in output


def test_an_interrupted_result_outlives_another_interruption(folder):
    """Of two interrupted results both are kept until a run has finished."""
    Path("my_rewards.py").write_text(REWARDS.replace("calls > 4", "calls in (4, 8)"))
    call = ["a", "--engine", "svi(objective=ReverseKL(), num_steps=6, num_samples=8)"]
    call += ["--reward", "my_rewards:interrupts"]
    infer(*call, "--out", "run", code=130)
    infer(*call, "--out", "run", code=130)
    assert sorted(path.name for path in Path("run").glob("svi*")) == ["svi", "svi-interrupted"]
    infer(*call, "--out", "run")
    assert [path.name for path in Path("run").glob("svi*")] == ["svi"]


def test_a_learned_twist_is_not_learned_again(folder):
    call = ["a", "--engine", f"smc(twist=TwistLearning({QUICK}), num_particles=20)", "--out", "run"]
    infer(*call)
    assert "twist: already in run/smc-twist" in infer(*call, "--engine", "importance")
    other = f"smc(twist=TwistLearning({QUICK}, reads_reward=True), num_particles=20)"
    assert "smc: twist: reads_reward was false" in infer("a", "--engine", other, "--out", "run", code=1)


# -- trained policies, and other settings of a training ----------------------------------------------------


def test_a_policy_to_start_from_and_to_propose_with(folder):
    own = "num_samples=8, optimizer=Adam(0.04)"
    infer("a", "--engine", f"svi({own}, num_steps=20, guide=AutoPolicy(lora_rank=2))", "--out", "first")
    policy = "LanguageModel('first/svi/policy')"
    infer("a", "--engine", f"svi({own}, num_steps=5, guide={policy})", "--out", "second")
    first, second = (Posterior.load(f"{name}/svi").stats["elbo"][0, :, 0] for name in ("first", "second"))
    assert second[0] > first[:3].mean() + 0.2
    infer("a", "--engine", f"importance(num_particles=200, guide={policy})", "--out", "proposed")
    infer("a", "--engine", "importance(num_particles=200)", "--out", "prior")
    proposed, prior = (Posterior.load(f"{name}/importance") for name in ("proposed", "prior"))
    assert proposed.stats["ess"][0] > 1.5 * prior.stats["ess"][0]
    errors = np.hypot(proposed.log_evidence_stderr, prior.log_evidence_stderr)
    assert abs(proposed.log_evidence - prior.log_evidence) < 4 * errors


@pytest.mark.long
def test_a_policy_in_each_place_that_takes_one(folder):
    """The packed policy of engines that train nothing is the policy, and the others go on training it."""
    infer("a", "--engine", "svi(num_steps=2, num_samples=8, guide=AutoPolicy(lora_rank=2))", "--out", "first")
    policy = "LanguageModel('first/svi/policy')"
    places = ["importance(guide={})", "smc(twist={})", "smc(proposal={})", "mcmc(proposal={}, warmup=2, num_samples=4)"]
    places += ["annealed(proposal={}, num_particles=8)", "svi(guide={}, num_steps=2, num_samples=8)"]
    places += ["svi(guide=AutoPolicy(start={}), num_steps=2, num_samples=8)"]
    places += ["adaptive(guide={}, num_particles=128, num_steps=2, train_below=1.0)"]
    for i, place in enumerate(places):
        infer("a", "--engine", place.format(policy), "--out", f"run{i}")
        assert "LanguageModel" in Path(f"run{i}/run.yaml").read_text()
        infer("a", "--config", f"run{i}/run.yaml", "--out", f"again{i}")
        name = place.partition("(")[0]
        one, two = (Posterior.load(f"{out}{i}/{name}") for out in ("run", "again"))
        assert (one.log_weights == two.log_weights).all(), place


def test_settings_of_a_training(folder):
    (folder / "unseen.txt").write_text("c\nd\n")
    callbacks = "callbacks=[NearPosterior(3), HeldOut('unseen.txt')]"
    svi = f"svi(num_steps=60, num_samples=8, num_particles=12, guide=AutoPolicy(lora_rank=None), {callbacks})"
    settings = ["--beta", "5", "--batch-size", "8", "--gradient-checkpointing"]
    infer("a", "b", "--engine", svi, *settings, "--out", "run")
    posterior = Posterior.load("run/svi")
    assert posterior.stats["held out_elbo"].shape[::2] == (1, 2)
    assert posterior.stats["steps"] == 20  # below the limit from the start: 20 is the window of the estimate
    assert not Path("run/svi/policy/adapter_config.json").exists()


@pytest.mark.long
def test_a_compiled_prior_draws_the_same_texts(folder, monkeypatch):
    steps: list[torch.device] = []
    monkeypatch.setattr(compiled, "_compiled", lambda device: steps.append(device) or compiled._step)
    infer("a", "c d", "--engine", "importance(num_particles=6)", "--out", "plain")
    assert not steps
    infer("a", "c d", "--engine", "importance(num_particles=6)", "--compile", "--out", "run")
    assert len(steps) == 1
    one, two = (Posterior.load(f"{out}/importance") for out in ("plain", "run"))
    assert (one.samples["completion"] == two.samples["completion"]).all()
    assert "compile: true" in Path("run/run.yaml").read_text()
    infer("a", "c d", "--config", "run/run.yaml", "--out", "again")
    assert len(steps) == 2


def test_help_teaches():
    assert "bayeslm infer" in run("infer", "--help")
    assert {"demo", "infer", "show", "label", "engines", "rewards"} <= set(run("--help").split())
