"""Learned twists against the exact twist by enumeration; on disk; and what they refuse."""

from __future__ import annotations

import json

import numpy as np
import pyro
import pytest
import torch
from helpers import table_lm, tiny_llama
from programs import PROMPTS, score_table, tilted

from bayeslm.inference import SMC, EvidenceError, Exact, ImportanceSampling, ProgramError, TwistLearning
from bayeslm.inference.twisting import contrastive, soft_value
from bayeslm.models import Twist
from bayeslm.models.stepping import categorical
from bayeslm.models.twist import hidden_states

METHODS = ["contrastive", "soft-value"]


def learn(model, **settings):
    settings = {"num_particles": 1000, "num_steps": 150, "learning_rate": 5e-3, "weight_decay": 0.01} | settings
    return TwistLearning(seed=0, progress=False, **settings).run(model, PROMPTS)


def words(lm, beta=0.5):
    """A reward that counts two words: what a text so far has of them is what its future adds to."""

    def model(prompts):
        with pyro.plate("prompts", len(prompts)):
            x = pyro.sample("completion", lm(prompts, max_new_tokens=4))
            pyro.factor("reward", (1.0 * (x == 2).sum(-1) - 0.7 * (x == 5).sum(-1)) / beta)

    return model


def exact_log_psi(exact, values, length):
    """log E[exp(r / beta) | x_1:t] of texts (particle, prompt, token), (particle, prompt)."""
    tokens, joint = torch.as_tensor(exact.samples["completion"][0]), torch.as_tensor(exact.log_joint[0])
    prior = joint - torch.as_tensor(exact.log_likelihood["reward"][0])
    out = torch.empty(values.shape[:2])
    for i, prompt in np.ndindex(*values.shape[:2]):
        text = values[i, prompt, :length]
        ends = (text == 0).nonzero()
        text = text[: int(ends[0]) + 1] if len(ends) else text
        same = (tokens[:, prompt, : len(text)] == text).all(-1)
        out[i, prompt] = joint[same, prompt].logsumexp(0) - prior[same, prompt].logsumexp(0)
    return out


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["table", "llama"])
def test_learns_the_exact_twist(kind, method):
    """Values and looks ahead go with the enumerated expectation at every step, and their mean is right."""
    lm = table_lm(order=3, seed=0) if kind == "table" else tiny_llama(seed=0)
    model = words(lm)
    exact, twist = Exact(num_prior_samples=1).run(model, PROMPTS), learn(model, method=method)
    torch.manual_seed(0)
    steps = lm(PROMPTS, max_new_tokens=4).expand((60, 2)).steps()
    state = twist.start(steps)
    while steps.t < 3:
        token, score = categorical(steps.logits)
        ahead, live = twist.lookahead(state, token[:, None])[:, 0], ~steps.finished
        steps.append(token, score)
        state = twist.read(state, steps)
        truth = exact_log_psi(exact, steps.values.reshape(60, 2, 4), steps.t).reshape(-1)
        for guess, of in ((twist.value(state), live | ~live), (ahead, live)):
            error = (guess[of] - truth[of]).square().mean()
            assert error < 0.8 * (truth[of] - truth[of].mean()).square().mean()  # of its variance: part is explained


@pytest.mark.parametrize("method", METHODS)
def test_smc_with_a_learned_twist_is_unbiased_and_better(method):
    model = words(tiny_llama(seed=1), beta=0.4)
    exact, twist = Exact(num_prior_samples=1).run(model, PROMPTS), learn(model, method=method)
    settings = {"num_particles": 16, "num_chains": 150, "seed": 0, "progress": False}
    variances = []
    for engine in (
        ImportanceSampling(**settings),
        SMC(twist=twist, **settings),
        SMC(twist={"completion": twist}, proposal="twist", top_k=4, **settings),
    ):
        ratios = np.exp(engine.run(model, PROMPTS).log_weights - exact.log_evidence).mean(1)
        stderr = ratios.std(0, ddof=1) / 150**0.5
        assert (np.abs(ratios.mean(0) - 1) < 4 * stderr).all()  # 4 standard errors, 12 comparisons
        variances.append(ratios.var(0))
    assert variances[2].sum() < 0.5 * variances[0].sum()  # of texts of 4 tokens, resampling alone gains little


def test_step_by_step_and_whole_completions_agree():
    """What SMC reads token by token is what training read, of prompts of different lengths, to their ends and after."""
    lm = tiny_llama(seed=0)
    model = words(lm)
    twist = learn(model, num_steps=5)
    torch.manual_seed(1)
    law = lm(PROMPTS, max_new_tokens=4).expand((20, 2))
    steps = law.steps()
    state, values, aheads = twist.start(steps), [], []
    while steps.t < 4:
        token, score = categorical(steps.logits)
        aheads.append(twist.lookahead(state, token[:, None])[:, 0])
        steps.append(token, score)
        state = twist.read(state, steps)
        values.append(twist.value(state))
    x = steps.values.reshape(20, 2, 4)
    lengths = law.lengths(x).reshape(-1)
    assert (lengths < 4).any()
    of = twist.inputs(hidden_states(law, x), steps.values, lengths)
    features = twist.features(of)
    expected = twist.value_of(features[:, 1:])[..., 0] + twist.offset[of.time[:, 1:]]
    torch.testing.assert_close(torch.stack(values, 1), expected, atol=1e-4, rtol=1e-4)
    written = torch.arange(4) < lengths[:, None]
    expected = twist.ahead_of(features[:, :-1], of.embedded)[..., 0] + twist.ahead_offset[torch.arange(1, 5)]
    torch.testing.assert_close(torch.stack(aheads, 1)[written], expected[written], atol=1e-4, rtol=1e-4)


def test_gradient_of_contrastive_learning():
    """With every completion as a draw, by its probability: E_pi[grad] - E_sigma[grad], enumerated."""
    exact = Exact(num_prior_samples=1).run(words(table_lm(order=2, seed=0, vocab=8)), PROMPTS)
    log_l = torch.as_tensor(exact.log_likelihood["reward"][0])
    log_p = torch.as_tensor(exact.log_joint[0]) - log_l
    generator = torch.Generator().manual_seed(0)
    log_psi = torch.randn(log_l.numel(), 3, generator=generator, dtype=log_l.dtype, requires_grad=True)
    shifted = (log_psi.reshape(*log_l.shape, 3) + log_p[..., None]).reshape(-1, 3)  # draws, each by its probability
    contrastive(shifted, shifted, log_l + log_p).backward()
    pi = (log_psi.detach().reshape(*log_l.shape, 3) + log_p[..., None]).softmax(0)
    sigma = (log_l + log_p).softmax(0)[..., None]
    torch.testing.assert_close(log_psi.grad.reshape(pi.shape), (pi - sigma) / (2 * 3), atol=1e-7, rtol=1e-4)


def test_gradient_of_soft_value_regression():
    """It is zero, on average over what follows, exactly at the exact twist: 2 tokens, drawn by their probabilities."""
    p = torch.tensor([[0.3, 0.7], [0.4, 0.6], [0.9, 0.1]])  # of the first token, of the second given the first
    likelihood = torch.tensor([[1.0, 3.0], [0.5, 2.0]])
    counts = torch.stack([torch.stack([1000 * p[0, a] * p[1 + a, b] for b in range(2)]) for a in range(2)])
    rows = torch.tensor([(a, b) for a in range(2) for b in range(2) for _ in range(round(float(counts[a, b])))])
    first = (p[1:] * likelihood).sum(-1)  # psi_1
    z = (p[0] * first).sum()
    table = (first / z).log().clone().requires_grad_()
    log_l = likelihood[rows[:, 0], rows[:, 1]].log()[:, None]

    def loss(table):
        value = torch.stack([table[rows[:, 0]], log_l[:, 0] - z.log()], -1)
        return soft_value(value, value, log_l)

    loss(table).backward()
    torch.testing.assert_close(table.grad, torch.zeros(2), atol=1e-6, rtol=0)
    wrong = (table.detach() + torch.tensor([0.5, -0.5])).requires_grad_()
    loss(wrong).backward()
    assert wrong.grad.abs().min() > 0.01


def test_saved_and_loaded(tmp_path):
    lm = tiny_llama(seed=0)
    model = words(lm)
    twist = learn(model, num_steps=10)
    assert {"loss", "held_out", "kept_step", "seconds", "tokens", "model_calls"} <= twist.stats.keys()
    twist.save_pretrained(tmp_path / "twist")
    again = Twist.from_pretrained(tmp_path / "twist", lm)
    settings = {"num_particles": 20, "seed": 0, "progress": False, "proposal": "twist"}
    a, b = (SMC(twist=t, **settings).run(model, PROMPTS) for t in (twist, again))
    np.testing.assert_array_equal(a.samples["completion"], b.samples["completion"])
    np.testing.assert_array_equal(a.log_weights, b.log_weights)
    with pytest.raises(FileExistsError, match="not empty"):
        twist.save_pretrained(tmp_path / "twist")
    with pytest.raises(FileNotFoundError, match="holds no twist"):
        Twist.from_pretrained(tmp_path, lm)
    with pytest.raises(ValueError, match="for a language model of"):
        Twist.from_pretrained(tmp_path / "twist", table_lm(order=2, seed=0, vocab=8))
    header = tmp_path / "twist" / "twist.json"
    header.write_text(json.dumps({**json.loads(header.read_text()), "format": "bayeslm.twist/0"}))
    with pytest.raises(ValueError, match="not written by a version"):
        Twist.from_pretrained(tmp_path / "twist", lm)


def test_training_reproduces_and_leaves_the_prior_alone():
    lm = tiny_llama(seed=0)
    before = [p.clone() for p in lm.parameters()]
    a, b = (learn(words(lm), num_steps=10) for _ in range(2))
    for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True):
        assert torch.equal(x, y)
    assert all(torch.equal(x, y) for x, y in zip(before, lm.parameters(), strict=True))
    assert not any(p is q for p in a.parameters() for q in lm.parameters())


def test_a_network_in_bfloat16_has_a_twist_in_float32():
    lm = tiny_llama(seed=0)
    lm.network.to(torch.bfloat16)
    twist = learn(words(lm), num_steps=10)
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
    twists = {name: TwistLearning(site=name, **settings).run(model, prompts) for name in ("draft", "reply")}
    exact = Exact().run(model, prompts)
    posterior = SMC(num_particles=16, num_chains=300, twist=twists, ess_threshold=0.9, seed=0, progress=False).run(
        model, prompts
    )
    ratios = np.exp(posterior.log_weights - exact.log_evidence).mean(1)
    assert (np.abs(ratios.mean(0) - 1) < 4 * ratios.std(0, ddof=1) / 300**0.5).all()
    with pytest.raises(ValueError, match="completions of 2 tokens, not 3"):
        SMC(twist=twists["draft"], progress=False).run(model, prompts)


def test_what_is_refused():
    with pytest.raises(ValueError, match="method must be one of"):
        TwistLearning(method="magic")
    with pytest.raises(ValueError, match="at least 8"):
        TwistLearning(num_particles=4)
    model = tilted(table_lm(order=2, seed=0), score_table(0))
    twist = learn(words(tiny_llama(seed=0)), num_steps=2)
    with pytest.raises(ValueError, match="another language model"):
        SMC(twist=twist, progress=False).run(model, PROMPTS)

    def hopeless(prompts):
        with pyro.plate("prompts", len(prompts)):
            x = pyro.sample("completion", table_lm(order=2, seed=0)(prompts, max_new_tokens=2))
            pyro.factor("reward", torch.full(x.shape[:-1], -torch.inf))

    with pytest.raises(EvidenceError, match="-inf"):
        learn(hopeless)
