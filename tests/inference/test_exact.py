"""`Exact` against sums written out by hand."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from support.models import table_lm
from support.programs import rewarded

from bayeslm.inference import EvidenceError, Exact, ProgramError

WORDS = "abc"


def small():
    """Vocabulary <eos> a b c, bigram: 40 completions of 3 tokens."""
    return table_lm(order=2, seed=3, vocab=4)


def by_hand(lm, prompt: list[int], tokens: int, log_likelihood) -> tuple[float, float]:
    """log Z and E[likelihood's exponent] of a bigram model, by a loop over all sequences and the table itself."""
    logits = lm.network.table.log_softmax(-1).tolist()
    terms = []
    for length in range(1, tokens + 1):
        for x in itertools.product(range(4), repeat=length):
            ended = x[-1] == 0
            if 0 in x[:-1] or not (ended or length == tokens):
                continue
            context = [prompt[-1], *x[:-1]]
            terms.append((sum(logits[c][t] for c, t in zip(context, x, strict=True)), log_likelihood(x)))
    weights = np.exp([p + r for p, r in terms])
    return math.log(weights.sum()), float((weights * [r for _, r in terms]).sum() / weights.sum())


def count(x: torch.Tensor, token: int) -> torch.Tensor:
    return (x == token).sum(-1).to(torch.get_default_dtype())


def test_log_evidence_and_expectations_of_each_prompt():
    lm = small()
    model = rewarded(lm, 3, lambda x: 1.7 * count(x, 2) - 0.4 * count(x, 1))
    prompts = [[1], [3, 2], [1, 1, 3]]
    posterior = Exact().run(model, prompts)
    expected = [by_hand(lm, p, 3, lambda x: 1.7 * x.count(2) - 0.4 * x.count(1)) for p in prompts]
    np.testing.assert_allclose(posterior.log_evidence, [z for z, _ in expected], atol=1e-5)
    mean = (posterior.weights() * posterior.log_likelihood["reward"]).sum((0, 1))
    np.testing.assert_allclose(mean, [r for _, r in expected], atol=1e-5)
    assert posterior.samples["completion"].shape == (1, 40, 3, 3)
    assert posterior.stats["atoms"] == 40
    # as if drawn uniformly from the atoms: the mean weight is Z, as for every engine
    mean_weight = np.logaddexp.reduce(posterior.log_weights, axis=(0, 1)) - math.log(40)
    np.testing.assert_allclose(mean_weight, posterior.log_evidence, atol=1e-5)


def test_a_discrete_latent_beside_the_completion():
    """p(topic) sum_x p(x | prompt) exp(l(topic, x)), topic inside the plate: mixtures of evidences."""
    lm = small()
    prior = torch.tensor([0.2, 0.5, 0.3])

    def model(prompts):
        with pyro.plate("prompts", len(prompts)):
            topic = pyro.sample("topic", dist.Categorical(prior))
            x = pyro.sample("completion", lm(prompts, max_new_tokens=3))
            hits = (x == topic[..., None] + 1).sum(-1)
            pyro.factor("reward", 1.3 * hits)

    prompts = [[1], [2]]
    posterior = Exact().run(model, prompts)
    assert posterior.log_weights.shape[-1] == 2
    for i, prompt in enumerate(prompts):
        parts = [by_hand(lm, prompt, 3, lambda x, k=k: 1.3 * x.count(k + 1))[0] for k in range(3)]
        joint = prior.log().numpy() + parts
        expected = np.logaddexp.reduce(joint)
        assert posterior.log_evidence[i] == pytest.approx(expected, abs=1e-5)
        weights = posterior.weights()[0, :, i]
        topics = [weights[posterior.samples["topic"][0, :, i] == k].sum() for k in range(3)]
        np.testing.assert_allclose(topics, np.exp(joint - expected), atol=1e-5)


def test_a_latent_shared_between_prompts_makes_them_one_posterior():
    lm = small()

    def model(prompts):
        mood = pyro.sample("mood", dist.Bernoulli(0.3))
        with pyro.plate("prompts", len(prompts)):
            x = pyro.sample("completion", lm(prompts, max_new_tokens=2))
            pyro.factor("reward", 2.0 * mood * count(x, 1))

    prompts = [[1], [2]]
    posterior = Exact().run(model, prompts)
    assert posterior.log_weights.shape == (1, 2 * 13**2, 1)
    parts = [
        math.log(p) + sum(by_hand(lm, q, 2, lambda x, m=m: 2.0 * m * x.count(1))[0] for q in prompts)
        for m, p in ((0, 0.7), (1, 0.3))
    ]
    assert posterior.log_evidence[0] == pytest.approx(np.logaddexp(*parts), abs=1e-5)
    on = posterior.weights()[0, posterior.samples["mood"][0] == 1, 0].sum()
    assert on == pytest.approx(math.exp(parts[1] - np.logaddexp(*parts)), abs=1e-5)


def test_two_completions_and_an_observed_site():
    """The second text is scored by an observation whose mean it sets."""
    lm = small()

    def model(prompts):
        with pyro.plate("prompts", len(prompts)):
            x = pyro.sample("first", lm(prompts, max_new_tokens=2))
            y = pyro.sample("second", lm(prompts, max_new_tokens=2))
            pyro.factor("reward", count(x, 1))
            pyro.sample("rating", dist.Normal(count(y, 2), 1.0), obs=torch.tensor(1.5))

    posterior = Exact().run(model, [[1]])
    first, _ = by_hand(lm, [1], 2, lambda x: x.count(1))
    second, _ = by_hand(lm, [1], 2, lambda y: -0.5 * (1.5 - y.count(2)) ** 2 - 0.5 * math.log(2 * math.pi))
    assert posterior.log_evidence[0] == pytest.approx(first + second, abs=1e-5)
    assert set(posterior.log_likelihood) == {"reward", "rating"}


def test_a_plate_inside_the_prompts_combines_freely():
    lm = small()

    def model(prompts):
        with pyro.plate("prompts", len(prompts)):
            x = pyro.sample("completion", lm(prompts, max_new_tokens=2))
            with pyro.plate("raters", 2, dim=-2):
                likes = pyro.sample("likes", dist.Bernoulli(0.5))
                pyro.factor("agreement", likes * count(x, 1))

    posterior = Exact().run(model, [[1], [3]])
    assert posterior.samples["likes"].shape == (1, 13 * 4, 2, 2)
    for i, prompt in enumerate([[1], [3]]):
        expected, _ = by_hand(lm, prompt, 2, lambda x: 2 * math.log(0.5 + 0.5 * math.exp(x.count(1))))
        assert posterior.log_evidence[i] == pytest.approx(expected, abs=1e-5)


def test_too_many_atoms_are_refused_with_their_number():
    with pytest.raises(ProgramError, match=r"40 of 'completion'.*max_atoms=39"):
        Exact(max_atoms=39).run(rewarded(small(), 3, lambda x: count(x, 1)), [[1]])


def test_continuous_latents_are_refused_by_name():
    with pytest.raises(ProgramError, match="'theta'"):
        Exact().run(lambda: pyro.sample("theta", dist.Normal(0.0, 1.0)))


def test_impossible_programs_are_an_error_not_nan():
    with pytest.raises(EvidenceError, match="does not exist"):
        Exact().run(rewarded(small(), 2, lambda x: torch.full(x.shape[:-1], -math.inf)), [[1]])
