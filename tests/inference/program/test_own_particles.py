"""A batch whose particles have other scores together than alone is refused, with the probability that is stated."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from support.statistics import assert_evidence

from bayeslm.inference import MCMC, SMC, SVI, AnnealedSMC, Exact, ImportanceSampling, ProgramError, RunError
from bayeslm.inference.program import check_independence, inspect
from bayeslm.models import LanguageModel, rewards

VOCAB, NUM = 48, 64
RARE = 40  # a token that arbitrary completions lack
LM = LanguageModel.tabular(["<eos>", *(f"w{i}" for i in range(1, VOCAB))], order=2, seed=1)
RUN = {"seed": 0, "progress": False}
MIXES = "program mixes particles"


def flags(x, t):
    return (x == t).any(-1)


# of texts, their scores (particle, prompt) and a token: each depends on all particles
COUPLINGS = {
    "any": lambda x, r, t: r + 1.0 if flags(x, t).any() else r,
    "all": lambda x, r, t: r - 1.0 if flags(x, t).all() else r,
    "not any": lambda x, r, t: torch.where(flags(x, t).any(), r, r - 1.0),
    "majority": lambda x, r, t: r + 1.0 if flags(x, t).float().mean() > 0.5 else r,
    "number": lambda x, r, t: r + 1.0 if flags(x, t).sum() > 2 else r,
    "mean": lambda x, r, t: r - flags(x, t).float().mean(),
    "softmax": lambda x, r, t: torch.softmax(3.0 * flags(x, t), 0).log().reshape(r.shape) + r,
    "sort": lambda x, r, t: flags(x, t).float().reshape(-1).sort().values.reshape(r.shape),
    "normalised": lambda x, r, t: r + (flags(x, t).float() - flags(x, t).float().mean()).sign(),
}


def coupled(coupling, t, batches):
    """A program of completions, whose scores are coupled, and the share f of the particles that its batches change."""

    def scored(x):
        return COUPLINGS[coupling](x, 0.1 * (x % 3).float().sum(-1), t)

    def model():
        with pyro.plate("prompts", 1):
            x = pyro.sample("completion", LM([[1]], max_new_tokens=4))
            r = scored(x)
            pyro.factor("r", r)
        if x.numel() == NUM * 4 and not batches:
            rows = x.reshape(NUM, 1, 4)
            alone = torch.stack([scored(row).reshape(()) for row in rows])
            batches.append(float(((alone - r.reshape(-1)).abs() > 1e-2).float().mean()))

    return model


def is_refused(model, seed):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            ImportanceSampling(num_particles=NUM, seed=seed, progress=False).run(model)
        except ProgramError:
            return True
    return False


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_couplings_over_all_particles_are_found_with_the_stated_probability(coupling):
    """For each token t. A batch that the coupling does not change is right, and is not refused."""
    bound, missed = [], 0
    for t in range(3, VOCAB, 15):
        batches = []
        refused = is_refused(coupled(coupling, t, batches), seed=t)
        if batches and batches[0] > 0:
            bound.append((1 - batches[0]) ** 4)
            missed += not refused
        elif batches:
            assert not refused
    # at most as many are missed as the probabilities say
    assert missed <= sum(bound) + 4 * math.sqrt(sum(p * (1 - p) for p in bound)) + 1e-9


@pytest.mark.parametrize("kind", [torch.any, torch.all])
@pytest.mark.parametrize("quantile", [0.02, 0.5, 0.98])
def test_conditions_on_numbers_are_found_however_few_particles_they_change(kind, quantile):
    """The smallest and the largest value are among the particles that run alone."""
    threshold = float(torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(quantile)))

    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.factor("r", x + 1.0 if kind(x > threshold) else x)

    with pytest.raises(ProgramError, match=MIXES):
        ImportanceSampling(num_particles=256, **RUN).run(model)


def only_if_one_has(t, reward=None):
    """A program that scores otherwise if any particle has drawn a token."""

    def model():
        with pyro.plate("prompts", 2):
            x = pyro.sample("completion", LM([[1], [2]], max_new_tokens=4))
            r = 0.1 * (x == 1).float().sum(-1) if reward is None else reward(["a", "b"], LM.decode(x))
            pyro.factor("r", r - (1.0 if (x == t).any() else 0.0))

    return model


@pytest.mark.parametrize(
    "engine",
    [
        SMC(num_particles=256, **RUN),
        AnnealedSMC(num_particles=256, **RUN),
        MCMC(num_chains=64, num_samples=64, warmup=8, **RUN),
        SVI(num_steps=4, num_particles=128, num_samples=256, **RUN),
        ImportanceSampling(num_particles=256, batch_size=16, **RUN),
    ],
    ids=lambda engine: type(engine).__name__,
)
def test_by_every_engine(engine):
    check_independence(inspect(only_if_one_has(RARE)))  # does not find it
    with pytest.raises((ProgramError, RunError), match=MIXES):
        engine.run(only_if_one_has(RARE))


def test_scores_of_rewards_are_repeated_and_no_reward_is_called_again():
    calls = []

    def function(completions, **_):
        calls.append(len(completions))
        return [float(len(text)) for text in completions]

    reward = rewards.Reward(function)
    with pytest.raises(ProgramError, match=MIXES):
        ImportanceSampling(num_particles=256, **RUN).run(only_if_one_has(RARE, reward))
    assert calls == [2, 512]  # the inspection's, and the run's


def test_guides_are_tried_too():
    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("z", dist.Normal(x, 1.0))

    def guide():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("z", dist.Normal(x, 2.0 if (x > 2.3).any() else 1.0))

    with pytest.raises(ProgramError, match="the guide mixes particles"):
        ImportanceSampling(num_particles=512, guide=guide, **RUN).run(model)


# -- programs that are not refused -----------------------------------------------------------------------------


def judged(score):
    def model():
        with pyro.plate("prompts", 2):
            x = pyro.sample("completion", LM([[1], [2]], max_new_tokens=2))
            pyro.factor("r", score(x))

    return model


def seldom(share):
    """Scores that are others in a share of the calls, as those of a judge with a temperature."""
    return lambda x: (x == 1).any(-1) + (torch.rand(x.shape[:-1]) < share).float()


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5])
def test_a_program_that_is_random_is_not_refused(share):
    for seed in range(4):
        ImportanceSampling(num_particles=NUM, seed=seed, progress=False).run(judged(seldom(share)))


def of_rewards(reward):
    return judged(lambda x: 0.1 * reward(["a", "b"], LM.decode(x)))


def unique_texts_alone(reward):
    """Each text is scored once, wherever it stands."""

    def score(x):
        texts = LM.decode(x)
        some, where = np.unique(texts.astype(str), return_inverse=True)
        return reward(["a"] * len(some), list(some))[torch.as_tensor(where)].reshape(texts.shape)

    return judged(score)


def with_a_cache(reward):
    known = {}

    def score(x):
        texts = LM.decode(x)
        if new := [text for text in dict.fromkeys(texts.reshape(-1)) if text not in known]:
            known.update(zip(new, reward(["a"] * len(new), new).tolist(), strict=True))
        return torch.tensor([known[text] for text in texts.reshape(-1)]).reshape(texts.shape)

    return judged(score)


@pytest.mark.parametrize("program", [of_rewards, unique_texts_alone, with_a_cache])
def test_rewards_that_stand_alone_are_right(program):
    model = program(rewards.Reward(lambda completions: [0.3 * len(text) for text in completions]))
    posterior = ImportanceSampling(num_particles=500, **RUN).run(model)
    assert_evidence(posterior, Exact().run(model).log_evidence)


def test_a_reward_that_is_random_is_not_refused():
    generator = np.random.default_rng(0)
    reward = rewards.Reward(lambda completions: generator.normal(size=len(completions)).tolist())
    ImportanceSampling(num_particles=NUM, **RUN).run(of_rewards(reward))
