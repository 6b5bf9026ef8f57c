"""Gradients of scores, in bounded memory: those of the network's own forward pass, whatever the micro-batches."""

import pytest
import torch
from helpers import by_hand, llama_network, tiny_llama
from torch import nn

from bayeslm.models import LanguageModel, scoring
from bayeslm.models.network import count_usage

PROMPTS = [[1, 2, 3, 4], [5], [6, 7]]  # of different lengths, so that two are padded
TOKENS = 6


def trained(lm: LanguageModel) -> list[nn.Parameter]:
    return [p for p in lm.parameters() if p.requires_grad]


def policy_of(lora_rank: int | None = None, **settings) -> LanguageModel:
    """A policy with two ends, away from LoRA's zeros, where half of the gradient vanishes."""
    policy = tiny_llama(seed=3, eos_token_ids=(0, 3), **settings).policy(lora_rank)
    with torch.no_grad():
        for p in trained(policy):
            p.add_(0.05 * torch.randn_like(p))
    return policy


def gradient(policy: LanguageModel, scores: torch.Tensor, weights: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(scores, trained(policy), weights))


@pytest.fixture(params=["with their completions", "once"])
def prompts_read(request, monkeypatch):
    """Prompts are read again with every completion, or in a pass of their own."""
    if request.param == "once":
        monkeypatch.setattr(scoring, "PROMPTS_AGAIN", -1)


@pytest.mark.usefixtures("prompts_read")
@pytest.mark.parametrize("lora_rank", [None, 2])
@pytest.mark.parametrize("batch_size", [None, 1, 2, 5])
def test_gradients_are_those_of_the_network(lora_rank, batch_size):
    """Of the policy's own draws and of others, malformed ones and the law's temperature included."""
    policy = policy_of(lora_rank, batch_size=batch_size)
    law = policy(PROMPTS, TOKENS, temperature=1.3)
    x = law.sample((4,))
    weights = torch.randn(x.shape)
    rows = [torch.stack([by_hand(policy, p, c, 1.3) for p, c in zip(PROMPTS, row, strict=True)]) for row in x]
    by_hand_scores = torch.stack(rows)
    expected = gradient(policy, by_hand_scores, weights)
    own = law.token_log_prob(x)
    torch.testing.assert_close(own, by_hand_scores, atol=1e-5, rtol=0)
    torch.testing.assert_close(gradient(policy, own, weights), expected, atol=1e-4, rtol=1e-4)
    given = law.token_log_prob(x.clone())
    torch.testing.assert_close(given, by_hand_scores, atol=1e-5, rtol=0)
    torch.testing.assert_close(gradient(policy, given, weights), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("batch_size", [None, 2])
def test_malformed_completions_leave_the_gradient_of_the_others(batch_size):
    policy = policy_of(batch_size=batch_size)
    value = torch.tensor([[[1, 0, 2], [1, 2, 9], [4, 4, 5]]])
    scores = policy(PROMPTS, 3).log_prob(value)
    assert torch.isinf(scores).tolist() == [[True, True, False]]
    expected = gradient(policy, by_hand(policy, PROMPTS[2], value[0, 2]).sum(), torch.tensor(1.0))
    torch.testing.assert_close(gradient(policy, scores[0, 2], torch.tensor(1.0)), expected, atol=1e-4, rtol=1e-4)


# -- what it costs -------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("prompts_read")
@pytest.mark.parametrize("batch_size", [None, 2])
def test_own_draws_are_read_by_the_backward_pass_alone(batch_size):
    policy = policy_of(batch_size=batch_size)
    law = policy(PROMPTS, TOKENS)
    x = law.sample((4,))
    with count_usage() as usage:
        scores = law.log_prob(x)
    assert (usage.model_calls, usage.tokens) == (0, 0)
    with count_usage() as later:
        scores.sum().backward()
    with count_usage() as plain, torch.no_grad():
        policy(PROMPTS, TOKENS).log_prob(x)
    assert usage.model_calls == plain.model_calls > 0  # where the scores were asked for
    assert usage.tokens == plain.tokens
    assert later.model_calls == 0


@pytest.mark.parametrize(("batch_size", "forward", "backward"), [(None, 1, 0), (12, 1, 0), (5, 3, 3), (1, 12, 12)])
def test_others_are_read_again_beyond_one_micro_batch(batch_size, forward, backward):
    policy = policy_of(batch_size=batch_size)
    x = policy(PROMPTS, TOKENS).arbitrary().expand(4, -1, -1)
    with count_usage() as usage:
        scores = policy(PROMPTS, TOKENS).log_prob(x)
        assert usage.model_calls == forward
        scores.sum().backward()
    assert usage.model_calls == forward + backward


@pytest.mark.usefixtures("prompts_read")
@pytest.mark.parametrize("own", [True, False])
def test_one_micro_batch_of_activations_is_alive_at_most(own):
    """Nothing but ids, scores and weights is kept between the passes, and no pass has more rows than allowed."""
    policy = policy_of(batch_size=3)
    law = policy(PROMPTS, TOKENS)
    x = law.sample((8,))
    kept = []
    rows = []
    policy.causal._body.register_forward_hook(lambda module, inputs, out: rows.append(len(out.last_hidden_state)))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        loss = (0.3 * law.token_log_prob(x if own else x.clone())).sum()
    weights = {p.data_ptr() for p in policy.parameters()}
    largest = max(t.numel() for t in kept if t.data_ptr() not in weights)
    assert largest == x.numel()
    loss.backward()
    assert max(rows) == 3


@pytest.mark.parametrize("lora_rank", [None, 4])
def test_micro_batches_have_bounded_activations(lora_rank):
    """The numbers that a graph keeps of a completion, counted, times the completions of a micro-batch."""
    network = llama_network(hidden_size=64, intermediate_size=256, num_hidden_layers=4)
    policy = LanguageModel(network).policy(lora_rank)
    law = policy([[1] * 20] * 16, max_new_tokens=10)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        law.log_prob(torch.ones((16, 10), dtype=torch.long))
    weights = {p.untyped_storage().data_ptr() for p in policy.parameters()}
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() // 4 for t in kept}
    numbers = sum(size for place, size in storages.items() if place not in weights) / 16
    assert 0.7 * 2**27 < numbers * law.max_rows_with_gradient < 1.3 * 2**27


# -- graphs --------------------------------------------------------------------------------------------------


def test_a_graph_is_kept_only_if_asked():
    policy = policy_of(batch_size=2)
    law = policy(PROMPTS, TOKENS)
    score = law.log_prob(law.sample((2,))).sum()
    score.backward(retain_graph=True)
    once = [p.grad.clone() for p in trained(policy)]
    score.backward()
    torch.testing.assert_close([p.grad for p in trained(policy)], [2 * g for g in once])
    with pytest.raises(RuntimeError, match="second time"):
        score.backward()


def test_second_derivatives_are_refused():
    policy = policy_of(batch_size=2)
    law = policy(PROMPTS, TOKENS)
    score = law.log_prob(law.sample((2,))).square().sum()
    first = torch.autograd.grad(score, trained(policy), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        sum(g.square().sum() for g in first).backward()


def test_weights_that_change_before_the_backward_pass_are_an_error():
    policy = policy_of(batch_size=2)
    law = policy(PROMPTS, TOKENS)
    score = law.log_prob(law.sample((2,))).sum()
    with torch.no_grad():
        trained(policy)[0].mul_(1.1)
    with pytest.raises(RuntimeError, match=r"weights were changed in place .*call backward\(\) before optimizer.step"):
        score.backward()


def test_parameters_that_take_no_part_have_no_gradient():
    policy = policy_of(batch_size=2)
    policy.network.unused = nn.Parameter(torch.ones(3))
    law = policy(PROMPTS, TOKENS)
    law.log_prob(law.sample((2,))).sum().backward()
    assert policy.network.unused.grad is None
    others = [p for p in trained(policy) if p is not policy.network.unused]
    assert all(p.grad.abs().sum() > 0 for p in others)


def test_parameters_frozen_on_the_way_are_left_alone():
    policy = policy_of(batch_size=2)
    policy.network.model.requires_grad_(False)
    law = policy(PROMPTS, TOKENS)
    law.log_prob(law.sample((2,))).sum().backward()
    assert policy.network.lm_head.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in policy.network.model.parameters())


def test_without_gradients_scores_have_no_graph():
    policy = policy_of(batch_size=2)
    law = policy(PROMPTS, TOKENS)
    x = law.sample((2,))
    with torch.no_grad():
        assert not law.log_prob(x).requires_grad
    assert law.log_prob(x).requires_grad
    assert not policy.requires_grad_(False)(PROMPTS, TOKENS).log_prob(x).requires_grad


# -- the mismatch between sampling and scoring ---------------------------------------------------------------


def test_the_mismatch_is_that_of_the_scores():
    """Kept scores that are off by a known amount, on some tokens."""
    policy = policy_of(batch_size=5)
    law = policy(PROMPTS, TOKENS)
    x = law.sample((4,))
    with torch.no_grad():
        scores = law.token_log_prob(x).clone()
    live = law._is_live(x)
    off = torch.where(torch.rand(x.shape) < 0.3, 0.25, 0.0) * live
    assert 0 < off.sum() < 0.25 * live.sum()
    law.know(x, scores + off)
    with count_usage() as usage:
        law.log_prob(x).sum().backward()
    largest, mean = usage.mismatch
    assert abs(largest - 0.25) < 1e-4
    assert abs(mean - float(off.sum() / live.sum())) < 1e-4


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 0.3)])
def test_the_mismatch_of_rounding(dtype, limit):
    policy = LanguageModel(llama_network().to(dtype)).policy(lora_rank=2)
    law = policy(PROMPTS, TOKENS)
    x = law.sample((20,))
    with count_usage() as usage:
        assert usage.mismatch is None
        score = law.log_prob(x).sum()
        assert usage.mismatch is None
        score.backward()
    largest, mean = usage.mismatch
    assert 0.0 <= mean <= largest < limit
    with count_usage() as usage:
        policy(PROMPTS, TOKENS).log_prob(x.clone()).sum().backward()
    assert usage.mismatch is None  # others' draws have one score alone
