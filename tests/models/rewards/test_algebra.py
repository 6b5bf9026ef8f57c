"""The algebra of combined rewards."""

import math
import pickle
import random
from functools import partial

import numpy as np
import pytest
import torch

from bayeslm.models.rewards import Constraint, Contains, Length, Matches, Reward, RewardError, Sentiment, Toxicity

NEG_INF = -math.inf


def length(completions, **kwargs):
    """A plain function, as a user of TRL writes it."""
    return [float(len(text)) for text in completions]


TEXTS = [" great, lovely!", " terrible", "", " please call 42", "you stupid idiot", " very very long " * 5]
POOL = {
    "sentiment": Sentiment(),
    "length": Length(),
    "near": Length(3),
    "contains": Contains("please"),
    "plain": Reward(length),
    "constraint": Constraint(lambda text: "idiot" not in text),
}


FORMS = [lambda w, r: w * r, lambda w, r: r * np.float64(w), lambda w, r: -(r * -w), lambda w, r: 0 - r * -w]


@pytest.mark.parametrize("seed", range(30))
def test_combinations_are_those_of_their_parts(seed):
    """(b + sum w r)(x) = b + sum w r(x), within bounds that follow from the parts', and never NaN."""
    rng = random.Random(seed)
    total, values, low, high = 0.0, torch.zeros(len(TEXTS)).double(), 0.0, 0.0
    for name in rng.choices(list(POOL), k=rng.randint(1, 5)):
        reward, offset = POOL[name], rng.choice([0.0, 1.5])
        weight = rng.choice([0.1, 1.0, 3.0] if name == "constraint" else [-2.0, -0.5, 0.1, 1.0, 3.0])
        total = rng.choice([lambda a, b: a + b, lambda a, b: b + a])(total, rng.choice(FORMS)(weight, reward))
        total = rng.choice([lambda t, b: t + b, lambda t, b: b + t, lambda t, b: t - -b])(total, offset)
        values = values + offset + weight * reward(["p"], TEXTS).double()
        ends = sorted((weight * reward.lower_bound, weight * reward.upper_bound))
        low, high = low + offset + ends[0], high + offset + ends[1]
    scores = total(["p"], TEXTS).double()
    assert torch.allclose(scores, values, atol=1e-5)
    assert not scores.isnan().any()
    assert (total.lower_bound, total.upper_bound) == pytest.approx((low, high))
    assert (scores <= total.upper_bound + 1e-6).all()
    assert (scores >= total.lower_bound - 1e-6).all()


def test_sums_and_differences_of_rewards():
    a, b = Sentiment(), Contains("please")
    at, bt = a(["p"], TEXTS), b(["p"], TEXTS)
    assert torch.equal((a - b)(["p"], TEXTS), at - bt)
    assert torch.equal(sum([a, b, a])(["p"], TEXTS), at + bt + at)
    assert torch.allclose((2 - a / 4)(["p"], TEXTS), 2 - at / 4)
    assert (a - b).upper_bound == 1.0
    assert (a - b).lower_bound == -2.0
    assert (1 - 0.5 * Toxicity()).upper_bound == 1.0
    assert (-Length()).upper_bound == 0.0
    assert Length().upper_bound == math.inf


def test_a_weight_of_zero_switches_a_term_off():
    constraint = POOL["constraint"]
    assert constraint(["p"], TEXTS).tolist() == [0, 0, 0, 0, NEG_INF, 0]
    off = 0 * constraint  # exp(-inf)^0 = 1
    assert off(["p"], TEXTS).tolist() == [0.0] * 6
    assert (off.lower_bound, off.upper_bound) == (0.0, 0.0)
    assert repr(off) == "0"
    assert torch.equal((Sentiment() + 0 * constraint)(["p"], TEXTS), Sentiment()(["p"], TEXTS))


def test_constraints_add_and_cannot_be_negated():
    both = Constraint(Contains("a")) + Constraint(Contains("b")) + 7.0
    assert both(["p"], ["ab", "a", "b", ""]).tolist() == [7.0, NEG_INF, NEG_INF, NEG_INF]
    assert both.upper_bound == 7.0
    assert (0.01 * both)(["p"], ["ab", "a"]).tolist() == pytest.approx([0.07, NEG_INF])
    with pytest.raises(RewardError, match=r"negates the -inf of 'constraint'.*\n.*'p'\n.*'bbb'"):
        (Sentiment() - Constraint(Contains("a")))(["p"], ["a", "bad", "bbb"])


def test_numbers_that_are_not_finite_and_other_things_do_not_combine():
    for combine in (lambda r: math.inf * r, lambda r: r + math.nan, lambda r: r - math.inf):
        with pytest.raises(ValueError, match="finite numbers"):
            combine(Sentiment())
    others = (lambda r: r * r, lambda r: r + "1", lambda r: None - r, lambda r: 1 / r, lambda r: r / r)
    arrays = (lambda r: np.ones(2) * r, lambda r: torch.tensor(2.0) * r, lambda r: r * torch.ones(2))
    for combine in others + arrays:
        with pytest.raises(TypeError):
            combine(Sentiment())


def test_map():
    squashed = (3 * Sentiment()).map(math.tanh, upper_bound=1.0, lower_bound=-1.0)
    assert torch.allclose(squashed(["p"], TEXTS), torch.tanh(3 * Sentiment()(["p"], TEXTS)))
    assert (squashed.lower_bound, squashed.upper_bound) == (-1.0, 1.0)
    assert Sentiment().map(abs).upper_bound == math.inf
    assert POOL["constraint"].map(math.exp)(["p"], TEXTS).tolist() == [1, 1, 1, 1, 0, 1]
    with pytest.raises(RewardError, match=r"'log\(contains\)' raised ValueError.*\n.*'p'\n.*' terrible'"):
        Contains("lovely").map(math.log)(["p"], TEXTS)


def test_an_error_names_the_part_that_failed():
    broken = Reward(lambda completions: [math.nan] * len(completions))
    with pytest.raises(RewardError, match="reward '<lambda>' gave nan"):
        (Sentiment() + 2 * broken.map(abs) - 1)(["p"], ["a"])


def test_names_and_reprs():
    total = 0.5 * Sentiment(on="text") - Toxicity() + Reward(length) / 4 - 1
    assert total.__name__ == "0.5 * sentiment - toxicity + 0.25 * length - 1"
    assert repr(total) == "0.5 * Sentiment(on='text') - Toxicity() + 0.25 * Reward(length) - 1"
    assert repr(-Contains("a")) == "-Contains(phrase='a')"
    assert repr(Matches("a").map(abs)) == "Matches(pattern='a').map(abs)"
    assert repr((1 + Length()).map(math.tanh)) == "(Length() + 1).map(tanh)"
    assert Reward(partial(length)).__name__ == "length"
    assert Reward.__name__ == "Reward"


def test_a_subclass_needs_only_score():
    class Vowels(Reward):
        lower_bound = 0.0

        def score(self, prompts, completions, **columns):
            return [sum(text.count(v) for v in "aeiou") for text in completions]

    assert Vowels()(["p"], ["banana", "sky"]).tolist() == [3.0, 0.0]
    assert (Vowels().lower_bound, (-Vowels()).upper_bound) == (0.0, 0.0)
    assert Vowels(upper_bound=10).upper_bound == 10.0
    assert (repr(Vowels()), Vowels().__name__) == ("Vowels()", "vowels")


def test_rewards_survive_pickling():
    reward = Sentiment() - 0.1 * Length(4) + Constraint(Matches(r"\w")) + Reward(length)
    copy = pickle.loads(pickle.dumps(reward))
    assert torch.equal(copy(["p"], TEXTS), reward(["p"], TEXTS))
    assert repr(copy) == repr(reward)
