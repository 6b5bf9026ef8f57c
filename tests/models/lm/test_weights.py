"""Weights that models share, and guards that only a change of weights trips."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.models import llama_network, random_network, tiny_llama
from support.oracles import assert_same_distribution, by_hand

from bayeslm.models import LanguageModel
from bayeslm.models.lm import packing, weights
from bayeslm.models.lm.adapters import own_parameters

PROMPTS = [[1, 2, 3], [4]]


def trained(lm):
    return [p for p in lm.parameters() if p.requires_grad]


def disturb(policy, scale=0.3):
    torch.manual_seed(0)
    for p in trained(policy):
        p.data.add_(scale * torch.randn_like(p))
    return policy


def scores(lm):
    with torch.no_grad():
        return lm(PROMPTS, 3).log_prob(torch.tensor([[1, 4, 3], [4, 5, 6]]))


# -- weights that models share -----------------------------------------------------------------------------------


def by_an_optimizer(network):
    network.requires_grad_(True)
    network(input_ids=torch.tensor([[1, 2, 3]])).logits.sum().backward()
    torch.optim.SGD(network.parameters(), lr=0.1).step()


def by_other_weights(network):
    network.load_state_dict({k: v + 0.1 for k, v in network.state_dict().items()})


def one_layer(network):
    network.get_base_model().model.layers[1].mlp.up_proj.base_layer.weight.data.mul_(1.1)


CHANGES = {
    "merge_and_unload": lambda network: network.merge_and_unload(),
    "merge_adapter": lambda network: network.merge_adapter(),
    "an optimizer": by_an_optimizer,
    "load_state_dict": by_other_weights,
    "half": lambda network: network.half(),
    "resize_token_embeddings": lambda network: network.resize_token_embeddings(12),
    "one layer": one_layer,
}


@pytest.mark.parametrize(
    ("share", "change"),
    [*(("policy", change) for change in CHANGES), *((share, "half") for share in ("continued", "packed", "loaded"))],
)
def test_a_prior_does_not_change_unseen(change, share, tmp_path):
    prior = tiny_llama()
    other = disturb(prior.policy(lora_rank=2))
    if share == "continued":
        prior, other = other, other.continued()
    elif share == "loaded":
        other.save_pretrained(tmp_path)
        other = LanguageModel.from_pretrained(tmp_path, base=prior)
    elif share == "packed":
        prior = prior.packed()  # its norms and embeddings are the policy's
    scores(prior)
    CHANGES[change](other.network)
    for use in (scores, lambda lm: lm(PROMPTS, 3).sample(), lambda lm: lm(PROMPTS, 3).decoder(), LanguageModel.packed):
        with pytest.raises(RuntimeError, match=r"weights that .* were changed .*\.merged\(\)"):
            use(prior)


def test_a_bfloat16_prior_does_not_change_unseen():
    """Where most weights do not move by a small adapter."""
    prior = LanguageModel(llama_network(hidden_size=64, intermediate_size=128).bfloat16())
    policy = disturb(prior.policy(lora_rank=2), 1e-3)
    before = copy.deepcopy(prior.network.state_dict())
    policy.network.merge_and_unload()
    moved = torch.cat([(before[k] != v).flatten() for k, v in prior.network.state_dict().items() if "proj" in k])
    assert 0 < moved.float().mean() < 0.2
    with pytest.raises(RuntimeError, match="were changed"):
        scores(prior)


@pytest.mark.parametrize(
    "change",
    [
        lambda policy: policy.network.disable_adapter_layers(),
        lambda policy: policy.network.delete_adapter("default"),
        lambda policy: policy.network.add_adapter("more", LoraConfig(r=1, target_modules=["q_proj"])),
        lambda policy: policy.fit(["a b c", "d e"], num_steps=3, progress=False),
        lambda policy: policy.network.train(),
        lambda policy: disturb(policy, 10.0),
        lambda policy: policy.merged().network.half(),
    ],
)
def test_what_does_not_reach_the_prior_is_allowed(change):
    prior = tiny_llama()
    policy = prior.policy(lora_rank=2)
    expected = scores(prior)
    change(policy)
    assert torch.equal(scores(prior), expected)


def test_a_model_may_change_its_own_weights():
    """By what it offers itself; the model that shares them refuses them."""
    for change in (lambda lm: lm.fit(["a b c"], num_steps=2, progress=False), lambda lm: lm.to(torch.bfloat16)):
        prior = tiny_llama()
        policy = prior.policy(lora_rank=2)
        change(prior)
        assert scores(prior).isfinite().all()
        with pytest.raises(RuntimeError, match="were changed"):
            scores(policy)
    prior = tiny_llama()
    prior.fit(["a b c"], num_steps=2, progress=False)  # shared with nobody
    with torch.no_grad():
        prior.network.lm_head.weight.mul_(2)
    expected = [by_hand(prior, p, torch.tensor(c)).sum() for p, c in zip(PROMPTS, [[1, 4, 3], [4, 5, 6]], strict=True)]
    torch.testing.assert_close(scores(prior), torch.stack(expected).detach())


def test_a_few_values_of_every_tensor_are_compared():
    network = random_network("gpt2")
    before = weights.values(network.parameters())
    for p in network.parameters():
        old = p.detach().clone()
        p.data.mul_(1.001).add_(1e-4)
        assert weights.values(network.parameters()) != before
        p.data.copy_(old)
    assert weights.values(network.parameters()) == before
    assert weights.values([torch.empty(0), torch.empty(3, device="meta")]) == {}
    broken = torch.tensor([float("nan")])
    assert weights.values([broken]) == weights.values([broken.clone()])


# -- merged weights ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
def test_merged_weights_are_the_policy_and_leave_the_prior_alone(model_type, tmp_path):
    prior = LanguageModel(random_network(model_type), eos_token_ids=(2, 7))
    policy = disturb(prior.policy(lora_rank=2), 0.1)
    before, of_policy = scores(prior), scores(policy)
    merged = policy.merged()
    assert not merged.has_adapters
    assert not trained(merged)
    assert (merged.eos_token_ids, merged.name) == ((2, 7), None)
    torch.testing.assert_close(scores(merged), of_policy, atol=1e-4, rtol=0)
    assert (of_policy - before).abs().max() > 0.01
    merged.save_pretrained(tmp_path)
    torch.testing.assert_close(scores(LanguageModel.from_pretrained(tmp_path)), of_policy, atol=1e-4, rtol=0)
    assert torch.equal(scores(prior), before)
    assert torch.equal(scores(policy), of_policy)
    assert {p.data_ptr() for p in merged.parameters()}.isdisjoint(p.data_ptr() for p in prior.parameters())
    assert_same_distribution(prior, prior.merged())
    with pytest.raises(TypeError, match="packed"):
        prior.packed().merged()


# -- mixtures of experts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss"])
def test_lora_on_experts_trains(model_type, monkeypatch):
    """PEFT raises torch's count of the experts' weights in every pass; a change of the weights is still noticed."""
    monkeypatch.setattr(packing, "MIN_WEIGHTS", 0)
    monkeypatch.setattr(packing, "MIN_PASSES", 1)
    extra = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    prior = LanguageModel(random_network(model_type, **extra), batch_size=2)
    target = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=target, init_lora_weights=False)
    policy = LanguageModel(get_peft_model(copy.deepcopy(prior.network), config), batch_size=2)
    for lm in (prior.policy(lora_rank=2), policy):
        disturb(lm, 0.05)
        for p in own_parameters(lm.network):
            p.requires_grad_(True)
        dist = lm(PROMPTS, 4)
        x = dist.sample((3,))
        assert dist.token_log_prob(x.clone()).requires_grad
        found = torch.autograd.grad(dist.token_log_prob(x).sum(), trained(lm))  # kept, then a backward pass alone
        rows = [by_hand(lm, p, c).sum() for row in x for p, c in zip(PROMPTS, row, strict=True)]
        expected = torch.autograd.grad(torch.stack(rows).sum(), trained(lm))
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)
        score = dist.token_log_prob(x).sum()
        with torch.no_grad():
            next(p for n, p in lm.network.named_parameters() if "experts" in n and not p.requires_grad).mul_(1.1)
        with pytest.raises(RuntimeError, match="weights were changed in place"):
            score.backward()


# -- adapters that are more than LoRA's layers -----------------------------------------------------------------


KINDS = {
    "modules_to_save": ({"modules_to_save": ["lm_head", "embed_tokens"]}, "modules_to_save.default.weight"),
    "added tokens": ({"trainable_token_indices": [3, 5]}, "trainable_tokens_delta"),
    "tokens of one layer": ({"trainable_token_indices": {"embed_tokens": [3, 5]}}, "trainable_tokens_delta"),
    "biases": ({"bias": "all"}, "bias"),
    "DoRA": ({"use_dora": True}, "lora_magnitude_vector"),
}


@pytest.mark.parametrize(("kind", "tie"), [*((kind, False) for kind in KINDS), ("added tokens", True)])
def test_adapters_go_on_training_all_that_they_have(kind, tie, tmp_path):
    settings, part = KINDS[kind]
    base = LanguageModel(llama_network(tie_word_embeddings=tie, attention_bias=True), eos_token_ids=(0,))
    base.save_pretrained(tmp_path / "base")
    network = get_peft_model(copy.deepcopy(base.network), LoraConfig(r=2, target_modules="all-linear", **settings))
    kept = {name for name, p in network.named_parameters() if p.requires_grad}
    assert any(part in name for name in kept)
    start = LanguageModel(network)
    start._unfreeze(own_parameters(network))
    assert {name for name, p in network.named_parameters() if p.requires_grad} == kept
    disturb(start, 0.1)
    start.requires_grad_(False).save_pretrained(tmp_path / "adapter")
    loaded = LanguageModel.from_pretrained(tmp_path / "adapter", base=base)
    torch.testing.assert_close(scores(loaded), scores(start))
    before = scores(base)
    policy = loaded.continued()
    assert {name for name, p in policy.network.named_parameters() if p.requires_grad} == kept
    torch.testing.assert_close(scores(policy), scores(loaded))
    old = [p.detach().clone() for p in trained(policy)]
    optimizer = torch.optim.SGD(trained(policy), lr=0.1)
    policy(PROMPTS, 3).log_prob(torch.tensor([[3, 5, 3], [5, 3, 1]])).sum().backward()
    optimizer.step()
    assert all(not torch.equal(p, o) for p, o in zip(trained(policy), old, strict=True) if p.grad.abs().sum() > 0)
    assert sum(float(p.grad.abs().sum()) > 0 for p in trained(policy)) > 0.9 * len(old)
    torch.testing.assert_close(scores(loaded), scores(start))  # it shares no trained weight
    assert torch.equal(scores(base), before)
    torch.testing.assert_close(scores(policy.merged()), scores(policy), atol=1e-4, rtol=0)
    torch.testing.assert_close(scores(policy.packed()), scores(policy), atol=1e-4, rtol=0)
