"""The critic: gradients against enumeration while it learns and after, what it saves, and what it remembers."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from support.enumerated import PROMPTS as SHORT
from support.enumerated import Problem, T
from support.gradients import COPIES, assert_unbiased, gradient_of, gradients, perturbed, policy_guide
from support.models import table_lm, tiny_llama
from support.programs import PROMPTS, longer, score_table, tilted

from bayeslm.inference import ProgramError
from bayeslm.inference.control import StateValues
from bayeslm.inference.training import Critic, ReverseKL, StatefulLoss
from bayeslm.inference.training.critic import Texts, value_of
from bayeslm.inference.training.state import within
from bayeslm.models.lm import count_usage


class Frozen(StatefulLoss):
    """Begins each step with what another had learned."""

    def __init__(self, learned: StatefulLoss) -> None:
        super().__init__(learned.objective)
        self._learned = learned.state

    def loss_and_grads(self, *args):
        self.state = self._learned
        return super().loss_and_grads(*args)


def quick() -> Critic:
    return Critic(learning_rate=0.02, num_steps=5)


@pytest.mark.parametrize("num_particles", [1, pytest.param(4, marks=pytest.mark.long)])
@pytest.mark.parametrize("when", ["while it learns", pytest.param("half-way", marks=pytest.mark.long), "after"])
def test_gradient_is_unbiased(num_particles, when):
    """At any time: what it has learned from the steps before does not depend on this one's draws."""
    small, objective = Problem(scale=1.0), StatefulLoss(ReverseKL(num_particles, quick()))
    torch.manual_seed(0)
    if when != "while it learns":
        small.estimates(objective, repeats=4 if when == "half-way" else 20)
        objective = Frozen(objective)
    repeats = 64 if when == "half-way" else 40  # whose gradients are noisier
    assert_unbiased(small.estimates(objective, repeats=repeats), small.gradient(small.reverse_kl()))


@pytest.mark.long
def test_variance_is_less_than_that_of_leave_one_out():
    """Once it has learned, of a policy that stays as it is."""
    small, objective = Problem(scale=1.0), StatefulLoss(ReverseKL(4, quick()))
    torch.manual_seed(0)
    small.estimates(objective, repeats=60)
    spread = [small.estimates(o, repeats=60).var(0).sum() for o in (Frozen(objective), ReverseKL(4))]
    assert spread[0] < 0.8 * spread[1]


def test_it_begins_as_leave_one_out():
    """The same gradient in the first step, whatever the program; in the second another."""

    def model(prompts):
        mood = pyro.sample("mood", dist.Bernoulli(0.3))
        with pyro.plate("prompts", len(prompts), dim=-1):
            topic = pyro.sample("topic", dist.Bernoulli(0.5))
            with pyro.plate("drafts", 3, dim=-2):
                x = pyro.sample("completion", lm(prompts, max_new_tokens=T))
                pyro.factor("reward", (x == 1).sum(-1) * (0.5 + mood) * topic)

    def guide(prompts):
        pyro.module("policy", policy)
        pyro.sample("mood", dist.Bernoulli(0.6))
        with pyro.plate("prompts", len(prompts), dim=-1):
            pyro.sample("topic", dist.Bernoulli(0.4))
            with pyro.plate("drafts", 3, dim=-2):
                pyro.sample("completion", policy(prompts, max_new_tokens=T))

    lm = tiny_llama(seed=1)
    policy = perturbed(lm)
    found = []
    for objective in (ReverseKL(8), ReverseKL(8, quick())):
        torch.manual_seed(0)
        found.append(gradients(objective, model, guide, list(policy.network.parameters()), (PROMPTS,), repeats=2))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-4, atol=1e-5)
    assert (found[1][1] - found[0][1]).norm() > 0.01 * found[0][1].norm()


@pytest.mark.long
def test_a_reply_to_a_draft():
    """Two completions, the second's prompt being the first's: each has a critic, and the gradient stays the ELBO's."""
    lm = table_lm(order=3, seed=1, vocab=4)
    policy = perturbed(lm, scale=1.0)
    table = 2.0 * score_table(3, vocab=4, tokens=2)

    def match(x, y):
        return 1.5 * (y == x[..., :1]).sum(-1) + table[torch.arange(2), x].sum(-1)

    def model(prompts):
        with pyro.plate("prompts", len(prompts)):
            x = pyro.sample("completion", lm(prompts, max_new_tokens=2))
            y = pyro.sample("reply", lm(longer(prompts, x[..., 0]), max_new_tokens=2))
            pyro.factor("match", match(x, y))

    def guide(prompts):
        pyro.module("policy", policy)
        with pyro.plate("prompts", len(prompts)):
            x = pyro.sample("completion", policy(prompts, max_new_tokens=2))
            pyro.sample("reply", policy(longer(prompts, x[..., 0]), max_new_tokens=2))

    elbo = 0.0
    for prompt in SHORT:
        q = policy([prompt], 2)
        xs = q.enumerate_support()
        log_q, log_p = q.log_prob(xs), lm([prompt], 2).log_prob(xs)
        for i, x in enumerate(xs):
            second = longer([prompt], x[..., 0])
            reply = policy(second, 2)
            ys = reply.enumerate_support()
            log_r = reply.log_prob(ys)
            worth = (log_r.exp() * (lm(second, 2).log_prob(ys) - log_r + match(x, ys))).sum()
            elbo = elbo + log_q[i, 0].exp() * (log_p[i, 0] - log_q[i, 0] + worth)
    parameters = list(policy.network.parameters())
    expected = gradient_of(-COPIES * elbo, parameters)
    torch.manual_seed(0)
    objective = StatefulLoss(ReverseKL(4, quick()))
    found = gradients(objective, model, guide, parameters, (SHORT * COPIES,), repeats=25)
    assert_unbiased(found, expected)
    assert {key.rpartition(":")[2] for key in objective.state} == {"completion", "reply"}


def test_advantages_by_hand():
    """f less the other particles' mean over their tokens, padding left out; U is what the critic says."""
    f, live = torch.tensor([[1.0], [3.0], [8.0]]), torch.tensor([[1, 1], [1, 0], [1, 1]])[:, None, None].bool()
    texts = Texts(torch.randn(3, 1, 1, 2, 5), torch.randn(3, 1, 1, 2), live, torch.zeros(3, 1, 1, 2))
    critic = Critic(learning_rate=0.1)
    first, state = critic.of_tokens("x", f, texts)
    first = first[:, 0, 0]
    torch.testing.assert_close(first, torch.tensor([[1 - 19 / 3] * 2, [3 - 18 / 4] * 2, [8 - 5 / 3] * 2]))
    scale = state["variance"].sqrt()
    rest = (f[:, :, None, None] - scale * value_of(within("head", state), texts.hidden, texts.past / scale))[:, 0, 0]
    second = critic.of_tokens("x", f, texts, state)[0][:, 0, 0]
    assert (second - first).abs().max() > 1e-3
    torch.testing.assert_close(second[1], rest[1] - (rest[0].sum() + rest[2].sum()) / 4)
    torch.testing.assert_close(second[0], rest[0] - (rest[1, 0] + rest[2].sum()) / 3)


@pytest.mark.parametrize("baseline", [Critic(), StateValues(3)], ids=["critic", "values"])
def test_episodes_that_ended_before_they_began(baseline):
    """Where none acts there is nothing to credit; where one acts alone, it is not compared to the others."""
    f = torch.tensor([[2.0, 1.0], [3.0, -1.0]])
    past = torch.zeros(2, 2, 1, T)
    hidden, live = torch.randn(2, 2, 1, T, 5), torch.zeros(2, 2, 1, T, dtype=torch.bool)
    nobody = Texts(hidden, past, live, past)
    advantage, state = baseline.of_tokens("x", f, nobody)
    assert torch.equal(advantage, past)
    live = live.clone()
    live[1, 0, 0, 0] = True
    advantage, state = baseline.of_tokens("x", f, Texts(hidden, past, live, past), state)
    assert advantage[1, 0, 0, 0] == 3.0
    assert advantage.isfinite().all()
    advantage, state = baseline.of_tokens("x", f, nobody, state)
    assert torch.equal(advantage, past)
    assert all(value.isfinite().all() for value in state.values())


@pytest.mark.parametrize("kind", ["table", "llama", "micro-batches", "padded prompts"])
def test_what_is_read_is_what_the_network_knows_before_each_token(kind):
    """Scores and hidden states of one pass: from a state the head has the distribution of the token that follows."""
    batch_size = 3 if kind == "micro-batches" else None
    lm = table_lm(order=3, seed=1) if kind == "table" else tiny_llama(1, batch_size=batch_size)
    texts = lm(PROMPTS if kind == "padded prompts" else [[2, 3], [5, 6]], 4).expand((5, 2))
    x = texts.sample()
    scores, hidden = texts.token_log_prob_and_hidden(x)
    with torch.no_grad():
        logits = lm.causal.logits(hidden, 1.0).log_softmax(-1)
    live = torch.arange(4) < texts.lengths(x)[..., None]
    expected = logits.gather(-1, x[..., None]).squeeze(-1)
    torch.testing.assert_close(scores, expected.masked_fill(~live, 0.0), rtol=1e-4, atol=1e-5)
    with count_usage() as usage:
        assert torch.equal(texts.token_log_prob(x, known=scores), scores)
    assert usage.model_calls == 0
    assert not scores.requires_grad
    assert not hidden.requires_grad


def test_no_pass_more_than_leave_one_out():
    lm = tiny_llama(seed=1)
    policy = perturbed(lm)
    model, guide = tilted(lm, score_table(1), 0.5), policy_guide(policy, 5)
    calls = []
    for objective in (ReverseKL(4), ReverseKL(4, Critic())):
        torch.manual_seed(0)
        with count_usage() as usage, pyro.get_param_store().scope():
            StatefulLoss(objective).loss_and_grads(model, guide, PROMPTS)
        calls.append((usage.model_calls, usage.tokens))
    assert calls[0] == calls[1]


def test_programs_without_completions_are_refused():
    def model():
        with pyro.plate("prompts", 2):
            mood = pyro.sample("mood", dist.Bernoulli(0.3))
            pyro.factor("reward", mood)

    def guide():
        with pyro.plate("prompts", 2):
            pyro.sample("mood", dist.Bernoulli(logits=pyro.param("logit", torch.tensor(0.0))))

    with pyro.get_param_store().scope(), pytest.raises(ProgramError, match="leave_one_out"):
        StatefulLoss(ReverseKL(4, Critic())).loss_and_grads(model, guide)


def test_states_may_move_far_from_the_first():
    """As those of a policy do that learns to live longer: its scale is that of what was seen lately."""
    torch.manual_seed(0)
    critic = Critic(learning_rate=0.01, num_steps=4)
    live = torch.ones(64, 1, 1, T, dtype=torch.bool)
    past = torch.zeros(64, 1, 1, T)
    state = {}
    for step in range(60):
        hidden = torch.randn(64, 1, 1, 1, 2).expand(-1, -1, -1, T, -1) * (1.0 if step < 5 else 100.0)
        f = hidden[:, :, 0, 0, 0]  # what is known before a token says it all
        advantage, state = critic.of_tokens("x", f, Texts(hidden, past, live, torch.zeros_like(past)), state)
    assert advantage.square().mean() < 0.1 * f.square().mean()


def test_settings_are_checked():
    for settings in ({"learning_rate": 0.0}, {"num_steps": 0}, {"width": 0}):
        with pytest.raises(ValueError, match=f"Critic: {next(iter(settings))}"):
            Critic(**settings)
