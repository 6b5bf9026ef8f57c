"""Learned twists against the exact twist by enumeration; saved and loaded; and their errors."""

from __future__ import annotations

import functools
import json
import math
from dataclasses import replace

import numpy as np
import pyro
import pytest
import torch
from support.models import table_lm, tiny_llama
from support.oracles import ExactTwist
from support.programs import PROMPTS, rewarded, score_table, tilted
from support.statistics import assert_evidence, assert_mean

from bayeslm.inference import SMC, EvidenceError, Exact, ImportanceSampling, ProgramError
from bayeslm.inference.program import inspect
from bayeslm.inference.sequential import TwistLearning
from bayeslm.inference.sequential.twist_learning import TwistData, confidence, contrastive, offset, soft_value
from bayeslm.inference.sequential.twists import LearnedTwist, SiteRows
from bayeslm.models import LanguageModel, TiltedLM, Twist, rewards
from bayeslm.models.lm.decoding import categorical
from bayeslm.models.lm.twist import TwistInputs

METHODS = ["contrastive", "soft-value"]
T = 4


def learn(model, **settings):
    settings = {"num_particles": 1000, "num_steps": 150, "learning_rate": 5e-3, "weight_decay": 0.01} | settings
    return TwistLearning(seed=0, progress=False, **settings).run(model, PROMPTS)


def words(lm, beta=0.5):
    """A reward that counts two words: the count so far is a term of the final one."""
    return rewarded(lm, T, lambda x: count(x) / beta)


def count(x):
    return 1.0 * (x == 2).sum(-1) - 0.7 * (x == 5).sum(-1)


def drawn(log_psi, log_l, taught=None):
    """Draws of one prompt: log psi (row, token), log L (row,)."""
    taught = torch.ones(log_psi.shape, dtype=torch.bool) if taught is None else taught
    nothing = TwistInputs(*(torch.empty(0) for _ in range(3)), None)
    return TwistData(nothing, taught, log_l[:, None])


@functools.cache
def learned(kind, method, reads_reward):
    """A model, a program on it, its exact posterior and its learned twist."""
    lm = table_lm(order=3, seed=0) if kind == "table" else tiny_llama(seed=1)
    model = words(lm, beta=0.4)
    twist = learn(model, method=method, reads_reward=reads_reward)
    return lm, model, Exact(num_prior_samples=1).run(model, PROMPTS), twist


@pytest.mark.parametrize("reads_reward", [False, pytest.param(True, marks=pytest.mark.long)])
@pytest.mark.parametrize(
    ("kind", "method"),
    [
        ("table", "contrastive"),
        pytest.param("table", "soft-value", marks=pytest.mark.long),
        *(("llama", method) for method in METHODS),
    ],
)
def test_learns_the_exact_twist(kind, method, reads_reward):
    """It is correlated with the enumerated expectation at every step, for each prompt."""
    lm, _, posterior, twist = learned(kind, method, reads_reward)
    exact = ExactTwist(posterior)
    torch.manual_seed(0)
    steps = lm(PROMPTS, max_new_tokens=T).expand((200, 2)).decoder()
    state, known = twist.start(steps), exact.start(steps)
    while steps.t < T:
        token, score = categorical(steps.logits)
        truth, live = exact.lookahead(known, token[:, None])[:, 0], ~steps.finished & (token != 0)
        so_far = count(torch.cat([steps.values[:, : steps.t], token[:, None]], -1)) / 0.4
        guess = twist.lookahead(state, token[:, None], so_far[:, None] if reads_reward else None)[:, 0]
        for prompt in range(2):
            of = live.reshape(200, 2).clone()
            of[:, 1 - prompt] = False
            of = of.reshape(-1)
            assert torch.corrcoef(torch.stack([guess[of], truth[of]]))[0, 1] > (0.9 if reads_reward else 0.8)
        steps.append(token, score)
        state, known = twist.advance(state, steps), exact.advance(known, steps)


@pytest.mark.parametrize(
    ("method", "reads_reward"),
    [
        *((method, False) for method in METHODS),
        pytest.param("contrastive", True, marks=pytest.mark.long),
        ("soft-value", True),
    ],
)
def test_smc_with_a_learned_twist_is_unbiased_and_better(method, reads_reward):
    _, model, exact, twist = learned("llama", method, reads_reward)
    settings = {"num_particles": 16, "num_chains": 80, "seed": 0, "progress": False}
    variances = []
    for engine in (
        ImportanceSampling(**settings),
        SMC(twist=twist, ess_threshold=0.9, **settings),
        SMC(twist={"completion": twist}, proposal="twist", top_k=6, **settings),
    ):
        ratios = np.exp(engine.run(model, PROMPTS).log_weights - exact.log_evidence).mean(1)
        assert_mean(ratios, 1.0)
        variances.append(ratios.var(0))
    assert variances[2].sum() < 0.25 * variances[0].sum()  # of texts of 4 tokens, resampling alone gains little


@pytest.mark.parametrize("reads_reward", [False, True])
def test_token_by_token_and_complete_texts_agree(reads_reward):
    """The twist token by token, for SMC, equals that of complete texts, for training, at prompts of any length."""
    lm = tiny_llama(seed=0)
    model = words(lm)
    twist = learn(model, num_steps=20, num_particles=100, reads_reward=reads_reward)
    dist = lm(PROMPTS, max_new_tokens=T).expand((20, 2))
    x = dist.sample()
    tokens, hidden = (value.flatten(0, 1) for value in (x, dist.token_log_prob_and_hidden(x)[1]))
    written = torch.arange(T) < dist.lengths(x).flatten()[:, None]
    assert not written.all()
    so_far = None
    if reads_reward:
        so_far = torch.stack([count(torch.where(torch.arange(T) <= t, tokens, -1)) / 0.5 for t in range(T)], 1)
    steps = dist.decoder()
    state, found = twist.start(steps), []
    for t in range(T):
        found.append(twist.lookahead(state, tokens[:, t, None], so_far[:, t, None] if reads_reward else None)[:, 0])
        steps.append(tokens[:, t], torch.zeros(len(tokens)))
        state = twist.advance(state, steps)
    with torch.no_grad():
        psi = twist(twist.inputs(twist.project(hidden), tokens, so_far))[..., 0]
        expected = twist.confidence[1:] * psi + twist.offset[1:]
    torch.testing.assert_close(torch.stack(found, 1)[written], expected[written], atol=1e-4, rtol=1e-4)


def test_resampled_texts_keep_their_twist():
    """A row that becomes another has the other's psi from then on: all of its features move."""
    lm = tiny_llama(seed=0)
    twist = learn(words(lm), num_steps=20, num_particles=100)
    torch.manual_seed(0)
    steps = lm(PROMPTS[:1], max_new_tokens=T).expand((8, 1)).decoder()
    state = twist.start(steps)
    for _ in range(2):
        steps.append(*categorical(steps.logits))
        state = twist.advance(state, steps)
    rows = torch.tensor([7, 6, 5, 4, 3, 2, 1, 0])
    tokens = torch.arange(1, 4).expand(8, -1)
    before = twist.lookahead(state, tokens)
    assert (before[:, 0].diff().abs() > 1e-6).any()
    torch.testing.assert_close(twist.lookahead(state.select(rows), tokens), before[rows])


def test_ended_texts_keep_their_last_estimate():
    lm = tiny_llama(seed=0)
    model = words(lm)
    twist = learn(model, num_steps=20, num_particles=100)
    program, dist = inspect(model, PROMPTS[:1]), lm(PROMPTS[:1], max_new_tokens=T).expand((4, 1))
    steps = dist.decoder()
    site_twist = LearnedTwist(twist, SiteRows(program, "completion", dist), steps, prefix_twist=None)
    steps.append(torch.tensor([1, 0, 2, 0]), torch.zeros(4))  # 0 ends a text
    site_twist.log_psi()
    steps.append(torch.tensor([0, 5, 0, 5]), torch.zeros(4))
    before = site_twist.log_psi()
    assert len(before.unique()) == 3  # two of them are the same text
    rows = torch.tensor([1, 2, 3, 0])
    steps.select(rows)
    site_twist.select(rows)
    steps.append(torch.tensor([3, 4, 5, 6]), torch.zeros(4))
    assert torch.equal(site_twist.log_psi(), before[rows])


def test_texts_of_final_minus_infinity_have_twist_zero():
    lm = tiny_llama(seed=0)
    twist = learn(words(lm), num_steps=5, num_particles=100, reads_reward=True)
    steps = lm(PROMPTS, max_new_tokens=T).expand((1, 2)).decoder()
    said = torch.tensor([[0.0, -torch.inf], [-torch.inf, 3.0]])
    psi = twist.lookahead(twist.start(steps), torch.tensor([[1, 2], [3, 4]]), said)
    assert torch.equal(psi == -torch.inf, said == -torch.inf)
    assert not psi.isnan().any()
    with pytest.raises(ValueError, match="reads_reward: give so_far"):
        twist.lookahead(twist.start(steps), torch.tensor([[1], [3]]))


def test_gradient_of_contrastive_learning():
    """With every completion as a draw, by its probability: E_pi[grad] - E_sigma[grad], enumerated."""
    exact = Exact(num_prior_samples=1).run(words(table_lm(order=2, seed=0, vocab=8)), PROMPTS)
    log_l = torch.as_tensor(exact.log_likelihood["reward"][0])
    log_p = torch.as_tensor(exact.log_joint[0]) - log_l
    generator = torch.Generator().manual_seed(0)
    log_psi = torch.randn(log_l.numel(), 3, generator=generator, dtype=log_l.dtype, requires_grad=True)
    shifted = (log_psi.reshape(*log_l.shape, 3) + log_p[..., None]).reshape(-1, 3)  # draws, each by its probability
    contrastive(shifted, replace(drawn(shifted, log_l[:, 0]), log_likelihood=log_l + log_p)).backward()
    pi = (log_psi.detach().reshape(*log_l.shape, 3) + log_p[..., None]).softmax(0)
    sigma = (log_l + log_p).softmax(0)[..., None]
    torch.testing.assert_close(log_psi.grad.reshape(pi.shape), (pi - sigma) / (2 * 3), atol=1e-7, rtol=1e-4)


def test_gradient_of_soft_value_regression():
    """It is zero on average over continuations exactly at the exact twist; 2 tokens, by their probabilities."""
    p = torch.tensor([[0.3, 0.7], [0.4, 0.6], [0.9, 0.1]])  # of the first token, of the second given the first
    likelihood = torch.tensor([[1.0, 3.0], [0.5, 2.0]])
    counts = torch.stack([torch.stack([1000 * p[0, a] * p[1 + a, b] for b in range(2)]) for a in range(2)])
    rows = torch.tensor([(a, b) for a in range(2) for b in range(2) for _ in range(round(float(counts[a, b])))])
    first = (p[1:] * likelihood).sum(-1)  # psi_1
    log_l = likelihood[rows[:, 0], rows[:, 1]].log()

    def gradients(one, two):
        """Of the logarithms of psi_1 (2,) and psi_2 (2, 2), of any level."""
        one, two = one.clone().requires_grad_(), two.clone().requires_grad_()
        log_psi = torch.stack([one[rows[:, 0]], two[rows[:, 0], rows[:, 1]]], -1)
        soft_value(log_psi, drawn(log_psi, log_l)).backward()
        return one.grad, two.grad

    for grad in gradients(first.log() + 1.0, likelihood.log() - 2.0):
        torch.testing.assert_close(grad, torch.zeros_like(grad), atol=1e-6, rtol=0)
    tilt = torch.tensor([0.5, -0.5])
    assert gradients(first.log() + tilt, likelihood.log())[0].abs().min() > 0.01
    assert gradients(first.log(), likelihood.log() + tilt)[1].abs().min() > 0.001
    # psi_1 learns from the current psi_2, and not from L alone: a wrong psi_2 moves it
    assert gradients(first.log(), likelihood.log() + tilt[:, None])[0].abs().min() > 0.001


def test_confidence_is_lowered_where_a_twist_exaggerates():
    """A twist log psi_t = 2 log L gets confidence 1/2 at most; a right one gets confidence 1."""
    log_l = torch.randn(4000, generator=torch.Generator().manual_seed(0))
    right, wild = (drawn(log_psi, log_l) for log_psi in 2 * [log_l[:, None].repeat(1, 3)])
    torch.testing.assert_close(confidence(log_l[:, None].repeat(1, 3), right), torch.ones(3))
    torch.testing.assert_close(
        confidence(2 * log_l[:, None].repeat(1, 3), wild), torch.full((3,), 0.5), atol=0.07, rtol=0
    )


def test_level_of_the_training_targets():
    """b_t makes the mean of psi_t that of L over the draws that still write at t, prompt by prompt."""
    generator = torch.Generator().manual_seed(0)
    log_psi, log_l = torch.randn(50, 3, generator=generator), torch.randn(50, generator=generator)
    taught = torch.ones(50, 3, dtype=torch.bool)
    taught[10:, 1], taught[:, 2] = False, False
    found = offset(log_psi, drawn(log_psi, log_l, taught))
    torch.testing.assert_close(found[0], log_l.logsumexp(0) - log_psi[:, 0].logsumexp(0))
    torch.testing.assert_close(found[1], log_l[:10].logsumexp(0) - log_psi[:10, 1].logsumexp(0))
    assert found[2] == 0


def test_saved_and_loaded(tmp_path):
    lm = tiny_llama(seed=0)
    model = words(lm)
    twist = learn(model, num_steps=10)
    assert {"loss", "held_out", "kept_step", "seconds", "tokens", "model_calls"} <= twist.stats.keys()
    twist.save_pretrained(tmp_path / "twist")
    again = Twist.from_pretrained(tmp_path / "twist", lm)
    assert again.stats == twist.stats
    settings = {"num_particles": 20, "seed": 0, "progress": False, "proposal": "twist"}
    a, b = (SMC(twist=t, **settings).run(model, PROMPTS) for t in (twist, again))
    np.testing.assert_array_equal(a.samples["completion"], b.samples["completion"])
    np.testing.assert_array_equal(a.log_weights, b.log_weights)
    with pytest.raises(FileExistsError, match="not empty"):
        twist.save_pretrained(tmp_path / "twist")
    with pytest.raises(FileNotFoundError, match="holds no twist"):
        Twist.from_pretrained(tmp_path, lm)
    for other in (table_lm(order=2, seed=0, vocab=8), tiny_llama(seed=1)):  # of another shape, and of the same
        with pytest.raises(ValueError, match="another language model"):
            Twist.from_pretrained(tmp_path / "twist", other)
    header = tmp_path / "twist" / "twist.json"
    header.write_text(json.dumps({**json.loads(header.read_text()), "format": "bayeslm.twist/0"}))
    with pytest.raises(ValueError, match="this version of bayeslm reads"):
        Twist.from_pretrained(tmp_path / "twist", lm)


def test_training_reproduces_and_leaves_the_prior_alone():
    lm = tiny_llama(seed=0)
    before = [p.clone() for p in lm.parameters()]
    a, b = (learn(words(lm), num_steps=10, num_particles=100) for _ in range(2))
    for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True):
        assert torch.equal(x, y)
    assert all(torch.equal(x, y) for x, y in zip(before, lm.parameters(), strict=True))
    assert not any(p is q for p in a.parameters() for q in lm.parameters())


def test_draws_cost_one_pass_a_token():
    lm = tiny_llama(seed=0)
    twist = learn(words(lm), num_steps=2, num_particles=100)
    prefill, probe = 2, 1
    assert twist.stats["model_calls"] <= (T - 1) + prefill + probe


@pytest.mark.parametrize("reads_reward", [False, True])
def test_a_network_in_bfloat16_has_a_twist_in_float32(reads_reward):
    lm = tiny_llama(seed=0)
    lm.network.to(torch.bfloat16)
    twist = learn(words(lm), num_steps=10, num_particles=100, reads_reward=reads_reward)
    assert all(p.dtype == torch.float32 for p in twist.parameters())
    posterior = SMC(num_particles=20, twist=twist, proposal="twist", seed=0, progress=False).run(words(lm), PROMPTS)
    assert np.isfinite(posterior.log_weights).all()


def test_one_of_several_completions():
    lm = table_lm(order=3, seed=1, vocab=4)

    def model(prompts):
        with pyro.plate("prompts", len(prompts)):
            x = pyro.sample("draft", lm(prompts, max_new_tokens=2))
            y = pyro.sample("reply", lm(prompts, max_new_tokens=3))
            pyro.factor("reward", 2.0 * (y == 1).sum(-1) + (x[..., 0] == y[..., 0]))

    prompts = [[1, 2], [3]]
    settings = {"num_particles": 200, "num_steps": 30, "learning_rate": 5e-3, "seed": 0, "progress": False}
    with pytest.raises(ProgramError, match="site must be one of"):
        TwistLearning(**settings).run(model, prompts)
    twists = {
        name: TwistLearning(site=name, reads_reward=name == "reply", **settings).run(model, prompts)
        for name in ("draft", "reply")
    }
    exact = Exact().run(model, prompts)
    posterior = SMC(num_particles=16, num_chains=150, twist=twists, ess_threshold=0.9, seed=0, progress=False).run(
        model, prompts
    )
    assert_evidence(posterior, exact.log_evidence, unbiased=True)
    with pytest.raises(ValueError, match="completions of 2 tokens, not 3"):
        SMC(twist=twists["draft"], progress=False).run(model, prompts)


@pytest.mark.parametrize("reads_reward", [False, pytest.param(True, marks=pytest.mark.long)])
def test_hard_constraints(reads_reward):
    """Most draws have no likelihood, and some texts are lost before their end."""
    lm = table_lm(order=3, seed=0)
    no_e = rewards.Constraint(lambda text: "e" not in text, prefix_closed=True)

    def model(prompts):
        with pyro.plate("prompts", len(prompts)):
            x = pyro.sample("completion", lm(prompts, max_new_tokens=T))
            pyro.factor("reward", no_e(prompts, lm.decode(x)) + 2.0 * count(x))

    exact = Exact().run(model, PROMPTS)
    twist = learn(model, method=METHODS[reads_reward], reads_reward=reads_reward)
    assert all(value.isfinite().all() for value in twist.state_dict().values())
    settings = {"num_particles": 16, "num_chains": 80, "seed": 0, "progress": False}
    posterior = SMC(twist=twist, proposal="twist", **settings).run(model, PROMPTS)
    assert_evidence(posterior, exact.log_evidence, unbiased=True)


def test_one_draw_alone_has_a_likelihood():
    """It is learned from, and nothing breaks."""

    def first_of_each(prompts, completions, **_):
        return [0.0 if prompts.index(prompt) == i else -math.inf for i, prompt in enumerate(prompts)]

    model = TiltedLM(table_lm(order=2, seed=0), rewards.Reward(first_of_each), max_new_tokens=2)
    twist = learn(model, num_particles=20, num_steps=20)
    assert twist.stats["kept_step"] == 20
    assert all(value.isfinite().all() for value in twist.state_dict().values())


def test_errors():
    with pytest.raises(ValueError, match="method must be 'contrastive' or 'soft-value'"):
        TwistLearning(method="magic")
    with pytest.raises(ValueError, match="at least 8"):
        TwistLearning(num_particles=4)
    model = tilted(table_lm(order=2, seed=0), score_table(0)[:T])
    twist = learn(words(tiny_llama(seed=0)), num_steps=2, num_particles=50)
    with pytest.raises(ValueError, match="another language model"):
        SMC(twist=twist, progress=False).run(model, PROMPTS)

    with pytest.raises(EvidenceError, match="-inf"):
        learn(rewarded(table_lm(order=2, seed=0), 2, lambda x: torch.full(x.shape[:-1], -torch.inf)))


def test_rows_have_the_likelihood_of_their_prompt():
    """Prompts in the plate on the left of another: a row's prompt is not its place modulo their number.

    After "b" token 1 is rewarded, after "c" token 2; and so says the twist.
    """
    lm = table_lm(order=2, seed=0, vocab=4)

    def model(prompts):
        twice = np.array([[prompt, prompt] for prompt in prompts], dtype=object)  # (prompt, each)
        with pyro.plate("prompts", len(prompts), dim=-2), pyro.plate("each", 2, dim=-1):
            x = pyro.sample("completion", lm(twice, max_new_tokens=2))
            pyro.factor("reward", 3.0 * (x[..., 0] == torch.tensor([[1], [2]])))

    settings = {"num_particles": 200, "num_steps": 60, "learning_rate": 0.01, "seed": 0, "progress": False}
    twist = TwistLearning(**settings).run(model, ["a b", "a c"])
    steps = lm(["a b", "a c"], max_new_tokens=2).decoder()
    psi = twist.lookahead(twist.start(steps), torch.tensor([[1, 2], [1, 2]]))
    assert psi[0, 0] - psi[0, 1] > 1.0
    assert psi[1, 1] - psi[1, 0] > 1.0


@pytest.mark.parametrize("pad", [9, -1, -100])
def test_a_pad_id_that_is_no_token(pad):
    table = table_lm(order=2, seed=0, vocab=4)
    lm = LanguageModel(table.network, table.tokenizer, pad_token_id=pad)
    model = words(lm)
    twist = TwistLearning(num_particles=50, num_steps=2, seed=0, progress=False).run(model, [[1, 2]])
    exact = Exact().run(model, [[1, 2]])
    for setting in ({}, {"retained": exact}):
        posterior = SMC(8, 2, twist=twist, proposal="twist", seed=0, progress=False, **setting).run(model, [[1, 2]])
        assert np.isfinite(posterior.log_weights).all()


WRONG_SIZES = [
    {"max_new_tokens": 10**9},
    {"max_new_tokens": 10**30},
    {"max_new_tokens": 3.0},
    {"inner": 10**9},
    {"width": 10**9},
    {"components": "64"},
    {"reads_reward": True},
    {"layers": 3},
]


@pytest.mark.parametrize("settings", WRONG_SIZES)
def test_settings_of_another_size_than_the_tensors_are_refused_before_they_are_allocated(tmp_path, settings):
    lm = table_lm()
    Twist(lm, 3).save_pretrained(tmp_path / "twist")
    path = tmp_path / "twist" / "twist.json"
    config = json.loads(path.read_text())
    config["settings"] |= settings
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"twist\.json does not fit twist\.safetensors: "):
        Twist.from_pretrained(tmp_path / "twist", lm)


@pytest.mark.parametrize("damage", ["cut", "gone", "huge"])
def test_a_damaged_file_of_tensors_is_named(tmp_path, damage):
    lm = table_lm()
    Twist(lm, 3).save_pretrained(tmp_path / "twist")
    path = tmp_path / "twist" / "twist.safetensors"
    if damage == "huge":
        with path.open("ab") as file:
            file.truncate(2**43)
    else:
        content = path.read_bytes()
        path.unlink()
        if damage == "cut":
            path.write_bytes(content[:-5])
    with pytest.raises((ValueError, FileNotFoundError), match=r"twist\.safetensors"):
        Twist.from_pretrained(tmp_path / "twist", lm)
