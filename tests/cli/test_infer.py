"""`bayeslm infer` and `bayeslm show`, on a tiny model in a temporary folder."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from support.models import tiny_llama
from typer.testing import CliRunner

from bayeslm.cli import app, resume
from bayeslm.models import LanguageModel
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
def folder(tmp_path, monkeypatch) -> Path:
    """A working directory with a model and a module of rewards."""
    tiny_llama(scale=1.0).save_pretrained(tmp_path / "model")
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


def test_particles_and_chains(folder):
    engines = ["--engine", "exact", "--engine", "smc", "--engine", "annealed", "--engine", "mcmc"]
    sizes = ["--particles", "40", "--samples", "20", "--chains", "4", "--steps", "10"]
    out = infer("a b", "c", *engines, *sizes, "--twist", "partial", "--top-k", "3", "--out", "run")
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


@pytest.mark.parametrize("twist", ["learned", "learned-partial"])
def test_a_twist_is_learned_kept_and_used_again(folder, twist):
    settings = ["a b", "--engine", "smc", "--particles", "20", "--top-k", "4"]
    infer(*settings, "--twist", twist, "--out", "one")
    infer(*settings, "--twist", "one/twist", "--out", "two")
    one, two = (Posterior.load(f"{name}/smc") for name in ("one", "two"))
    assert (one.samples["completion"] == two.samples["completion"]).all()
    assert "learned-partial" in infer(*settings, "--twist", "nowhere", code=1)
    assert "are for --engine smc" in infer("a b", "--twist", "partial", code=1)
    assert "choose one by --twist" in infer(*settings, code=1)
    assert "cannot score unfinished texts" in infer("a b", "--engine", "smc", "--twist", "prefix", code=1)


def test_infer_compares_engines_and_show_repeats_it(folder):
    out = infer(
        "a b", "c", *["--engine", "exact", "--engine", "importance", "--engine", "svi", "--steps", "3", "--out", "run"]
    )
    for word in ("exact", "importance", "svi: policy", "svi: weighted", "log Z", "written to run"):
        assert word in out
    assert {p.name for p in Path("run").iterdir()} == {
        ".lock",
        "call.json",
        "tables.txt",
        "summary.csv",
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
        infer("a", "--particles", "30", "--seed", seed, "--out", f"run{len(list(Path().glob('run*')))}")
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
        (["a", "--engine", "importanc"], 1, "did you mean 'importance'"),
        (["a", "--reward", "sentimnt"], 1, "did you mean 'sentiment'"),
        (["a", "--reward", "my_rewards:leters"], 1, "did you mean 'letters'"),
        (["a", "--reward", "contains"], 1, "reward 'contains' needs the settings phrase: --reward-settings"),
        (["a", "--reward", "length", "--reward-settings", '{"targt": 1}'], 1, "'targt', did you mean 'target'?"),
        (
            ["a", "--reward", "length", "--reward-settings", '{"target": "a"}'],
            1,
            "--reward-settings: Length: target must",
        ),
        (["a", "--reward", "my_rewards:hangs", "--timeout", "0.2"], 1, "'hangs' reached its time limit of 0.2 s"),
        (["a", "--timeout", "0"], 1, "timeout must be a positive number of seconds"),
        (["a\udc80"], 1, "prompt 1 holds the lone surrogate"),
        (["--prompts", "."], 1, ". is a folder"),
        (["a", "--prior", "smolm2"], 1, "did you mean 'smollm2'"),
        (["a", "--beta", "0"], 1, "beta must be positive"),
        (["a", "--beta", "nan"], 1, "beta must be positive"),
        ([], 1, "no prompts"),
        (["a", "--particles", "0"], 1, "num_particles must be a positive whole number"),
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


def test_ctrl_c_in_training_ends_it_and_keeps_the_policy(folder):
    """Interrupted in the third step; the posterior's draws are of the policy trained in two steps."""
    Path("my_rewards.py").write_text(REWARDS.replace("calls > 4", "calls == 4"))
    out = infer(
        "a",
        *[
            "--engine",
            "svi",
            "--objective",
            "elbo",
            "--samples",
            "8",
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
    training = ["--engine", "svi", "--steps", "12", "--samples", "8", "--minibatch", "2", "--kl-target", "9"]
    infer("--prompts", "prompts.txt", *training, "--dtype", "bfloat16", "--out", "run")
    posterior = Posterior.load("run/svi")
    assert posterior.samples["completion"].shape == (1, 8, 5, 4)
    assert posterior.stats["prompts"].shape == (1, 12, 2)
    assert posterior.stats["inverse_temperature"][0, -1] == pytest.approx(
        0.98**-11
    )  # the limit of the change in 11 steps
    assert LanguageModel.from_pretrained("run/svi/policy").network.dtype == torch.bfloat16  # as it was trained
    assert "exact takes all prompts at once" in " ".join(
        infer("a", "--engine", "exact", "--minibatch", "1", code=1).split()
    )
    assert "--minibatch" in infer("a", "--minibatch", "0", code=2)
    assert "--dtype float8 is unknown" in infer("a", "--dtype", "float8", code=1)


def test_a_failed_training_resumes_from_its_checkpoint(folder):
    """After a reward that raised once; the policy is that of an uninterrupted run."""
    training = ["--engine", "svi", "--steps", "60", "--samples", "8", "--objective", "log-variance-replay"]
    # in step 52: the reward is called at the inspection and at every fourth step
    Path("my_rewards.py").write_text(REWARDS.replace("calls > 4", "calls == 15"))
    settings = ["a", *training, "--reward", "my_rewards:breaks_later", "--checkpoint", "kept"]
    settings += ["--tensorboard", "curves", "--out", "again"]
    assert "the last checkpoint is" in " ".join(infer(*settings, code=1).split())
    infer(*settings)
    infer("a", *training, "--reward", "my_rewards:breaks_later", "--out", "anew")
    again, anew = (Posterior.load(f"{name}/svi") for name in ("again", "anew"))
    assert (again.samples["completion"] == anew.samples["completion"]).all()
    assert list(Path("curves").glob("events*"))
    (folder / "others.txt").write_text("b")
    for option in ("--objective elbo", "--kl-target 0.1", "--held-out others.txt", "--gradient-checkpointing"):
        name = option.split()[0]
        assert f"{name} is for --engine svi" in " ".join(infer("a", *option.split(), code=1).split())
    assert "hinge is unknown: choose one of elbo" in infer("a", "--engine", "svi", "--objective", "hinge", code=1)


# -- the same command again -------------------------------------------------------------------------------------


def stamps(folder: str) -> dict[str, int]:
    return {path.parent.name: path.stat().st_mtime_ns for path in Path(folder).glob("*/posterior.json")}


def test_a_repeated_command_runs_the_engines_that_have_no_result(folder):
    call = ["a", "b", "--samples", "8", "--steps", "4", "--out", "run"]
    infer(*call, "--engine", "importance")
    before = stamps("run")
    out = infer(*call, "--engine", "importance", "--engine", "svi")
    assert "importance: already in run" in out
    assert "svi: already in" not in out
    assert {**stamps("run"), "svi": 0} == {**before, "svi": 0}
    both = infer(*call, "--engine", "svi", "--engine", "importance")
    assert "svi: already in run" in both
    for other, says in {
        ("--beta", "0.7"): "beta was",
        ("--reward", "length"): "reward was",
        ("--seed", "3"): "seed was",
    }.items():
        out = " ".join(infer(*call, *other, code=1).split())
        assert "run holds results of other settings" in out
        assert says in out
    assert "prompts was" in " ".join(infer("a", *call[2:], code=1).split())


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
    "reward's code: terms": lambda: edit("my_rewards.py", 'WORDS = ["a"]', 'WORDS = ["b"]'),
    "bonus: code": lambda: edit("helpers.py", "0.1 *", "0.2 *"),
    "prior's content: network: weights was": lambda: tiny_llama(seed=5).save_pretrained("model"),
    "prior's content: eos_token_ids was": lambda: edit(
        "model/generation_config.json", '"eos_token_id": 0', '"eos_token_id": 1'
    ),
    "prompts was": lambda: Path("prompts.txt").write_text("a b\n"),
    "version was": list,
}


CALL = ["--prompts", "prompts.txt", "--reward", "my_rewards:helped", "--particles", "8", "--out", "run"]


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
    engine = ["a", "--engine", "smc" if content == "twist" else "importance", "--particles", "8", "--top-k", "2"]
    if content == "twist":
        infer(*engine, "--twist", "learned", "--out", "made")
        given = "made/twist"
    else:
        engine = engine[:-2]
        LanguageModel.from_pretrained("model").save_pretrained("made")
        given = "made"
    call = [*engine, f"--{content}", given, "--out", "run"]
    infer(*call)
    assert "already in run" in infer(*call)
    if content == "twist":
        (Path(given) / "note.txt").write_text("another")
    else:
        tiny_llama(seed=5).save_pretrained("made")
    assert f"{content}'s content" in " ".join(infer(*call, code=1).split())


def test_a_result_of_another_call_in_its_place_is_refused(folder):
    """Folders that are whole, but exchanged: between engines, and between calls."""
    for out, beta in (("one", "0.5"), ("two", "0.7")):
        infer("a", "--engine", "importance", "--engine", "smc", "--particles", "8", "--beta", beta, "--out", out)
    for source in ("two/importance", "one/smc"):
        shutil.rmtree("one/importance")
        shutil.copytree(source, "one/importance")
        out = " ".join(infer("a", "--engine", "importance", "--particles", "8", "--out", "one", code=1).split())
        assert "one/importance is not a result of importance in this call" in out
    assert "one/importance: left out, a copy or a result of another call" in " ".join(run("show", "one").split())
    edit("one/call.json", '"beta": "0.5"', '"beta": "0.7"')
    assert "one/call.json is damaged" in " ".join(infer("a", "--beta", "0.7", "--out", "one", code=1).split())


def test_one_command_at_a_time_writes_to_a_folder(folder):
    """The second says at once that the first holds it, and has touched nothing."""
    infer("a", "--particles", "8", "--out", "run")
    with resume.Results(Path("run")):
        before = {path: path.stat().st_mtime_ns for path in Path("run").rglob("*")}
        for call in (["a", "--particles", "8"], ["b"]):  # the same call, and another
            out = " ".join(infer(*call, "--prior", "no-such-model", "--out", "run", code=1).split())
            assert "run is written by another command: wait for its end, or choose another --out" in out
        assert {path: path.stat().st_mtime_ns for path in Path("run").rglob("*")} == before
    assert "already in run" in infer("a", "--particles", "8", "--out", "run")


def test_after_ctrl_c_the_repeated_command_resumes(folder):
    """From its checkpoint; the interrupted result stays until the engine has finished."""
    training = ["--engine", "svi", "--objective", "elbo", "--steps", "12", "--samples", "8"]
    Path("my_rewards.py").write_text(REWARDS.replace("calls > 4", "calls == 8"))
    call = ["a", *training, "--reward", "my_rewards:interrupts", "--checkpoint", "kept"]
    infer(*call, "--out", "run", code=130)
    interrupted = Posterior.load("run/svi")
    assert interrupted.stats["interrupted"]
    infer(*call, "--out", "run")
    assert [path.name for path in Path("run").glob("svi*")] == ["svi"]
    sys.modules.pop("my_rewards")
    infer(*call[:-2], "--engine", "svi", "--out", "anew", code=130)
    infer(*call[:-2], "--engine", "svi", "--out", "anew")
    again, anew = (Posterior.load(f"{name}/svi") for name in ("run", "anew"))
    assert not again.stats["interrupted"]
    assert again.stats["steps"] == anew.stats["steps"] == 12
    assert (again.samples["completion"] == anew.samples["completion"]).all()


def test_ctrl_c_in_the_first_draws_after_a_training(folder):
    """There is no posterior yet, but the training is kept, in a checkpoint or as a policy."""
    Path("my_rewards.py").write_text(REWARDS.replace("calls > 4", "calls == 8"))  # an inspection, six steps, and draws
    training = ["--engine", "svi", "--objective", "elbo", "--steps", "6", "--samples", "8"]
    call = ["a", *training, "--reward", "my_rewards:interrupts", "--out", "run"]
    assert "needs the folder --checkpoint" in infer(*call, "--checkpoint-minutes", "2", code=1)
    output = " ".join(infer(*call, "--checkpoint", "kept", "--checkpoint-minutes", "2", code=130).split())
    assert "interrupted: " in output
    assert "the training so far is saved in kept: repeat the command to resume it" in output
    infer(*call, "--checkpoint", "kept")
    assert Posterior.load("run/svi").stats["steps"] == 6
    sys.modules.pop("my_rewards")
    output = " ".join(infer(*call[:-1], "other", code=130).split())
    assert "the policy trained so far is saved in other/svi-policy-so-far" in output


def test_an_interrupted_result_outlives_another_interruption(folder):
    """Of two interrupted results both are kept until a run has finished."""
    Path("my_rewards.py").write_text(REWARDS.replace("calls > 4", "calls in (6, 12)"))
    training = ["--engine", "svi", "--objective", "elbo", "--steps", "12", "--samples", "8"]
    call = ["a", *training, "--reward", "my_rewards:interrupts"]
    infer(*call, "--out", "run", code=130)
    infer(*call, "--out", "run", code=130)
    assert sorted(path.name for path in Path("run").glob("svi*")) == ["svi", "svi-interrupted"]
    infer(*call, "--out", "run")
    assert [path.name for path in Path("run").glob("svi*")] == ["svi"]


def test_a_learned_twist_is_not_learned_again(folder):
    call = ["a", "--engine", "smc", "--twist", "learned", "--particles", "20", "--out", "run"]
    infer(*call)
    assert "twist: already in run/twist" in infer(*call, "--engine", "importance")


# -- trained policies, and other settings of a training ----------------------------------------------------


def test_a_policy_to_start_from_and_to_propose_with(folder):
    training = ["--engine", "svi", "--samples", "8", "--reward", "my_rewards:letters", "--learning-rate", "0.02"]
    infer("a", *training, "--steps", "40", "--lora-rank", "2", "--out", "first")
    policy = "first/svi/policy"
    infer("a", *training, "--steps", "5", "--policy", policy, "--out", "second")
    first, second = (Posterior.load(f"{name}/svi").stats["elbo"][0, :, 0] for name in ("first", "second"))
    assert second[0] > first[:3].mean() + 0.2
    infer("a", "--reward", "my_rewards:letters", "--particles", "200", "--policy", policy, "--out", "proposed")
    infer("a", "--reward", "my_rewards:letters", "--particles", "200", "--out", "prior")
    proposed, prior = (Posterior.load(f"{name}/importance") for name in ("proposed", "prior"))
    assert proposed.stats["ess"][0] > 1.5 * prior.stats["ess"][0]
    errors = np.hypot(proposed.log_evidence_stderr, prior.log_evidence_stderr)
    assert abs(proposed.log_evidence - prior.log_evidence) < 4 * errors
    assert "--policy nowhere is not a folder" in infer("a", "--policy", "nowhere", code=1)
    assert "--policy is for --engine svi and importance" in " ".join(
        infer("a", "--engine", "smc", "--policy", policy, code=1).split()
    )


def test_settings_of_a_training(folder):
    (folder / "unseen.txt").write_text("c\nd\n")
    training = ["--engine", "svi", "--steps", "60", "--samples", "8", "--particles", "12", "--beta", "5"]
    settings = ["--held-out", "unseen.txt", "--stop-kl", "3", "--lora-rank", "0", "--batch-size", "8"]
    infer("a", "b", *training, *settings, "--gradient-checkpointing", "--out", "run")
    posterior = Posterior.load("run/svi")
    assert posterior.stats["held out_elbo"].shape[::2] == (1, 2)
    assert posterior.stats["steps"] == 20  # below the limit from the start: 20 is the window of the estimate
    assert not Path("run/svi/policy/adapter_config.json").exists()


def test_help_teaches():
    assert "bayeslm infer" in run("infer", "--help")
    assert {"demo", "infer", "show"} <= set(run("--help").split())
