"""Long runs of SVI: callbacks that move beta, stop, evaluate and log; interruptions and errors."""

from __future__ import annotations

import dataclasses
import functools
import warnings

import numpy as np
import pyro
import pytest
import torch
from support.disks import full_disk
from support.gradients import policy_guide
from support.programs import PROMPTS, TOKENS, score_table, tilted
from support.trainings import EXACT, FAST, GOLD, LM, MODEL, SMALL, TWO, assert_same, batches, every_5, kl_of, log_probs

from bayeslm import DiagnosticsWarning
from bayeslm.inference import SVI, Exact, ProgramError, RunError
from bayeslm.inference.training import (
    Adam,
    Checkpointing,
    FromPosterior,
    HeldOut,
    KLTarget,
    LogVariance,
    NearPosterior,
    Plateau,
    ReverseKL,
    StepRecord,
    Tempering,
    TensorBoard,
)

AT_START = StepRecord(step=0, num_steps=30, chain=0, is_last=False, policy=None, inverse_temperature=1.0)
VALUE = torch.tensor([[1, 2, 3], [4, 5, 6]])


def test_interrupted_in_the_first_step_of_a_second_chain():
    """What the first chain has learned is kept."""
    steps = []

    def interrupt(record: StepRecord) -> None:
        steps.append(record.step)
        if len(steps) == SMALL["num_steps"] + 2:
            raise KeyboardInterrupt

    run = SVI(**SMALL, num_chains=2, callbacks=[interrupt]).run(MODEL, PROMPTS)
    assert run.stats["elbo"].shape[:2] == (1, SMALL["num_steps"])
    assert run.stats["interrupted"]


def test_kept_scores_do_not_outlive_a_step():
    """Adam's fused kernel does not tell torch that it changed the weights; its user has to."""
    kept, seen = [], []

    def score(record: StepRecord) -> None:
        kept.append(kept[0] if kept else record.policy(PROMPTS, 3))
        with torch.no_grad():
            seen.append(kept[0].log_prob(VALUE).sum().item())

    SVI(**SMALL, callbacks=[score]).run(tilted(LM, score_table(1, tokens=3)), PROMPTS)
    assert len(set(seen)) == len(seen)


def test_ctrl_c_in_the_first_evaluation_of_held_out_programs():
    def interrupts():
        raise KeyboardInterrupt

    run = SVI(**SMALL, callbacks=[HeldOut({"gold": interrupts})]).run(MODEL, PROMPTS)
    assert run.stats["interrupted"]


def test_what_svi_cannot_train():
    with pytest.raises(ValueError, match="num_particles=64, and the objective has 8"):
        SVI(num_particles=64, objective=LogVariance())
    with pytest.raises(TypeError, match=r"callbacks\[0\] must be a Callback or a function, got the class Tempering"):
        SVI(callbacks=[Tempering])
    frozen = LM.policy()
    frozen.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameters that require a gradient"):
        SVI(**SMALL, guide=policy_guide(frozen, TOKENS)).run(MODEL, PROMPTS)


# -- numbers that go wrong -----------------------------------------------------------------------------------


class Infinite(ReverseKL):
    """An ELBO that is lost in its seventh step."""

    def estimate(self, program, guide, state, inverse_temperature):
        calls = state.get("calls", torch.tensor(0)) + 1
        estimate = super().estimate(program, guide, state, inverse_temperature)
        loss = estimate.loss * (torch.inf if calls == 7 else 1.0)
        return dataclasses.replace(estimate, loss=loss, state=estimate.state | {"calls": calls})


def test_what_is_not_finite_stops_with_step_prompt_texts_and_checkpoint(tmp_path):
    with pytest.raises(RunError, match=r"the loss is -?(inf|nan)") as caught:
        SVI(**SMALL, objective=Infinite(4), checkpoint=every_5(tmp_path)).run(MODEL, PROMPTS)
    assert isinstance(caught.value.__cause__, FloatingPointError)
    notes = "\n".join(caught.value.__cause__.__notes__)
    for part in ("step 6", "of particle", "completion of 'b c d'", "chain-0-step-6"):
        assert part in notes or part.replace("b c d", "e f") in notes, notes
    kept = caught.value.so_far
    assert kept.particles.values["completion"].shape == (4, 2, TOKENS)
    assert kept.step == 6
    assert kept.checkpoint.endswith("chain-0-step-6")
    assert all(p.isfinite().all() for p in kept.policy.parameters())


# -- beta and stopping ---------------------------------------------------------------------------------------


def test_tempering_ends_at_the_posterior():
    run = SVI(**FAST, num_steps=120, callbacks=[Tempering(0.1, share=0.5)]).run(TWO, PROMPTS)
    gamma = run.stats["inverse_temperature"][0]
    assert gamma[0] == 0.1
    assert gamma[30] == pytest.approx(0.1**0.5)
    assert (gamma[60:] == 1.0).all()
    assert (np.diff(gamma[:61]) > 0).all()
    assert kl_of(run.policy) < 0.01


def test_a_kl_target_is_held():
    """By enumeration of the policy's own KL to the prior, within a tenth; beta moves there from far away."""
    target = 0.3
    run = SVI(**FAST, num_steps=300, callbacks=[KLTarget(target)]).run(TWO, PROMPTS)
    gamma = float(run.stats["inverse_temperature"][0, -1])
    assert gamma < 0.7  # at beta 1 it would have ended elsewhere
    log_q = log_probs(run.policy)
    assert float((log_q.exp() * (log_q - log_probs(LM))).sum(0).mean()) == pytest.approx(target, rel=0.1)
    assert kl_of(run.policy, gamma) < 0.03  # it is the posterior of that beta
    assert kl_of(run.policy) > 0.1  # and not the program's
    for kl, error in ((2.2, 0.1), (1.0, -0.2), (9.0, 0.2), (2.0, 0.0)):
        record = dataclasses.replace(AT_START, inverse_temperature=3.0, figures={"kl": kl})
        reply = KLTarget(2.0, gain=0.5).step(record, {})
        assert reply.inverse_temperature == pytest.approx(3.0 / (1.0 + 0.5 * error))


def test_stopping_near_the_posterior():
    """What is estimated when it stops is near the truth; of two chains the one that ends first has NaN after."""
    settings = FAST | {"optimizer": Adam(0.03, schedule="constant"), "num_chains": 2}
    run = SVI(**settings, num_steps=500, callbacks=[NearPosterior(0.05, window=10)]).run(TWO, PROMPTS)
    ends = np.isfinite(run.stats["elbo"][..., 0]).sum(1)
    assert 10 <= ends.min() < ends.max() == run.stats["steps"] < 400
    assert run.stats["elbo"].shape == (2, ends.max(), 2)
    assert abs(kl_of(run.policy) - 0.05) < 0.02


def test_stopping_on_a_plateau():
    settings = FAST | {"optimizer": Adam(0.1, schedule="constant")}
    run = SVI(**settings, num_steps=500, callbacks=[Plateau(window=40)]).run(TWO, PROMPTS)
    assert 80 <= run.stats["steps"] < 500
    assert kl_of(run.policy) < 0.03
    rising = {"elbo": [np.array([0.1 * i, 0.0]) for i in range(20)], "inverse_temperature": 20 * [np.array(1.0)]}
    record = dataclasses.replace(AT_START, step=20, history=rising)
    assert not Plateau(window=10, nats=0.4).step(record, {}).stop
    assert Plateau(window=10, nats=0.6).step(record, {}).stop
    moving = rising | {"inverse_temperature": [np.array(0.05 * i) for i in range(20)]}
    assert Plateau(window=10, nats=0.6).step(dataclasses.replace(record, history=moving), {}) is None


# -- evaluation and logs -------------------------------------------------------------------------------------


def test_held_out_programs_are_evaluated_without_bias():
    """The last evaluation against enumeration: 4.5 standard errors, false alarm 7e-6 a number."""
    held_out = HeldOut({"gold": GOLD}, every=10, num_particles=800)
    settings = {"num_steps": 25, "optimizer": Adam(0.05), "num_samples": 8, "seed": 0, "progress": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        run = SVI(**settings, callbacks=[held_out]).run(MODEL, PROMPTS)
        assert_same(run, SVI(**settings, callbacks=[held_out]).run(MODEL, PROMPTS))
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
    assert (plain.stats["elbo"] == run.stats["elbo"]).all()  # and evaluating changes nothing


def test_over_optimisation_is_warned_of():
    opposed = functools.partial(tilted(LM, -score_table(1, tokens=2, scale=1.5)), PROMPTS)
    settings = FAST | {"num_steps": 30}
    with pytest.warns(UserWarning, match="over-optimisation: the log-likelihood of 'opposed'"):
        SVI(**settings, callbacks=[HeldOut({"opposed": opposed})]).run(TWO, PROMPTS)
    same = functools.partial(TWO, PROMPTS)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.simplefilter("ignore", DiagnosticsWarning)  # of 8 draws
        SVI(**settings, callbacks=[HeldOut({"same": same})]).run(TWO, PROMPTS)


def test_tensorboard_gets_every_step(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    callbacks = [HeldOut({"gold": GOLD}, every=6, num_particles=4), TensorBoard(tmp_path, texts_every=5)]
    run = SVI(**SMALL, num_chains=2, optimizer=Adam(), callbacks=callbacks).run(MODEL, PROMPTS)
    events = EventAccumulator(str(tmp_path)).Reload()
    elbo = events.Scalars("elbo")
    assert [event.step for event in elbo] == list(range(1, 25))
    np.testing.assert_allclose([event.value for event in elbo], run.stats["elbo"].mean(-1).ravel(), rtol=1e-5)
    assert [event.step for event in events.Scalars("held_out/gold_kl")] == [6, 12, 18, 24]
    rates = [event.value for event in events.Scalars("learning_rate")]
    np.testing.assert_allclose(rates, 2 * [1e-3 * (1 - done / 12) for done in range(12)], rtol=1e-5)
    assert all(event.value > 0 for event in events.Scalars("samples_per_second"))
    assert "prompts" not in events.Tags()["scalars"]
    shown = events.Tensors("completions/text_summary")
    assert [event.step for event in shown] == [5, 10, 12, 17, 22, 24]
    header, _, *rows = shown[-1].tensor_proto.string_val[0].decode().split("\n")
    assert header == "| prompt | completion | r / β |"
    assert len(rows) == len(PROMPTS)


def test_texts_are_shown_with_their_prompts_and_rewards():
    """Of a minibatch the prompt's own; r / beta is the program's at the completion."""
    rows: list[tuple[str, str, float]] = []

    def log(record: StepRecord) -> None:
        assert record.step == 0 or "samples_per_second" in record.figures
        if record.step and record.step % 3 == 0:
            rows.extend(record.texts())

    SVI(**SMALL, callbacks=[log]).run(batches, ["a a", "b", "c c"])
    assert len(rows) == 4
    assert len({prompt for prompt, _, _ in rows}) > 1
    assert {prompt for prompt, _, _ in rows} <= {"a a", "b", "c c"}
    for _, text, log_likelihood in rows:
        assert log_likelihood == text.split().count("b")  # token 2


def test_an_error_in_a_later_chain_carries_the_policies_of_all():
    calls = []

    def fail(record: StepRecord) -> None:
        calls.append(record.step)
        if len(calls) == 20:  # of 13 a chain
            raise ConnectionError("gone")

    with pytest.raises(RunError, match=r"ConnectionError: gone(.|\n)*2 trained policies") as caught:
        SVI(**SMALL, num_chains=2, callbacks=[fail]).run(TWO, PROMPTS)
    assert isinstance(caught.value.__cause__, ConnectionError)
    first, second = caught.value.so_far.policies
    assert caught.value.so_far.policy is second
    whole = SVI(**SMALL).run(TWO, PROMPTS)
    assert (log_probs(first) == log_probs(whole.policy)).all()
    assert (log_probs(second) != log_probs(first)).any()


def test_mistakes():
    with pytest.raises(ValueError, match="first must be a number in"):
        Tempering(first=0.0)
    with pytest.raises(ValueError, match="nats must be positive"):
        KLTarget(-1.0)
    with pytest.raises(ValueError, match="programs is empty"):
        HeldOut({})
    with pytest.raises(ValueError, match="Checkpointing: every"):
        Checkpointing("run", every=0)
    with pytest.raises(ValueError, match="has none as its attribute"):
        SVI(**SMALL, guide=policy_guide(LM.policy(), TOKENS), callbacks=[HeldOut({"gold": GOLD})]).run(MODEL, PROMPTS)
    stock = pyro.infer.Trace_ELBO(num_particles=2, vectorize_particles=True, max_plate_nesting=1)
    with pytest.raises(ValueError, match="moves the inverse temperature of an objective, and Trace_ELBO has none"):
        SVI(**SMALL, objective=stock, callbacks=[Tempering()]).run(MODEL, PROMPTS)
    with pytest.raises(RunError, match="ValueError: KLTarget: this objective does not estimate KL"):
        SVI(**SMALL, objective=stock, callbacks=[KLTarget(1.0)]).run(MODEL, PROMPTS)
    SVI(**SMALL, objective=stock, callbacks=[HeldOut({"gold": GOLD}, num_particles=2)]).run(MODEL, PROMPTS)
    objective = LogVariance(8, FromPosterior(EXACT))
    with pytest.raises(RunError, match="does not know the density of its particles"):
        SVI(**SMALL, objective=objective, callbacks=[NearPosterior()]).run(MODEL, PROMPTS)


def test_a_wrong_reward_in_a_minibatch_names_the_prompt_of_all():
    prompts = [[1], [2], [3], [4]]

    def model(prompts):
        with pyro.plate("prompts", len(prompts), subsample_size=1) as batch:
            pyro.sample("completion", LM([prompts[int(batch[0])]], max_new_tokens=TOKENS))
            wrong = torch.inf if batch[0] == 2 and torch.is_grad_enabled() else 0.0
            pyro.factor("reward", torch.tensor([wrong]))

    with pytest.raises((ProgramError, RunError), match="particle 0, prompt 2") as caught:
        SVI(**SMALL).run(model, prompts)
    assert ProgramError in (type(caught.value), type(caught.value.__cause__))


def test_a_full_disk_ends_the_curves_of_tensorboard_alone(tmp_path):
    with full_disk(2000), pytest.warns(UserWarning, match="no more curves in .*the training continues"):
        run = SVI(**SMALL, callbacks=[TensorBoard(tmp_path)]).run(MODEL, PROMPTS)
    plain = SVI(**SMALL).run(MODEL, PROMPTS)
    np.testing.assert_array_equal(run.stats["elbo"], plain.stats["elbo"])
