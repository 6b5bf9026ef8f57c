"""Long runs of SVI: checkpoints, temperature, stopping, what is looked at beside."""

from __future__ import annotations

import contextlib
import functools
import json
import random
import re
import resource
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from gradients import policy_guide
from helpers import table_lm, tiny_llama
from programs import PROMPTS, TOKENS, case, score_table, tilted

from bayeslm.inference import (
    SVI,
    Critic,
    Exact,
    ExponentialAverage,
    FDivergence,
    FromPosterior,
    HeldOut,
    KLTarget,
    LogVariance,
    NearPosterior,
    Plateau,
    ProgramError,
    Replay,
    ReverseKL,
    Tempering,
    TensorBoard,
    alpha_divergence,
)
from bayeslm.inference.checkpoints import describe, digest
from bayeslm.models import TiltedLM, rewards

LM, MODEL, EXACT = case("table", 1.0)
# of two tokens, so that the table can be the posterior: the places after these prompts have contexts of their own
TWO = tilted(LM, score_table(1, tokens=2, scale=1.5))
EXACT_TWO = Exact().run(TWO, PROMPTS)
FAST = {"num_particles": 32, "learning_rate": 0.1, "num_samples": 8, "seed": 0, "progress": False}
GOLD = functools.partial(tilted(LM, score_table(5)), PROMPTS)
SMALL = {"num_steps": 12, "num_samples": 16, "seed": 0, "progress": False, "checkpoint_every": 5}


class Killed(BaseException):
    """As sudden as Ctrl-C, and not taken for it."""


def killer(step: int):
    def on_step(done: int, policy: object) -> None:
        if done == step:
            raise Killed

    return on_step


def topical(prompts):
    """Other latents before the completion: one with AutoNormal's parameters, one with free logits."""
    with pyro.plate("prompts", len(prompts)):
        level = pyro.sample("level", dist.Normal(0.0, 1.0))
        topic = pyro.sample("topic", dist.Categorical(torch.tensor([0.3, 0.7])))
        x = pyro.sample("completion", LM(prompts, max_new_tokens=3))
        pyro.factor("reward", level * (x[..., 0] == topic + 1))
        pyro.factor("own", pyro.param("weight", torch.tensor(0.5)) * (x[..., 1] == 2))


def batches(prompts):
    """A prompt a step."""
    with pyro.plate("prompts", len(prompts), subsample_size=1) as chosen:
        x = pyro.sample("completion", LM([prompts[i] for i in chosen], max_new_tokens=3))
        pyro.factor("reward", 1.0 * (x == 2).sum(-1))


def fickle(prompts):
    """A reward with random numbers of its own, of Python's and of NumPy's."""
    with pyro.plate("prompts", len(prompts)):
        x = pyro.sample("completion", LM(prompts, max_new_tokens=3))
        noise = random.random() + np.random.standard_normal()  # noqa: NPY002  (the generator that rewards may use)
        pyro.factor("reward", 1.0 * (x == 2).sum(-1) + noise)


def log_probs(lm) -> torch.Tensor:
    """Of every completion of `TWO`, (value, prompt)."""
    with torch.no_grad():
        return lm(PROMPTS, 2).log_prob(torch.as_tensor(EXACT_TWO.samples["completion"][0])).double()


def kl_of(policy, gamma: float = 1.0) -> float:
    """KL(q || the posterior of `TWO` at an inverse temperature), the mean over prompts."""
    log_q = log_probs(policy)
    target = (log_probs(LM) + gamma * torch.as_tensor(EXACT_TWO.log_likelihood["reward"][0])).log_softmax(0)
    return float((log_q.exp() * (log_q - target)).sum(0).mean())


def assert_same(one, other) -> None:
    """The same to the bit, but for the clock."""
    assert one.stats.keys() == other.stats.keys()
    for key in one.stats.keys() - {"seconds"}:
        assert np.array_equal(np.asarray(one.stats[key]), np.asarray(other.stats[key]), equal_nan=True), key
    for name, value in one.samples.items():
        assert (value == other.samples[name]).all(), name
    assert (one.log_weights == other.log_weights).all()
    for p, q in zip(one.policy.parameters(), other.policy.parameters(), strict=True):
        assert torch.equal(p, q)


# -- going on from a checkpoint ------------------------------------------------------------------------------

RUNS = {
    "elbo": (MODEL, {"held_out": HeldOut({"gold": GOLD}, every=4, num_particles=4), "stop": Plateau(3, -0.5)}),
    "replay": (MODEL, {"objective": LogVariance(8, Replay(20)), "temperature": Tempering(), "num_chains": 2}),
    "average": (MODEL, {"objective": ReverseKL(2, baseline=ExponentialAverage()), "temperature": KLTarget(0.5)}),
    "latents": (topical, {"num_chains": 2}),
    "no gradient": (topical, {"objective": LogVariance(4)}),  # which gives the program's own parameter none
    "critic": (MODEL, {"objective": ReverseKL(4, Critic())}),
    "fickle": (fickle, {}),
    "minibatches": (batches, {"objective": LogVariance(4, Replay(20, every=2))}),
    "lora": (tilted(tiny_llama(seed=1), score_table(1)), {"lora_rank": 2}),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_that_was_killed_ends_as_if_it_had_not_been(name, tmp_path):
    model, settings = RUNS[name]
    settings = SMALL | settings
    whole = SVI(**settings).run(model, PROMPTS)
    for step in (7, 11, 2):  # each time the run goes further: from 5, from 10, into a second chain
        with contextlib.suppress(Killed):
            SVI(**settings, checkpoint=tmp_path, on_step=killer(step)).run(model, PROMPTS)
    torch.manual_seed(1)  # whatever the process did meanwhile
    assert_same(SVI(**settings, checkpoint=tmp_path).run(model, PROMPTS), whole)
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"chain-{i}" for i in range(settings.get("num_chains", 1))]
    assert_same(SVI(**settings, checkpoint=tmp_path).run(model, PROMPTS), whole)  # nothing left to train


SCRIPT = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import safetensors.torch
from bayeslm.inference import checkpoints
from test_training import MODEL, PROMPTS, SMALL, SVI, LogVariance, Replay

write = checkpoints.save_file
def dies(tensors, path):
    write(tensors, path)
    if "step-10" in str(path):
        with open(path, "r+b") as file:
            file.truncate(100)
        os.kill(os.getpid(), signal.SIGKILL)
checkpoints.save_file = dies
SVI(**SMALL, objective=LogVariance(8, Replay()), checkpoint=sys.argv[1]).run(MODEL, PROMPTS)
"""


def test_killed_while_it_writes_a_checkpoint(tmp_path):
    """SIGKILL with half of the second checkpoint written: the first stands, and the run ends the same."""
    script = SCRIPT.format(tests=str(Path(__file__).parent))
    assert subprocess.run([sys.executable, "-c", script, tmp_path / "run"]).returncode == -9
    left = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert left[-1] == "chain-0-step-5"
    assert left[0].startswith(".chain-0-step-10")
    settings = SMALL | {"objective": LogVariance(8, Replay())}
    again = SVI(**settings, checkpoint=tmp_path / "run").run(MODEL, PROMPTS)
    assert_same(again, SVI(**settings).run(MODEL, PROMPTS))
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["chain-0"]


@pytest.mark.long
def test_killed_at_any_moment(tmp_path):
    """SIGKILL after random times, until a run comes through."""
    tests = str(Path(__file__).parent)
    script = f"import sys; sys.path.insert(0, {tests!r}); from test_training import *; " + (
        "SVI(**LONG, checkpoint=sys.argv[1]).run(MODEL, PROMPTS)"
    )
    waits = np.random.default_rng(0).uniform(0.0, 4.0, 30)
    kills = 0
    for wait in waits:
        process = subprocess.Popen([sys.executable, "-c", script, tmp_path])
        while process.poll() is None and not any(tmp_path.glob("*")):
            pass
        try:
            process.wait(wait)
            break
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
    assert kills >= 2
    assert_same(SVI(**LONG, checkpoint=tmp_path).run(MODEL, PROMPTS), SVI(**LONG).run(MODEL, PROMPTS))


LONG = SMALL | {"num_steps": 300, "checkpoint_every": 1, "objective": LogVariance(8, Replay())}


@pytest.mark.parametrize(
    "make",
    [
        lambda: None,
        lambda: LogVariance(8, Replay(every=2)),
        lambda: ReverseKL(8, ExponentialAverage()),
        lambda: ReverseKL(8, Critic()),
    ],
    ids=["leave-one-out", "replay", "average", "critic"],
)
@pytest.mark.parametrize("raised", [ConnectionError, KeyboardInterrupt])
def test_a_reward_that_raises_in_mid_run_loses_nothing(tmp_path, make, raised):
    """No step: what there was before it is written, though the next checkpoint was far."""
    calls = []

    def model(prompts):
        with pyro.plate("prompts", len(prompts)):
            x = pyro.sample("completion", LM(prompts, max_new_tokens=TOKENS))
            calls.append(1)
            torch.rand(())  # as rewards may
            if len(calls) == 5:
                raise raised("the judge does not answer")
            pyro.factor("reward", 0.5 * (x == 2).sum(-1))

    settings = SMALL | {"checkpoint_every": 50}
    engine = SVI(**settings, objective=make(), checkpoint=tmp_path)
    if raised is KeyboardInterrupt:
        done = engine.run(model, PROMPTS).stats["steps"]
    else:
        with pytest.raises(raised) as caught:
            engine.run(model, PROMPTS)
        notes = "\n".join(caught.value.__notes__)
        done = int(re.search(r"stopped at step (\d+)", notes)[1])
        assert f"chain-0-step-{done}" in notes
        assert caught.value.policy is not None
    assert done in (3, 6)  # the first call was the look at the program; replay has one in two steps
    assert (tmp_path / f"chain-0-step-{done}").exists()
    assert_same(engine.run(model, PROMPTS), SVI(**settings, objective=make()).run(model, PROMPTS))


def test_a_step_that_is_broken_off_after_it_moved_the_guide(tmp_path):
    """Such a place cannot be gone on from: the checkpoint before it is."""
    broken = []

    def stop(history):
        if len(history["elbo"]) == 7 and not broken:
            broken.append(1)
            raise ConnectionError
        return False

    engine = SVI(**SMALL, stop=stop, checkpoint=tmp_path)
    with pytest.raises(ConnectionError):
        engine.run(MODEL, PROMPTS)
    assert [path.name for path in tmp_path.iterdir()] == ["chain-0-step-5"]
    assert_same(engine.run(MODEL, PROMPTS), SVI(**SMALL).run(MODEL, PROMPTS))


def test_interrupted_in_the_first_step_of_a_second_chain():
    """What the first chain has learned is kept."""
    steps = []

    def on_step(done: int, policy: object) -> None:
        steps.append(done)
        if len(steps) == SMALL["num_steps"] + 2:
            raise KeyboardInterrupt

    run = SVI(**SMALL, num_chains=2, on_step=on_step).run(MODEL, PROMPTS)
    assert run.stats["elbo"].shape[:2] == (1, SMALL["num_steps"])
    assert run.stats["interrupted"]


def test_kept_scores_do_not_outlive_a_step():
    """Adam's fused kernel does not tell torch that it changed the weights; its user has to."""
    law, seen = [], []

    def on_step(done: int, policy: object) -> None:
        law.append(law[0] if law else policy(PROMPTS, 3))
        with torch.no_grad():
            seen.append(law[0].log_prob(VALUE).sum().item())

    SVI(**SMALL, on_step=on_step).run(tilted(LM, score_table(1, tokens=3)), PROMPTS)
    assert len(set(seen)) == len(seen)


VALUE = torch.tensor([[1, 2, 3], [4, 5, 6]])


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path):
    """The system refuses files of more than 4 kB from step 6 on, as a full disk would."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def on_step(done: int, policy: object) -> None:
        if done == 6:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))

    try:
        with pytest.warns(UserWarning, match=r"no checkpoint .*step-10.*step-5 is kept, and the training goes on"):
            run = SVI(**SMALL, checkpoint=tmp_path, on_step=on_step).run(MODEL, PROMPTS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in tmp_path.iterdir()] == ["chain-0-step-5"]
    assert_same(SVI(**SMALL, checkpoint=tmp_path).run(MODEL, PROMPTS), run)


OTHERS = {
    "learning_rate was 0.001 and is 0.01": {"learning_rate": 0.01},
    'objective: type was "ReverseKL" and is "LogVariance"': {"objective": LogVariance(8)},
    "log p of 'reward'": {"model": tilted(LM, score_table(1), 0.5)},
    "weights of the prior": {"model": tilted(table_lm(order=3, seed=2), score_table(1))},
    "tokens of the prompts": {"prompts": [[2, 3, 4], [6, 5]]},
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    SVI(**SMALL, checkpoint=folder).run(MODEL, PROMPTS)
    return folder


@pytest.mark.parametrize("says", OTHERS)
def test_a_checkpoint_of_another_run_is_refused_with_what_differs(finished, says):
    other = {"model": MODEL, "prompts": PROMPTS} | OTHERS[says]
    model, prompts = other.pop("model"), other.pop("prompts")
    with pytest.raises(ValueError, match="is a checkpoint of another run") as caught:
        SVI(**SMALL | other, checkpoint=finished).run(model, prompts)
    assert says in str(caught.value)
    if "prompts" not in says:  # which are told by their texts as well
        differences = str(caught.value).partition("another run: ")[2].partition(". Run what")[0].split("; ")
        # nothing else differs: of an objective its settings do, and a reward of other numbers is another program
        may = (says.partition(" was")[0].partition(": type")[0], *(["program: with"] if "log p" in says else []))
        assert all(difference.startswith(may) for difference in differences), differences


def test_checkpoints_that_cannot_be_read_are_refused(finished, tmp_path):
    def copied(name: str) -> Path:
        folder = tmp_path / name / "chain-0"
        folder.mkdir(parents=True)
        for path in (finished / "chain-0").iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        return folder

    header = copied("version") / "checkpoint.json"
    header.write_text(header.read_text().replace('"version": "', '"version": "9.'))
    with pytest.raises(ValueError, match=r"version was \"9\."):
        SVI(**SMALL, checkpoint=tmp_path / "version").run(MODEL, PROMPTS)
    tensors = copied("cut") / "tensors.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:500])
    with pytest.raises(ValueError, match="no checkpoint that can be read"):
        SVI(**SMALL, checkpoint=tmp_path / "cut").run(MODEL, PROMPTS)
    guide = policy_guide(LM.policy(), TOKENS)
    SVI(**SMALL, guide=guide, checkpoint=tmp_path / "guide").run(MODEL, PROMPTS)
    named = json.loads((tmp_path / "guide/chain-0/checkpoint.json").read_text())["run"]["guide"]
    assert "guide" in named["function"]


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
    assert describe(make(1)) == describe(make(1)) != describe(make(2))


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


def test_ctrl_c_in_the_first_look_at_held_out_programs():
    def interrupts():
        raise KeyboardInterrupt

    run = SVI(**SMALL, held_out=HeldOut({"gold": interrupts})).run(MODEL, PROMPTS)
    assert run.stats["interrupted"]


def test_what_svi_cannot_train():
    with pytest.raises(ValueError, match="num_particles=64, and the objective has 8"):
        SVI(num_particles=64, objective=LogVariance())
    frozen = LM.policy()
    frozen.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameters that require a gradient"):
        SVI(**SMALL, guide=policy_guide(frozen, TOKENS)).run(MODEL, PROMPTS)


def test_what_a_checkpoint_tells_apart_beside_plain_numbers():
    given, others = (describe(FDivergence(log_evidence=[0.0, x])) for x in (1.0, 2.0))
    assert given != others
    given, others = (describe(FDivergence(log_evidence=torch.tensor([0.0, x]))) for x in (1.0, 2.0))
    assert given != others
    same, other, changed = (
        describe(np.array([f"text {number}", None], dtype=object))
        for number in (1, 1, 2)  # three objects in memory
    )
    assert same == other != changed
    same, other, changed = (tiny_llama(seed=seed).packed() for seed in (0, 0, 1))  # weights that cannot be read
    assert digest(same) == digest(other) != digest(changed)


# -- numbers that go wrong -----------------------------------------------------------------------------------


class Infinite(ReverseKL):
    """An ELBO that is lost in its seventh step."""

    def estimate(self, program, guide):
        loss = super().estimate(program, guide)
        self.calls = getattr(self, "calls", 0) + 1
        return loss * (torch.inf if self.calls == 7 else 1.0)


def test_what_is_not_finite_stops_with_step_prompt_texts_and_checkpoint(tmp_path):
    with pytest.raises(FloatingPointError, match=r"the loss is -?(inf|nan)") as caught:
        SVI(**SMALL, objective=Infinite(4), checkpoint=tmp_path).run(MODEL, PROMPTS)
    notes = "\n".join(caught.value.__notes__)
    for part in ("step 6", "of particle", "completion of 'b c d'", "chain-0-step-6"):
        assert part in notes or part.replace("b c d", "e f") in notes, notes
    assert caught.value.draws["completion"].shape == (4, 2, TOKENS)
    assert all(p.isfinite().all() for p in caught.value.policy.parameters())


# -- temperature and stopping --------------------------------------------------------------------------------


def test_tempering_ends_at_the_posterior():
    run = SVI(**FAST, num_steps=200, temperature=Tempering(0.1, share=0.5)).run(TWO, PROMPTS)
    gamma = run.stats["inverse_temperature"][0]
    assert gamma[0] == 0.1
    assert gamma[50] == pytest.approx(0.1**0.5)
    assert (gamma[100:] == 1.0).all()
    assert (np.diff(gamma[:101]) > 0).all()
    assert kl_of(run.policy) < 0.01


def test_a_kl_target_is_held():
    """By enumeration of the policy's own KL to the prior, within a tenth; beta moves there from far away."""
    target = 0.3
    run = SVI(**FAST, num_steps=300, temperature=KLTarget(target)).run(TWO, PROMPTS)
    gamma = float(run.stats["inverse_temperature"][0, -1])
    assert gamma < 0.7  # at beta 1 it would have ended elsewhere
    log_q = log_probs(run.policy)
    assert float((log_q.exp() * (log_q - log_probs(LM))).sum(0).mean()) == pytest.approx(target, rel=0.1)
    assert kl_of(run.policy, gamma) < 0.03  # it is the posterior of that beta
    assert kl_of(run.policy) > 0.1  # and not the program's
    for kl, error in ((2.2, 0.1), (1.0, -0.2), (9.0, 0.2), (2.0, 0.0)):
        assert KLTarget(2.0, gain=0.5).after(3.0, 0.0, kl) == pytest.approx(3.0 / (1.0 + 0.5 * error))


def test_stopping_near_the_posterior():
    """What is estimated when it stops is near the truth; of two chains the one that ends first has NaN after."""
    settings = FAST | {"learning_rate": 0.03, "num_chains": 2, "schedule": "constant"}
    run = SVI(**settings, num_steps=500, stop=NearPosterior(0.05, window=10)).run(TWO, PROMPTS)
    ends = np.isfinite(run.stats["elbo"][..., 0]).sum(1)
    assert 10 <= ends.min() < ends.max() == run.stats["steps"] < 400
    assert run.stats["elbo"].shape == (2, ends.max(), 2)
    assert abs(kl_of(run.policy) - 0.05) < 0.02


def test_stopping_on_a_plateau():
    run = SVI(**FAST | {"schedule": "constant"}, num_steps=500, stop=Plateau(window=40)).run(TWO, PROMPTS)
    assert 80 <= run.stats["steps"] < 500
    assert kl_of(run.policy) < 0.03
    rising = {"elbo": [np.array([0.1 * i, 0.0]) for i in range(20)]}
    assert not Plateau(window=10, nats=0.4)(rising)
    assert Plateau(window=10, nats=0.6)(rising)
    moving = rising | {"inverse_temperature": [np.array(0.05 * i) for i in range(20)]}
    assert not Plateau(window=10, nats=0.6)(moving)


# -- what is looked at beside --------------------------------------------------------------------------------


def test_held_out_programs_are_seen_as_they_are():
    """The last look against enumeration: 4.5 standard errors, false alarm 7e-6 a number."""
    held_out = HeldOut({"gold": GOLD}, every=10, num_particles=2000)
    settings = {"num_steps": 25, "learning_rate": 0.05, "num_samples": 8, "seed": 0, "progress": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        run = SVI(**settings, held_out=held_out).run(MODEL, PROMPTS)
        assert_same(run, SVI(**settings, held_out=held_out).run(MODEL, PROMPTS))
    assert run.stats["held_out_steps"] == [0, 10, 20, 25]
    exact = Exact().run(GOLD.func, PROMPTS)
    values = torch.as_tensor(exact.samples["completion"][0])
    with torch.no_grad():
        q = run.policy(PROMPTS, TOKENS).log_prob(values).double().exp().numpy()
    truth = (q * exact.log_likelihood["reward"][0]).sum(0)
    error = run.stats["gold_log_likelihood"][0, -1] - truth
    assert (np.abs(error) < 4.5 * run.stats["gold_log_likelihood_stderr"][0, -1]).all()
    assert (np.abs(run.stats["gold_kl"][0, 0]) < 1e-5).all()  # it began as the prior
    plain = SVI(**settings).run(MODEL, PROMPTS)
    assert (plain.stats["elbo"] == run.stats["elbo"]).all()  # and looking changes nothing


def test_over_optimisation_is_warned_of():
    opposed = functools.partial(tilted(LM, -score_table(1, tokens=2, scale=1.5)), PROMPTS)
    settings = FAST | {"num_steps": 60}
    with pytest.warns(UserWarning, match="over-optimisation: the log-likelihood of 'opposed'"):
        SVI(**settings, held_out=HeldOut({"opposed": opposed})).run(TWO, PROMPTS)
    same = functools.partial(TWO, PROMPTS)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        SVI(**settings, held_out=HeldOut({"same": same})).run(TWO, PROMPTS)


def test_tensorboard_gets_every_step(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = SMALL | {"held_out": HeldOut({"gold": GOLD}, every=6, num_particles=4), "num_chains": 2}
    run = SVI(**settings, log=TensorBoard(tmp_path)).run(MODEL, PROMPTS)
    events = EventAccumulator(str(tmp_path)).Reload()
    elbo = events.Scalars("elbo")
    assert [event.step for event in elbo] == list(range(1, 25))
    np.testing.assert_allclose([event.value for event in elbo], run.stats["elbo"].mean(-1).ravel(), rtol=1e-5)
    assert [event.step for event in events.Scalars("held_out/gold_kl")] == [6, 12, 18, 24]


def test_mistakes():
    with pytest.raises(ValueError, match="start must be in"):
        Tempering(start=0.0)
    with pytest.raises(ValueError, match="nats must be positive"):
        KLTarget(-1.0)
    with pytest.raises(ValueError, match="programs is empty"):
        HeldOut({})
    with pytest.raises(ValueError, match="checkpoint_every"):
        SVI(checkpoint_every=0)
    with pytest.raises(ValueError, match="has none as its attribute"):
        SVI(**SMALL, guide=policy_guide(LM.policy(), TOKENS), held_out=HeldOut({"gold": GOLD})).run(MODEL, PROMPTS)
    stock = pyro.infer.Trace_ELBO(num_particles=2, vectorize_particles=True, max_plate_nesting=1)
    with pytest.raises(ValueError, match="temperature moves that of an objective"):
        SVI(**SMALL, objective=stock, temperature=Tempering()).run(MODEL, PROMPTS)
    SVI(**SMALL, objective=stock, held_out=HeldOut({"gold": GOLD}, num_particles=2)).run(MODEL, PROMPTS)
    objective = LogVariance(8, FromPosterior(EXACT))
    with pytest.raises(ValueError, match="draws whose law is known"):
        SVI(**SMALL, objective=objective, stop=NearPosterior()).run(MODEL, PROMPTS)


def test_errors_of_what_looks_on_tell_step_and_checkpoint(tmp_path):
    def on_step(done, policy):
        if done == 7:
            raise RuntimeError("no more")

    with pytest.raises(RuntimeError) as caught:
        SVI(**SMALL, on_step=on_step, checkpoint=tmp_path).run(MODEL, PROMPTS)
    notes = "\n".join(caught.value.__notes__)
    assert "stopped at step 7" in notes
    assert "chain-0-step-5" in notes


def test_a_wrong_reward_in_a_minibatch_names_the_prompt_of_all():
    prompts = [[1], [2], [3], [4]]

    def model(prompts):
        with pyro.plate("prompts", len(prompts), subsample_size=1) as batch:
            pyro.sample("completion", LM([prompts[int(batch[0])]], max_new_tokens=TOKENS))
            wrong = torch.inf if batch[0] == 2 and torch.is_grad_enabled() else 0.0
            pyro.factor("reward", torch.tensor([wrong]))

    with pytest.raises(ProgramError, match="particle 0, prompt 2"):
        SVI(**SMALL).run(model, prompts)
