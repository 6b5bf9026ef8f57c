"""A training that several processes do together: its gradient, its law, its decisions, its end."""

from __future__ import annotations

import os
import signal
import threading
import time
from dataclasses import replace
from functools import partial
from unittest import mock

import numpy as np
import pyro
import pytest
import torch
from support.enumerated import BETA, PROMPTS, Problem, T
from support.models import table_lm, tiny_llama
from support.oracles import kl_to
from support.programs import SHORT, score_table, tilted
from support.ranks import launch

from bayeslm import Posterior
from bayeslm.inference import SVI, Exact, ImportanceSampling, RankError, RunError
from bayeslm.inference.control import StateValues
from bayeslm.inference.program import Ranks, inspect, ranks, run_particles, running
from bayeslm.inference.training import (
    Adam,
    AutoPolicy,
    Checkpointing,
    Critic,
    ExponentialAverage,
    FDivergence,
    ForwardKL,
    FromPosterior,
    HeldOut,
    LogVariance,
    Renyi,
    Replay,
    Reply,
    ReverseKL,
    StatefulLoss,
    Texts,
    TrustRegion,
    of_prior,
)

LM = table_lm(2, seed=0, vocab=4)
TABLE = score_table(0, vocab=4, tokens=3)
MODEL = tilted(LM, TABLE, 0.5)
FAST = partial(SVI, num_steps=12, objective=ReverseKL(8), optimizer=Adam(0.1), num_samples=32, seed=3, progress=False)


@pytest.fixture(scope="module", autouse=True)
def _imported():
    """What engines import when they first run is imported before the forks."""
    FAST(num_steps=2).run(MODEL, SHORT)


@pytest.fixture(scope="module")
def exact():
    return Exact().run(MODEL, SHORT)


def together(objective, problem):
    """The gradient of a step of all processes, (coordinate,), the completions of this one, and the figures of all."""
    loss = StatefulLoss(objective)
    with pyro.get_param_store().scope(), running(5, divided=True):
        loss.loss_and_grads(problem.model, problem.guide, PROMPTS)
        ranks().add_up([p.grad for p in problem.parameters])
    last = loss.last
    return (
        torch.cat([p.grad.reshape(-1) for p in problem.parameters]).numpy(),
        last.particles.values["completion"],
        last.figures,
    )


@pytest.mark.parametrize(
    "make",
    [
        LogVariance,
        partial(LogVariance, truncated=True),
        ForwardKL,
        FDivergence,
        partial(FDivergence, "reverse-kl"),
        Renyi,
    ],
    ids=["log-variance", "truncated", "forward", "jensen-shannon", "reverse", "renyi"],
)
def test_the_gradient_at_given_particles_is_that_of_one_process(make):
    """Losses are no sums over particles: a process must know those of the others. 7 are divided unequally."""
    problem = Problem(seed=1)
    with torch.no_grad():
        given = run_particles(inspect(problem.model, PROMPTS), problem.guide, 7)
    objective = make(num_particles=7)
    objective.source = lambda program, guide, num, state: (given[ranks().rows(num)], state)  # no setting of `Renyi`
    alone, _, _ = together(objective, Problem(seed=1))
    results = launch(lambda rank: together(objective, problem), size=3)
    for found, _, _ in results:
        np.testing.assert_allclose(found, alone, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(torch.cat([x for _, x, _ in results]), given.values["completion"])


@pytest.mark.parametrize("kind", ["reverse", "reverse, no baseline yet", "log-variance", "of the prior"])
def test_the_gradient_at_their_own_draws_is_the_formula_s(kind):
    objective = {
        "reverse": ReverseKL(7),
        "reverse, no baseline yet": ReverseKL(7, ExponentialAverage()),
        "log-variance": LogVariance(7),
        "of the prior": LogVariance(7, of_prior),
    }[kind]
    problem = Problem(seed=1)
    (found, x, figures), (same, others, same_figures) = launch(lambda rank: together(objective, problem))
    np.testing.assert_array_equal(found, same)
    x = torch.cat([x, others])
    assert x.shape == (7, 2, T)
    log_q = problem.policy(PROMPTS, max_new_tokens=T).log_prob(x)
    log_p = problem.lm(PROMPTS, max_new_tokens=T).log_prob(x)
    f = log_p + problem.table[torch.arange(T), x].sum(-1) / BETA - log_q
    if kind == "reverse":
        advantage = f.detach() - (f.detach().sum(0) - f.detach()) / 6
        loss = -(advantage * log_q).mean(0)
    else:
        loss = -(f.detach() * log_q).mean(0) if "baseline" in kind else 0.5 * f.var(0)
    expected = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss.sum(), problem.parameters)])
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    if kind != "of the prior":
        of_all = {"elbo": f.mean(0), "log_evidence": f.logsumexp(0) - np.log(7), "kl": (log_q - log_p).mean(0)}
        for name, figure in of_all.items():
            torch.testing.assert_close(figures[name], figure.detach(), rtol=1e-5, atol=1e-6)
            assert torch.equal(figures[name], same_figures[name])


OBJECTIVES = {
    "default": {},
    "reverse": {"objective": ReverseKL(16), "optimizer": Adam(0.1)},
    "critic": {"objective": ReverseKL(16, Critic()), "optimizer": Adam(0.1)},
    "kept draws": {"objective": LogVariance(16, Replay(64))},
    "of another engine": {"objective": ForwardKL(16), "optimizer": Adam(0.1)},
    "adapters": {"guide": partial(AutoPolicy, lora_rank=2), "objective": ReverseKL(16), "optimizer": TrustRegion()},
}


IN_SUITE = ("default",)


@pytest.mark.parametrize("name", [x if x in IN_SUITE else pytest.param(x, marks=pytest.mark.long) for x in OBJECTIVES])
def test_processes_train_one_policy_towards_the_posterior(name):
    settings = dict(OBJECTIVES[name])
    lm = tiny_llama() if name == "adapters" else LM
    model = tilted(lm, score_table(0, vocab=8, tokens=3), 0.5) if name == "adapters" else MODEL
    exact = Exact().run(model, SHORT)
    if name == "of another engine":
        draws = ImportanceSampling(64, seed=0, progress=False).run(MODEL, SHORT)
        settings["objective"] = ForwardKL(16, FromPosterior(draws))
    engine = FAST(**{"num_steps": 40, "objective": None, "optimizer": TrustRegion()} | settings)

    def run(rank):
        posterior = engine.run(model, SHORT)
        weights = [x.detach().numpy() for x in posterior.policy.parameters()]
        return weights, float(kl_to(exact, posterior.policy, SHORT).mean()), posterior.stats, posterior.log_weights

    one, other = launch(run)
    for x, y in zip(one[0], other[0], strict=True):
        np.testing.assert_array_equal(x, y)
    np.testing.assert_array_equal(one[3], other[3])
    for key in one[2].keys() - {"seconds"}:
        np.testing.assert_equal(one[2][key], other[2][key])
    prior = float(kl_to(exact, lm, SHORT).mean())
    assert one[1] < 0.6 * prior, (one[1], prior)


def test_minibatches_are_the_same_on_all():
    def model(prompts):
        with pyro.plate("prompts", len(prompts), subsample_size=2) as batch:
            x = pyro.sample("completion", LM([prompts[i] for i in batch], max_new_tokens=3))
            pyro.factor("reward", TABLE[torch.arange(3), x].sum(-1))

    prompts = [[1], [2], [3], [1, 2], [2, 3]]
    one, other = launch(lambda rank: FAST(objective=LogVariance(8, Replay(32, every=2))).run(model, prompts))
    np.testing.assert_array_equal(one.stats["prompts"], other.stats["prompts"])
    np.testing.assert_array_equal(one.log_weights, other.log_weights)
    assert len(np.unique(one.stats["prompts"])) == 5


def test_callbacks_are_the_first_s_and_decide_for_all():
    def run(rank):
        calls = []

        def stop(record):
            calls.append(record.step)
            return Reply(stop=rank == 0 and record.step == 5, inverse_temperature=0.5 + rank)

        held_out = HeldOut({"other": partial(MODEL, SHORT[:1])}, every=2, num_particles=4)
        return calls, FAST(callbacks=[stop, held_out]).run(MODEL, SHORT).stats

    (calls, stats), (none, same) = launch(run)
    assert calls == [0, 1, 2, 3, 4, 5]
    assert none == []
    assert stats["steps"] == same["steps"] == 5
    for key in stats.keys() - {"seconds"}:
        np.testing.assert_equal(stats[key], same[key])
    np.testing.assert_array_equal(stats["inverse_temperature"], [[0.5] * 5])
    assert stats["held_out_steps"] == [0, 2, 4, 5]


def described(run):
    """The message of the `RunError` that a run raises, and what it has so far."""
    with pytest.raises(RunError) as error:
        run()
    return str(error.value), replace(error.value.so_far, particles=None, policies=())


def test_weights_that_differ_stop_the_run_with_both_values():
    def run(rank):
        def spoil(record):  # on the first process alone
            if record.step == 6:
                next(record.policy.parameters()).data += 1e-3

        return described(partial(FAST(callbacks=[spoil]).run, MODEL, SHORT))

    for error, _ in launch(run):
        assert "after step 10, the guide differs between the processes" in error
        assert "its weights: " in error
        assert "on rank 0, " in error


def test_a_source_that_knows_of_no_other_process_is_an_error():
    """Each would learn from as many particles as all should have."""

    def run(rank):
        def own(program, guide, num, state):
            return run_particles(program, guide, num), state

        return FAST(objective=LogVariance(8, own)).run(MODEL, SHORT)

    for error in launch(run):
        assert "the source has returned 8 particles in place of 4" in str(error)


class OwnMean(LogVariance):
    """A loss that takes the mean of one process's particles for that of all."""

    def loss(self, densities):
        return 0.5 * (densities.log_target - densities.log_q).var(0)


def test_a_loss_that_knows_of_no_other_process_is_an_error():
    for error in launch(lambda rank: FAST(objective=OwnMean(8)).run(MODEL, SHORT)):
        assert (
            "in OwnMean, whose sums over particles must be those of inference.training.sums, what is found differs"
            in str(error)
        )


def test_a_pyro_elbo_and_too_few_particles_are_refused():
    def run(rank):
        errors = []
        for objective in (pyro.infer.Trace_ELBO(), ReverseKL(2)):
            try:
                FAST(objective=objective).run(MODEL, SHORT)
            except ValueError as error:
                errors.append(str(error))
        return errors

    for elbo, few in launch(run, size=3):
        assert "Trace_ELBO is a Pyro ELBO, whose particles cannot be divided among 3 processes" in elbo
        assert "num_particles is 2 in all, to divide among 3 processes" in few


def act():
    """Do on rank 1 what the launch's environment says."""
    acts = {
        "die": lambda: os.kill(os.getpid(), signal.SIGKILL),
        "hang": lambda: time.sleep(2.5),
        "be interrupted": lambda: os.kill(os.getpid(), signal.SIGINT),
    }
    if os.environ.get("RANK") == "1" and "ACT" in os.environ:
        acts[os.environ["ACT"]]()


def at_call(when):
    """`MODEL`, which acts at its call number ``when``."""
    calls = 0

    def model(prompts):
        nonlocal calls
        calls += 1
        if calls == when:
            act()
        MODEL(prompts)

    return model


def test_ctrl_c_on_one_ends_the_training_of_all_at_the_same_step():
    def run(rank):
        posterior = FAST(num_steps=200).run(at_call(30), SHORT)
        return posterior.stats["interrupted"], posterior.stats["steps"], posterior.log_weights

    (interrupted, steps, weights), other = launch(run, ACT="be interrupted")
    assert interrupted
    assert 0 < steps < 60
    assert other[:2] == (interrupted, steps)
    np.testing.assert_array_equal(weights, other[2])


@pytest.mark.parametrize("what", ["die", pytest.param("hang", marks=pytest.mark.long)])
def test_a_process_that_dies_or_hangs_ends_the_run_and_the_checkpoint_is_good(what, tmp_path, exact):
    """It is resumed by one process and by three, whose draws have the law of the posterior."""
    engine = FAST(num_steps=40, num_samples=600, checkpoint=Checkpointing(tmp_path, every=5))

    def run(rank):
        return described(partial(engine.run, at_call(40), SHORT))

    start = time.monotonic()
    error, so_far = launch(run, BAYESLM_TIME_LIMIT="1", ACT=what)[0]
    assert time.monotonic() - start < 8.0
    assert "another process of this run has died, or has not answered for 1 seconds" in error
    assert so_far.checkpoint is not None
    results = launch(lambda rank: engine.run(at_call(40), SHORT), size=3)
    alone = engine.run(at_call(40), SHORT)  # what three have finished
    for posterior in (*results, alone):
        assert isinstance(posterior, Posterior)
        assert posterior.stats["steps"] == 40
        error = np.abs(posterior.log_evidence - exact.log_evidence)
        assert (error < 4 * posterior.log_evidence_stderr).all()
        np.testing.assert_array_equal(posterior.stats["elbo"], results[0].stats["elbo"])
    assert so_far.step > 5
    x = results[0].samples["completion"][0]
    assert not np.array_equal(x[:200], x[200:400])


@pytest.mark.parametrize("size", [1, 2, pytest.param(3, marks=pytest.mark.long)])
def test_a_training_resumes_under_another_number_of_processes(size, tmp_path):
    """The steps until then stay, those after go on, and no process draws what another draws."""
    kept = LogVariance(8, Replay(32, every=2))
    engine = partial(FAST, objective=kept, optimizer=TrustRegion(), checkpoint=str(tmp_path))
    begun = launch(lambda rank: engine(num_steps=6).run(MODEL, SHORT).stats["elbo"])[0]

    def resume(rank):
        drawn, call = [], Replay.__call__

        def noted(self, *args):
            found = call(self, *args)
            drawn.append(found[0].values["completion"].numpy())
            return found

        with mock.patch.object(Replay, "__call__", noted):
            stats = engine(num_steps=10).run(MODEL, SHORT).stats
        return stats["elbo"], drawn

    results = launch(resume, size=size) if size > 1 else [resume(0)]
    for elbo, _ in results:
        assert elbo.shape == (1, 10, 2)
        np.testing.assert_array_equal(elbo[:, :6], begun)
        np.testing.assert_array_equal(elbo, results[0][0])
    assert len(results[0][1]) == 4
    for shares in zip(*(drawn for _, drawn in results), strict=True):
        assert [len(x) for x in shares] == [Ranks(rank, size).share(8) for rank in range(size)]
        assert len({x[:2].tobytes() for x in shares}) == size  # of each, as each has two draws at least


def test_kept_draws_are_divided_anew():
    """Three processes take what others have kept, all of it and none twice; of a lot of two, one each."""
    lots = torch.tensor([0] * 2 + [4] * 7 + [8] * 8)
    turns = torch.randperm(len(lots))[:9]
    names = torch.arange(len(lots))
    state = {"kept.log_prior": names[:, None].float(), "lot": lots, "step": torch.tensor(10), "turns": turns}

    def run(rank):
        with running(0, divided=True):
            own = Replay().divided(state)
            return own, Replay().gathered(own)

    results = launch(run, size=3)
    kept = [own["kept.log_prior"][:, 0].long().tolist() for own, _ in results]
    assert [each[0] for each in kept] == [0, 1, 0]
    assert sorted(x for each in kept for x in each[1:]) == list(range(2, 17))
    assert [len(each) for each in kept] == [7, 6, 5]
    for own, _ in results:
        found = own["kept.log_prior"][:, 0].long()
        np.testing.assert_array_equal(own["lot"], lots[found])
        mine = [x for x in turns.tolist() if x in found]
        assert found[own["turns"]].tolist() == mine  # in the same order
    of_all = results[0][1]
    of_all_names = of_all["kept.log_prior"][:, 0].long()
    np.testing.assert_array_equal(of_all["lot"], lots[of_all_names])
    assert (of_all["lot"].diff() >= 0).all()
    assert set(of_all_names[of_all["turns"]].tolist()) == set(turns.tolist())
    assert of_all["step"] == 10


@pytest.mark.parametrize(("size", "num", "capacity"), [(5, 8, 7), (3, 8, 1), (2, 8, 20), (4, 8, 64)])
def test_all_processes_keep_the_same_lots(size, num, capacity):
    """Whatever the shares: of a minibatch that one has kept each must have draws."""
    kept = []
    for rank in range(size):
        run = Ranks(rank, size)
        with mock.patch("bayeslm.inference.training.sources.ranks", lambda run=run: run):
            lots = torch.arange(5).repeat_interleave(run.share(num))
            kept.append(lots[Replay(capacity)._newest(lots, num)])
    assert all(x.unique().tolist() == kept[0].unique().tolist() for x in kept)
    assert sum(map(len, kept)) <= max(capacity, size)


@pytest.mark.parametrize("baseline", [Critic(num_steps=2), StateValues(3)], ids=["critic", "values"])
def test_a_baseline_of_tokens_learns_from_the_particles_of_all(baseline):
    """Advantages and what is learned are those of one process with all seven particles."""
    shape = (7, 2, 1, 4)
    state_of = torch.randint(3, shape)
    hidden = torch.cat([torch.nn.functional.one_hot(state_of, 3), torch.randn(*shape, 2)], -1)
    live = torch.arange(4) < torch.randint(0, 5, shape[:3])[..., None]
    f, past = torch.randn(7, 2), torch.randn(shape) * live

    def learn(rank=0, size=1):
        rows, state, advantages = Ranks(rank, size).rows(7), {}, []
        with running(0, divided=True):
            few = f[:3][Ranks(rank, size).rows(3)]  # of three processes, one particle each
            assert not baseline("z", few)[1]  # leave-one-out, which remembers nothing
            for _ in range(3):
                texts = Texts(hidden[rows], past[rows], live[rows], torch.zeros_like(past[rows]))
                advantage, state = baseline.of_tokens("x", f[rows], texts, state)
                advantages.append(advantage)
        return torch.stack(advantages), state

    expected, learned = learn()
    results = launch(lambda rank: learn(rank, 3), size=3)
    found = torch.cat([advantages for advantages, _ in results], 1)
    torch.testing.assert_close(found * live, expected * live, rtol=1e-4, atol=1e-5)
    for _, state in results:
        assert state.keys() == learned.keys()
        for name, x in learned.items():
            torch.testing.assert_close(state[name], x, rtol=1e-4, atol=1e-5)
            assert torch.equal(state[name], results[0][1][name])


@pytest.mark.long
@pytest.mark.parametrize("seed", range(3))
def test_four_processes_of_which_one_is_killed_at_a_random_moment(seed, tmp_path, exact):
    """Again and again, and under other numbers of processes, until the training is done."""
    moments = np.random.default_rng(seed)
    engine = FAST(num_steps=60, num_samples=400, checkpoint=Checkpointing(tmp_path, every=4))
    kills, posterior = 0, None
    while not isinstance(posterior, Posterior):
        size, victim, after = int(moments.integers(2, 5)), int(moments.integers(4)), moments.uniform(0.1, 1.5)

        def run(rank, victim=victim % size if kills < 4 else None, after=after):
            if rank == victim:
                threading.Timer(after, os.kill, (os.getpid(), signal.SIGKILL)).start()
            try:
                return engine.run(MODEL, SHORT)
            except (RunError, RankError) as error:
                return str(error)

        results = launch(run, size=size, BAYESLM_TIME_LIMIT="20")
        kills += 1
        for i, result in enumerate(results):
            if i != victim % size or kills > 4:
                assert isinstance(result, Posterior) or "another process of this run has died" in result, result
        posterior = next((x for x in results if isinstance(x, Posterior)), None)
    assert posterior.stats["steps"] == 60
    assert posterior.stats["elbo"].shape == (1, 60, 2)
    assert (np.abs(posterior.log_evidence - exact.log_evidence) < 4 * posterior.log_evidence_stderr).all()
