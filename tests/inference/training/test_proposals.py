"""Weights of draws of several proposals: by their formula, written out; unbiased whatever the draws teach; bounded."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from support.models import table_lm
from support.programs import rewarded
from support.statistics import assert_mean

from bayeslm.inference import Exact
from bayeslm.inference.program import inspect, run_particles, seeded
from bayeslm.inference.training import AutoPolicy
from bayeslm.inference.training.proposals import ProposalDraws, stratified_log_evidence
from bayeslm.models import LanguageModel

PROMPT = [[1]]
REWARD = torch.tensor([[0.0, 1.0, -1.0, 0.5], [1.5, 0.0, 2.0, -1.0]])  # of position and token
SIZES = [(6, 0), (3, 9), (4, 20), (5, 40)]  # draws of the prior and of the policy, in each round


@functools.cache
def program():
    lm = table_lm(order=3, seed=1, vocab=4)
    return inspect(rewarded(lm, 2, lambda x: REWARD[torch.arange(2), x].sum(-1)), PROMPT)


@functools.cache
def policy():
    """The guide, whose parameters every run sets anew."""
    return AutoPolicy(program())


def memorise(guide, particles, rows, strength):
    """Make the policy one that repeats the best of some draws, and little else."""
    best = rows[int(particles.log_joint[rows, 0].argmax())]
    tokens = particles.values["completion"][best, 0].tolist()
    (table,) = [x for x in guide.parameters() if x.requires_grad]
    with torch.no_grad():
        table.zero_()
        for token in tokens:
            table[..., token] += strength


def rounds(seed, teachers=6, strength=1.5):
    """Draws of a policy that memorises before each round, their weights, and what each proposal was."""
    inspected, guide = program(), policy()
    draws, tables = ProposalDraws(inspected, guide, teachers, False), []
    with seeded(seed):
        for num_prior, num_policy in SIZES:
            if num_policy:
                memorise(guide, draws.particles, draws.teachers(), strength)
                draws.keep()
                tables.append([x.detach().clone() for x in guide.parameters()])
            prior = run_particles(inspected, None, num_prior)
            draws.add(prior, run_particles(inspected, guide, num_policy) if num_policy else None)
    return draws, guide, tables


def test_weights_are_those_of_the_formula():
    draws, guide, tables = rounds(0)
    particles, log_weights, strata = draws.first(len(SIZES))
    x = particles.values["completion"]
    log_q = [particles.log_prior[:, 0].numpy()]
    for table in tables:
        with torch.no_grad():
            for parameter, value in zip(guide.parameters(), table, strict=True):
                parameter.copy_(value)
            log_q.append(guide.policy(PROMPT, max_new_tokens=2).log_prob(x)[:, 0].numpy())
    q, target = np.exp(np.array(log_q)), np.exp(particles.log_joint[:, 0].numpy())
    teaches = []  # of each draw: the first share of both proposals' draws of a round, rounded up, and not of the last
    for t, sizes in enumerate(SIZES):
        for n in filter(None, sizes):
            teaches += [i < -(-6 * n // sum(sizes)) and t < len(SIZES) - 1 for i in range(n)]
    teaches = np.array(teaches)
    round_of = np.repeat(np.arange(len(SIZES)), [sum(sizes) for sizes in SIZES])
    drawn_by = np.concatenate([np.repeat([0, t], sizes) for t, sizes in enumerate(SIZES)])
    counts = np.bincount(drawn_by[~teaches], minlength=4)
    expected = np.empty(len(x))
    for i in range(len(x)):
        t = round_of[i]
        if teaches[i]:
            n, m = SIZES[t]
            expected[i] = 0.5 ** (3 - t) * target[i] / ((n * q[0, i] + m * q[t, i]) / (n + m))
        else:
            rest = (len(x) - (0.5 ** (3 - round_of[teaches])).sum()) / (~teaches).sum()
            expected[i] = rest * target[i] / (counts @ q[:, i] / counts.sum())
    np.testing.assert_allclose(log_weights[:, 0].exp().numpy(), expected, rtol=1e-4)
    for group in np.unique(strata):  # one distribution, one formula
        some = strata == group
        assert len(set(zip(drawn_by[some], teaches[some], strict=True))) == 1


@pytest.mark.parametrize("own", [False, pytest.param(True, marks=pytest.mark.long)])
def test_z_is_unbiased_though_a_policy_memorises_its_teachers(own):
    """The policy repeats the best of 40 draws of 400 words: its density makes that one's weight too small."""
    lm = LanguageModel.tabular(["<eos>", *(f"w{i}" for i in range(399))], order=2, seed=1)
    scores = torch.randn(400, generator=torch.Generator().manual_seed(1))
    inspected = inspect(rewarded(lm, 1, lambda x: scores[x].sum(-1)), PROMPT)
    guide, log_z = AutoPolicy(inspected), float(Exact().run(inspected.model, PROMPT).log_evidence[0])
    ratios = []
    for seed in range(100):
        draws = ProposalDraws(inspected, guide, 40, own)
        with seeded(seed):
            draws.add(run_particles(inspected, None, 40), None)
            memorise(guide, draws.particles, draws.teachers(), 8.0)
            draws.keep()
            draws.add(run_particles(inspected, None, 20), run_particles(inspected, guide, 20))
        _, log_weights, _ = draws.first(2)
        ratios.append(float((log_weights - log_z).exp().mean()))
    assert_mean(np.array(ratios), 1.0)


def test_the_error_has_no_part_of_the_differences_between_strata():
    rng = np.random.default_rng(0)
    strata = np.repeat([0, 1, 1], 40)[None]
    weights = rng.normal(np.where(strata == 0, 1.0, 5.0)[..., None] * [1.0, 2.0], 0.1, (1, 120, 2))
    estimate, error = stratified_log_evidence(np.log(weights), strata)
    np.testing.assert_allclose(estimate, np.log(weights.mean((0, 1))))
    parts = [weights[0, :40], weights[0, 40:]]
    variance = sum(len(x) * x.var(0, ddof=1) for x in parts) / 120**2
    np.testing.assert_allclose(error, np.sqrt(variance) / weights.mean((0, 1)))


def test_the_prior_bounds_weights_where_a_policy_misses_all_else():
    draws, _, _ = rounds(3, teachers=1, strength=20.0)
    _, log_weights, strata = draws.first(len(SIZES))
    taught = strata >= 4  # the strata of the mixture are its proposals, 0 to 3
    share = (~taught & (draws.components == 0).numpy()).sum() / (~taught).sum()
    highest = float(REWARD.amax(-1).sum()) - np.log(share)
    rest = np.log(len(taught) / (~taught).sum())
    assert log_weights[~taught].max() <= highest + rest + 1e-4


def test_an_interrupted_round_leaves_the_others(monkeypatch):
    draws, guide, _ = rounds(0)
    before = len(draws.particles)
    monkeypatch.setattr(ProposalDraws, "_score", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    inspected = draws._program
    with pytest.raises(KeyboardInterrupt):
        draws.add(run_particles(inspected, None, 3), run_particles(inspected, guide, 3))
    assert len(draws.particles) == len(draws.rounds) == before
    assert draws.num_rounds == len(SIZES)
