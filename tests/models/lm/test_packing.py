"""Packed weights: the same distribution, for drawing and scoring only. (Other architectures: test_network.py.)"""

import copy
from unittest import mock

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.models import llama_network, tiny_llama
from support.oracles import assert_same_distribution
from torch import nn

from bayeslm.inference import ImportanceSampling
from bayeslm.models import LanguageModel, TiltedLM
from bayeslm.models.lm import packing
from bayeslm.models.lm.network import CausalNetwork
from bayeslm.models.lm.packing import PackedLinear, can_pack
from bayeslm.models.lm.usage import count_usage

pytestmark = pytest.mark.skipif(not can_pack(nn.Linear(2, 2)), reason="oneDNN has no packed products here")


def packed_layers(lm):
    return [module for module in lm.network.modules() if isinstance(module, PackedLinear)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(0,), (1,), (32,), (70,), (2, 3), (3, 0)])
def test_a_packed_layer_gives_the_same_products(bias, shape):
    linear = nn.Linear(40, 24, bias=bias)
    x = torch.randn(*shape, 80)[..., ::2]  # not contiguous
    torch.testing.assert_close(PackedLinear(linear)(x), linear(x).detach(), atol=1e-5, rtol=1e-5)


def test_float32_linear_layers_on_a_cpu_are_packed():
    assert can_pack(nn.Linear(2, 2))
    assert not can_pack(nn.Linear(2, 2).bfloat16())
    assert not can_pack(nn.Linear(2, 2, device="meta"))
    assert not can_pack(nn.Embedding(2, 2))


def test_all_else_is_shared_and_the_original_does_not_change():
    lm = tiny_llama()
    before = {name: id(p) for name, p in lm.network.named_parameters()}
    packed = lm.packed()
    assert len(packed_layers(packed)) == 7 * 2 + 1
    assert packed_layers(lm) == []
    after = {name: id(p) for name, p in packed.network.named_parameters()}
    assert after.items() < before.items()
    assert (packed.eos_token_ids, packed.pad_token_id) == (lm.eos_token_ids, lm.pad_token_id)
    assert_same_distribution(packed, lm)
    assert_same_distribution(packed.packed(), lm)
    assert_same_distribution(copy.deepcopy(packed), lm)


def test_a_policy_is_packed_as_it_is_now_and_goes_on_training():
    for policy in (tiny_llama().policy(), tiny_llama().policy(lora_rank=2)):
        trained = [p for p in policy.network.parameters() if p.requires_grad]
        for p in trained:
            p.data.add_(0.1)
        packed = policy.packed()
        assert_same_distribution(packed, policy)
        assert all(p.requires_grad for p in trained)
        assert not any(p.requires_grad for p in packed.network.parameters())
        x = policy([[1, 2]], 5).sample((64,))
        dist = packed([[1, 2]], 5).log_prob(x)
        for p in trained:
            p.data.add_(0.3)
        assert torch.equal(packed([[1, 2]], 5).log_prob(x), dist)


def test_an_engine_draws_the_same_from_it():
    lm = tiny_llama()
    runs = []
    for prior in (lm, lm.packed()):
        model = TiltedLM(prior, lambda completions, **_: [float(len(text)) for text in completions], beta=5.0)
        runs.append(ImportanceSampling(num_particles=64, seed=0, progress=False).run(model, ["a b", "c"]))
    assert (runs[0].samples["completion"] == runs[1].samples["completion"]).all()
    torch.testing.assert_close(*(torch.as_tensor(run.log_evidence) for run in runs))


def test_training_moving_and_saving_are_refused(tmp_path):
    packed = tiny_llama().packed()
    refused = "neither trained nor saved"
    with pytest.raises(TypeError, match=refused):
        packed.policy()
    with pytest.raises(TypeError, match=refused):
        packed.policy(lora_rank=2)
    with pytest.raises(TypeError, match=refused):
        packed.fit(["a b"])
    with pytest.raises(TypeError, match=refused):
        packed.save_pretrained(tmp_path)
    with pytest.raises(TypeError, match="do that first"):
        packed.to(torch.bfloat16)


# -- for the time of a sample --------------------------------------------------------------------------------


@pytest.fixture
def always(monkeypatch):
    """Also where networks are too small for it to pay."""
    monkeypatch.setattr(packing, "MIN_WEIGHTS", 0)
    monkeypatch.setattr(packing, "MIN_PASSES", 1)


def drawn_with(policy, prompts, tokens):
    """Completions, and the kinds of linear layers that they were drawn with."""
    kinds = set()
    hidden = CausalNetwork.hidden

    def noting(self, *args, **kwargs):
        kinds.update(type(module) for module in self.network.modules() if isinstance(module, nn.Linear | PackedLinear))
        kinds.add(type(self.head))
        return hidden(self, *args, **kwargs)

    with mock.patch.object(CausalNetwork, "hidden", noting):
        return policy(prompts, tokens).expand((30, len(prompts))).sample(), kinds


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("lora_rank", [None, 2])
def test_a_policy_is_packed_while_it_samples(lora_rank):
    """The same draws, and scores to rounding; weights and modules do not change."""
    policy = tiny_llama(eos_token_ids=(0, 3)).policy(lora_rank)
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(0.1 * torch.randn_like(p)) if p.requires_grad else None
    before = [p.detach().clone() for p in policy.parameters()]
    modules = dict(policy.named_modules())
    prompts = [[1, 2, 3], [4]]
    policy(prompts, 6).sample()  # at first use a network is tried
    torch.manual_seed(5)
    x, kinds = drawn_with(policy, prompts, 6)
    assert kinds == {PackedLinear}
    assert dict(policy.named_modules()) == modules
    assert all(torch.equal(p, b) for p, b in zip(policy.parameters(), before, strict=True))
    with mock.patch.object(packing, "MIN_PASSES", 10**9):
        torch.manual_seed(5)
        y, kinds = drawn_with(policy, prompts, 6)
    assert PackedLinear not in kinds
    assert torch.equal(x, y)
    dist = policy(prompts, 6).expand((30, 2))
    x = dist.sample()
    with count_usage() as usage:
        dist.log_prob(x).sum().backward()
    assert usage.mismatch[0] < 2e-5
    assert all(p.grad is not None for p in policy.parameters() if p.requires_grad)


@pytest.mark.usefixtures("always")
def test_a_sample_that_fails_does_not_change_the_policy():
    policy = tiny_llama().policy(lora_rank=2)
    modules = dict(policy.named_modules())
    head = policy.causal.head
    divisors = [1]
    policy.network.base_model.model.model.norm.register_forward_hook(lambda *_: 1 // divisors[0] and None)
    policy([[1, 2]], 6).sample()  # the network with its hook is tried once
    divisors[0] = 0
    with pytest.raises(ZeroDivisionError):
        policy([[1, 2]], 6).sample()
    assert dict(policy.named_modules()) == modules
    assert policy.causal.head is head


def test_priors_and_small_networks_are_not_packed():
    assert PackedLinear not in drawn_with(tiny_llama().policy(), [[1, 2]], 20)[1]
    with mock.patch.object(packing, "MIN_WEIGHTS", 0):
        assert PackedLinear in drawn_with(tiny_llama().policy(), [[1, 2]], 20)[1]
        assert PackedLinear not in drawn_with(tiny_llama().policy(), [[1, 2]], 6)[1]
        assert PackedLinear not in drawn_with(tiny_llama(), [[1, 2]], 20)[1]


@pytest.mark.usefixtures("always")
def test_adapters_of_other_kinds_are_left_as_they_are():
    """DoRA, whose weight is no sum; and bfloat16, for which there are no packed products."""
    network = get_peft_model(llama_network(), LoraConfig(r=2, use_dora=True, target_modules="all-linear"))
    policy = LanguageModel(network)
    for name, p in policy.named_parameters():
        p.requires_grad_("lora" in name)
    x, kinds = drawn_with(policy, [[1, 2], [3]], 6)
    assert nn.Linear in kinds
    with torch.no_grad():
        torch.testing.assert_close(policy([[1, 2], [3]], 6).log_prob(x), policy([[1, 2], [3]], 6).log_prob(x.clone()))
    half = LanguageModel(llama_network().bfloat16()).policy(lora_rank=2)
    assert PackedLinear not in drawn_with(half, [[1, 2]], 6)[1]
