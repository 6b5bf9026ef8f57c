"""The ensemble move: its transition matrix, stationarity from exact draws, recycled averages, and what it learns.

Chi-square tests fail by chance once in a million each (`assert_drawn_from`).
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from support.models import WORDS, table_lm
from support.oracles import Enumerated, expectation
from support.programs import SHORT, conversation, rewarded, score_table, shared, tilted
from support.statistics import assert_drawn_from, assert_mean

from bayeslm.inference import MCMC, Exact
from bayeslm.inference.markov import SuffixMove, latent_moves, num_candidates, sweep
from bayeslm.inference.markov.ensemble import choose
from bayeslm.inference.program import inspect
from bayeslm.models.lm import LanguageModel, count_usage, redraw

# -- the choice --------------------------------------------------------------------------------------------------


def tiny():
    """Two words and an end, texts of two tokens: 7 of them, of lengths 1 and 2."""
    return rewarded(table_lm(order=2, seed=3, vocab=3), 2, lambda x: 1.2 * (x == 1).sum(-1) - 0.5 * (x[..., 0] == 2))


def transitions(target, cut, n):
    """The transition matrix of one prompt by enumeration of all N-tuples of suffixes after a cut."""
    values = target.atoms.values["completion"][:, 0]
    lengths = target.program.completions[0].fn.lengths(values)
    log_p, log_l = target.atoms.log_prior[:, 0].double(), target.atoms.total_log_likelihood[:, 0].double()
    size = len(values)
    matrix = torch.zeros(size, size, dtype=torch.double)
    for x in range(size):
        if lengths[x] <= cut:
            matrix[x, x] = 1.0
            continue
        rest = [y for y in range(size) if (values[y, :cut] == values[x, :cut]).all()]
        q = log_p[rest].softmax(0)
        for tuple_ in itertools.product(range(len(rest)), repeat=n):
            ys, chance = [rest[k] for k in tuple_], float(q[list(tuple_)].prod())
            w, own = log_l[ys].exp(), log_l[x].exp()
            for k, y in enumerate(ys):
                step = chance * w[k] / w.sum() * min(1.0, float(w.sum() / (w.sum() - w[k] + own)))
                matrix[x, y] += step
                matrix[x, x] -= step
            matrix[x, x] += chance
    return matrix


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("cut", [0, 1])
def test_the_transition_matrix_is_in_detailed_balance_and_is_that_of_the_move(n, cut):
    target = Enumerated(tiny())
    matrix, pi = transitions(target, cut, n), target.log_prob[:, 0].exp()
    torch.testing.assert_close(matrix.sum(1), torch.ones(len(pi), dtype=torch.double))
    flow = pi[:, None] * matrix
    torch.testing.assert_close(flow, flow.T, atol=1e-12, rtol=0)
    move = SuffixMove(target.program, "completion", num_candidates=n, same_cut=True)
    each = 1500
    state = target.atoms[torch.arange(len(pi)).repeat_interleave(each)]
    for seed in range(9):
        torch.manual_seed(seed)
        after, outcome = move(state)
        if int(outcome.cut.max()) == cut:
            break
    reached = target.index(after)[:, 0].reshape(len(pi), each)
    for x, row in enumerate(reached):
        assert_drawn_from(row.bincount(minlength=len(pi)), matrix[x].clamp_min(0.0).log())


def test_choices_where_weights_are_zero():
    """From 0 a chain goes to what is possible, and to nothing impossible; shares are a distribution."""
    inf = torch.inf
    ratios = torch.tensor([[-inf, inf, torch.nan, 0.3], [-inf, torch.nan, torch.nan, -inf]])[..., None]
    current = torch.tensor([True, False, False, True])[:, None]
    torch.manual_seed(0)
    for _ in range(20):
        choice = choose(ratios, current)
        assert choice.index[:, 0].tolist() == [0, 1, 0, 1]
    torch.testing.assert_close(choice.shares.sum(0), torch.ones(4, 1))
    np.testing.assert_allclose(choice.shares[:, 0, 0], [1, 0, 0])
    np.testing.assert_allclose(choice.shares[:, 1, 0], [0, 1, 0])


# -- stationarity ------------------------------------------------------------------------------------------------


def constrained():
    lm = table_lm(order=3, seed=2, vocab=4)
    return rewarded(lm, 3, lambda x: torch.where((x[..., 1:] == x[..., :-1]).any(-1), -torch.inf, x[..., 0] * 0.3))


PROGRAMS = {
    "texts": lambda: tilted(table_lm(order=3, seed=2, vocab=4), score_table(2, vocab=4, tokens=3), 0.3),
    "constrained": constrained,
    "two texts and a latent": conversation,
    "a shared latent": shared,
}


def swept(target, moves, size, seed, sweeps=5, warmup=10):
    """Exact draws, moved by sweeps after other chains have taught the moves where to cut."""
    other = target.draw(50, seed=seed + 100)
    for _ in range(warmup):
        other = sweep(moves, other, adapt=True)
    state = target.draw(size, seed=seed)
    for _ in range(sweeps):
        state = sweep(moves, state)
    return state


def assert_stationary(target, state):
    for column, index in enumerate(target.index(state).T):
        assert_drawn_from(index.bincount(minlength=len(target.log_prob)), target.log_prob[:, column])


QUICK = [
    ("texts", False, True, 0),
    ("texts", True, False, 0),
    ("constrained", True, True, 0),
    ("a shared latent", True, False, 0),
]
LONG = list(itertools.product(PROGRAMS, (False, True), (False, True), (1, 2)))


@pytest.mark.parametrize(
    ("program", "policy", "same_cut", "seed"), QUICK + [pytest.param(*case, marks=pytest.mark.long) for case in LONG]
)
def test_exact_draws_stay_exact(program, policy, same_cut, seed):
    target = Enumerated(PROGRAMS[program]())
    vocab = target.program.completions[0].fn.lm.vocab_size
    moves = latent_moves(
        target.program,
        policy=table_lm(order=2, seed=9, vocab=vocab) if policy else None,
        num_candidates=4,
        same_cut=same_cut,
    )
    size = 4_000 * (4 if seed and program != "two texts and a latent" else 1)
    assert_stationary(target, swept(target, moves, size, seed))
    cuts = [move.cut_probabilities for move in moves if isinstance(move, SuffixMove) and move.site.shape[-1] > 2]
    assert all((x.std() > 0.01).all() for x in cuts)  # so that it had learned, and cuts were not uniform


def changed(ratio):
    """A move whose log-ratios are wrong."""

    class Wrong(SuffixMove):
        def propose(self, fn, value, token_log_prob):
            made = super().propose(fn, value, token_log_prob)
            old = fn.lengths(value)
            return replace(made, log_ratio=made.log_ratio + ratio(self, old, fn.lengths(made.value)))

    return Wrong


def of_cuts(move, lengths):
    return move.cut_probabilities[0].cumsum(0)[lengths - 1].log()


WRONG = {  # added to the log-weights: what cancels where all have one cut, and what is needed where they do not
    "a factor of lengths": (True, lambda move, old, new: old.log() - new.log()),
    "no probability of the cut": (False, lambda move, old, new: of_cuts(move, new) - of_cuts(move, old)),
    "cuts as if they were uniform": (
        False,
        lambda move, old, new: of_cuts(move, new) - of_cuts(move, old) + old.log() - new.log(),
    ),
}


@pytest.mark.parametrize("name", [*list(WRONG)[:2], pytest.param(list(WRONG)[2], marks=pytest.mark.long)])
def test_a_wrong_weight_is_seen(name):
    target = Enumerated(PROGRAMS["texts"]())
    same_cut, ratio = WRONG[name]
    move = changed(ratio)(target.program, "completion", None, 4, same_cut=same_cut)
    if not same_cut:
        move._log_learned[:] = torch.tensor([0.0, 0.0, 4.0])
    with pytest.raises(AssertionError):
        assert_stationary(target, swept(target, [move], 8_000, 0, warmup=0))


def test_the_weights_of_a_policys_suffixes_are_needed():
    target = Enumerated(PROGRAMS["texts"]())

    class Wrong(SuffixMove):
        def propose(self, fn, value, token_log_prob):
            made = super().propose(fn, value, token_log_prob)
            return replace(made, log_ratio=torch.where(made.log_ratio == -torch.inf, -torch.inf, 0.0))

    move = Wrong(target.program, "completion", table_lm(order=2, seed=9, vocab=4), 4)
    with pytest.raises(AssertionError):
        assert_stationary(target, swept(target, [move], 8_000, 0))


# -- all candidates in averages ----------------------------------------------------------------------------------


def test_recycled_averages_are_right_and_more_precise():
    """E[r] from all candidates, of chains that start as good as exact; its error is below that of the draws."""
    model = tilted(table_lm(order=3, seed=2, vocab=4), score_table(2, vocab=4, tokens=4), 0.7)
    exact = Exact().run(model, SHORT)
    posterior = MCMC(12, 120, warmup=10, num_candidates=12, initial_particles=2000, seed=0, progress=False).run(
        model, SHORT
    )
    truth = expectation(exact, exact.measured)
    recycled = posterior.stats["recycled_reward"]
    assert recycled.shape == posterior.measured.shape
    assert_mean(recycled.mean(1), truth)
    assert_mean(posterior.stats["recycled_log_likelihood_reward"].mean(1), truth / 0.7)
    squares = [((values.mean(1) - truth) ** 2).mean() for values in (recycled, posterior.measured)]
    assert squares[0] < 0.9 * squares[1]
    times = posterior.stats["autocorrelation_time"]
    assert ((times > 0.5) & (times < 5)).all()


# -- its batch, and what it learns -------------------------------------------------------------------------------


def test_copies_share_the_tokens_that_are_kept():
    """Suffixes of one completion have the prior's distribution each, and the kept tokens are read once."""
    lm = table_lm(order=2, vocab=4)
    distribution = lm([[1] * 9, [2]], max_new_tokens=12).expand((5, 2))
    x = torch.ones((5, 2, 12), dtype=torch.long)
    with count_usage() as usage:
        y, scores = redraw(distribution, x, torch.tensor(8).expand(5, 2), copies=7)
    assert y.shape == scores.shape == (7, 5, 2, 12)
    assert torch.equal(y[..., :8], x[..., :8].expand(7, 5, 2, 8))
    assert usage.tokens <= 2 * 9 + 10 * 8 + 70 * 3
    known = distribution.expand((7, 5, 2)).token_log_prob(y)
    torch.testing.assert_close(scores[..., 8:], known[..., 8:])
    assert len(y.reshape(-1, 12).unique(dim=0)) > 5


def test_cuts_go_where_the_likelihood_jumps_and_stay_after_the_warm_up():
    """The reward reads the fourth token of six alone."""
    model = rewarded(table_lm(order=1, seed=2, vocab=4), 6, lambda x: 2.0 * (x[..., 3] == 1))
    settings = {"num_chains": 8, "warmup": 40, "num_candidates": 2, "initial_particles": 50, "progress": False}
    short, long = (MCMC(n, seed=1, **settings).run(model, SHORT).stats["cut_probabilities_completion"] for n in (1, 30))
    np.testing.assert_array_equal(short, long)
    np.testing.assert_allclose(long.sum(), 1.0, rtol=1e-5)
    assert long[4:].max() < 0.8 * long[:4].min()
    assert (long > 0.5 / 6 - 1e-6).all()


def test_the_number_of_candidates_is_by_the_device_and_the_chains():
    program = inspect(PROGRAMS["texts"](), SHORT)
    assert [num_candidates(program, chains) for chains in (1, 4, 16, 500)] == [16, 8, 2, 1]
    gpu = replace(program, device=torch.device("meta"))
    assert [num_candidates(gpu, chains) for chains in (1, 64, 500)] == [16, 4, 1]
    model = tilted(table_lm(order=2, seed=2, vocab=4), score_table(2, vocab=4, tokens=3), 1.0)
    default = MCMC(4, 16, warmup=2, initial_particles=20, seed=0, progress=False)
    assert default.run(model, SHORT).stats["num_candidates"] == 2
    with pytest.raises(ValueError, match="num_candidates"):
        MCMC(num_candidates=0)


@pytest.mark.parametrize("copies", [None, 3])
@pytest.mark.parametrize("batch_size", [None, 1])
def test_where_all_texts_have_ended_nothing_is_redrawn(copies, batch_size):
    """Of no prompt, and of one of two prompts that are read one after another."""
    lm = table_lm(order=2, vocab=4)
    distribution = LanguageModel(lm.network, lm.tokenizer, batch_size=batch_size)(SHORT, 3).expand((4, 2))
    x = torch.tensor([1, 0, 0]).expand(4, 2, 3)
    x = x.masked_fill(torch.arange(3) > 1, distribution.vocabulary.pad_token_id)
    new, scores = redraw(distribution, x, torch.tensor([2, 2]).expand(4, 2), copies)
    assert (new == x).all()
    assert (scores == 0).all()
    new, _ = redraw(distribution, x, torch.tensor([2, 1]).expand(4, 2), copies)
    assert (new[..., 0, :] == x[..., 0, :]).all()


def test_short_texts_and_late_cuts():
    """Nine of ten texts end at once: at most steps no chain moves, and the posterior is right."""
    lm = LanguageModel.tabular(WORDS[:4], order=1, table=torch.tensor([[0.9, 0.04, 0.03, 0.03]]).log())
    model = rewarded(lm, 6, lambda x: 1.0 * (x[..., 0] == 1))
    posterior = MCMC(20, 60, warmup=10, seed=0, progress=False).run(model, SHORT)
    exact = Exact().run(model, SHORT)
    assert_mean(posterior.measured.mean(1), expectation(exact, exact.measured))
