"""The laws that every engine obeys, over one list of engines (`engines.ENGINES`); `Exact` is the judge."""

from __future__ import annotations

import functools
import re
import warnings

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from support import dialogues, programs
from support.engines import ENGINES, those
from support.models import table_lm, tiny_llama, tiny_seq2seq
from support.programs import highest, rewarded, score_table, tilted, token_is
from support.statistics import (
    assert_agrees,
    assert_chain_mean,
    assert_evidence,
    assert_mean,
    assert_random_state_kept,
    deviations,
)

from bayeslm import diagnostics, inference
from bayeslm.arviz_versions import az
from bayeslm.inference import EvidenceError, Exact

SHORT = [[1, 2], [3]]
SMALL = {"vocab": 4, "tokens": 4}


def case(beta: float = 0.7, constant: float = 0.0, seed: int = 2):
    """A program of 121 completions a prompt, and the upper bound of its log-likelihood."""
    table = score_table(seed, **SMALL)
    return tilted(table_lm(order=3, seed=seed, vocab=4), table, beta, constant), (highest(table) + constant) / beta


@functools.cache
def exact_of(beta: float = 0.7, seed: int = 2):
    return Exact().run(case(beta, seed=seed)[0], SHORT)


def run(name, model, bound, prompts=SHORT, *, seed=0, size=4):
    return ENGINES[name].make(seed, bound, size).run(model, prompts)


@functools.cache
def small(name):
    """A run of few particles, which tests read and do not change."""
    return run(name, *case(), size=1)


def reward(posterior):
    return posterior.rewards["reward"]


def mood(posterior):
    return posterior.samples["mood"][..., None]


# programs, and functions of their latents
LATENTS = {
    "a latent that prompts depend on": (
        programs.conversation(reply=2),
        [
            lambda p: p.samples["topic"],
            token_is(0, 1),
            lambda p: p.samples["reply"][..., 1] == 2,
            lambda p: p.samples["topic"] * (p.samples["reply"][..., 0] == 2),
        ],
    ),
    "a latent that prompts share": (
        programs.shared(vocab=4),
        [
            mood,
            lambda p: p.samples["completion"][..., :1, 0] == 1,
            lambda p: mood(p) * (p.samples["completion"][..., 1:, 1] == 2),
        ],
    ),
}

TEXTS = {
    "a rationale before an observed answer": (
        dialogues.reasoned(),
        [lambda p, t=t, k=k: p.samples["rationale"][..., t] == k for t in (0, 1) for k in (1, 2)],
    ),
    "a dialogue with a tool": (
        dialogues.dialogue(),
        [
            lambda p: p.samples["turn_0"][..., 0] == 1,
            lambda p: (p.samples["turn_0"] == 3).any(-1),
            lambda p: p.samples["turn_1"][..., 0] == 1,
        ],
    ),
    "an observed beginning of an answer": (
        dialogues.reasoned(eos=False),
        [lambda p, t=t, k=k: p.samples["rationale"][..., t] == k for t in (0, 1) for k in (1, 2)],
    ),
    "a text after a text": (
        dialogues.continued(),
        [
            lambda p: p.samples["draft"][..., 0] == 2,
            lambda p: p.samples["revision"][..., 0] == 2,
            lambda p: (p.samples["draft"][..., 0] == 2) * (p.samples["revision"][..., 0] == 1),
        ],
    ),
}
QUICK = ("exact", "importance, policy", "svi", "smc, default")  # of the dialogue; all else takes a minute

FUNCTIONS = [reward, *(token_is(t, token) for t in range(4) for token in (0, 1, 2))]


def test_every_engine_is_on_the_list():
    made = {type(claims.make(0, 1.0, 1)) for claims in ENGINES.values()}
    assert made == set(inference.ENGINES.values())


@pytest.mark.parametrize("name", those(texts=True, posterior=True))
class TestPosterior:
    @pytest.mark.parametrize("seed", [2, pytest.param(3, marks=pytest.mark.long)])
    def test_agrees_with_exact(self, name, seed):
        """log Z, the expected reward, and the marginal of every token."""
        model, bound = case(seed=seed)
        assert_agrees(run(name, model, bound, seed=seed), exact_of(seed=seed), FUNCTIONS)

    def test_prompts_in_another_order(self, name):
        swapped = run(name, *case(), SHORT[::-1], seed=1)
        assert_agrees(swapped, exact_of(), FUNCTIONS[:4], order=slice(None, None, -1))

    @pytest.mark.parametrize("i", [pytest.param(0, marks=pytest.mark.long), 1])
    def test_a_prompt_alone(self, name, i):
        """Without the longer one beside it, the shorter one is not padded."""
        alone = run(name, *case(), SHORT[i : i + 1], seed=2 + i)
        assert_agrees(alone, exact_of(), FUNCTIONS[:4], order=slice(i, i + 1))

    def test_large_beta_gives_the_prior(self, name):
        model, bound = case(beta=1e6)
        posterior = run(name, model, bound, size=2)
        if ENGINES[name].evidence and "policy" not in name:
            np.testing.assert_allclose(posterior.log_evidence, 0.0, atol=2e-3)
        assert_agrees(posterior, exact_of(beta=1e6), FUNCTIONS[:4])

    @pytest.mark.parametrize("program", LATENTS)
    def test_other_latents_and_several_completions(self, name, program):
        model, functions = LATENTS[program]
        exact = Exact().run(model, programs.SHORT)
        bound = float(sum(exact.log_likelihood.values()).max())
        assert_agrees(run(name, model, bound, programs.SHORT, seed=2, size=2), exact, functions)


@pytest.mark.parametrize(
    ("name", "program"),
    [
        pytest.param(name, program, marks=[] if "dialogue" in program and name in QUICK else [pytest.mark.long])
        for name in those(texts=True, posterior=True)
        for program in TEXTS
    ],
)
def test_programs_of_several_texts(name, program):
    model, functions = TEXTS[program]
    exact = Exact().run(model, programs.SHORT)
    bound = float(sum(exact.log_likelihood.values()).max())
    assert_agrees(run(name, model, bound, programs.SHORT, seed=2), exact, functions)


@pytest.mark.parametrize("name", those(unbiased=True, texts=True, exact=False))
def test_z_is_unbiased(name):
    """The mean of Z-hat / Z over all chains of four runs is 1, with few particles in each."""
    model, bound = case(beta=0.5)
    runs = [run(name, model, bound, seed=seed, size=1) for seed in range(4)]
    ratios = np.concatenate([np.exp(p.log_weights - exact_of(beta=0.5).log_evidence).mean(1) for p in runs])
    assert_mean(ratios, 1.0)
    assert (ratios.std(0) > 0.01).all()  # so that there is something to be wrong about


@pytest.mark.parametrize("name", those(texts=True))
class TestTexts:
    def test_same_seed_same_result_and_no_nan(self, name):
        model, bound = case()
        a, b, c = small(name), *(run(name, model, bound, seed=seed, size=1) for seed in (0, 1))
        np.testing.assert_array_equal(a.samples["completion"], b.samples["completion"])
        np.testing.assert_array_equal(a.log_weights, b.log_weights)
        if not ENGINES[name].exact:
            assert not np.array_equal(a.samples["completion"], c.samples["completion"])
        for array in (a.log_weights, a.log_joint, *a.log_likelihood.values()):
            assert not np.isnan(array).any()
        assert np.isnan(a.log_evidence).any() != ENGINES[name].evidence
        for name_, value in a.stats.items():
            if isinstance(value, np.ndarray | float) and name_ not in ("khat",) and not name_.startswith("acceptance"):
                assert not np.isnan(value).any(), name_

    def test_a_seeded_run_leaves_the_global_random_state_alone(self, name):
        model, bound = case()
        with assert_random_state_kept():
            run(name, model, bound, size=1)

    def test_contract_of_shapes(self, name):
        posterior = small(name)
        chains, draws = posterior.log_weights.shape[:2]
        assert posterior.log_weights.shape == posterior.log_joint.shape == (chains, draws, 2)
        assert posterior.samples["completion"].shape == (chains, draws, 2, 4)
        assert posterior.samples["completion"].dtype == np.int64
        assert posterior.dims["completion"] == ("prompt", "token")
        assert posterior.log_likelihood["reward"].shape == (chains, draws, 2)
        assert posterior.rewards["reward"].shape == (chains, draws, 2)
        assert posterior.log_evidence.shape == posterior.log_evidence_stderr.shape == (2,)
        assert posterior.texts["completion"].shape == posterior.lengths["completion"].shape == (chains, draws, 2)
        np.testing.assert_array_equal(posterior.truncated["completion"], (posterior.samples["completion"] != 0).all(-1))
        assert posterior.prompts == ["a b", "c"]
        assert (posterior.prior_measured is not None) == ENGINES[name].prior
        assert posterior.stats["seconds"] > 0
        assert posterior.stats["model_calls"] > 0
        assert posterior.stats["tokens"] > 0
        assert (posterior.policy is not None) == ENGINES[name].trains
        weights = posterior.weights()
        np.testing.assert_allclose(weights.sum((0, 1)), 1.0, rtol=1e-6)
        assert {"posterior", "sample_stats", "texts"} <= set(posterior.to_arviz().groups())
        assert len(diagnostics.summary(posterior)) == 2

    def test_arviz_gives_a_number_as_rhat_without_arguments(self, name):
        posterior = small(name)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # "Shape validation failed"
            table = az.summary(posterior.to_arviz(), round_to="none")
        (column,) = [column for column in table if column.startswith("r_hat")]
        assert {"reward[a b]", "reward[c]", "completion_length[c]"} <= set(table.index)
        assert table[column].notna().all()

    def test_log_joint_is_the_programs(self, name):
        """log p(x) + r / beta of every draw, scored afresh."""
        posterior = small(name)
        values = torch.as_tensor(posterior.samples["completion"])
        fresh = table_lm(order=3, seed=2, vocab=4)(SHORT, max_new_tokens=4).log_prob(values).detach().numpy()
        score = score_table(2, **SMALL)[torch.arange(4), values].sum(-1).numpy()
        np.testing.assert_allclose(posterior.rewards["reward"], score, atol=1e-5)
        np.testing.assert_allclose(posterior.log_likelihood["reward"], score / 0.7, atol=1e-5)
        np.testing.assert_allclose(posterior.log_joint, fresh + score / 0.7, atol=1e-4)

    def test_a_constant_in_the_reward_moves_log_z_alone(self, name):
        plain, bound = case(beta=1.0)
        moved, moved_bound = case(beta=1.0, constant=2.0)
        a, b = run(name, plain, bound, seed=5, size=1), run(name, moved, moved_bound, seed=5, size=1)
        moved = (a.samples["completion"] != b.samples["completion"]).any(-1).mean()
        assert moved == 0 or (ENGINES[name].trains and moved < 0.01)  # gradients are rounded, and so a draw may differ
        if ENGINES[name].evidence:
            np.testing.assert_allclose(b.log_evidence - a.log_evidence, 2.0, atol=1e-2 if moved else 1e-4)

    def test_all_rewards_minus_infinity_is_an_error(self, name):
        model = programs.second_is_impossible(table_lm(order=2, seed=0, vocab=4))
        with pytest.raises(ValueError, match="-inf") as caught:
            run(name, model, 0.0, size=1)
        if ENGINES[name].constraints:
            assert isinstance(caught.value, EvidenceError)
            assert "prompt 1 ('c')" in str(caught.value)
            assert re.search("'rule' is -inf|every reward is -inf", str(caught.value))

    def test_a_hard_constraint_holds(self, name):
        """Half of the completions are impossible: no draw of positive weight is one, and Z is their complement."""
        lm = table_lm(order=2, seed=0, vocab=4)
        model = rewarded(lm, 3, lambda x: torch.where((x == 2).any(-1), -torch.inf, 0.0))
        if not ENGINES[name].constraints:
            with pytest.raises(ValueError, match="-inf"):
                run(name, model, 0.0, size=1)
            return
        posterior = run(name, model, 0.0)
        alive = np.isfinite(posterior.log_weights) & np.isfinite(posterior.log_joint)
        assert not (posterior.samples["completion"][alive] == 2).any()
        if ENGINES[name].posterior:
            assert_agrees(posterior, Exact().run(model, SHORT), [token_is(0, 1), token_is(2, 3)])


NETWORKS = {"llama": tiny_llama} | {name: functools.partial(tiny_seq2seq, name) for name in ("t5", "bart")}
OF_NETWORKS = ("importance", "rejection", "smc", "smc, induced", "annealed, fixed ladder", "mcmc")


@pytest.mark.parametrize(
    ("network", "names"),
    [
        ("llama", OF_NETWORKS),
        ("t5", ("smc", "mcmc")),
        *(pytest.param(name, those(texts=True, posterior=True), marks=pytest.mark.long) for name in NETWORKS),
    ],
)
def test_a_networks_texts_agree_with_exact(network, names):
    """Transformers too, their caches and their padding: causal networks, and decoders of sources of unequal lengths."""
    table, prompts = score_table(1, vocab=8, tokens=3), [[2, 3, 4], [5]]
    model = tilted(NETWORKS[network](seed=1), table, 1.0)
    exact = Exact().run(model, prompts)
    x, weights = exact.samples["completion"][0], exact.weights()[0]
    shares = [[np.bincount(x[:, i, t], weights[:, i], 8) for i in range(2)] for t in range(3)]  # of each token
    functions = [reward, *(token_is(t, int(np.min(share, 0).argmax())) for t, share in enumerate(shares))]  # none rare
    for name in set(names) - {"exact", "importance, policy"}:  # whose policy has other words
        posterior = run(name, model, highest(table), prompts)
        assert_agrees(posterior, exact, functions)


# -- continuous latents ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", those(continuous=True, posterior=True))
def test_the_closed_form_of_a_gaussian(name):
    """Means, squares and log Z of a conjugate model: every engine that takes continuous latents, NUTS among them.

    y ~ N(theta, 1/10) and theta ~ N(0, 1): posterior N(100 y / 101, 1 / 101), ten times narrower than the prior.
    """
    y = torch.tensor([0.4, -1.1])
    bound = float(dist.Normal(0.0, 0.1).log_prob(torch.tensor(0.0)))
    claims = ENGINES[name]
    posterior = claims.make(0, bound, 8 if claims.texts else 3).run(programs.normal_mean(y, 0.1), ["a", "b"])
    theta, mean = posterior.samples["theta"], (100 / 101 * y).numpy()
    log_z = dist.Normal(0.0, 1.01**0.5).log_prob(y).numpy()
    if claims.evidence:
        assert_evidence(posterior, log_z)
    for values, truth in ((theta, mean), ((theta - mean) ** 2, np.full(2, 1 / 101))):
        if posterior.kind == "markov":
            assert_chain_mean(values, truth)
        else:
            assert_mean(deviations(posterior, values, truth, log_z), 0.0)
