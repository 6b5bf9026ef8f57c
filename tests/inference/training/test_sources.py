"""What objectives learn from: draws of the guide, of other distributions, and kept ones."""

from __future__ import annotations

import collections
import math
from dataclasses import replace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from support.enumerated import BETA, PROMPTS, Problem, T, kl_to
from support.gradients import perturbed, policy_guide
from support.models import table_lm
from support.programs import SHORT, tilted
from support.statistics import assert_drawn_from, count_completions

from bayeslm.inference import MCMC, SMC, SVI, Exact, ImportanceSampling, ProgramError
from bayeslm.inference.program import inspect, run_particles, seeded
from bayeslm.inference.training import (
    Adam,
    AutoPolicy,
    FDivergence,
    ForwardKL,
    FromPosterior,
    LogVariance,
    Replay,
    StatefulLoss,
    sources,
)
from bayeslm.inference.training.sources import log_q
from bayeslm.models.lm import count_usage
from bayeslm.models.rewards.rehearsal import is_rehearsal


def test_auxiliary_sites_of_a_guide_are_drawn_and_kept_with_it():
    """AutoPolicy's continuous latents: scored again where they were drawn, they have the score they were drawn with."""
    lm = table_lm(order=2, seed=5, vocab=4)

    def model(prompts):
        with pyro.plate("prompts", len(prompts)):
            scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
            x = pyro.sample("completion", lm(prompts, max_new_tokens=T))
            pyro.factor("reward", scale * (x == 1).sum(-1))

    with seeded(0), pyro.get_param_store().scope():
        program = inspect(model, SHORT)
        guide = AutoPolicy(program)
        draws = run_particles(program, guide, 50)
        again = log_q(program, guide, draws)
        torch.testing.assert_close(again.detach(), draws.log_proposal)
        assert again.requires_grad
        with pytest.raises(ProgramError, match="learn from its own draws"):
            log_q(program, guide, run_particles(program, None, 50))


def test_replay_keeps_what_was_drawn():
    small = Problem()
    replay = Replay(capacity=40, every=3)
    program = inspect(small.model, PROMPTS)
    torch.manual_seed(0)
    seen, state = [], {}
    for _ in range(12):
        draws, state = replay(program, small.guide, 16, state)
        seen.append(draws)
    assert all(len(draws) == 16 for draws in seen)
    for i, draws in enumerate(seen):
        if i % 3:
            newest = torch.cat([new.values["completion"] for new in seen[: i + 1 : 3]])[-40:]
            same = (draws.values["completion"][:, None] == newest).flatten(2).all(-1)
            assert same.any(1).all()
        torch.testing.assert_close(log_q(program, small.guide, draws).detach(), draws.log_proposal)


def test_replayed_draws_take_turns():
    """Of the buffer, each as often as any other, or once more: new draws too, and none that had to give way."""
    small = Problem()
    program, replay = inspect(small.model, PROMPTS), Replay(capacity=48, every=6)
    buffer, picked, state = [], [], {}
    torch.manual_seed(0)
    for step in range(24):
        draws, state = replay(program, small.guide, 16, state)
        rows = [tuple(row) for row in torch.cat([draws.log_proposal, draws.log_joint], 1).tolist()]
        if step % 6 == 0:
            buffer, picked = [*buffer, *rows][-48:], []
            continue
        picked += rows
        times, copies = collections.Counter(picked), collections.Counter(buffer)  # a text may be drawn twice
        turns = len(picked) / len(buffer)
        assert times.keys() <= copies.keys()
        assert all(math.floor(turns) * n <= times[row] <= math.ceil(turns) * n for row, n in copies.items())
        assert picked[:48] != buffer


def with_flag(dtype):
    """A program and its guide with a latent of a floating-point type, 1/4 or 3/4, beside the completion."""
    lm = table_lm(order=2, seed=5, vocab=4)
    policy, zero_or_one = perturbed(lm), dist.Bernoulli(torch.tensor(0.3, dtype=dtype))
    quarters = dist.TransformedDistribution(zero_or_one, dist.transforms.AffineTransform(0.25, 0.5))

    def model(prompts):
        with pyro.plate("prompts", len(prompts)):
            flag = pyro.sample("flag", quarters)
            x = pyro.sample("completion", lm(prompts, max_new_tokens=T))
            pyro.factor("reward", flag * (x == 1).sum(-1))

    def guide(prompts):
        pyro.module("policy", policy)
        with pyro.plate("prompts", len(prompts)):
            pyro.sample("flag", quarters)
            pyro.sample("completion", policy(prompts, max_new_tokens=T))

    return model, guide, list(policy.network.parameters())


@pytest.mark.parametrize(
    ("dtype", "collide"),
    [
        *((dtype, False) for dtype in (torch.bfloat16, torch.float32, torch.float64)),
        (torch.float32, True),
        *(pytest.param(dtype, True, marks=pytest.mark.long) for dtype in (torch.bfloat16, torch.float64)),
    ],
)
def test_draws_that_agree_are_scored_once(dtype, collide, monkeypatch):
    """In as many rows as there are different ones; scores and gradients are those of each by itself.

    Where the hashes of different draws are equal, each is scored.
    """
    if collide:
        monkeypatch.setattr(sources, "BASE", 0)
    model, guide, parameters = with_flag(dtype)
    program = inspect(model, PROMPTS[:1])
    torch.manual_seed(0)
    draws = replace(run_particles(program, guide, 200), proposal_token_log_prob={})  # as of an earlier step
    rows = torch.cat([value.reshape(200, -1).double() for value in draws.values.values()], -1)
    different = 200 if collide else len(rows.unique(dim=0))
    assert len(rows.unique(dim=0)) < 100
    with pyro.get_param_store().scope(), count_usage() as usage:
        together = log_q(program, guide, draws)
    assert usage.tokens <= different * (len(PROMPTS[0]) + T)
    with pyro.get_param_store().scope():
        each = torch.cat([log_q(program, guide, draws[i : i + 1]) for i in range(200)])
    torch.testing.assert_close(together, each)
    weights = torch.randn(each.shape)
    found = [torch.autograd.grad((weights * x).sum(), parameters) for x in (together, each)]
    torch.testing.assert_close(found[0], found[1])


def test_new_draws_are_not_scored_again():
    """Beyond one micro-batch that would be a pass of its own, whose graph is not kept; the gradient is the same."""
    small = Problem()
    small.policy.batch_size = 8
    program = inspect(small.model, PROMPTS)
    torch.manual_seed(0)
    draws = run_particles(program, small.guide, 40)
    found = {}
    for name, some in {"new": draws, "kept": replace(draws, proposal_token_log_prob={})}.items():
        with pyro.get_param_store().scope(), count_usage() as usage:
            scores = log_q(program, small.guide, some)
            forward = usage.model_calls
            gradient = torch.autograd.grad((torch.arange(80.0).reshape(40, 2) * scores).sum(), small.parameters)
            found[name] = forward, usage.model_calls - forward, scores, gradient
    assert found["new"][0] == 0 < found["kept"][0]
    assert found["new"][1] == found["kept"][1] > 0
    torch.testing.assert_close(found["new"][2:], found["kept"][2:])


def test_replay_starts_again_with_other_prompts_in_an_objective():
    small = Problem()
    objective = StatefulLoss(LogVariance(8, Replay(every=2)))
    for prompts in (PROMPTS, PROMPTS, PROMPTS[:1], PROMPTS):
        with pyro.get_param_store().scope():
            assert math.isfinite(objective.loss_and_grads(small.model, small.guide, prompts))
        assert objective.last.figures["elbo"].shape == (len(prompts),)


@pytest.mark.parametrize(
    "engine",
    [
        Exact(),
        pytest.param(
            SMC(num_particles=40, num_chains=200, twist="partial", seed=0, progress=False), marks=pytest.mark.long
        ),
        pytest.param(MCMC(num_samples=100, num_chains=200, warmup=20, seed=0, progress=False), marks=pytest.mark.long),
    ],
    ids=["exact", "smc", "mcmc"],
)
def test_other_engines_draws(engine):
    """They come with their density: weighted, they are the posterior's, and SVI learns it from them."""
    small = Problem(order=4)
    posterior = engine.run(small.model, PROMPTS)
    program = inspect(small.model, PROMPTS)
    torch.manual_seed(0)
    draws, _ = FromPosterior(posterior)(program, small.guide, 4000)
    expected = Exact().run(small.model, PROMPTS)
    weights = (draws.log_joint - draws.log_proposal).softmax(0)
    reward = (weights * draws.total_log_likelihood).sum(0).numpy()
    exact_weights = np.exp(expected.log_weights[0] - expected.log_weights[0].max(0))
    truth = (exact_weights * expected.log_likelihood["reward"][0]).sum(0) / exact_weights.sum(0)
    assert reward == pytest.approx(truth, abs=0.25)  # the draws' own error: standard error 0.03 to 0.05
    settings = {"num_steps": 150, "optimizer": Adam(0.1), "num_samples": 500, "seed": 0, "progress": False}
    trained = SVI(objective=ForwardKL(64, FromPosterior(posterior)), **settings).run(small.model, PROMPTS)
    assert (kl_to(trained.policy, small) < 0.05).all()
    # Under the distribution of the draws, the posterior, the variance of log w falls to a twentieth. (KL(q || pi*) need
    # not fall: it counts what q has and the draws have not, and log Z, which would tell, drops out.)
    policy = SVI(objective=LogVariance(64, FromPosterior(posterior)), **settings).run(small.model, PROMPTS).policy
    with torch.no_grad():
        f = small.log_target - torch.stack([q(PROMPTS, T).log_prob(small.x) for q in (small.lm, policy)])
        share = small.log_posterior.exp()
    before, after = (share * f**2).sum(1) - (share * f).sum(1) ** 2
    assert (after < 0.05 * before).all(), (before, after)


def test_draws_are_the_policys():
    small = Problem()
    program = inspect(small.model, PROMPTS[:1])
    torch.manual_seed(0)
    draws = run_particles(program, small.guide, 4000)
    counts = count_completions(draws.values["completion"][:, 0], small.x[:, 0], vocab=4)
    assert_drawn_from(counts, small.log_q[:, 0].detach())


def test_draws_have_the_weights_that_engines_give_them():
    """A latent that the guide leaves out is drawn from the prior, and counts in neither density."""
    lm = table_lm(order=2, seed=5, vocab=4)

    def model(prompts):
        with pyro.plate("prompts", len(prompts)):
            mood = pyro.sample("mood", dist.Bernoulli(0.3))
            x = pyro.sample("completion", lm(prompts, max_new_tokens=T))
            pyro.factor("reward", (x == 1).sum(-1) * (0.5 + mood))

    program, guide = inspect(model, PROMPTS), policy_guide(perturbed(lm), T)
    with seeded(0):
        draws = run_particles(program, guide, 20)
    latents = [site.name for site in program.latents]
    mood, x = (draws.values[name] for name in latents)
    with torch.no_grad():
        left_out = dist.Bernoulli(0.3).log_prob(mood)
        torch.testing.assert_close(draws.log_left_out, left_out)
        torch.testing.assert_close(log_q(program, guide, draws), draws.log_proposal - left_out)
    torch.testing.assert_close(draws.total_log_likelihood, (x == 1).sum(-1) * (0.5 + mood))


def test_hard_constraints_on_another_engines_draws():
    """The density of draws of no probability is not known, and maximum likelihood does not need it."""
    small = Problem(order=4)
    never = small.table.clone()
    never[0, 2] = -torch.inf
    model = tilted(small.lm, never, BETA)
    posterior = ImportanceSampling(num_particles=2000, seed=0, progress=False).run(model, PROMPTS)
    assert 0.05 < np.isneginf(posterior.log_weights).mean() < 0.95
    objective = ForwardKL(64, FromPosterior(posterior))
    settings = {"num_steps": 150, "optimizer": Adam(0.1), "num_samples": 500, "seed": 0, "progress": False}
    trained = SVI(objective=objective, **settings).run(model, PROMPTS)
    exact = Exact().run(model, PROMPTS)
    with torch.no_grad():
        log_q = trained.policy(PROMPTS, max_new_tokens=T).log_prob(torch.as_tensor(exact.samples["completion"][0]))
    log_p = torch.as_tensor(exact.log_joint[0] - exact.log_evidence)
    kl = torch.where(log_p > -torch.inf, log_p.exp() * (log_p - log_q), 0.0).sum(0)
    assert (kl < 0.05).all(), kl  # KL(posterior || q)
    assert not np.isnan(trained.stats["elbo"]).any()
    with pytest.raises(ProgramError, match="not known where their reward is -inf"):
        SVI(objective=FDivergence("total-variation", 64, FromPosterior(posterior)), **settings).run(model, PROMPTS)


def test_equal_prompts_keep_the_buffer_and_others_do_not():
    """In a loop of plain Pyro that makes its list of prompts at every step: new draws at every third.

    The program runs at an inspection, and where there are new draws: what is kept has its terms.
    """
    small, calls = Problem(), []

    def model(prompts):
        calls.append(not is_rehearsal())
        small.model(prompts)

    loss = StatefulLoss(LogVariance(8, Replay(every=3)))
    svi = pyro.infer.SVI(model, small.guide, pyro.optim.Adam({"lr": 1e-3}), loss)

    def runs(prompts, steps):
        calls.clear()
        for _ in range(steps):
            svi.step([list(prompt) for prompt in prompts])
        return sum(calls)

    with pyro.get_param_store().scope():
        assert runs(PROMPTS, 7) == 1 + 3
        assert runs(PROMPTS[::-1], 1) == 1 + 1
        assert runs([[3], [2, 1]][::-1], 1) == 1 + 1  # as many tokens, and others
        assert runs(PROMPTS[:1], 1) == 1 + 1
        assert runs(PROMPTS[:1], 2) == 0
