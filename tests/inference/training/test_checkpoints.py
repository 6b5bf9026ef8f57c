"""Checkpoints of a training: it resumes bit-identically, and refuses what is another run's."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import re
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyro
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.chaos import forked
from support.gradients import policy_guide
from support.models import table_lm, tiny_llama
from support.programs import PROMPTS, TOKENS, score_table, tilted
from support.trainings import (
    GOLD,
    LM,
    MODEL,
    SMALL,
    Killed,
    assert_same,
    batches,
    every_5,
    every_step,
    fickle,
    killer,
    topical,
)

from bayeslm.checksums import digest_of, verify, write_checksums
from bayeslm.inference import SVI, RunError
from bayeslm.inference.training import (
    Adam,
    AutoPolicy,
    Checkpointing,
    Critic,
    ExponentialAverage,
    FDivergence,
    HeldOut,
    KLTarget,
    LogVariance,
    Plateau,
    Replay,
    ReverseKL,
    StatefulLoss,
    StepRecord,
    Tempering,
    TrustRegion,
    alpha_divergence,
    checkpoints,
    identify,
)
from bayeslm.inference.training.identity import digest
from bayeslm.models import TiltedLM, rewards
from bayeslm.models.rewards.rehearsal import is_rehearsal


def kept(folder: Path) -> list[str]:
    """The names of the checkpoints there."""
    return sorted(path.name for path in folder.glob("chain-*"))


# -- going on from a checkpoint ------------------------------------------------------------------------------

RUNS = {
    "elbo": (MODEL, {"callbacks": [HeldOut({"gold": GOLD}, every=4, num_particles=4), Plateau(3, -0.5)]}),
    "replay": (MODEL, {"objective": LogVariance(8, Replay(20)), "callbacks": [Tempering()], "num_chains": 2}),
    "average": (MODEL, {"objective": ReverseKL(2, baseline=ExponentialAverage()), "callbacks": [KLTarget(0.5)]}),
    "latents": (topical, {"num_chains": 2}),
    "no gradient": (topical, {"objective": LogVariance(4)}),  # which gives the program's own parameter none
    "critic": (MODEL, {"objective": ReverseKL(4, Critic())}),
    "fickle": (fickle, {}),
    "minibatches": (batches, {"objective": LogVariance(4, Replay(20, every=2))}),
    "trust region": (MODEL, {"objective": LogVariance(8, Replay(20)), "optimizer": TrustRegion(), "num_chains": 2}),
    "lora": (tilted(tiny_llama(seed=1), score_table(1)), {"guide": functools.partial(AutoPolicy, lora_rank=2)}),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_that_was_killed_ends_as_if_it_had_not_been(name, tmp_path):
    model, settings = RUNS[name]
    settings = SMALL | settings
    whole = SVI(**settings).run(model, PROMPTS)
    chains = settings.get("num_chains", 1)
    for step in (7, 11, 2)[: 1 + chains]:  # each time the run goes further: from 5, from 10, into a second chain
        with contextlib.suppress(Killed):
            callbacks = [*settings.get("callbacks", []), killer(step)]
            SVI(**settings | {"callbacks": callbacks, "checkpoint": every_5(tmp_path)}).run(model, PROMPTS)
    torch.manual_seed(1)  # whatever the process did meanwhile
    assert_same(SVI(**settings, checkpoint=every_5(tmp_path)).run(model, PROMPTS), whole)
    there = sorted(path.name.partition("-step-")[0] for path in tmp_path.iterdir())
    assert there == [".lock", *(f"chain-{i}" for i in range(chains))]
    assert_same(SVI(**settings, checkpoint=every_5(tmp_path)).run(model, PROMPTS), whole)  # nothing left to train


@pytest.mark.parametrize(
    "name", [*(pytest.param(name, marks=pytest.mark.long) for name in ("elbo", "critic")), "replay", "trust region"]
)
def test_checkpoints_by_time_are_written_between_those_by_steps_and_resume_to_the_bit(name, tmp_path, monkeypatch):
    """The clock moves a minute a call, so that checkpoints are due after steps that no number of steps divides."""
    model, settings = RUNS[name]
    settings = SMALL | settings | {"num_chains": 1}
    whole = SVI(**settings).run(model, PROMPTS)
    minutes = itertools.count()
    monkeypatch.setattr(checkpoints.time, "monotonic", lambda: 60.0 * next(minutes))
    by_time = Checkpointing(tmp_path, every=1000, minutes=3)
    found = []
    for step in (8, 11):
        with contextlib.suppress(Killed):
            callbacks = [*settings.get("callbacks", []), killer(step)]
            SVI(**settings | {"callbacks": callbacks, "checkpoint": by_time}).run(model, PROMPTS)
        found += kept(tmp_path)
    assert found == ["chain-0-step-6", "chain-0-step-9"]
    assert_same(SVI(**settings, checkpoint=by_time).run(model, PROMPTS), whole)
    assert kept(tmp_path) == ["chain-0-step-12"]


@pytest.mark.parametrize(("minutes", "steps"), [(5.0, [5, 7, 10, 12]), (None, [5, 10, 12]), (20.0, [5, 10, 12])])
def test_a_disk_that_refuses_is_asked_again_after_the_interval(minutes, steps, tmp_path, monkeypatch):
    """By steps and by time at once; step 7 takes 6 minutes. A checkpoint that fails is not tried again at each step."""
    now, tried = [0.0], []
    monkeypatch.setattr(checkpoints.time, "monotonic", lambda: now[0])

    def refuse(tensors, path):
        tried.append(int(re.search(r"-step-(\d+)", str(path))[1]))
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "save_file", refuse)

    def slow(record):
        if record.step == 7:
            now[0] += 360.0

    engine = SVI(**SMALL, callbacks=[slow], checkpoint=Checkpointing(tmp_path, every=5, minutes=minutes))
    with pytest.warns(UserWarning, match="no checkpoint: .*No space left"):
        engine.run(MODEL, PROMPTS)
    assert tried == steps


@pytest.mark.parametrize("minutes", [0, -1, float("nan")])
def test_minutes_are_positive(minutes, tmp_path):
    with pytest.raises(ValueError, match="minutes"):
        Checkpointing(tmp_path, minutes=minutes)


def test_killed_while_it_writes_a_checkpoint(tmp_path, monkeypatch):
    """SIGKILL with half of the second checkpoint written: the first stands, and the run ends the same."""
    settings = SMALL | {"objective": LogVariance(8, Replay())}
    write = checkpoints.save_file

    def dies(tensors, path):
        write(tensors, path)
        if "step-10" in str(path):
            with open(path, "r+b") as file:
                file.truncate(100)
            os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patched:
        patched.setattr(checkpoints, "save_file", dies)
        engine = SVI(**settings, checkpoint=every_5(tmp_path / "run"))
        with pytest.raises(RuntimeError) as error:
            forked(functools.partial(engine.run, MODEL, PROMPTS))
    assert "Traceback" not in str(error.value)
    assert kept(tmp_path / "run") == ["chain-0-step-5"]
    assert any(path.name.startswith(".chain-0-step-10") for path in (tmp_path / "run").iterdir())
    again = engine.run(MODEL, PROMPTS)
    assert_same(again, SVI(**settings).run(MODEL, PROMPTS))
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [".lock", "chain-0-step-12"]


RAISES = {
    "leave-one-out": lambda: ReverseKL(8),
    "replay": lambda: LogVariance(8, Replay(every=2)),
    "average": lambda: ReverseKL(8, ExponentialAverage()),
    "critic": lambda: ReverseKL(8, Critic()),
}


@pytest.mark.parametrize(
    ("make", "raised"),
    [
        *(pytest.param(make, ConnectionError, id=name) for name, make in RAISES.items()),
        *(
            pytest.param(make, KeyboardInterrupt, id=f"{name}, Ctrl-C", marks=[pytest.mark.long] * (name != "replay"))
            for name, make in RAISES.items()
        ),
    ],
)
def test_a_reward_that_raises_in_mid_run_loses_nothing(tmp_path, make, raised):
    """No step: a checkpoint of where it began is written, though the next was far."""
    calls = itertools.count(1)

    def model(prompts):
        with pyro.plate("prompts", len(prompts)):
            x = pyro.sample("completion", LM(prompts, max_new_tokens=TOKENS))
            torch.rand(())  # as rewards may
            if not is_rehearsal() and next(calls) == 5:
                raise raised("the judge does not answer")
            pyro.factor("reward", 0.5 * (x == 2).sum(-1))

    engine = SVI(**SMALL, objective=make(), checkpoint=tmp_path)
    if raised is KeyboardInterrupt:
        done = engine.run(model, PROMPTS).stats["steps"]
    else:
        with pytest.raises(RunError, match="ConnectionError: the judge does not answer") as caught:
            engine.run(model, PROMPTS)
        notes = "\n".join(caught.value.__cause__.__notes__)
        done = int(re.search(r"stopped at step (\d+)", notes)[1])
        assert f"chain-0-step-{done}" in notes
        assert caught.value.so_far.policy is not None
        assert caught.value.so_far.step == done
    assert done in (3, 6)  # the first call inspected the program; replay has one in two steps
    assert (tmp_path / f"chain-0-step-{done}").exists()
    assert_same(engine.run(model, PROMPTS), SVI(**SMALL, objective=make()).run(model, PROMPTS))


def test_a_callback_that_raises_after_a_step_has_moved_the_guide(tmp_path):
    """From there a run cannot be resumed: it is from the checkpoint before."""
    broken = []

    def fail(record):
        if record.step == 7 and not broken:
            broken.append(1)
            raise ConnectionError

    engine = SVI(**SMALL, callbacks=[fail], checkpoint=every_5(tmp_path))
    with pytest.raises(RunError, match="ConnectionError") as caught:
        engine.run(MODEL, PROMPTS)
    notes = "\n".join(caught.value.__cause__.__notes__)
    assert "stopped at step 7" in notes
    assert "chain-0-step-5" in notes
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "chain-0-step-5"]
    assert_same(engine.run(MODEL, PROMPTS), SVI(**SMALL).run(MODEL, PROMPTS))


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path):
    """The system refuses files of more than 4 kB from step 6 on, as a full disk would."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(record: StepRecord) -> None:
        if record.step == 6:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))

    try:
        with pytest.warns(UserWarning, match=r"no checkpoint: .*step-10.*step-5 is kept, and the training continues"):
            run = SVI(**SMALL, checkpoint=every_5(tmp_path), callbacks=[fill]).run(MODEL, PROMPTS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "chain-0-step-5"]
    assert_same(SVI(**SMALL, checkpoint=every_5(tmp_path)).run(MODEL, PROMPTS), run)


ADAM = SMALL | {"optimizer": Adam()}
OTHERS = {
    "optimizer: learning_rate was null and is 0.01": {"optimizer": Adam(0.01)},
    'objective: type was "ReverseKL" and is "LogVariance"': {"objective": LogVariance(8)},
    "log p of 'reward'": {"model": tilted(LM, score_table(1), 0.5)},
    "prior of 'completion': network: weights": {"model": tilted(table_lm(order=3, seed=2), score_table(1))},
    "tokens of the prompts": {"prompts": [[2, 3, 4], [6, 5]]},
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    SVI(**ADAM, checkpoint=every_5(folder)).run(MODEL, PROMPTS)
    return folder


@pytest.mark.parametrize("says", OTHERS)
def test_a_checkpoint_of_another_run_is_refused_with_what_differs(finished, says):
    other = {"model": MODEL, "prompts": PROMPTS} | OTHERS[says]
    model, prompts = other.pop("model"), other.pop("prompts")
    with pytest.raises(ValueError, match="is a checkpoint of another run") as caught:
        SVI(**ADAM | other, checkpoint=finished).run(model, prompts)
    assert says in str(caught.value)
    if "prompts" not in says:  # which are told by their texts as well
        differences = str(caught.value).partition("another run: ")[2].partition(". Run what")[0].split("; ")
        # nothing else differs: of an objective its settings do, and a reward of other numbers is another program
        may = (says.partition(" was")[0].partition(": type")[0], *(["program: cells"] if "log p" in says else []))
        assert all(difference.startswith(may) for difference in differences), differences


def test_checkpoints_that_cannot_be_read_are_refused(finished, tmp_path):
    def copied(name: str) -> Path:
        folder = tmp_path / name / "chain-0-step-12"
        folder.mkdir(parents=True)
        for path in (finished / "chain-0-step-12").iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        return folder

    header = copied("version") / "checkpoint.json"
    header.write_text(header.read_text().replace('"version": "', '"version": "9.'))
    write_checksums(header.parent)
    with pytest.raises(ValueError, match=r"version was \"9\."):
        SVI(**ADAM, checkpoint=every_5(tmp_path / "version")).run(MODEL, PROMPTS)
    with (copied("huge") / "tensors.safetensors").open("ab") as file:
        file.truncate(2**43)  # no block of it is on the disk
    with pytest.raises(ValueError, match=r"no checkpoint that can be read.*bytes, and this machine has"):
        SVI(**ADAM, checkpoint=every_5(tmp_path / "huge")).run(MODEL, PROMPTS)
    guide = policy_guide(LM.policy(), TOKENS)
    SVI(**ADAM, guide=guide, checkpoint=tmp_path / "guide").run(MODEL, PROMPTS)
    named = json.loads((tmp_path / "guide/chain-0-step-12/checkpoint.json").read_text())["run"]["guide"]
    assert named["name"] == "policy_guide.<locals>.guide"


def change(path: Path, edit: Callable[[bytes], bytes]) -> None:
    path.write_bytes(edit(path.read_bytes()))


def flip(at: float) -> Callable[[bytes], bytes]:
    """Flip a bit of the byte at a fraction of the length."""

    def edit(content: bytes) -> bytes:
        i = int(at * len(content))
        return content[:i] + bytes([content[i] ^ 4]) + content[i + 1 :]

    return edit


def without_a_parameter(path: Path) -> None:
    tensors = load_file(path)
    tensors.pop(next(name for name in tensors if name.startswith("param.")))
    save_file(tensors, path)


def in_header(**entries) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        header = json.loads((folder / "checkpoint.json").read_text())
        (folder / "checkpoint.json").write_text(json.dumps(header | entries))

    return edit


DAMAGES = {
    **{
        f"{file}, bit flipped at {at:.0%}": lambda folder, other, file=file, at=at: change(folder / file, flip(at))
        for file in ("checkpoint.json", "tensors.safetensors", "SHA256SUMS")
        for at in (0.0, 0.3, 0.7, 0.999)
    },
    **{
        f"{file}, {what}": lambda folder, other, file=file, edit=edit: change(folder / file, edit)
        for file in ("checkpoint.json", "tensors.safetensors", "SHA256SUMS")
        for what, edit in {"cut": lambda x: x[: len(x) // 2], "emptied": lambda x: b""}.items()
    },
    **{
        f"{file}, removed": lambda folder, other, file=file: (folder / file).unlink()
        for file in ("checkpoint.json", "tensors.safetensors", "SHA256SUMS")
    },
    "tensors.safetensors, of another run": lambda folder, other: change(
        folder / "tensors.safetensors", lambda _: (other / "tensors.safetensors").read_bytes()
    ),
    "tensors.safetensors, without a parameter": lambda folder, other: without_a_parameter(
        folder / "tensors.safetensors"
    ),
    "checkpoint.json, a step of -5": lambda folder, other: in_header(step=-5)(folder),
    "checkpoint.json, no step": lambda folder, other: in_header(step=None)(folder),
    "chain-0-step-12, all files removed": lambda folder, other: [path.unlink() for path in folder.iterdir()],
    "chain-0-step-11, renamed": lambda folder, other: folder.rename(folder.with_name("chain-0-step-11")),
}


@pytest.fixture(scope="module")
def other_finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("other")
    SVI(**ADAM | {"seed": 1}, checkpoint=every_5(folder)).run(MODEL, PROMPTS)
    return folder / "chain-0-step-12"


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused_by_the_name_of_its_file(finished, other_finished, tmp_path, damage):
    """And nothing is lost: it is left as it is."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    DAMAGES[damage](tmp_path / "chain-0-step-12", other_finished)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=damage.partition(",")[0]):
        SVI(**ADAM, checkpoint=tmp_path).run(MODEL, PROMPTS)
    assert contents(tmp_path) == before


def test_a_chain_copied_as_another_is_refused(tmp_path):
    settings = SMALL | {"num_steps": 3, "num_chains": 2}
    SVI(**settings, checkpoint=tmp_path).run(MODEL, PROMPTS)
    shutil.rmtree(tmp_path / "chain-1-step-3")
    shutil.copytree(tmp_path / "chain-0-step-3", tmp_path / "chain-1-step-3")
    with pytest.raises(ValueError, match=r"chain-1-step-3 .*is a copy of chain-0-step-3"):
        SVI(**settings, checkpoint=tmp_path).run(MODEL, PROMPTS)


def contents(folder: Path) -> dict[Path, bytes]:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_bad_newest_checkpoint_does_not_cost_the_good_one(finished, tmp_path):
    """Nor are a user's own folders beside them touched, whatever their names."""
    with contextlib.suppress(Killed):
        SVI(**ADAM, checkpoint=every_5(tmp_path), callbacks=[killer(7)]).run(MODEL, PROMPTS)
    own = ("backup", "chain-0-step-5-backup", "chain-0-step-5 (copy)", "chain-0-step-05", "chain-0-step-x", ".chain-0")
    copies = (*own, ".chain-0-step-5.mine", "chain-0-step-3")  # the last has the name of a checkpoint
    for name in copies:
        shutil.copytree(tmp_path / "chain-0-step-5", tmp_path / name)
    (tmp_path / "chain-0-step-4").write_text("a file")
    shutil.copytree(finished / "chain-0-step-12", tmp_path / "chain-0-step-12")
    change(tmp_path / "chain-0-step-12/tensors.safetensors", flip(0.5))
    damaged = contents(tmp_path / "chain-0-step-12")
    with pytest.warns(UserWarning, match=r"step-12.*tensors.safetensors is damaged.*; resuming from chain-0-step-5"):
        resumed = SVI(**ADAM, checkpoint=every_5(tmp_path)).run(MODEL, PROMPTS)
    assert_same(resumed, SVI(**ADAM).run(MODEL, PROMPTS))
    aside = next(tmp_path.glob("chain-0-step-12.damaged-*"))
    assert contents(aside) == damaged
    there = {path.name for path in tmp_path.iterdir()}
    assert there == {".lock", "chain-0-step-12", "chain-0-step-4", aside.name, *copies}
    assert all(contents(tmp_path / name).keys() == damaged.keys() for name in copies)


def test_the_checkpoint_before_is_kept_until_the_next_is_verified(tmp_path, monkeypatch):
    """A disk that reports success and keeps something else."""
    write = checkpoints.save_file

    def bad_disk(tensors, path):
        write(tensors, path)
        if "step-10" in str(path):
            monkeypatch.setattr(
                checkpoints, "verify", lambda folder: (change(folder / path.name, flip(0.5)), verify(folder))
            )

    monkeypatch.setattr(checkpoints, "save_file", bad_disk)
    with (
        pytest.warns(UserWarning, match=r"no checkpoint: .*step-10.* is damaged.*step-5 is kept"),
        contextlib.suppress(Killed),
    ):
        SVI(**SMALL, checkpoint=every_5(tmp_path), callbacks=[killer(11)]).run(MODEL, PROMPTS)
    assert kept(tmp_path) == ["chain-0-step-10", "chain-0-step-5"]
    monkeypatch.undo()
    with pytest.warns(UserWarning, match="resuming from chain-0-step-5"):
        resumed = SVI(**SMALL, checkpoint=every_5(tmp_path)).run(MODEL, PROMPTS)
    assert_same(resumed, SVI(**SMALL).run(MODEL, PROMPTS))


def begins(word):
    def reward(completions, **kwargs):
        return [float(text.startswith(word)) for text in completions]

    return reward


@pytest.mark.parametrize(
    "make",
    [
        lambda n: FDivergence(alpha_divergence(n / 4)),
        lambda n: TiltedLM(LM, begins("a" * n), 1.0),
        lambda n: TiltedLM(LM, rewards.Length(target=3), 1.0 / n),
        lambda n: TiltedLM(LM, 0.5 * rewards.Length(target=n) + rewards.Length(target=9), 1.0),
        lambda n: HeldOut({"gold": functools.partial(TiltedLM(LM, begins("a"), float(n)), PROMPTS)}),
        lambda n: HeldOut({f"gold {n}": GOLD}),
        lambda n: (lambda x: x + 1) if n == 1 else (lambda x: x + 2),
    ],
    ids=["alpha", "reward", "beta", "sum of rewards", "held-out program", "held-out name", "function"],
)
def test_what_a_checkpoint_tells_apart(make):
    assert identify(make(1)) == identify(make(1)) != identify(make(2))


def test_columns_of_prompts_that_are_not_in_the_first_minibatch(tmp_path):
    def right(completions, answer, **kwargs):
        return [float(len(text) == x) for text, x in zip(completions, answer, strict=True)]

    model = TiltedLM(LM, right, 1.0, max_new_tokens=2, subsample_size=1)
    engine = SVI(**SMALL | {"num_steps": 2}, checkpoint=tmp_path)
    engine.run(model, PROMPTS, answer=[1, 2])
    engine.run(model, PROMPTS, answer=[1, 2])
    for answer in ([2, 2], [1, 1]):
        with pytest.raises(ValueError, match="digest of the program's arguments"):
            engine.run(model, PROMPTS, answer=answer)


def test_arrays_and_packed_weights_are_told_apart():
    given, others = (identify(FDivergence(log_evidence=[0.0, x])) for x in (1.0, 2.0))
    assert given != others
    given, others = (identify(FDivergence(log_evidence=torch.tensor([0.0, x]))) for x in (1.0, 2.0))
    assert given != others
    same, other, changed = (
        identify(np.array([f"text {number}", None], dtype=object))
        for number in (1, 1, 2)  # three objects in memory
    )
    assert same == other != changed
    same, other, changed = (tiny_llama(seed=seed).packed() for seed in (0, 0, 1))  # weights that cannot be read
    assert digest(same) == digest(other) != digest(changed)


# -- more steps, and others at work --------------------------------------------------------------------------

OPEN = {"optimizer": Adam(schedule="constant")}  # what a step does, does not depend on how many there are to be


@pytest.mark.parametrize(
    "settings",
    [OPEN, OPEN | {"callbacks": [KLTarget(0.5)], "objective": LogVariance(8, Replay(20))}],
    ids=["elbo", "a KL target, replay"],
)
@pytest.mark.parametrize("killed", [pytest.param(False, marks=pytest.mark.long), True])
def test_more_steps_are_as_if_there_had_been_as_many_from_the_start(settings, killed, tmp_path):
    settings = SMALL | settings
    whole = SVI(**settings | {"num_steps": 30}).run(MODEL, PROMPTS)
    with contextlib.suppress(Killed):
        callbacks = [*settings.get("callbacks", []), *([killer(9)] if killed else [])]
        SVI(**settings | {"callbacks": callbacks, "checkpoint": every_5(tmp_path)}).run(MODEL, PROMPTS)
    assert_same(SVI(**settings | {"num_steps": 30}, checkpoint=every_5(tmp_path)).run(MODEL, PROMPTS), whole)
    assert kept(tmp_path) == ["chain-0-step-30"]
    with pytest.raises(ValueError, match="has 30 steps already, and num_steps is 12: give as many"):
        SVI(**settings, checkpoint=tmp_path).run(MODEL, PROMPTS)


@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer": Adam()},
        {"optimizer": Adam(schedule="cosine")},
        OPEN | {"callbacks": [Tempering()]},
        OPEN | {"num_chains": 2},
    ],
)
def test_what_has_an_end_has_no_more_steps(settings, tmp_path):
    SVI(**SMALL | settings, checkpoint=tmp_path).run(MODEL, PROMPTS)
    with pytest.raises(ValueError, match=r"num_steps was 12 and is 20\..*More steps need schedule='constant'"):
        SVI(**SMALL | settings | {"num_steps": 20}, checkpoint=tmp_path).run(MODEL, PROMPTS)


def test_one_training_at_a_time_writes_to_a_folder(tmp_path):
    """Also while it draws; and whoever is refused has touched nothing. After the end the next may."""
    refused = []

    def another(record: StepRecord) -> None:
        if record.step == 8:
            before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
            same = SVI(**SMALL, checkpoint=every_5(tmp_path))
            with pytest.raises(RuntimeError) as error:
                forked(functools.partial(same.run, MODEL, PROMPTS))
            refused.append(str(error.value).strip().splitlines()[-1])
            assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before

    whole = SVI(**SMALL, checkpoint=every_5(tmp_path), callbacks=[another]).run(MODEL, PROMPTS)
    assert refused[0].startswith(f"BlockingIOError: {tmp_path} is written by another training: end that first")
    assert_same(SVI(**SMALL, checkpoint=tmp_path).run(MODEL, PROMPTS), whole)


@pytest.mark.parametrize("name", ["replay", "average", "critic", "minibatches"])
def test_no_step_changes_a_state_in_place(name):
    """What an objective remembered before each step is the same after it."""
    model, settings = RUNS[name]
    loss, states = StatefulLoss(settings["objective"]), []
    policy = LM.policy()

    def guide(prompts):
        pyro.module("policy", policy)
        size = 1 if model is batches else None
        with pyro.plate("prompts", len(prompts), subsample_size=size) as some:
            pyro.sample("completion", policy([prompts[i] for i in some], max_new_tokens=3 if size else TOKENS))

    with pyro.get_param_store().scope():
        for _ in range(12):
            loss.loss_and_grads(model, guide, PROMPTS)
            states.append((loss.state, {key: x.clone() for key, x in loss.state.items()}))
    assert states[-1][0], name
    for held, copies in states:
        assert held.keys() == copies.keys()
        assert all(torch.equal(held[key].nan_to_num(), copies[key].nan_to_num()) for key in copies)


# -- changed by hand, with checksums computed anew -------------------------------------------------------------


KILLED = {
    "replay": {"objective": LogVariance(8, Replay(20))},
    "critic": {"objective": ReverseKL(4, Critic()), "optimizer": Adam(0.05)},
}


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> dict[str, Path]:
    """A checkpoint of each after five steps."""
    folders = {name: tmp_path_factory.mktemp(name) for name in KILLED}
    for name, own in KILLED.items():
        with contextlib.suppress(Killed):
            SVI(**SMALL | own, checkpoint=every_step(folders[name]), callbacks=[killer(6)]).run(MODEL, PROMPTS)
    return folders


def edited(folder: Path, target: Path, header: Callable[[dict], object], tensors: Callable[[dict], object]) -> Path:
    """Copy a run's checkpoint, and change it as somebody does who knows how it is checked."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(folder, target)
    (place,) = target.glob("chain-0-step-*")
    values, loaded = json.loads((place / "checkpoint.json").read_text()), load_file(place / "tensors.safetensors")
    tensors(loaded)
    save_file({name: x.contiguous() for name, x in loaded.items()}, place / "tensors.safetensors")
    values["tensors"] = digest_of(place / "tensors.safetensors")
    header(values)
    (place / "checkpoint.json").write_text(json.dumps(values))
    write_checksums(place)
    return place


def keep(_: dict) -> None:
    pass


WRONG = [None, "x", -1, [], float("nan"), 3.5, True]
ENTRIES = ["step", "samples", "train_seconds", "ended", "gamma", "used", "best", "numpy", "random", "run", "chain"]
ENTRIES += [
    "used.seconds",
    "used.model_calls",
    "used.tokens",
    "used.mismatch",
    "used.drawn",
    "best.step",
    "best.elbo",
    "best.since",
]
MAY = {  # what a training could have had
    "train_seconds": [3.5],
    "used.seconds": [3.5],
    "used.mismatch": [None],
    "used.drawn": [None],
}


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_header_that_was_edited_is_refused_before_anything_is_put_back(entry, killed, tmp_path):
    """Missing, of another type, or out of range; NumPy does not check its state, and reads beyond it."""
    *above, name = entry.split(".")

    def change(values: dict, edit: Callable[[dict], object]) -> None:
        edit(values[above[0]] if above else values)

    edits = [lambda x: x.pop(name)]
    edits += [lambda x, bad=bad: x.__setitem__(name, bad) for bad in WRONG if bad not in MAY.get(entry, [])]
    if name == "numpy":
        edits += [lambda x, at=at, bad=bad: x[name].__setitem__(at, bad) for at, bad in ((2, 10**6), (2, -5), (1, [0]))]
    engine = SVI(**SMALL | KILLED["replay"], checkpoint=every_step(tmp_path))
    for edit in edits:
        place = edited(killed["replay"], tmp_path, functools.partial(change, edit=edit), keep)
        before = torch.get_rng_state(), np.random.get_state()[2]  # noqa: NPY002
        with pytest.raises(ValueError, match=re.escape(str(place))):
            engine.run(MODEL, PROMPTS)
        assert torch.equal(before[0], torch.get_rng_state())
        assert before[1] == np.random.get_state()[2]  # noqa: NPY002


@pytest.mark.parametrize("run", KILLED)
def test_tensors_that_were_edited_are_refused_by_name(run, killed, tmp_path):
    """Removed, of another shape, or no numbers. (Of a buffer without rows the next turn would never come.)"""
    (place,) = killed[run].glob("chain-0-step-*")
    names = list(load_file(place / "tensors.safetensors"))
    changes = {
        "removed": lambda tensors, name: tensors.pop(name),
        "longer": lambda tensors, name: tensors.update({name: torch.cat([tensors[name].reshape(-1)] * 2)}),
        "empty": lambda tensors, name: tensors.update({name: tensors[name].reshape(-1)[:0]}),
    }
    silent = []
    for i, name in enumerate(names):
        what = list(changes)[i % 3]  # with all three for each it takes 25 s, and finds no more
        if what != "removed" and name == "objective.source.turns":
            continue  # every row has had its turn: it is empty
        if what == "removed" and name.startswith(("best.", "history.", "objective.source.kept.log_left_out")):
            continue  # found after the next step alone, or without consequence
        path = edited(killed[run], tmp_path, keep, functools.partial(changes[what], name=name))
        try:
            SVI(**SMALL | KILLED[run], checkpoint=every_step(tmp_path)).run(MODEL, PROMPTS)
        except ValueError as error:
            assert str(path) in str(error), (name, what)  # noqa: PT017
        else:
            silent.append((name, what))
    assert not silent


def test_figures_that_are_missing_are_found_after_the_first_step(killed, tmp_path):
    place = edited(killed["replay"], tmp_path, keep, lambda tensors: tensors.pop("history.kl"))
    with pytest.raises(RunError, match=rf"{place} cannot be resumed: history.kl is not what 5 steps"):
        SVI(**SMALL | KILLED["replay"], checkpoint=every_step(tmp_path)).run(MODEL, PROMPTS)


def test_a_file_of_another_run_is_refused_though_its_checksum_fits(finished, other_finished, tmp_path):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    place = tmp_path / "chain-0-step-12"
    shutil.copyfile(other_finished / "tensors.safetensors", place / "tensors.safetensors")
    write_checksums(place)
    with pytest.raises(ValueError, match=r"checkpoint.json belongs to other tensors"):
        SVI(**ADAM, checkpoint=tmp_path).run(MODEL, PROMPTS)


def test_links_and_stray_files_beside_checkpoints(finished, tmp_path):
    """A link is read through and what it leads to is left; a name outside of the folder is refused."""
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    shutil.copytree(finished / "chain-0-step-12", elsewhere)
    run.mkdir()
    (run / "chain-0-step-12").symlink_to(elsewhere)
    (run / "chain-0-step-7").symlink_to(run)  # a circle
    (elsewhere / "evil.py").write_text("raise SystemExit")
    assert_same(SVI(**ADAM, checkpoint=every_5(run)).run(MODEL, PROMPTS), SVI(**ADAM).run(MODEL, PROMPTS))
    assert contents(elsewhere).keys() == {*contents(finished / "chain-0-step-12").keys(), Path("evil.py")}
    with (elsewhere / "SHA256SUMS").open("a") as file:
        file.write(f"{'0' * 64}  ../../etc/passwd\n")
    with pytest.raises(ValueError, match=r"'../../etc/passwd' is not in the folder"):
        SVI(**ADAM, checkpoint=every_5(run)).run(MODEL, PROMPTS)
