"""Hard constraints: every engine has the posterior of whole texts, by enumeration, whatever it proposes."""

import functools
import itertools
import json
import math
import re
from dataclasses import replace

import jsonschema
import numpy as np
import pyro
import pytest
import torch
from support.languages import LANGUAGES, PROMPTS, TOKENIZERS, TOKENS, local_distribution, spelling_lm
from support.oracles import expectation
from support.programs import token_is
from support.statistics import assert_agrees, assert_mean, deviations

from bayeslm.inference import MCMC, SMC, Exact, ImportanceSampling, RejectionSampling
from bayeslm.inference.program import EvidenceError, ProgramError, inspect, run_particles
from bayeslm.inference.sequential import LearnedRejection
from bayeslm.inference.sequential.spelling import Spelling
from bayeslm.models import LanguageModel, TiltedLM, rewards
from bayeslm.reliability import problems

pytest.importorskip("llguidance")
QUIET = {"seed": 0, "progress": False}
FUNCTIONS = [token_is(0, 1), token_is(1, 2), lambda p: p.lengths["completion"]]


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


MASKED = [("regex", "characters", 0), ("json", "pieces", 1)]
ENGINES = {
    "importance": lambda c, seed: ImportanceSampling(50, 25, guide=c, seed=seed, progress=False),
    "smc": lambda c, seed: SMC(20, 40, twist=c, seed=seed, progress=False),
    "smc, optimal": lambda c, seed: SMC(20, 40, twist=c, resampling="optimal", seed=seed, progress=False),
    "rejection": lambda c, seed: RejectionSampling(10, 20, constraint=c, batch_size=64, seed=seed, progress=False),
}


@pytest.mark.parametrize(
    ("engine", "language", "tokenizer", "seed"),
    [
        *((engine, language, tokenizer, seed) for engine in ENGINES for language, tokenizer, seed in MASKED),
        ("smc", "regex", "word_ends", 2),
        ("smc", "lark", "characters", 3),
    ],
)
def test_masked_proposals_have_the_global_posterior(engine, language, tokenizer, seed):
    grammar = LANGUAGES[language].grammar
    posterior = ENGINES[engine](grammar, seed).run(program(language, tokenizer), PROMPTS)
    assert_agrees(posterior, exact(language, tokenizer), FUNCTIONS)


@pytest.mark.parametrize("engine", sorted(ENGINES.keys() - {"smc, optimal"}))
@pytest.mark.parametrize(("language", "seed"), [("regex", 0)])
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


@pytest.mark.parametrize("proposal", ["masks", "checks"])
def test_a_retained_draw_makes_log_z_an_upper_bound(proposal):
    """E[1 / Z-hat] = 1 / Z, where the retained text has the weight that it would have if it had been drawn."""
    model, known = program("regex"), exact("regex")
    constraint = LANGUAGES["regex"].grammar if proposal == "masks" else predicate("regex")
    smc = SMC(12, 60, twist=constraint, retained=known, **QUIET).run(model, PROMPTS)
    log_z = np.log(np.exp(smc.log_weights - known.log_evidence).mean(1))
    assert_mean(np.exp(-log_z), 1.0)
    if proposal == "masks":
        weighted = ImportanceSampling(12, 60, guide=constraint, retained=known, **QUIET).run(model, PROMPTS)
        assert_mean(1 / np.exp(weighted.log_weights - known.log_evidence).mean(1), 1.0)


def test_each_of_several_completions_has_its_own_constraint():
    lm, grammar, even = spelling_lm("regex"), LANGUAGES["regex"].grammar, rewards.Grammar(regex="(ab)*")

    def model(prompts):
        with pyro.plate("prompts", len(prompts)):
            x = pyro.sample("completion", lm(prompts, max_new_tokens=2))
            pyro.factor("first", grammar(prompts, lm.decode(x)))
            y = pyro.sample("reply", lm(prompts, max_new_tokens=2))
            pyro.factor("second", even(prompts, lm.decode(y)) + (x[..., 0] == y[..., 0]) * 1.0)

    known = Exact().run(model, PROMPTS)
    both = {"completion": grammar, "reply": even}
    for engine in (
        SMC(30, 30, twist=both, **QUIET),
        SMC(30, 30, twist={"reply": even}, **QUIET),
        ImportanceSampling(30, 30, guide=both, **QUIET),
        RejectionSampling(5, 20, constraint=both, log_bound=1.0, batch_size=64, **QUIET),
    ):
        posterior = engine.run(model, PROMPTS)
        assert_agrees(posterior, known, [token_is(0, 1), lambda p: p.samples["reply"][..., 0] == 3])
    for engine in (SMC(twist=even), ImportanceSampling(guide=even), RejectionSampling(constraint=even, log_bound=1.0)):
        with pytest.raises(ProgramError, match="say which one"):
            engine.run(model, PROMPTS)


def test_a_grammar_that_only_proposes_is_refused():
    """Without the factor, texts that the limit has cut off would have over half of the weight."""
    lm = LanguageModel.tabular(["<eos>", "was", "good", "food"], seed=0)
    grammar = rewards.Grammar(regex="was( good)* food")
    with_factor, without = (TiltedLM(lm, reward, 1.0, max_new_tokens=3) for reward in (grammar, None))
    engines = SMC(64, twist=grammar, seed=0), ImportanceSampling(64, guide=grammar, seed=0)
    for engine in (*engines, RejectionSampling(4, constraint=grammar, batch_size=32, seed=0)):
        engine = replace(engine, progress=False)
        engine.run(with_factor, ["food"])
        with pytest.raises(ProgramError, match=r"no factor of the program: '.*' has weight.* Add the grammar to"):
            engine.run(without, ["food"])


def test_rejection_learns_until_it_refuses_nothing():
    model, grammar = program("json"), LANGUAGES["json"].grammar
    settings = {"num_samples": 100, "batch_size": 32, **QUIET}
    learned = RejectionSampling(constraint=grammar, **settings).run(model, PROMPTS[:1])
    assert learned.rewards["reward"].shape == (1, 100, 1)
    assert problems(learned) == [[]]  # a constraint leaves one reward, and that is nothing to warn of
    assert learned.stats["proposals"] < 0.01 * 100 / np.exp(exact("json").log_evidence[0])  # of what it takes without


def test_a_language_without_a_text_that_fits_is_an_error():
    lm, long = spelling_lm("regex"), rewards.Grammar(regex="a{20}")
    model = TiltedLM(lm, long, beta=1.0, max_new_tokens=TOKENS)
    for engine in (
        SMC(16, 1, twist=long, **QUIET),
        ImportanceSampling(16, guide=long, **QUIET),
        RejectionSampling(8, constraint=long, batch_size=8, **QUIET),
        ImportanceSampling(16, **QUIET),  # from the prior, and only afterwards
        MCMC(8, 1, **QUIET),
    ):
        with pytest.raises(
            EvidenceError, match=rf"no text of at most {TOKENS} tokens .*: the shortest takes 20 or more"
        ):
            engine.run(model, PROMPTS)


def test_tokens_without_texts_are_refused_with_advice():
    lm = LanguageModel(spelling_lm("regex").network, None, eos_token_ids=0)
    grammar = LANGUAGES["regex"].grammar

    def model(prompts):
        with pyro.plate("prompts", len(prompts)):
            pyro.factor("even", 0.0 * pyro.sample("completion", lm(prompts, max_new_tokens=2)).sum(-1))

    for engine in (SMC(twist=grammar), ImportanceSampling(guide=grammar), RejectionSampling(constraint=grammar)):
        with pytest.raises(ProgramError, match="tokenizer"):
            (replace(engine, log_bound=0.0) if isinstance(engine, RejectionSampling) else engine).run(model, PROMPTS)


def test_a_constraint_is_no_setting_of_another_type():
    for make in (lambda: SMC(twist=3), lambda: RejectionSampling(constraint="a+")):
        with pytest.raises((TypeError, ValueError), match=r"twist|constraint"):
            make()


def test_the_least_number_of_tokens_of_a_forced_text():
    distribution = spelling_lm("regex")(PROMPTS, TOKENS)
    spelling = Spelling(distribution, torch.tensor([0]))
    words = [word for word in spelling.token_bytes if word]
    for text in (b"a", b"ab", b"aab", b"abba", b"bbbab"):
        spellings = (
            n for n in range(1, 6) for each in itertools.product(words, repeat=n) if b"".join(each).startswith(text)
        )
        assert spelling.shortest(text) == next(spellings)
    assert spelling.shortest(b"") == 0
    assert spelling.shortest(b"ac") > TOKENS  # no word has a c


@pytest.mark.parametrize(
    ("settings", "sharp"),
    [
        ({"regex": "a(b|ab)*"}, 1),
        ({"regex": "a{20}"}, 20),  # no token but "a" has its letters alone
        ({"regex": "(a|b){5,9}"}, 3),
        ({"regex": "(ab|ba)(ab){3}a{2}"}, 5),
        ({"regex": "b+a{4}"}, 3),
        ({"regex": "(a|é)b{0,3}"}, 1),
        ({"regex": "(c|d){9}"}, math.inf),  # no word has a c
        ({"lark": 'start: "abab" | "ababb"'}, 2),  # two tokens spell what both begin with
    ],
)
def test_no_text_takes_fewer_tokens_than_the_lower_bound(settings, sharp):
    """By all texts of at most four tokens; the bound is said where it is above the limit."""
    grammar, tokens = rewards.Grammar(**settings), (b"", b"a", b"b", b"ab", b"ba")
    texts = {n: [b"".join(x).decode() for x in itertools.product(tokens[1:], repeat=n)] for n in range(5)}
    shortest = next((n for n, some in texts.items() if 0.0 in grammar.score(some, some)), math.inf)
    for limit in (0, 2, 4):
        found = grammar.least_tokens(tokens, limit)
        assert found <= shortest
        assert found == sharp or limit >= sharp or shortest <= limit


@pytest.mark.parametrize("twisted", [True, False])
def test_texts_that_have_not_ended_are_said_to_be_so(twisted):
    """A schema, of which no bound is known: 40 particles are inside the language when their tokens are over."""
    grammar = rewards.Grammar(json_schema={"type": "array", "items": {"enum": [1]}, "minItems": 9})
    model = TiltedLM(spelling_lm("json"), grammar, beta=1.0, max_new_tokens=TOKENS)
    with pytest.raises(EvidenceError) as caught:
        SMC(10, 4, twist=grammar if twisted else None, **QUIET).run(model, PROMPTS)
    said = "\n".join([str(caught.value), *caught.value.__notes__])
    assert re.search(r"all 40 particles of prompt 0 .* have weight 0 at", said)
    assert ("no text of 'completion' had ended after 4 tokens: raise max_new_tokens (4)" in said) == twisted


@pytest.mark.long
def test_smollm2_writes_json_of_a_schema():
    """Every text that has a weight is valid JSON of the schema, and what cannot be completed in time has none."""
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 16}, "age": {"type": "integer", "maximum": 150}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    grammar = rewards.Grammar(json_schema=schema | {"x-guidance": {"whitespace_flexible": False}})
    lm = LanguageModel.from_pretrained("smollm2")
    prompts = ["Maria Keller is 34 years old. As JSON, with name and age: ", "JSON of a person called Bo, aged 7: "]
    for engine in (SMC(16, 2, twist=grammar, **QUIET), ImportanceSampling(32, guide=grammar, **QUIET)):
        posterior = engine.run(TiltedLM(lm, grammar, 1.0, max_new_tokens=32), prompts)
        weighted = posterior.texts["completion"][posterior.weights() > 0]
        assert len(weighted) >= 16
        for text in weighted:
            jsonschema.validate(json.loads(text), schema)
        for text in posterior.texts["completion"][posterior.weights() == 0]:
            with pytest.raises(ValueError, match=r"Unterminated|Expecting|Extra"):
                json.loads(text)


@pytest.mark.parametrize("kind", ["masks", "checks"])
def test_what_is_not_refused_keeps_its_proportions(kind):
    """q = p / c for every text of a batch, c being what is left, which falls from 1 and not below Z."""
    model = program("regex")
    inspected = inspect(model, PROMPTS)
    guide = LearnedRejection(inspected, LANGUAGES["regex"].grammar if kind == "masks" else predicate("regex"))
    left = np.zeros(2)
    for batch in range(5):
        torch.manual_seed(batch)
        particles = run_particles(inspected, guide, 24)
        log_c = (particles.log_prior - particles.log_proposal).numpy()
        np.testing.assert_allclose(log_c, log_c[:1].repeat(24, 0), atol=1e-4)
        assert (log_c[0] < left - 0.01).all() if batch else (log_c[0] == pytest.approx(0.0, abs=1e-5))
        assert (log_c[0] > exact("regex").log_evidence - 1e-4).all()
        left = log_c[0]
        guide.learn()
