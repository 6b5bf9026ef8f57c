"""Packed weights: the same law, to draw from and to score with only. (Other architectures: test_network.py.)"""

import copy

import pytest
import torch
from helpers import assert_same_law, tiny_llama
from torch import nn

from bayeslm.inference import ImportanceSampling
from bayeslm.models import TiltedLM
from bayeslm.models.packing import PackedLinear, can_pack

pytestmark = pytest.mark.skipif(not can_pack(nn.Linear(2, 2)), reason="oneDNN has no packed products here")


def packed_layers(lm):
    return [module for module in lm.network.modules() if isinstance(module, PackedLinear)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(0,), (1,), (32,), (70,), (2, 3), (3, 0)])
def test_a_packed_layer_gives_the_same_products(bias, shape):
    linear = nn.Linear(40, 24, bias=bias)
    x = torch.randn(*shape, 80)[..., ::2]  # not contiguous
    torch.testing.assert_close(PackedLinear(linear)(x), linear(x).detach(), atol=1e-5, rtol=1e-5)


def test_what_is_packed():
    assert can_pack(nn.Linear(2, 2))
    assert not can_pack(nn.Linear(2, 2).bfloat16())
    assert not can_pack(nn.Linear(2, 2, device="meta"))
    assert not can_pack(nn.Embedding(2, 2))


def test_all_else_is_shared_and_the_original_stays_as_it_is():
    lm = tiny_llama()
    before = {name: id(p) for name, p in lm.network.named_parameters()}
    packed = lm.packed()
    assert len(packed_layers(packed)) == 7 * 2 + 1
    assert packed_layers(lm) == []
    after = {name: id(p) for name, p in packed.network.named_parameters()}
    assert after.items() < before.items()
    assert (packed.eos_token_ids, packed.pad_token_id) == (lm.eos_token_ids, lm.pad_token_id)
    assert_same_law(packed, lm)
    assert_same_law(packed.packed(), lm)
    assert_same_law(copy.deepcopy(packed), lm)


def test_a_policy_is_packed_as_it_is_now_and_goes_on_training():
    for policy in (tiny_llama().policy(), tiny_llama().policy(lora_rank=2)):
        trained = [p for p in policy.network.parameters() if p.requires_grad]
        for p in trained:
            p.data.add_(0.1)
        packed = policy.packed()
        assert_same_law(packed, policy)
        assert all(p.requires_grad for p in trained)
        assert not any(p.requires_grad for p in packed.network.parameters())
        x = policy([[1, 2]], 5).sample((64,))
        law = packed([[1, 2]], 5).log_prob(x)
        for p in trained:
            p.data.add_(0.3)
        assert torch.equal(packed([[1, 2]], 5).log_prob(x), law)


def test_an_engine_draws_the_same_from_it():
    lm = tiny_llama()
    runs = []
    for prior in (lm, lm.packed()):
        model = TiltedLM(prior, lambda completions, **_: [float(len(text)) for text in completions], beta=5.0)
        runs.append(ImportanceSampling(num_particles=64, seed=0, progress=False).run(model, ["a b", "c"]))
    assert (runs[0].samples["completion"] == runs[1].samples["completion"]).all()
    torch.testing.assert_close(*(torch.as_tensor(run.log_evidence) for run in runs))


def test_what_it_cannot_do_is_refused(tmp_path):
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
