"""Twisted SMC against `Exact`: log Z, expectations, other latents, and what it refuses."""

from __future__ import annotations

import itertools

import numpy as np
import pyro
import pytest
import torch
from support.gradients import perturbed
from support.models import table_lm, tiny_llama
from support.oracles import ExactTwist
from support.programs import PROMPTS, case, conversation, longer, rewarded, score_table, tilted, token_is
from support.statistics import assert_agrees, assert_evidence, assert_mean, assert_roots_follow

from bayeslm.inference import SMC, EvidenceError, Exact, ImportanceSampling, ProgramError
from bayeslm.models import TiltedLM, rewards

SHORT = [[1, 2], [3]]
SETTINGS = {
    "no twist": {"twist": None},
    "partial": {"twist": "partial"},
    "partial, always resampled": {"twist": "partial", "ess_threshold": 1.0, "resampling": "multinomial"},
    "partial, stratified": {"twist": "partial", "resampling": "stratified"},
    "partial, residual": {"twist": "partial", "resampling": "residual"},
    "optimal": {"twist": None, "resampling": "optimal"},
    "partial, optimal": {"twist": "partial", "resampling": "optimal"},
    "induced, optimal": {"twist": "partial", "proposal": "twist", "top_k": 3, "resampling": "optimal"},
    "induced, few candidates": {"twist": "partial", "proposal": "twist", "top_k": 3},
    "induced, all candidates": {"twist": "partial", "proposal": "twist", "top_k": 100},
}


def ratios(posterior, log_z):
    """Z-hat / Z of each chain, (chain, prompt)."""
    return np.exp(posterior.log_weights - log_z).mean(1)


@pytest.mark.parametrize(
    ("setting", "kind", "seed"),
    [
        *((setting, "table", 1) for setting in SETTINGS),
        ("induced, few candidates", "llama", 0),
        *(
            pytest.param(setting, "llama", 0, marks=pytest.mark.long)
            for setting in sorted(SETTINGS.keys() - {"induced, few candidates"})
        ),
    ],
)
def test_agrees_with_exact(setting, kind, seed):
    engine = SMC(num_particles=16, num_chains=300, seed=seed, progress=False, **SETTINGS[setting])
    _, model, exact = case(kind, 0.5, seed)
    functions = [lambda p: p.rewards["reward"], *(token_is(t, token) for t in (0, 2, 4) for token in (0, 3))]
    assert_agrees(engine.run(model, PROMPTS), exact, functions)


@pytest.mark.parametrize("as_twist", [True, False])
def test_policies_propose(as_twist):
    """As twist and proposal it is importance sampling with the policy; as proposal alone, resampled by a twist."""
    lm, model, exact = case("table", 0.5, 0)
    policy = perturbed(lm, seed=1, scale=0.3)
    setting = {"twist": policy} if as_twist else {"twist": "partial", "proposal": policy}
    posterior = SMC(num_particles=16, num_chains=120, seed=0, progress=False, **setting).run(model, PROMPTS)
    assert_agrees(posterior, exact, [token_is(0, 0), token_is(3, 2)])
    if as_twist:
        sampled = ImportanceSampling(num_particles=1920, guide=policy, seed=0, progress=False).run(model, PROMPTS)
        np.testing.assert_array_equal(sampled.samples["completion"][0, :16], posterior.samples["completion"][0])
        np.testing.assert_allclose(sampled.log_weights[0, :16], posterior.log_weights[0], atol=1e-4)
    else:
        assert posterior.stats["resampled"].any()


def test_a_policys_ratio_as_twist_of_the_prior():
    """With the prior as proposal the weights move before the end, and particles are resampled."""
    _, model, exact = case("table", 0.5, 0)
    setting = {"twist": table_lm(order=3, seed=7), "proposal": "prior"}
    posterior = SMC(num_particles=64, num_chains=100, seed=0, progress=False, **setting).run(model, PROMPTS)
    assert posterior.stats["resampled"].any()
    assert_agrees(posterior, exact, [token_is(0, 0)])


def test_without_a_twist_it_is_importance_sampling():
    model = tilted(tiny_llama(seed=0, eos_token_ids=(), pad_token_id=0), score_table(0), 0.5)
    smc = SMC(num_particles=50, num_chains=2, twist=None, seed=3, progress=False).run(model, PROMPTS)
    sampled = ImportanceSampling(num_particles=50, num_chains=2, seed=3, progress=False).run(model, PROMPTS)
    np.testing.assert_array_equal(smc.samples["completion"], sampled.samples["completion"])
    np.testing.assert_allclose(smc.log_weights, sampled.log_weights, atol=1e-5)
    assert not smc.stats["resampled"].any()


def test_a_reward_that_knows_the_exact_twist_knows_z():
    """Unfinished texts and candidates are distinguished from finished texts, though padding is an EOS."""
    lm = table_lm(order=3, seed=2, vocab=4)
    assert lm.pad_token_id in lm.eos_token_ids
    known: dict[str, float] = {}

    def score(completions):
        return [2.0 * text.split().count("a") - text.split().count("c") for text in completions]

    reward = rewards.Reward(score, prefix=lambda completions: [known[text] for text in completions])
    model = TiltedLM(lm, reward, beta=1.0, max_new_tokens=4)
    prompts = [[1, 2]]
    exact = Exact().run(model, prompts)
    twist = ExactTwist(exact)
    for length in range(1, 5):
        for text in itertools.product((1, 2, 3), repeat=length):
            known[str(lm.decode(torch.tensor([text]))[0])] = twist.of(text, 0)
    engine = SMC(num_particles=20, num_chains=5, twist="prefix", proposal="twist", top_k=4, seed=0, progress=False)
    posterior = engine.run(model, prompts)
    np.testing.assert_allclose(posterior.log_weights, np.broadcast_to(exact.log_evidence, (5, 20, 1)), atol=2e-4)


@pytest.mark.parametrize("top_k", [4, 3])
def test_the_exact_twist_knows_z(top_k):
    """With all tokens as candidates every particle is an exact draw and every weight is Z; with fewer, nearly."""
    lm = table_lm(order=3, seed=2, vocab=4)
    model = tilted(lm, score_table(2, vocab=4, tokens=4), 0.3)
    exact = Exact().run(model, SHORT)
    settings = {"num_particles": 20, "num_chains": 20, "seed": 0, "progress": False}
    posterior = SMC(twist=ExactTwist(exact), proposal="twist", top_k=top_k, **settings).run(model, SHORT)
    if top_k == 4:
        np.testing.assert_allclose(posterior.log_weights, np.broadcast_to(exact.log_evidence, (20, 20, 2)), atol=2e-4)
    else:
        assert_evidence(posterior, exact.log_evidence, unbiased=True)
        plain = ImportanceSampling(num_particles=20, num_chains=400, seed=0, progress=False).run(model, SHORT)
        assert (ratios(posterior, 0).var(0) < ratios(plain, 0).var(0) / 2).all()


# -- genealogy and cost ----------------------------------------------------------------------------------------


def test_roots_follow_from_the_ancestors():
    _, model, _ = case("table", 0.5, 0)
    posterior = SMC(num_particles=12, num_chains=5, twist="partial", seed=1, progress=False).run(model, PROMPTS)
    ancestors = posterior.stats["ancestors"]  # (chain, step, draw, prompt)
    assert ancestors.shape == (5, 5, 12, 2)
    assert_roots_follow(posterior)
    moved = (ancestors != np.arange(12)[:, None]).any(2)
    assert (moved <= posterior.stats["resampled"]).all()
    assert posterior.stats["resampled"].any()
    ess = posterior.stats["ess_by_step"]
    np.testing.assert_array_equal(posterior.stats["resampled"][:, :4], ess[:, :4] < 6.0)
    assert not posterior.stats["resampled"][:, 4].any()  # the truth comes after the last token
    assert posterior.kind == "particles"


@pytest.mark.parametrize("tokens", [3, 6])
@pytest.mark.parametrize("particles", [10, 40])
def test_cost_is_linear_in_particles_and_tokens(particles, tokens):
    """One prefill of the prompts, then one forward pass a token: resampling computes nothing anew."""
    lm = tiny_llama(seed=0, eos_token_ids=(), pad_token_id=0)
    model = tilted(lm, score_table(0, tokens=tokens), 0.2)
    engine = SMC(particles, 1, twist="partial", ess_threshold=1.0, seed=0, progress=False)
    posterior = engine.run(model, PROMPTS)
    assert posterior.stats["resampled"][:, :-1].all()
    assert posterior.stats["model_calls"] == tokens
    assert posterior.stats["tokens"] == 2 * 3 + 2 * particles * (tokens - 1)  # prompts are padded to 3


def test_chains_in_groups_of_bounded_memory():
    lm = table_lm(order=3, seed=0)
    lm.batch_size = 64  # 2 prompts of 16 particles: two chains at once
    posterior = SMC(num_particles=16, num_chains=101, twist="partial", seed=0, progress=False).run(
        tilted(lm, score_table(0), 0.5), PROMPTS
    )
    assert posterior.log_weights.shape == (101, 16, 2)
    assert posterior.stats["ancestors"].shape == (101, 5, 16, 2)
    assert_evidence(posterior, case("table", 0.5, 0)[2].log_evidence, unbiased=True)


def test_conditional_smc_bounds_from_above():
    """1 / Z-hat of a conditional run is unbiased for 1 / Z, and log Z-hat is above log Z on average."""
    _, model, exact = case("table", 0.5, 0)
    draws = exact.resample(400, seed=1)
    engine = SMC(num_particles=8, num_chains=400, twist="partial", retained=draws, seed=0, progress=False)
    posterior = engine.run(model, PROMPTS)
    np.testing.assert_array_equal(posterior.samples["completion"][:, 0], draws.samples["completion"][0])
    inverse = 1 / ratios(posterior, exact.log_evidence)
    assert_mean(inverse, 1.0)
    free = SMC(num_particles=8, num_chains=400, twist="partial", seed=0, progress=False).run(model, PROMPTS)
    assert (free.log_evidence_lower < exact.log_evidence).all()
    assert (posterior.log_evidence_upper > exact.log_evidence).all()
    assert posterior.stats["resampled"].any()


# -- programs with more in them --------------------------------------------------------------------------------


def test_completions_in_a_plate_of_their_own():
    """Three candidates a prompt are one particle; they have no candidates' proposal of their own."""
    lm = table_lm(order=2, seed=5, vocab=4)

    def model(prompts):
        with pyro.plate("prompts", len(prompts)), pyro.plate("candidates", 2):
            x = pyro.sample("completion", lm(prompts, max_new_tokens=2))
            pyro.factor("reward", 1.0 * (x == 1).sum(-1))

    exact = Exact().run(model, SHORT)
    posterior = SMC(num_particles=16, num_chains=200, twist="partial", seed=0, progress=False).run(model, SHORT)
    assert_agrees(posterior, exact, [lambda p: (p.samples["completion"][..., 0, :, 1] == 1) * 1.0])
    with pytest.raises(ProgramError, match="several completions a prompt"):
        SMC(twist="partial", proposal="twist", progress=False).run(model, SHORT)


# -- what it refuses -------------------------------------------------------------------------------------------


def mixing(how):
    lm = table_lm(order=3, seed=1, vocab=4)

    def model(prompts):
        with pyro.plate("prompts", len(prompts)):
            x = pyro.sample("completion", lm(prompts, max_new_tokens=2))
            hits = 2.0 * (x == 1).sum(-1)
            if how == "mean":
                hits = hits - hits.mean()
            elif how == "random":
                hits = hits + torch.rand(())
            elif (how == "branch" and hits) or (how == "any" and x[0, 0, 0] == 1):
                hits = hits + 1
            elif how == "item":
                hits = hits * float(hits)
            pyro.factor("draft", hits)
            prompts = longer(prompts, x[..., 0].flip(0) if how == "flip" else x[..., 0])
            y = pyro.sample("reply", lm(prompts, max_new_tokens=2))
            pyro.factor("match", 1.0 * (x == y).sum(-1))

    return model


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("mean", "'draft' has another log-probability"),
        ("random", "'draft' has another log-probability"),
        ("flip", "prompts of site 'reply' are others"),
        ("branch", "single value"),
        ("item", "single value"),
    ],
)
def test_programs_that_mix_particles_are_refused(how, message):
    engine = SMC(num_particles=32, num_chains=2, twist="partial", ess_threshold=1.0, seed=0, progress=False)
    engine.run(mixing("no"), SHORT)
    for prompts in [SHORT] if how != "branch" else [SHORT, SHORT[:1]]:  # one prompt passes the inspection
        with pytest.raises(ProgramError, match=message):
            engine.run(mixing(how), prompts)


def test_dead_particles_say_where_of_what_and_who_was_alive():
    """A text may hold two words at most, and only at the limit is it found that it must not end either."""
    lm = table_lm(order=2, seed=0, vocab=3)
    short = rewards.Constraint(lambda text: len(text.split()) < 3, prefix_closed=True)
    engine = SMC(num_particles=20, num_chains=2, twist="prefix", seed=0, progress=False)
    endless = TiltedLM(lm, short, beta=1.0, max_new_tokens=6)
    prompts = [[1, 2], [1]]
    posterior = engine.run(endless, prompts)
    assert (posterior.lengths["completion"][np.isfinite(posterior.log_weights)] <= 3).all()

    with torch.no_grad():
        for logits in lm.parameters():
            logits[..., 0] = -1e4  # no text ends
    with pytest.raises(EvidenceError, match=r"40 particles of prompt 0 .'a b'. have weight 0 at token 3 of") as caught:
        engine.run(endless, prompts)
    assert "'reward' is -inf" in str(caught.value)
    assert len(caught.value.survivors) == 40
    assert all(len(text.split()) == 2 for text in caught.value.survivors)

    never = TiltedLM(lm, rewards.Constraint(lambda text: False), beta=1.0, max_new_tokens=3)
    with pytest.raises(EvidenceError, match="have weight 0 at the end of the program: 'reward' is -inf"):
        engine.run(never, prompts)


@pytest.mark.parametrize("twist", ["prefix", "partial"])
def test_a_constraint_that_unfinished_texts_cannot_meet_kills_nobody(twist):
    """A factor on the tokens themselves, -inf but for those that end in token 2: no reward says that it is final."""
    lm = table_lm(order=3, seed=1, vocab=4)

    model = rewarded(lm, 3, lambda x: torch.where(x[..., 2] == 2, 1.0 * (x[..., 1] == 1), -torch.inf))
    exact = Exact().run(model, SHORT)
    posterior = SMC(num_particles=16, num_chains=300, ess_threshold=1.0, twist=twist, seed=0, progress=False).run(
        model, SHORT
    )
    assert_agrees(posterior, exact, [token_is(0, 1), token_is(1, 1)])


def test_a_pad_token_that_is_a_word_is_not_read():
    lm = table_lm(order=2, seed=0, vocab=4)
    lm.eos_token_ids, lm.pad_token_id = (), 1
    prefixes = set()

    def reward(completions, **columns):
        prefixes.update(completions)
        return [float(len(text.split())) for text in completions]

    SMC(num_particles=8, twist="partial", seed=0, progress=False).run(TiltedLM(lm, reward, max_new_tokens=4), SHORT)
    assert {len(text.split()) for text in prefixes} >= {1, 2, 3}


def test_a_dead_chain_counts_as_an_estimate_of_zero():
    """Few particles, a rare word: some chains die out, and Z-hat is unbiased all the same."""
    lm = table_lm(order=2, seed=0, vocab=8)
    model = TiltedLM(lm, rewards.Constraint(rewards.Contains("f")), beta=1.0, max_new_tokens=3)
    exact = Exact().run(model, PROMPTS)
    posterior = SMC(num_particles=4, num_chains=300, twist="prefix", seed=0, progress=False).run(model, PROMPTS)
    assert np.isneginf(posterior.log_weights).all(1).any()
    assert_evidence(posterior, exact.log_evidence, unbiased=True)


def test_what_is_not_a_number_is_named():
    lm, broken = table_lm(order=2, seed=0, vocab=4), table_lm(order=2, seed=0, vocab=4)
    broken(SHORT, max_new_tokens=3).sample()  # the first use tries the network, which would refuse it
    with torch.no_grad():
        for parameter in broken.parameters():
            parameter.fill_(torch.nan)
    model = tilted(lm, score_table(0, vocab=4, tokens=3), 1.0)
    with pytest.raises(ProgramError, match=r"the proposal.* is NaN or .inf at token 1 of 'completion'"):
        SMC(num_particles=8, proposal=broken, twist="partial", seed=0, progress=False).run(model, SHORT)

    class Broken(ExactTwist):
        def lookahead(self, state, tokens):
            return super().lookahead(state, tokens) + torch.nan

    exact = Exact().run(model, SHORT)
    with pytest.raises(ProgramError, match=r"the twist is NaN or .inf at token 1 of 'completion'"):
        SMC(num_particles=8, twist=Broken(exact), seed=0, progress=False).run(model, SHORT)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"num_particles": 0}, "num_particles"),
        ({"resampling": "systemic"}, "resampling must be one of"),
        ({"ess_threshold": 1.5}, "ess_threshold"),
        ({"twist": "reward"}, "twist must be"),
        ({"proposal": "policy"}, "proposal must be"),
        ({"twist": None, "proposal": "twist"}, "needs a twist"),
        ({"twist": {}, "proposal": "twist"}, "needs a twist"),
        ({"twist": {"completion": "prefx"}}, "twist must be"),
        ({"twist": {"completion": tiny_llama()}}, r"twist\['completion'\] must be"),
        ({"twist": 3}, "twist must be"),
        ({"proposal": 3}, "proposal must be"),
        ({"proposal": len}, "needs a `policy`"),
        ({"retained": 3}, "retained must be a Posterior"),
    ],
)
def test_settings_are_checked(setting, message):
    with pytest.raises((TypeError, ValueError), match=message):
        SMC(**setting)


def test_a_twist_for_a_site_that_is_not_there():
    with pytest.raises(ProgramError, match="'completon', which is no completion"):
        SMC(twist={"completon": "partial"}, progress=False).run(case("table", 0.5, 0)[1], PROMPTS)


def test_retained_draws_of_prompts_that_depend_on_a_latent():
    """Prompts have the same names in every run, whatever a latent happens to be in it."""
    model = conversation()
    exact = Exact().run(model, SHORT)
    for seed in range(4):
        posterior = SMC(num_particles=4, num_chains=2, retained=exact, seed=seed, progress=False).run(model, SHORT)
        assert posterior.prompts == exact.prompts


def test_no_point_estimate_by_retained_draws_where_all_others_can_die():
    """E[1 / Z-hat] is below 1 / Z there; the bound from above holds."""
    lm = table_lm(order=2, seed=0, vocab=4)

    model = rewarded(lm, 2, lambda x: torch.where((x == torch.tensor([3, 2])).all(-1), 0.0, -torch.inf))
    exact = Exact().run(model, [[1]])
    for engine in (SMC, ImportanceSampling):
        posterior = engine(num_particles=8, num_chains=50, retained=exact, seed=0, progress=False).run(model, [[1]])
        assert np.isnan(posterior.log_evidence).all()
        assert (posterior.log_evidence_upper > exact.log_evidence).all()


@pytest.mark.parametrize("neither_can", [False, True])
def test_a_policy_may_propose_what_the_prior_cannot_write(neither_can):
    lm, policy = table_lm(order=2, seed=0, vocab=4), table_lm(order=2, seed=1, vocab=4)
    with torch.no_grad():
        for table in (lm.network.table, policy.network.table)[: 1 + neither_can]:
            table[:, 3] = -torch.inf
    model = tilted(lm, 2.0 * score_table(0, vocab=4, tokens=3), 1.0)
    exact = Exact().run(model, SHORT)
    for setting in ({}, {"proposal": "twist", "top_k": 4}, {"proposal": "prior"}):
        engine = SMC(num_particles=16, num_chains=300, twist=policy, seed=0, progress=False, **setting)
        assert_evidence(engine.run(model, SHORT), exact.log_evidence, unbiased=True)


def test_a_learned_twist_is_not_for_one_site_of_a_mapping():
    with pytest.raises(ValueError, match="auto"):
        SMC(twist={"completion": "auto"})
