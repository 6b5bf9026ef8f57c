"""Markov moves: each keeps its target and is reversible; and redrawn suffixes have the right distribution.

Chains that begin as exact draws of an enumerated target must have its distribution after a move (chi-square), and
as many must go from i to j as from j to i (Bowker's test of symmetry). Each test fails by chance once in a million.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from scipy import stats
from support.models import ARCHITECTURES, PADDED_PROMPTS, random_network, table_lm, tiny_llama
from support.oracles import Enumerated, by_hand
from support.programs import SHORT, conversation, rewarded, score_table, shared, tilted
from support.statistics import assert_drawn_from, count_completions

from bayeslm.inference import ProgramError
from bayeslm.inference.markov import SuffixMove, Tally, latent_moves
from bayeslm.inference.markov.moves import RandomWalk
from bayeslm.inference.program import Particles, inspect, score_values
from bayeslm.models import LanguageModel
from bayeslm.models.lm import count_usage, redraw

ALARM = 1e-6


# -- suffixes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model_type", "batch_size"),
    [
        *((model_type, 7) for model_type in ARCHITECTURES),
        *(
            pytest.param(model_type, None, marks=[pytest.mark.long] * (i % 3 > 0))
            for i, model_type in enumerate(ARCHITECTURES)
        ),
    ],
)
def test_redrawn_suffixes_are_scored_as_the_network_does(model_type, batch_size):
    """Ragged cuts and prompts, windows shorter than them, in one batch or several."""
    extra, _ = ARCHITECTURES[model_type]
    lm = LanguageModel(random_network(model_type, **extra), eos_token_ids=(2, 7), batch_size=batch_size)
    distribution = lm(PADDED_PROMPTS, max_new_tokens=8, temperature=1.2).expand((6, len(PADDED_PROMPTS)))
    torch.manual_seed(0)
    x = distribution.sample()
    lengths = distribution.lengths(x)
    cut = (torch.rand(lengths.shape) * (lengths + 1)).long()  # some at their end
    y, scores = redraw(distribution, x, cut)
    kept = torch.arange(8) < cut[..., None]
    assert torch.equal(y[kept], x[kept])
    assert torch.equal(y[cut == lengths], x[cut == lengths])
    assert not torch.equal(y, x)
    assert distribution.support.check(y).all()
    for row, keep, score_ in zip(y, kept, scores, strict=True):
        for prompt, completion, k, s in zip(PADDED_PROMPTS, row, keep, score_, strict=True):
            at_end = torch.equal(s, torch.zeros_like(s)) and (k.sum() >= distribution.lengths(completion))
            expected = torch.zeros(8) if at_end else by_hand(lm, prompt, completion, 1.2).masked_fill(k, 0.0)
            torch.testing.assert_close(s, expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("kind", ["table", "llama"])
def test_redrawn_suffixes_have_the_distribution_of_the_rest(kind):
    """p(x_{>i} | x_{<=i}) by enumeration, for cuts after 0, 1 and 2 tokens in one batch."""
    lm = table_lm(order=3, vocab=4) if kind == "table" else tiny_llama()
    distribution = lm([[1, 2], [3]], max_new_tokens=3)
    support = distribution.enumerate_support()[:, 0]
    log_p = distribution.log_prob(distribution.enumerate_support())
    start = torch.tensor([1, 2, 1])
    size = 9000
    distribution = distribution.expand((size, 2))
    value = start.expand(size, 2, 3)
    cut = (torch.arange(size) % 3)[:, None].expand(size, 2)
    torch.manual_seed(1)
    y, _ = redraw(distribution, value, cut)
    for i in range(3):
        same = (support[:, :i] == start[:i]).all(-1)
        for prompt in range(2):
            log_q = torch.where(same, log_p[:, prompt], -torch.inf)
            counts = count_completions(y[i::3, prompt], support, lm.vocab_size)
            assert_drawn_from(counts, log_q - log_q.logsumexp(0))


def test_redrawing_prefills_a_prompt_once_and_drops_rows_that_have_ended():
    lm = table_lm(order=2, vocab=4)
    distribution = lm([[1] * 30, [2]], max_new_tokens=20).expand((50, 2))
    x = torch.ones((50, 2, 20), dtype=torch.long)
    cut = torch.full((50, 2), 19)
    cut[0] = 0
    with count_usage() as usage:
        y, _ = redraw(distribution, x, cut)
    prefill, kept = 2 * 30, 100 * 19
    longest = int(distribution.lengths(y)[0].max())
    assert prefill + kept <= usage.tokens <= prefill + kept + 2 * longest
    assert usage.model_calls <= 2 + longest


# -- invariance --------------------------------------------------------------------------------------------------


def plain(lm=None):
    return tilted(lm or table_lm(order=3, seed=2, vocab=4), score_table(2, vocab=4, tokens=4), 0.4)


def constrained():
    def no_repeats(x):
        return torch.where((x[..., 1:] == x[..., :-1]).any(-1), -torch.inf, x[..., 0] * 0.3)

    return rewarded(table_lm(order=3, seed=2, vocab=4), 4, no_repeats)


def candidates():
    """Two completions a prompt, and flags, in a plate of their own."""
    lm = table_lm(order=2, seed=5, vocab=3)

    def model(prompts):
        with pyro.plate("candidates", 2, dim=-2), pyro.plate("prompts", len(prompts), dim=-1):
            flag = pyro.sample("flag", dist.Bernoulli(0.3))
            x = pyro.sample("completion", lm(prompts, max_new_tokens=2))
            pyro.factor("reward", (0.5 + flag) * (x == 1).sum(-1))

    return model


def assert_reversible(target, before, after):
    """The distribution after a move is the target's, and flows between any two values are equal both ways."""
    atoms = len(target.log_prob)
    for column in range(target.log_prob.shape[1]):
        i, j = before[:, column], after[:, column]
        assert_drawn_from(j.bincount(minlength=atoms), target.log_prob[:, column])
        flow = torch.zeros((atoms, atoms), dtype=torch.double).index_put_((i, j), torch.ones(len(i)).double(), True)
        there, back = flow.triu(1), flow.T.triu(1)
        frequent = there + back >= 8
        assert frequent.any()
        statistic = ((there - back) ** 2 / (there + back))[frequent].sum()
        assert statistic < stats.chi2.isf(ALARM, int(frequent.sum())), statistic


def by_cut(move, state, gamma=1.0, parts=8):
    """Move parts of the chains one after another, as each step has one cut; return the chains and each outcome."""
    each = [move(state[rows], gamma) for rows in torch.arange(len(state)).chunk(parts)]
    moved, outcomes = zip(*each, strict=True)
    return Particles.concatenate(list(moved)), outcomes


POLICY = {"prior": lambda: None, "policy": lambda: table_lm(order=2, seed=9, vocab=4)}


def each_and_half_of_all() -> list:
    """Every two settings of a move come together in the suite; all four do so in the long one."""
    cases = itertools.product((plain, constrained), (False, True), POLICY, (1.0, 0.3))
    return [
        pytest.param(*case, marks=[pytest.mark.long] * (sum(places) % 2))
        for case, places in zip(cases, itertools.product((0, 1), repeat=4), strict=True)
    ]


@pytest.mark.parametrize(("model", "same_cut", "proposal", "gamma"), each_and_half_of_all())
def test_suffix_moves_are_reversible(model, same_cut, proposal, gamma):
    target = Enumerated(model(), gamma)
    state = target.draw(10_000)
    move = SuffixMove(target.program, "completion", POLICY[proposal](), 1 if gamma == 1.0 else 3, same_cut=same_cut)
    after, outcomes = by_cut(move, state, gamma)
    assert 0.02 < torch.cat([outcome.accepted for outcome in outcomes]).float().mean() < 0.98
    assert_reversible(target, target.index(state), target.index(after))
    lengths = move.site.fn.lengths(state.values["completion"])
    if not same_cut:
        for length in (2, 3, 4):  # the cut is uniform over the tokens of the text
            cut = torch.cat([outcome.cut for outcome in outcomes])[lengths == length]
            assert_drawn_from(cut.bincount(minlength=length), -torch.tensor(float(length)).log().expand(length))
        return
    lengths = lengths.chunk(len(outcomes))
    cuts = [outcome.cut.unique() for outcome in outcomes]
    assert {int(cut.max()) for cut in cuts} == {0, 1, 2, 3}
    for cut, length, outcome in zip(cuts, lengths, outcomes, strict=True):  # one cut; texts that have ended stay
        assert ((outcome.cut == cut.max()) == (length > cut.max())).all()
        assert torch.equal(outcome.tried, length > cut.max())
        assert not (outcome.accepted & ~outcome.tried).any()


@pytest.mark.parametrize(
    "model", [pytest.param(conversation, marks=pytest.mark.long), shared, candidates], ids=lambda m: m.__name__
)
def test_moves_of_every_latent_are_reversible(model):
    """Prompts that depend on latents, several completions, a latent that prompts share, plates; and terms kept."""
    target = Enumerated(model())
    size = 2_500 if model is conversation else 6_000
    for i, move in enumerate(latent_moves(target.program, num_candidates=2)):
        state = target.draw(size, seed=i)
        after, outcomes = by_cut(move, state, parts=4)
        assert outcomes[0].accepted.shape == (size // 4, target.program.weight_prompts)
        assert_reversible(target, target.index(state), target.index(after))
        again = score_values(target.program, {site.name: after.values[site.name] for site in target.program.latents})
        torch.testing.assert_close(after.log_prior, again.log_prior, atol=1e-5, rtol=1e-5)
        for name, scores in again.token_log_prob.items():
            torch.testing.assert_close(after.token_log_prob[name], scores, atol=1e-5, rtol=1e-5)
        for name, term in again.log_likelihood.items():
            torch.testing.assert_close(after.log_likelihood[name], term)


def test_suffix_moves_of_a_transformer_are_reversible():
    lm = tiny_llama(seed=1)
    target = Enumerated(tilted(lm, score_table(1, tokens=2), 0.5))
    state = target.draw(6_000)
    for policy in (None, tiny_llama(seed=2)):
        after, _ = by_cut(SuffixMove(target.program, "completion", policy, 2), state, parts=4)
        assert_reversible(target, target.index(state), target.index(after))


def test_each_prompt_accepts_on_its_own_unless_a_latent_is_shared():
    for model, columns in ((conversation, 2), (shared, 1)):
        target = Enumerated(model())
        state = target.draw(500)
        after, outcome = SuffixMove(target.program, "completion", num_candidates=2)(state)
        assert outcome.accepted.shape == (500, columns)
        changed = (after.values["completion"] != state.values["completion"]).any(-1)  # (particle, prompt)
        assert not changed[~outcome.accepted.expand_as(changed)].any()
        if columns == 1:
            assert changed.sum(-1).max() == 1  # one completion at a time
            assert (changed.sum(0) > 50).all()


def test_only_what_a_move_changes_is_scored():
    """The network does what redrawing takes, and nothing else: not the other completion, not the kept tokens."""
    lm = table_lm(order=2, seed=0, vocab=4)

    def model(prompts):
        with pyro.plate("prompts", len(prompts)):
            x = pyro.sample("draft", lm(prompts, max_new_tokens=5))
            y = pyro.sample("reply", lm(prompts, max_new_tokens=5))
            pyro.factor("match", (x == y).sum(-1) * 1.0)

    program = inspect(model, SHORT)
    distributions = {site.name: site.fn.expand((40, 2)) for site in program.completions}
    state = score_values(program, {name: distribution.sample() for name, distribution in distributions.items()})
    for name, distribution in distributions.items():
        with count_usage() as whole:
            _, outcome = SuffixMove(program, name)(state)
        rooms = 5 - outcome.cut
        prefill, kept, steps = 2 * 2, 80 * int(outcome.cut.max()), int(rooms.clamp_min(1).sum())
        assert whole.tokens <= prefill + kept + steps
        assert distribution.batch_shape == (40, 2)


def test_acceptance_is_counted_by_site_column_and_cut():
    target = Enumerated(plain())
    move, tally = SuffixMove(target.program, "completion", same_cut=True), Tally()
    state, outcomes = target.draw(300), []
    for _ in range(3):
        state, outcome = move(state)
        tally.add(move, outcome, slice(100, None))
        outcomes.append(outcome)
    counted = tally.stats()
    accepted, tried = (torch.cat([getattr(x, name)[100:] for x in outcomes]) for name in ("accepted", "tried"))
    cut = torch.cat([outcome.cut[100:] for outcome in outcomes])
    np.testing.assert_allclose(counted["acceptance_completion"], accepted.sum(0) / tried.sum(0), rtol=1e-6)
    assert counted["cuts_completion"].sum() == tried.sum() > 600
    for i in (i for i in range(4) if (cut == i).any()):
        assert counted["cuts_completion"][i] == (cut == i).sum()
        np.testing.assert_allclose(counted["acceptance_by_cut_completion"][i], accepted[cut == i].float().mean())


# -- continuous latents ------------------------------------------------------------------------------------------


def assert_distribution(draws, distribution):
    assert stats.kstest(draws.reshape(-1).numpy(), distribution.cdf).pvalue > ALARM


@pytest.mark.parametrize("gamma", [1.0, 0.5])
def test_random_walks_keep_a_normal_posterior(gamma):
    """theta ~ N(0, 1), y ~ N(theta, 1 / 2) in the plate of prompts: N(4 g y / (1 + 4 g), 1 / (1 + 4 g))."""
    y = torch.tensor([1.2, -0.4])

    def model():
        with pyro.plate("prompts", 2):
            theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(theta, 0.5), obs=y)

    program = inspect(model)
    precision = 1 + 4 * gamma
    torch.manual_seed(0)
    theta = 4 * gamma * y / precision + torch.randn(20_000, 2) / precision**0.5
    after, outcome = RandomWalk(program, "theta")(score_values(program, {"theta": theta}), gamma)
    assert (outcome.accepted.float().mean(0) > 0.2).all()
    for i in range(2):
        moved = after.values["theta"][:, i]
        assert_distribution(moved, stats.norm(4 * gamma * float(y[i]) / precision, precision**-0.5))
        # reversible: E[f(before) g(after)] is symmetric
        f = theta[:, i] * (moved > 0.3) - moved * (theta[:, i] > 0.3)
        assert abs(f.mean()) < 5 * f.std() / 20_000**0.5


SIMPLE = {
    "beta": (dist.Beta(2.0, 1.5), lambda p: dist.Bernoulli(p), stats.beta(2.0 + 1, 1.5)),
    "gamma": (dist.Gamma(2.0, 1.0), lambda r: dist.Exponential(r), stats.gamma(3.0, scale=1 / 2.0)),
    "dirichlet": (dist.Dirichlet(torch.tensor([1.0, 2.0, 0.8])), dist.Categorical, None),
}


@pytest.mark.parametrize("family", SIMPLE)
def test_random_walks_have_the_jacobian(family):
    """Conjugate pairs whose latent is positive, in (0, 1) or a simplex, one observation of 1."""
    prior, likelihood, posterior = SIMPLE[family]

    def model():
        z = pyro.sample("z", prior)
        pyro.sample("y", likelihood(z), obs=torch.tensor(1.0 if family != "dirichlet" else 1))

    program = inspect(model)
    size = 20_000
    torch.manual_seed(0)
    if family == "dirichlet":
        z = dist.Dirichlet(torch.tensor([1.0, 3.0, 0.8])).sample((size,))
    else:
        z = torch.as_tensor(posterior.rvs(size, random_state=0), dtype=torch.float32)
    state, move = score_values(program, {"z": z}), RandomWalk(program, "z")
    for _ in range(3):
        state, outcome = move(state)
    assert outcome.accepted.float().mean() > 0.2
    after = state.values["z"]
    if family == "dirichlet":
        for i, a in enumerate([1.0, 3.0, 0.8]):
            assert_distribution(after[:, i], stats.beta(a, 4.8 - a))
    else:
        assert_distribution(after, posterior)


def test_a_support_that_depends_on_another_latent():
    """w ~ U(0, 1), x ~ U(0, w): steps of w below x are refused, not errors."""

    def model():
        w = pyro.sample("w", dist.Uniform(0.0, 1.0))
        pyro.sample("x", dist.Uniform(0.0, w))

    program = inspect(model)
    torch.manual_seed(0)
    w = torch.rand(20_000)
    state = score_values(program, {"w": w, "x": w * torch.rand(20_000)})
    for move in latent_moves(program) * 2:
        state, outcome = move(state)
        assert 0.1 < outcome.accepted.float().mean() < 0.9
    assert (state.values["x"] < state.values["w"]).all()
    assert_distribution(state.values["w"], stats.uniform())
    assert_distribution(state.values["x"] / state.values["w"], stats.uniform())


@pytest.mark.parametrize(("dimension", "best"), [(1, 0.44), (20, 0.234)])
def test_step_sizes_adapt_to_the_best_acceptance_of_each_group(dimension, best):
    """A posterior a hundred times narrower than its prior in the second group, which is colder."""

    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros(dimension), 1.0).to_event(1))
        pyro.factor("narrow", -0.5e4 * z.square().sum(-1))

    program = inspect(model)
    groups = torch.tensor([0, 1]).repeat_interleave(50)
    gamma = groups[:, None].float()
    move = RandomWalk(program, "z", step_size=1.0, groups=groups)
    torch.manual_seed(0)
    z = torch.randn(100, dimension)
    z[50:] /= 100
    state = score_values(program, {"z": z})
    rates = []
    for step in range(180):
        state, outcome = move(state, gamma)
        move.adapt(outcome)
        if step >= 120:
            rates.append(outcome.probability.reshape(2, 50).mean(1))
    np.testing.assert_allclose(torch.stack(rates).mean(0), best, atol=0.05)
    wide, narrow = move.step_size[:, 0]
    assert 30 < wide / narrow < 300


# -- refusals ----------------------------------------------------------------------------------------------------


def test_a_broken_constraint_is_never_accepted_and_a_dead_chain_may_come_alive():
    target = Enumerated(constrained())
    move = SuffixMove(target.program, "completion")
    alive = move(target.draw(2_000))[0]
    assert (alive.log_joint > -torch.inf).all()
    dead = score_values(target.program, {"completion": torch.full((500, 2, 4), 1)})
    assert (dead.log_joint == -torch.inf).all()
    after, outcome = move(dead)
    assert torch.equal(after.log_joint > -torch.inf, outcome.accepted)
    assert outcome.accepted.any()
    assert not outcome.accepted.all()


def test_a_reward_that_is_not_a_number_is_named():
    broken = False  # until the chains have begun

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("liking", torch.where(z > 0, torch.inf if broken else 0.0, -z))

    program = inspect(model)
    state = score_values(program, {"z": torch.zeros(50)})
    broken = True
    with pytest.raises(ProgramError, match="'liking' has log-probability inf"):
        RandomWalk(program, "z")(state)


def test_masked_latents_are_refused():
    def model():
        with poutine.mask(mask=torch.tensor(False)):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(ProgramError, match="'z' is masked"):
        latent_moves(inspect(model))


def test_a_policy_of_another_vocabulary_is_refused():
    program = inspect(plain(), SHORT)
    state = Enumerated(plain()).draw(3)
    with pytest.raises(ValueError, match="vocabularies differ"):
        SuffixMove(program, "completion", table_lm(order=2, vocab=5))(state)
    assert math.isfinite(state.log_prior.sum())
