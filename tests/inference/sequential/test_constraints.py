"""Hard constraints: every engine has the posterior of whole texts, by enumeration, whatever it proposes."""

import functools

import numpy as np
import pytest
import torch
from support.languages import LANGUAGES, PROMPTS, TOKENIZERS, TOKENS, local_distribution, spelling_lm
from support.oracles import expectation
from support.programs import token_is
from support.statistics import assert_agrees, assert_mean, deviations

from bayeslm.inference import SMC, Exact, ImportanceSampling, RejectionSampling
from bayeslm.models import TiltedLM, rewards

QUIET = {"seed": 0, "progress": False}
FUNCTIONS = [token_is(0, 1), token_is(1, 2), lambda p: p.lengths["completion"]]


def number_of_as(completions):
    return [0.5 * float(text.count("a")) for text in completions]


def program(language: str, tokenizer: str = "characters", reward=None) -> TiltedLM:
    return TiltedLM(
        spelling_lm(language, tokenizer), reward or LANGUAGES[language].grammar, beta=1.0, max_new_tokens=TOKENS
    )


@functools.cache
def exact(language: str, tokenizer: str = "characters"):
    return Exact().run(program(language, tokenizer), PROMPTS)


def predicate(language: str) -> rewards.Constraint:
    """The same language by a function of the text, with one of its beginnings."""
    grammar = LANGUAGES[language].grammar
    return rewards.Constraint(
        rewards.Reward(
            lambda completions: [float(x == 0.0) for x in grammar.score([], completions)],
            prefix=lambda completions: [float(x == 0.0) for x in grammar.prefix([], completions)],
        )
    )


@pytest.mark.parametrize(
    ("language", "tokenizer"), [*(("regex", each) for each in TOKENIZERS), ("lark", "characters"), ("json", "pieces")]
)
def test_the_posterior_is_that_of_the_texts_in_the_language(language, tokenizer):
    distribution = program(language, tokenizer).prior(PROMPTS, TOKENS)
    x = distribution.enumerate_support()
    inside = np.vectorize(LANGUAGES[language].contains)(distribution.decode(x))
    assert 3 < inside.sum() < inside.size / 4
    log_target = distribution.log_prob(x).double().masked_fill(~torch.from_numpy(inside), -torch.inf)
    np.testing.assert_allclose(exact(language, tokenizer).log_evidence, log_target.logsumexp(0), atol=1e-5)


ENGINES = {
    "importance": lambda c, seed: ImportanceSampling(50, 25, guide=c, seed=seed, progress=False),
    "smc": lambda c, seed: SMC(20, 40, twist=c, seed=seed, progress=False),
    "rejection": lambda c, seed: RejectionSampling(10, 20, constraint=c, batch_size=64, seed=seed, progress=False),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("language", "tokenizer", "seed"),
    [("regex", "characters", 0), ("regex", "word_ends", 1), ("lark", "characters", 2), ("json", "pieces", 3)],
)
def test_masked_proposals_have_the_global_posterior(engine, language, tokenizer, seed):
    grammar = LANGUAGES[language].grammar
    posterior = ENGINES[engine](grammar, seed).run(program(language, tokenizer), PROMPTS)
    assert_agrees(posterior, exact(language, tokenizer), FUNCTIONS)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("language", "seed"), [("regex", 0), ("lark", 1)])
def test_checked_proposals_have_the_global_posterior(engine, language, seed):
    posterior = ENGINES[engine](predicate(language), seed).run(program(language), PROMPTS)
    assert_agrees(posterior, exact(language), FUNCTIONS)


def test_locally_renormalised_texts_have_another_distribution():
    """The masked draws themselves, without their weights, have the local distribution; with them the global one."""
    language = "regex"
    known, contains = exact(language), LANGUAGES[language].contains
    local = local_distribution(spelling_lm(language), contains, PROMPTS[0])
    truth = {text: expectation(known, (known.texts["completion"] == text) * 1.0)[0] for text in local}
    text = max(local, key=lambda each: abs(truth[each] - local[each]))
    assert abs(truth[text] - local[text]) > 0.04, "they must differ, to be told apart"
    posterior = ImportanceSampling(200, 20, guide=LANGUAGES[language].grammar, **QUIET).run(
        program(language), PROMPTS[:1]
    )
    drawn = posterior.texts["completion"]
    is_text, inside = (drawn == text) * 1.0, np.vectorize(contains)(drawn)
    assert_mean((inside * (is_text - local[text])).mean(1), 0.0)
    assert abs(is_text[inside].mean() - truth[text]) > 0.02
    assert_mean(deviations(posterior, is_text, truth[text], known.log_evidence[:1]), 0.0)
