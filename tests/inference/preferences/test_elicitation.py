"""Preference elicitation: its questions, its posterior, and that no answer is lost."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, replace

import numpy as np
import pytest
import torch
from support.models import table_lm
from support.statistics import assert_drawn_from, assert_estimate, assert_mean

from bayeslm import diagnostics
from bayeslm.inference import Exact, ImportanceSampling, Laplace
from bayeslm.inference.control import Boltzmann, EpsilonGreedy, Random, Thompson
from bayeslm.inference.preferences import Duel, Elicitation, FreshCompletions, InformationGain, Pool, Tilted
from bayeslm.inference.preferences.acquisition import information
from bayeslm.models import TiltedLM
from bayeslm.models.preferences import (
    Answer,
    BradleyTerry,
    JudgeError,
    Question,
    SimulatedJudge,
    UncertainReward,
    to_comparisons,
)
from bayeslm.models.rewards import Reward

TRUTH = torch.tensor([1.5, -1.0, 0.5, 0.0, 2.0])


def features(prompts, completions):
    """Return standard normal features that are a function of the text, (n, 5)."""
    rows = [torch.randn(5, generator=torch.Generator().manual_seed(int(text))) for text in completions]
    return torch.stack(rows)


def truth(prompts, completions, **columns):
    return (features(prompts, completions) @ TRUTH).tolist()


MODEL = BradleyTerry(features, scale=4.0)
POOL = Pool(["a"] * 12 + ["b"] * 8, [str(i) for i in range(20)])
JUDGE = SimulatedJudge(Reward(truth), temperature=1.0)


def pair(answer):
    """Return what was compared, regardless of the order."""
    return answer.prompt, frozenset((answer.first, answer.second))


def take(loop, number, judge=JUDGE, answers=None, pool=POOL):
    return list(itertools.islice(loop.run(pool, judge, answers), number))


# -- which pair ------------------------------------------------------------------------------------------------


def test_information_against_the_joint_distribution():
    """I(y; theta) is the KL from the joint distribution of draw and answer to the product of its margins."""
    log_odds = torch.randn(7, 30, generator=torch.Generator().manual_seed(0)) * 3
    p = log_odds.double().sigmoid()
    joint = torch.stack([p, 1 - p]) / 7  # (answer, draw, pair)
    expected = (joint * (joint / (joint.sum(1, keepdim=True) / 7)).log()).sum((0, 1))
    torch.testing.assert_close(information(log_odds).double(), expected, atol=1e-6, rtol=1e-4)
    assert information(torch.full((5, 1), 0.3)).abs() < 1e-6  # all draws agree: only the noise remains
    half = information(torch.tensor([[1e4], [-1e4]]))  # the draws are sure of opposite answers: one bit
    assert half.item() == pytest.approx(math.log(2))


def test_information_gain_asks_for_the_most_informative():
    rewards = torch.randn(50, 20, generator=torch.Generator().manual_seed(1)) * torch.rand(20)
    pairs = POOL.pairs()
    gains = information(rewards[:, pairs[:, 0]] - rewards[:, pairs[:, 1]])
    chosen = {InformationGain().choose(rewards, pairs, POOL.prompt_indices) for _ in range(5)}
    assert chosen == {int(gains.argmax())}
    some = [gains[InformationGain(3).choose(rewards, pairs, POOL.prompt_indices)] for _ in range(400)]
    n, ranked = len(gains), gains.sort().values.double()
    weights = [math.comb(i, 2) / math.comb(n, 3) for i in range(n)]  # the best of three of n is of rank i
    mean = sum(w * g for w, g in zip(weights, ranked, strict=True))
    assert_mean(some, mean)


@pytest.mark.parametrize("strategy", [Random(), Thompson(), EpsilonGreedy(0.4), Boltzmann(0.7), Tilted(0.5)])
def test_duels_have_the_probabilities_of_their_strategy(strategy):
    """The strategy chooses the first completion, and then the second of the others, of a uniformly drawn prompt."""
    rewards = torch.randn(6, 5, generator=torch.Generator().manual_seed(2))
    prompts = torch.tensor([0, 0, 0, 1, 1])
    pairs = torch.tensor([[0, 1], [0, 2], [1, 2], [3, 4]])
    distribution = torch.zeros(4).double()
    distribution[3] = 0.5
    first = strategy.probabilities(rewards[:, :3])
    for i, j in itertools.permutations(range(3), 2):
        others = [k for k in range(3) if k != i]
        second = strategy.probabilities(rewards[:, others])[others.index(j)]
        distribution[i + j - 1] += 0.5 * first[i] * second
    draws = torch.tensor([Duel(strategy).choose(rewards, pairs, prompts) for _ in range(800)])
    assert_drawn_from(torch.bincount(draws, minlength=4), distribution.log())


def test_duels_ask_nothing_twice():
    rewards = torch.tensor([[3.0, 2.0, 1.0]])
    choice = Duel(EpsilonGreedy(0.0)).choose(rewards, torch.tensor([[0, 2], [1, 2]]), torch.zeros(3).long())
    assert choice == 0  # 0 is the best, and 1 was asked about


def test_tilted_draws_from_the_aligned_model():
    values = torch.randn(9, 4, generator=torch.Generator().manual_seed(3))
    expected = torch.stack([(row / 0.3).exp() / (row / 0.3).exp().sum() for row in values]).mean(0)
    torch.testing.assert_close(Tilted(0.3).probabilities(values), expected)
    torch.testing.assert_close(Tilted(1e-4).probabilities(values), Thompson().probabilities(values))
    with pytest.raises(ValueError, match="beta must be positive"):
        Tilted(0.0)


def letters(prompts, completions):
    return torch.tensor([[c.count("a"), c.count("b")] for c in completions]).float()


# -- candidates ------------------------------------------------------------------------------------------------


def test_pools():
    pool = Pool(["a", "a", "b", "a", "a", "b"], ["1", " ", "1", "1", "2", "3"])
    assert (pool.prompts, pool.completions) == (["a", "b", "a", "b"], ["1", "1", "2", "3"])
    assert pool.prompt_indices.tolist() == [0, 1, 0, 1]
    assert pool.pairs().tolist() == [[0, 2], [1, 3]]
    asked = [Answer("b", "3", "1", 0.5, None), Answer("a", "1", "3", 0.5, True), Answer("c", "1", "2", 0.5, True)]
    assert pool.pairs(asked).tolist() == [[0, 2]]  # the second and third have texts that are not in the pool
    with pytest.raises(ValueError, match="nothing to compare"):
        Pool(["a", "b", "a"], ["1", "2", "1"])
    with pytest.raises(ValueError, match="2 prompts for 1"):
        Pool(["a", "b"], ["1"])


def test_pools_are_drawn_of_the_prior():
    lm = table_lm(order=2, vocab=4)
    pool = Pool.drawn(lm, ["a", "b c"], 40, max_new_tokens=2, seed=3)
    assert set(pool.prompts) == {"a", "b c"}
    assert pool == Pool.drawn(lm, ["a", "b c"], 40, max_new_tokens=2, seed=3)
    assert pool != Pool.drawn(lm, ["a", "b c"], 40, max_new_tokens=2, seed=4)


@pytest.mark.parametrize("epsilon", [pytest.param(None, marks=pytest.mark.long), 0.3])
def test_fresh_completions_have_the_posterior_with_the_reward_uncertain(epsilon):
    """Draws by `Exact` agree with the mixture over weights (or of mean and prior) of enumerated posteriors."""
    lm, model = table_lm(order=2, vocab=4), BradleyTerry(letters)
    weights = torch.tensor([[2.0, -1.0], [-1.0, 1.0], [0.5, 3.0]])
    fresh = FreshCompletions(lm, ["c"], model, beta=0.8, engine=Exact(), epsilon=epsilon, max_new_tokens=2)

    def distribution(w):
        posterior = Exact().run(TiltedLM(lm, UncertainReward(model, w[None], "mean"), 0.8, max_new_tokens=2), ["c"])
        texts = posterior.texts["completion"][0, :, 0]
        by_text = dict.fromkeys(sorted(set(texts)), 0.0)
        for text, weight in zip(texts, posterior.weights()[0, :, 0], strict=True):
            by_text[text] += float(weight)
        return torch.tensor(list(by_text.values())), list(by_text)

    distributions = [distribution(w) for w in weights]
    names = distributions[0][1]
    mixture = torch.stack([p for p, _ in distributions]).mean(0)
    if epsilon is not None:
        mixture = 0.7 * distribution(weights.mean(0))[0] + 0.3 * distribution(torch.zeros(2))[0]
    drawn = [fresh.draw("c", weights) for _ in range(80)]
    counts = torch.tensor([drawn.count(name) for name in names])
    assert_drawn_from(counts, mixture.log())
    pool = fresh(weights)
    assert set(pool.prompts) == {"c"}
    assert len(pool.completions) == 2


@pytest.mark.long
@pytest.mark.parametrize("seed", range(3))
def test_fresh_completions_that_are_equal_are_drawn_again(monkeypatch, seed):
    """The model has three texts and the blank one: after all three pairs, an error says what to do."""
    model = BradleyTerry(letters)
    lm = table_lm(order=1, vocab=4, seed=1)
    fresh = FreshCompletions(lm, ["c"], model, engine=Exact(), beta=5.0, max_new_tokens=1)
    loop, answers = Elicitation(model, seed=seed), []
    monkeypatch.setattr("bayeslm.inference.preferences.elicitation.TRIES", 60)
    with pytest.raises(ValueError, match=r"60 times the completions were .* a larger beta, longer texts"):
        take(loop, 9, lambda prompt, first, second: first < second, answers, fresh)
    assert len({pair(answer) for answer in answers}) == len(answers) == 3
    assert loop.ask(fresh, answers[:2]) == Question(*astuple(answers[2])[:4])  # a resumed loop asks the same question


def test_the_seed_of_the_engine_is_ignored():
    model, lm = BradleyTerry(letters), table_lm(order=2, vocab=8)
    engine = ImportanceSampling(num_particles=1, progress=False, seed=0)  # its seed would make all completions equal
    fresh = FreshCompletions(lm, ["c"], model, engine=engine, num_completions=4, max_new_tokens=6)
    torch.manual_seed(0)
    assert len(fresh(torch.zeros(1, 2)).completions) > 1


def test_fresh_completions_in_a_loop():
    lm, model = table_lm(order=2, vocab=6), BradleyTerry(letters, scale=3.0)
    judge = SimulatedJudge(Reward(lambda completions, **_: [float(c.count("a")) for c in completions]), 0.2)
    fresh = FreshCompletions(lm, ["c", "d e"], model, beta=1.0, num_completions=6, max_new_tokens=4)
    loop = Elicitation(model, seed=1)
    answers = list(itertools.islice(loop.run(fresh, judge), 10))
    assert {answer.prompt for answer in answers} == {"c", "d e"}
    weights = loop.weights(answers, fresh.example)
    assert (weights[:, 0] > weights[:, 1]).float().mean() > 0.9
    for settings, says in (
        ({"num_completions": 1}, "num_completions must be a whole number of at least 2"),
        ({"epsilon": 1.1}, "epsilon"),
        ({"beta": 0.0}, "beta"),
        ({"prompts": []}, "at least one prompt"),
    ):
        with pytest.raises(ValueError, match=says):
            replace(fresh, **settings)


# -- judges ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.long) for seed in (1, 2))])
def test_simulated_judges_have_bradley_terry_noise(seed):
    reward = Reward(lambda completions, **_: [0.3 if c[0] == "x" else 0.0 for c in completions])
    judge = SimulatedJudge(reward, temperature=0.4, seed=seed)
    answers = [judge("p", f"x{i}", f"y{i}") for i in range(2000)]
    expected = 1 / (1 + math.exp(-0.3 / 0.4))
    assert_estimate(np.mean(answers), math.sqrt(expected * (1 - expected) / 2000), expected)
    assert answers == [judge("p", f"x{i}", f"y{i}") for i in range(2000)]
    other = replace(judge, seed=seed + 100)
    assert answers[:100] != [other("p", f"x{i}", f"y{i}") for i in range(100)]


def test_a_judge_without_noise():
    judge = SimulatedJudge(Reward(truth), temperature=0.0)
    for i, j in itertools.permutations("0123", 2):
        assert judge("p", i, j) == (truth([], [i]) > truth([], [j]))
    ties = SimulatedJudge(Reward(lambda completions, **_: [-math.inf] * len(completions)), temperature=0.0)
    called = [ties("p", f"{i}", f"{i} ") for i in range(400)]
    assert_estimate(np.mean(called), 0.025, 0.5)
    far = SimulatedJudge(Reward(lambda completions, **_: [0.0, 1e9]), temperature=1e-9)
    assert far.probability("p", "1", "2") == 0.0
    for temperature in (-1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="temperature"):
            SimulatedJudge(Reward(truth), temperature)


def test_answers():
    answer = Answer("p", "one", "two", 0.8, False)
    assert answer.surprisal == pytest.approx(-math.log(0.2))
    assert not answer.foreseen
    assert replace(answer, first_is_better=True).foreseen
    for even in (True, False):
        assert not replace(answer, probability=0.5, first_is_better=even).foreseen
    skipped = replace(answer, first_is_better=None)
    assert (skipped.surprisal, skipped.foreseen) == (0.0, False)
    assert to_comparisons([skipped]) is None
    data = to_comparisons([answer, skipped, replace(answer, first_is_better=True)])
    assert (data.chosen, data.rejected) == (["two", "one"], ["one", "two"])
    with pytest.raises(TypeError, match="True, False or None"):
        answer.with_answer("1")


# -- the loop --------------------------------------------------------------------------------------------------

LOOPS = {
    "information": Elicitation(MODEL, seed=5),
    "thompson": Elicitation(MODEL, Duel(), seed=5),
    "random": Elicitation(MODEL, Duel(Random()), seed=5),
}


@pytest.mark.parametrize("name", LOOPS)
def test_a_loop_resumes_from_its_answers(name):
    """After any number of answers and skipped questions, without changing the global random state."""
    loop = LOOPS[name]

    def moody(prompt, first, second):
        return None if (int(first) + int(second)) % 3 == 0 else JUDGE(prompt, first, second)

    complete = take(loop, 9, moody)
    assert {answer.first_is_better for answer in complete} == {True, False, None}
    for cut in (1, 8):
        torch.manual_seed(cut)
        before = torch.get_rng_state()
        answers = list(complete[:cut])
        take(loop, 9 - cut, moody, answers)
        assert answers == complete
        assert torch.get_rng_state().equal(before)
    assert take(replace(loop, seed=6), 9, moody) != complete


def test_nothing_is_asked_twice_and_it_ends():
    pool = Pool(["a"] * 3 + ["b"] * 2, list("12345"))
    answers = take(Elicitation(MODEL), 100, pool=pool)
    assert len({pair(answer) for answer in answers}) == len(answers) == 4
    assert Elicitation(MODEL).ask(pool, answers) is None


@pytest.mark.parametrize("error", [RuntimeError("the judge went home"), KeyboardInterrupt()])
def test_no_answer_is_lost_if_a_judge_raises(error):
    answers = []

    def tired(prompt, first, second):
        if len(answers) == 4:
            raise error
        return JUDGE(prompt, first, second)

    with pytest.raises(type(error)):
        take(LOOPS["information"], 9, tired, answers)
    assert len(answers) == 4
    take(LOOPS["information"], 2, answers=answers)
    assert answers == take(LOOPS["information"], 6)


def spins(prompt, first, second):
    while True:
        with contextlib.suppress(Exception):
            pass


def sleeps(prompt, first, second):
    time.sleep(60)


async def waits(prompt, first, second):
    await asyncio.sleep(60)


@pytest.mark.parametrize("hangs", [spins, sleeps, waits])
@pytest.mark.parametrize("in_main", [True, False])
def test_a_judge_that_hangs_is_stopped_and_no_answer_is_lost(hangs, in_main):
    answers, released = [], threading.Event()

    def judge(prompt, first, second):
        if len(answers) < 2:
            return JUDGE(prompt, first, second)
        if in_main or hangs is waits:
            return hangs(prompt, first, second)
        return released.wait(60)  # a thread that is abandoned ends with the test

    def ask():
        start = time.monotonic()
        with pytest.raises(JudgeError, match=r"the judge reached its time limit of 0\.2 s: whether '\d+' or '\d+' is"):
            take(Elicitation(MODEL, timeout=0.2), 9, judge, answers)
        assert time.monotonic() - start < 20

    if in_main:
        ask()
    else:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(ask).result(60)
    released.set()
    assert answers == take(Elicitation(MODEL), 2)


def test_a_time_limit_changes_no_answer():
    assert take(Elicitation(MODEL, timeout=60.0), 4) == take(Elicitation(MODEL), 4)
    with pytest.raises(ValueError, match="timeout must be"):
        Elicitation(MODEL, timeout=0.0)


@pytest.mark.parametrize(("seeds", "number"), [(4, 14), pytest.param(8, 20, marks=pytest.mark.long)])
def test_probabilities_are_those_of_the_posterior(seeds, number):
    """Questions are answered with their stated probabilities, and the order of the two completions is random."""
    foreseen, swapped = [], []
    for seed in range(seeds):
        answers = take(replace(LOOPS["random"], seed=seed), number, replace(JUDGE, seed=seed))
        foreseen += [(answer.probability, answer.first_is_better) for answer in answers[5:]]
        swapped += [int(answer.first) > int(answer.second) for answer in answers]
    p, y = np.array(foreseen, dtype=float).T
    assert abs((p - y).mean()) < 4.5 * math.sqrt((p * (1 - p)).mean() / len(p))
    assert abs(((p - 0.5) * (y - p)).mean()) < 4.5 * math.sqrt(((p - 0.5) ** 2 * p * (1 - p)).mean() / len(p)) + 0.01
    assert abs(np.mean(swapped) - 0.5) < 4.5 * 0.5 / math.sqrt(len(swapped))


def test_without_answers_the_posterior_is_the_prior():
    weights = LOOPS["information"].weights([], POOL.example)
    assert weights.shape == (256, 5)
    assert weights.square().mean().item() == pytest.approx(16 / 5, rel=4.5 * math.sqrt(2 / 1280))
    with pytest.raises(ValueError, match="no question was answered"):
        LOOPS["information"].posterior([Answer("a", "1", "2", 0.5, None)])


@pytest.mark.long
def test_information_gain_needs_fewer_answers_than_random_pairs():
    """After 20 answers its predictions on new texts are closer to those of the true weights, over 6 seeds."""
    held = Pool(["a"] * 60, [str(i) for i in range(1000, 1060)])
    pairs = held.pairs()
    true = torch.tensor(truth(held.prompts, held.completions))
    right = true[pairs[:, 0]] > true[pairs[:, 1]]

    def accuracy(name, seed):
        pool = Pool(["a"] * 60, [str(i) for i in range(60 * seed, 60 * seed + 60)])
        loop = replace(LOOPS[name], seed=seed)
        answers = take(loop, 20, replace(JUDGE, seed=seed), pool=pool)
        reward = MODEL.reward(held.prompts, held.completions, loop.weights(answers, pool.example).mean(0))
        return ((reward[pairs[:, 0]] > reward[pairs[:, 1]]) == right).float().mean().item()

    gain = np.array([accuracy("information", seed) - accuracy("random", seed) for seed in range(6)])
    assert gain.mean() > 2.0 * gain.std(ddof=1) / math.sqrt(6)


def test_any_engine_infers_the_weights():
    """Importance sampling of the same answers has the same posterior mean."""
    small = BradleyTerry(lambda prompts, completions: features(prompts, completions)[:, :2], scale=1.0)
    answers = take(Elicitation(small), 8)
    means = []
    for engine in (Laplace(num_samples=20_000), ImportanceSampling(num_particles=100_000, progress=False)):
        posterior = Elicitation(small, engine=engine).posterior(answers)
        means.append(diagnostics.expectation(posterior, posterior.samples["weights"][..., :1]))
    (one, error), (two, other) = means
    assert_estimate(one, np.hypot(error, other), two)
    assert error < 0.02
