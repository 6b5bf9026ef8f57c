"""Gradients of scores, in bounded memory: those of the network's own forward pass, whatever the micro-batches."""

import pytest
import torch
from support.models import llama_network, random_network, table_lm, tiny_llama
from support.oracles import all_by_hand, by_hand
from torch import nn

from bayeslm.models import LanguageModel
from bayeslm.models.lm import scoring
from bayeslm.models.lm.gradient_checkpointing import checkpointable_layers
from bayeslm.models.lm.network import CausalNetwork
from bayeslm.models.lm.usage import count_usage

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


@pytest.fixture(params=["with their completions", "apart"])
def prompt_passes(request, monkeypatch):
    """Prompts go through the network with every completion, or in a pass of their own."""
    if request.param == "apart":
        monkeypatch.setattr(scoring, "PROMPTS_AGAIN", -1)


@pytest.fixture(params=["all logits", "blocks of logits"])
def logits(request, monkeypatch):
    """The head's logits are computed at once, or in blocks of five tokens."""
    if request.param == "blocks of logits":
        monkeypatch.setattr(scoring, "LOGITS_BLOCK", 5 * 8)


@pytest.mark.usefixtures("prompt_passes", "logits")
@pytest.mark.parametrize("lora_rank", [None, 2])
@pytest.mark.parametrize("batch_size", [None, 1, pytest.param(2, marks=pytest.mark.long), 5])
def test_gradients_are_those_of_the_network(lora_rank, batch_size):
    """Of the policy's own draws and of others, malformed ones and a temperature included."""
    policy = policy_of(lora_rank, batch_size=batch_size)
    dist = policy(PROMPTS, TOKENS, temperature=1.3)
    x = dist.sample((3,))
    weights = torch.randn(x.shape)
    by_hand_scores = all_by_hand(policy, PROMPTS, x, 1.3)
    expected = gradient(policy, by_hand_scores, weights)
    own = dist.token_log_prob(x)
    torch.testing.assert_close(own, by_hand_scores, atol=1e-5, rtol=0)
    torch.testing.assert_close(gradient(policy, own, weights), expected, atol=1e-4, rtol=1e-4)
    given = dist.token_log_prob(x.clone())
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


# -- cost ----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("prompt_passes")
@pytest.mark.parametrize("batch_size", [None, 2])
def test_own_draws_are_scored_by_the_backward_pass_alone(batch_size):
    policy = policy_of(batch_size=batch_size)
    dist = policy(PROMPTS, TOKENS)
    x = dist.sample((4,))
    with count_usage() as usage:
        scores = dist.log_prob(x)
    assert (usage.model_calls, usage.tokens) == (0, 0)
    with count_usage() as later:
        scores.sum().backward()
    with count_usage() as plain, torch.no_grad():
        policy(PROMPTS, TOKENS).log_prob(x)
    assert usage.model_calls == plain.model_calls > 0  # where the scores were asked for
    assert usage.tokens == plain.tokens
    assert later.model_calls == 0


@pytest.mark.parametrize("batch_size", [None, 2])
def test_known_scores_are_not_computed_again(batch_size):
    """They are returned, though they be wrong; the backward pass is the first to run the network, and is right."""
    policy = policy_of(batch_size=batch_size)
    dist = policy(PROMPTS, TOKENS)
    x = dist.arbitrary().expand(4, -1, -1)
    weights = torch.randn(x.shape)
    expected = gradient(policy, dist.token_log_prob(x), weights)
    known = torch.randn(x.shape)
    with count_usage() as forward:
        with torch.no_grad():
            assert torch.equal(dist.token_log_prob(x, known), known)
        scores = dist.token_log_prob(x, known)
    assert forward.model_calls == 0
    assert torch.equal(scores, known)
    torch.testing.assert_close(gradient(policy, scores, weights), expected, atol=1e-4, rtol=1e-4)
    assert not torch.equal(dist.token_log_prob(x), known)  # they are not kept


@pytest.mark.parametrize(("batch_size", "forward", "backward"), [(None, 1, 0), (12, 1, 0), (5, 3, 3), (1, 12, 12)])
def test_others_are_scored_again_beyond_one_micro_batch(batch_size, forward, backward):
    policy = policy_of(batch_size=batch_size)
    x = policy(PROMPTS, TOKENS).arbitrary().expand(4, -1, -1)
    with count_usage() as usage:
        scores = policy(PROMPTS, TOKENS).log_prob(x)
        assert usage.model_calls == forward
        scores.sum().backward()
    assert usage.model_calls == forward + backward


@pytest.mark.usefixtures("prompt_passes")
@pytest.mark.parametrize("own", [True, False])
def test_one_micro_batch_of_activations_is_alive_at_most(own):
    """Nothing but ids, scores and weights is kept between the passes, and no pass has more rows than allowed."""
    policy = policy_of(batch_size=3)
    dist = policy(PROMPTS, TOKENS)
    x = dist.sample((8,))
    kept = []
    rows = []
    policy.causal.body.register_forward_hook(lambda module, inputs, out: rows.append(len(out.last_hidden_state)))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        loss = (0.3 * dist.token_log_prob(x if own else x.clone())).sum()
    weights = {p.data_ptr() for p in policy.parameters()}
    largest = max(t.numel() for t in kept if t.data_ptr() not in weights)
    assert largest == x.numel()
    loss.backward()
    assert max(rows) == 3


def kept_numbers(policy: LanguageModel, rows: int, length: int) -> int:
    """Numbers, but for the weights, that the graph of so many completions' scores keeps."""
    dist = policy([[1] * length] * rows, max_new_tokens=10)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        dist.log_prob(torch.ones((rows, 10), dtype=torch.long))
    weights = {p.untyped_storage().data_ptr() for p in policy.parameters()}
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() // 4 for t in kept}
    return sum(size for place, size in storages.items() if place not in weights)


@pytest.mark.parametrize("lora_rank", [None, 4])
def test_micro_batches_have_bounded_activations(lora_rank):
    """The numbers that a graph keeps of a completion, counted, times the completions of a micro-batch."""
    policy = LanguageModel(llama_network(hidden_size=64, intermediate_size=256, num_hidden_layers=4)).policy(lora_rank)
    largest = policy([[1] * 20], max_new_tokens=10).max_rows_with_gradient
    assert 0.7 * 2**27 < kept_numbers(policy, 16, 20) / 16 * largest < 1.3 * 2**27


# -- graphs --------------------------------------------------------------------------------------------------


def test_a_graph_is_kept_only_if_asked():
    policy = policy_of(batch_size=2)
    dist = policy(PROMPTS, TOKENS)
    score = dist.log_prob(dist.sample((2,))).sum()
    score.backward(retain_graph=True)
    once = [p.grad.clone() for p in trained(policy)]
    score.backward()
    torch.testing.assert_close([p.grad for p in trained(policy)], [2 * g for g in once])
    with pytest.raises(RuntimeError, match="second time"):
        score.backward()


def test_second_derivatives_are_refused():
    policy = policy_of(batch_size=2)
    dist = policy(PROMPTS, TOKENS)
    score = dist.log_prob(dist.sample((2,))).square().sum()
    first = torch.autograd.grad(score, trained(policy), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        sum(g.square().sum() for g in first).backward()


def test_weights_that_change_before_the_backward_pass_are_an_error():
    policy = policy_of(batch_size=2)
    dist = policy(PROMPTS, TOKENS)
    score = dist.log_prob(dist.sample((2,))).sum()
    with torch.no_grad():
        trained(policy)[0].mul_(1.1)
    with pytest.raises(RuntimeError, match=r"weights were changed in place .*call backward\(\) before optimizer.step"):
        score.backward()


def test_parameters_that_take_no_part_have_no_gradient():
    policy = policy_of(batch_size=2)
    policy.network.unused = nn.Parameter(torch.ones(3))
    dist = policy(PROMPTS, TOKENS)
    dist.log_prob(dist.sample((2,))).sum().backward()
    assert policy.network.unused.grad is None
    others = [p for p in trained(policy) if p is not policy.network.unused]
    assert all(p.grad.abs().sum() > 0 for p in others)


def test_parameters_frozen_on_the_way_are_left_alone():
    policy = policy_of(batch_size=2)
    policy.network.model.requires_grad_(False)
    dist = policy(PROMPTS, TOKENS)
    dist.log_prob(dist.sample((2,))).sum().backward()
    assert policy.network.lm_head.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in policy.network.model.parameters())


def test_without_gradients_scores_have_no_graph():
    policy = policy_of(batch_size=2)
    dist = policy(PROMPTS, TOKENS)
    x = dist.sample((2,))
    with torch.no_grad():
        assert not dist.log_prob(x).requires_grad
    assert dist.log_prob(x).requires_grad
    assert not policy.requires_grad_(False)(PROMPTS, TOKENS).log_prob(x).requires_grad


# -- the mismatch between sampling and scoring ---------------------------------------------------------------


def test_the_mismatch_is_that_of_the_scores():
    """Kept scores that are off by a known amount, on some tokens."""
    policy = policy_of(batch_size=5)
    dist = policy(PROMPTS, TOKENS)
    x = dist.sample((4,))
    with torch.no_grad():
        scores = dist.token_log_prob(x).clone()
    live = dist.vocabulary.is_live(x)
    off = torch.where(torch.rand(x.shape) < 0.3, 0.25, 0.0) * live
    assert 0 < off.sum() < 0.25 * live.sum()
    with count_usage() as usage:
        dist.token_log_prob(x, known=scores + off).sum().backward()
    largest, mean = usage.mismatch
    assert abs(largest - 0.25) < 1e-4
    assert abs(mean - float(off.sum() / live.sum())) < 1e-4


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 0.3)])
def test_the_mismatch_of_rounding(dtype, limit):
    policy = LanguageModel(llama_network().to(dtype)).policy(lora_rank=2)
    dist = policy(PROMPTS, TOKENS)
    x = dist.sample((20,))
    with count_usage() as usage:
        assert usage.mismatch is None
        score = dist.log_prob(x).sum()
        assert usage.mismatch is None
        score.backward()
    largest, mean = usage.mismatch
    assert 0.0 <= mean <= largest < limit
    with count_usage() as usage:
        policy(PROMPTS, TOKENS).log_prob(x.clone()).sum().backward()
    assert usage.mismatch is None  # others' draws have one score alone


# -- gradient checkpointing ----------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma2", "opt"])
@pytest.mark.parametrize("lora_rank", [None, 2])
def test_checkpointing_gives_the_same_gradient(model_type, lora_rank):
    """Without dropout, which the last's layers have in training mode; own draws and given ones."""
    if lora_rank and model_type == "gpt2":
        pytest.skip("its Conv1D layers are not PEFT's linear ones")
    policy = LanguageModel(random_network(model_type)).policy(lora_rank)
    prompts = [[5, 6, 7, 8], [20]]
    dist = policy(prompts, TOKENS)
    x = dist.sample((3,))
    weights = torch.randn(x.shape)
    expected = gradient(policy, dist.token_log_prob(x), weights)
    policy.gradient_checkpointing = True
    layers = checkpointable_layers(policy.network)
    for value in (x, x.clone()):
        torch.testing.assert_close(
            gradient(policy, policy(prompts, TOKENS).token_log_prob(value), weights), expected, atol=1e-5, rtol=1e-4
        )
    assert len(layers) == 2
    assert not any("forward" in vars(layer) or layer.training for layer in layers)


def test_checkpointing_keeps_the_inputs_of_layers():
    """And little more."""
    policy = LanguageModel(llama_network(hidden_size=64, intermediate_size=128, num_hidden_layers=8)).policy()
    plain = kept_numbers(policy, 4, 20)
    policy.gradient_checkpointing = True
    less = kept_numbers(policy, 4, 20)
    inputs = 8 * 64 * 4 * 29  # layers, width, completions, tokens
    assert inputs <= less < 2 * inputs < plain / 4


def test_checkpointing_goes_with_a_model_and_needs_layers(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    lm = LanguageModel.from_pretrained(tmp_path, gradient_checkpointing=True, batch_size=7)
    assert (lm.policy().gradient_checkpointing, lm.policy(2).batch_size) == (True, 7)
    with pytest.raises(
        ValueError, match="has none of transformers' GradientCheckpointingLayers; a small micro_batch_size"
    ):
        LanguageModel(table_lm().network, gradient_checkpointing=True)


# -- bfloat16 ------------------------------------------------------------------------------------------------


def bfloat16_prior() -> LanguageModel:
    return LanguageModel(llama_network(seed=3).bfloat16(), eos_token_ids=(0, 3))


@pytest.mark.parametrize("lora_rank", [None, 2])
def test_a_policy_of_a_bfloat16_prior_trains_in_float32(lora_rank):
    """Steps too small for bfloat16 weights are kept, and add up; the prior does not change."""
    prior = bfloat16_prior()
    policy = prior.policy(lora_rank)
    assert {p.dtype for p in trained(policy)} == {torch.float32}
    assert (policy.compute_dtype == torch.bfloat16) == (lora_rank is None)
    torch.manual_seed(1)
    x = prior(PROMPTS, TOKENS).sample((8,))
    torch.testing.assert_close(
        policy(PROMPTS, TOKENS).log_prob(x), prior(PROMPTS, TOKENS).log_prob(x), atol=0.3, rtol=0
    )
    before = [p.detach().clone() for p in trained(policy)]
    untouched = [p.detach().clone() for p in prior.parameters()]
    target = x[:1]
    start = policy(PROMPTS, TOKENS).log_prob(target).sum().item()
    adam = torch.optim.Adam(trained(policy), lr=1e-4)
    for _ in range(40):
        adam.zero_grad()
        scores = policy(PROMPTS, TOKENS).token_log_prob(target)
        assert scores.dtype == torch.float32
        (-scores.sum()).backward()
        adam.step()
    assert policy(PROMPTS, TOKENS).log_prob(target).sum().item() > start + 0.1
    moved = torch.cat([(p - b).abs().reshape(-1) for p, b in zip(trained(policy), before, strict=True)])
    assert (moved > 0).float().mean() > 0.9
    assert all(torch.equal(p, b) for p, b in zip(prior.parameters(), untouched, strict=True))
    if lora_rank is None:  # steps of 1e-4 on the bfloat16 weights themselves
        kept = torch.cat([(b.bfloat16() - 1e-4) != b.bfloat16() for b in map(torch.flatten, before)])
        assert kept.float().mean() < 0.1


@pytest.mark.parametrize("lora_rank", [None, 2])
@pytest.mark.parametrize("own", [True, False])
def test_gradients_in_bfloat16_point_where_those_in_float32_do(lora_rank, own):
    prior = bfloat16_prior()
    exact = LanguageModel(llama_network(seed=3).bfloat16().float(), eos_token_ids=(0, 3)).policy(lora_rank)
    policy = prior.policy(lora_rank)
    with torch.no_grad():
        for p, q in zip(trained(policy), trained(exact), strict=True):
            p.copy_(q.add_(0.05 * torch.randn_like(q)))
    dist = policy(PROMPTS, TOKENS)
    x = dist.sample((4,))
    assert dist.support.check(x).all()
    torch.testing.assert_close(dist.log_prob(x), exact(PROMPTS, TOKENS).log_prob(x), atol=0.3, rtol=0)
    weights = torch.randn(x.shape)
    one = torch.cat([g.flatten() for g in gradient(policy, dist.token_log_prob(x if own else x.clone()), weights)])
    two = torch.cat([g.flatten() for g in gradient(exact, exact(PROMPTS, TOKENS).token_log_prob(x), weights)])
    assert one.dtype == torch.float32
    assert torch.cosine_similarity(one, two, dim=0) > 0.99
    assert abs(one.norm() / two.norm() - 1) < 0.1


@pytest.mark.parametrize(
    ("model_type", "dtype", "checkpointing"),
    [
        ("llama", torch.bfloat16, True),
        ("llama", torch.float16, False),
        ("gpt2", torch.bfloat16, False),
        ("gemma2", torch.bfloat16, True),
        ("mixtral", torch.bfloat16, False),
        pytest.param("bloom", torch.float16, False, marks=pytest.mark.long),
        pytest.param("mixed", torch.bfloat16, False, marks=pytest.mark.long),  # with a head in float32
    ],
)
def test_a_policy_in_half_precision_starts_as_its_prior_to_the_bit(model_type, dtype, checkpointing, tmp_path):
    """With all its weights or adapters, padded and not, sampled and scored, with a gradient, copied and loaded."""
    mixed = model_type == "mixed"
    network = random_network("llama" if mixed else model_type)
    for name, p in network.named_parameters():
        p.data = p.data if mixed and "lm_head" in name else p.data.to(dtype)
    prior = LanguageModel(network, gradient_checkpointing=checkpointing)
    if mixed:
        network.lm_head.register_forward_pre_hook(lambda m, args: (args[0].float(),))
    full = prior.policy()
    policies = [full, full.policy()] + ([prior.policy(2)] if model_type != "gpt2" else [])
    if not mixed:
        full.save_pretrained(tmp_path)
        policies.append(LanguageModel.from_pretrained(tmp_path))
    prompts = [[5, 6, 7, 8], [20]]
    for batch in (prompts, prompts[:1]):
        torch.manual_seed(0)
        x = prior(batch, 4).sample((3,))
        expected = prior(batch, 4).token_log_prob(x.clone())
        for policy in policies:
            scores = policy(batch, 4).token_log_prob(x)
            assert torch.equal(scores, expected)
            if scores.requires_grad:
                assert all(g.isfinite().all() for g in torch.autograd.grad(scores.sum(), trained(policy)))
            torch.manual_seed(0)
            assert torch.equal(policy(batch, 4).sample((3,)), x)


def test_sampling_converts_weights_once(monkeypatch):
    """And not at every token."""
    policy = bfloat16_prior().policy()
    dist = policy(PROMPTS, TOKENS)
    dist.sample()  # tries it
    converted, passes = [], []
    convert, hidden = CausalNetwork._convert, CausalNetwork.hidden
    monkeypatch.setattr(CausalNetwork, "_convert", lambda self, p: converted.append(id(p)) or convert(self, p))
    monkeypatch.setattr(CausalNetwork, "hidden", lambda *args, **kwargs: passes.append(1) or hidden(*args, **kwargs))
    dist.sample()
    assert len(passes) > 1
    assert len(converted) == len(set(converted)) == len(list(policy.parameters()))


def test_a_policy_of_a_policy_goes_on_computing_in_bfloat16():
    policy = bfloat16_prior().policy()
    assert policy.policy().compute_dtype == policy.policy(2).compute_dtype == torch.bfloat16
    assert {p.dtype for p in policy.policy().parameters()} == {torch.float32}
    assert tiny_llama().policy().compute_dtype is None


def test_a_bfloat16_policy_computes_as_before_when_it_is_loaded(tmp_path):
    policy = bfloat16_prior().policy()
    policy.save_pretrained(tmp_path)
    assert LanguageModel.from_pretrained(tmp_path).compute_dtype == torch.bfloat16
    (tmp_path / "bayeslm.json").write_text('{"compute_dtype": "load"}')
    with pytest.raises(OSError, match=r"bayeslm\.json cannot be read"):
        LanguageModel.from_pretrained(tmp_path)
    llama = LanguageModel(llama_network())
    llama.save_pretrained(tmp_path)  # overwrites it: the file of the dtype goes
    assert LanguageModel.from_pretrained(tmp_path).compute_dtype is None
