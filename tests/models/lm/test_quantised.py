"""Networks whose weights are stored in few bits: scored as their own forward, under adapters, or refused with why.

Those of torchao are long tests, in an environment that has it: `make test-quantised`.
"""

from __future__ import annotations

import copy
import importlib.util

import numpy as np
import pytest
import torch
from support.models import WORDS, llama_network
from support.oracles import all_by_hand
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from bayeslm.inference import SVI, Exact
from bayeslm.inference.training import AutoPolicy
from bayeslm.models import LanguageModel, TiltedLM, rewards
from bayeslm.models.lm import word_tokenizer
from bayeslm.models.lm.quantised import quantised_layers, refuse_without_gradient, tensors_in
from bayeslm.models.lm.weights import digest_of_values, values

PROMPTS = [[1, 2, 3], [4]]
torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")


def model(network, **settings) -> LanguageModel:
    return LanguageModel(network, word_tokenizer(WORDS[:8], "<eos>"), eos_token_ids=(0,), **settings)


def network_of(seed: int = 0):
    return llama_network(seed, hidden_size=64, intermediate_size=64)


# -- without a library ---------------------------------------------------------------------------------------


def test_the_numbers_of_a_tensor_of_several_are_compared():
    """TwoTensor is torch's own tensor of two, as torchao's are of integers and scales."""
    a, b = torch.arange(6.0), torch.ones(6)
    x = TwoTensor(a, b)
    assert [t.data_ptr() for t in tensors_in(x)] == [a.data_ptr(), b.data_ptr()]
    before = values([x]), digest_of_values([("x", x)])
    b[3] = 7.0
    assert values([x]) != before[0]
    assert digest_of_values([("x", x)]) != before[1]
    layer = nn.Linear(2, 2)
    layer.weight = nn.Parameter(TwoTensor(torch.ones(2, 2), torch.ones(2, 2)), requires_grad=False)
    assert list(quantised_layers(nn.Sequential(nn.Linear(2, 2), layer))) == ["1"]


def test_what_rounds_a_text_by_others_is_refused_by_name():
    dynamic = torch.ao.quantization.quantize_dynamic(network_of(), {nn.Linear}, dtype=torch.qint8)
    with pytest.raises(TypeError, match=r"layers.0.self_attn.q_proj is a Linear of torch.ao, .* in the batch.*torchao"):
        LanguageModel(dynamic)
    for name, reason in {"Linear8bitLt": "chooses by the batch", "Linear4bit": "on a CPU its passes"}.items():
        network = network_of()
        kind = type(name, (nn.Linear,), {"__module__": "bitsandbytes.nn.modules"})
        network.model.layers[1].mlp.up_proj = kind(64, 64)
        with pytest.raises(TypeError, match=f"layers.1.mlp.up_proj is a {name} of bitsandbytes, .*{reason}"):
            LanguageModel(network)


class Rounded(nn.Linear):
    """A layer whose weight is of two tensors, and which rounds what it is given."""

    detached = True

    def forward(self, x):
        rounded = (x * 64).round() / 64
        return nn.functional.linear(rounded if self.detached else x + (rounded - x).detach(), self.weight.a)


def test_layers_through_which_gradients_do_not_pass_carry_no_adapters():
    layer = Rounded(16, 16)
    layer.weight = nn.Parameter(TwoTensor(torch.randn(16, 16), torch.ones(16, 16)), requires_grad=False)
    with pytest.raises(TypeError, match=r"0 has quantised weights \(TwoTensor\) through which gradients do not pass"):
        refuse_without_gradient(nn.Sequential(layer))
    layer.detached = False  # the gradient of a rounding is that of none
    refuse_without_gradient(nn.Sequential(layer))


# -- torchao -------------------------------------------------------------------------------------------------


def quantised(dynamic: bool = False, seed: int = 0):
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_

    network = network_of(seed)
    config = Int8DynamicActivationInt8WeightConfig() if dynamic else Int8WeightOnlyConfig()
    quantize_(network, config, filter_fn=lambda module, name: isinstance(module, nn.Linear) and "head" not in name)
    return network


def dequantised(network):
    """The network whose weights are what the quantised ones stand for."""
    new, own = network_of(), dict(network.named_parameters())
    with torch.no_grad():
        for name, p in new.named_parameters():
            x = own[name]
            p.copy_(x.dequantize() if tensors_in(x)[0] is not x else x)
    return new


def with_adapters(lm: LanguageModel, seed: int) -> LanguageModel:
    policy, generator = lm.policy(2), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in policy.network.parameters():
            if p.requires_grad:
                p.copy_(0.2 * torch.randn(p.shape, generator=generator))
    return policy


@torchao
@pytest.mark.long
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_quantised_prior_is_its_own_forward_pass(dynamic):
    for seed in range(2):
        lm = model(quantised(dynamic, seed))
        value = lm(PROMPTS, 4).expand((3, 2)).sample()
        found = lm(PROMPTS, 4).token_log_prob(value)
        torch.testing.assert_close(found, all_by_hand(lm, PROMPTS, value), atol=1e-5, rtol=1e-5)
        whole = model(network_of(seed))
        assert (found - whole(PROMPTS, 4).token_log_prob(value)).abs().max() > 1e-3  # the rounding is of the weights
    exact = Exact(progress=False).run(TiltedLM(lm, rewards.Length(), 2.0, max_new_tokens=3), ["a b", "c"])
    x = torch.as_tensor(exact.samples["completion"][0])
    log_p = all_by_hand(lm, [[1, 2], [3]], x).sum(-1).detach().double()
    right = (log_p + torch.as_tensor(exact.rewards["reward"][0]) / 2.0).logsumexp(0)
    np.testing.assert_allclose(exact.log_evidence, right, atol=1e-4)


@torchao
@pytest.mark.long
def test_adapters_on_it_have_the_gradient_of_the_dequantised_network():
    network = quantised()
    for seed in range(3):
        grads, scores = [], []
        value = None
        for each in (network, dequantised(network)):
            policy = with_adapters(model(each), seed)
            value = policy(PROMPTS, 4).sample() if value is None else value
            score = policy(PROMPTS, 4).log_prob(value.clone())
            score.sum().backward()
            scores.append(score.detach())
            grads.append(torch.cat([p.grad.flatten() for p in policy.network.parameters() if p.requires_grad]))
        torch.testing.assert_close(*scores, atol=1e-4, rtol=1e-4)
        assert (grads[0] - grads[1]).norm() < 1e-3 * grads[1].norm()


@torchao
@pytest.mark.long
def test_it_is_trained_by_default_with_adapters_that_share_its_weights():
    lm = model(quantised())
    assert lm.is_quantised
    before = values(lm.network.parameters())
    program = TiltedLM(lm, rewards.get("contains", phrase="a"), 0.3, max_new_tokens=3)
    settings = {"num_samples": 512, "num_prior_samples": 512, "progress": False}
    found = SVI(150, num_particles=32, seed=0, guide=AutoPolicy, **settings).run(program, ["b c"])
    assert found.policy.has_adapters
    assert values(lm.network.parameters()) == before
    shared = {id(p) for p in lm.network.parameters()}
    assert sum(id(p) in shared for p in found.policy.network.parameters()) == len(shared)
    log_z = float(Exact(progress=False).run(program, ["b c"]).log_evidence[0])
    elbo = np.asarray(found.stats["elbo"])[0, :, 0]
    assert elbo[:10].mean() < elbo[-30:].mean() - 0.05  # it learns,
    assert elbo[-30:].mean() < log_z + 0.3  # and the bound is one, within its error


@torchao
@pytest.mark.long
def test_it_is_loaded_saved_and_packed_or_refused(tmp_path):
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    model(network_of()).save_pretrained(tmp_path / "whole")
    config = TorchAoConfig(Int8WeightOnlyConfig())
    lm = LanguageModel.from_pretrained(tmp_path / "whole", quantization_config=config)
    assert lm.is_quantised
    value = lm(PROMPTS, 4).sample((5,))
    expected = lm(PROMPTS, 4).log_prob(value.clone())
    lm.save_pretrained(tmp_path / "few")
    again = LanguageModel.from_pretrained(tmp_path / "few")
    assert again.is_quantised
    policy = with_adapters(lm, 0)
    policy.save_pretrained(tmp_path / "adapter")
    loaded = LanguageModel.from_pretrained(tmp_path / "adapter", base=again)
    assert torch.equal(loaded(PROMPTS, 4).log_prob(value), policy(PROMPTS, 4).log_prob(value.clone()))
    for other in (again, lm.packed(), copy.deepcopy(lm)):
        torch.testing.assert_close(other(PROMPTS, 4).log_prob(value.clone()), expected, atol=1e-6, rtol=1e-6)
    whole = LanguageModel.from_pretrained(tmp_path / "adapter", base=model(network_of())).merged()
    assert not whole.is_quantised
    for refused, reason in {
        lm.policy: r"trains all weights.*policy\(lora_rank=16\)",
        policy.merged: "merged.*base=a model of whole weights",
        lm.shard: "shard",
        lambda: lm.fit(["a b"], num_steps=1, progress=False): "fit needs weights that are not quantised",
        lambda: model(quantised()).save_pretrained(tmp_path / "by hand"): "does not say how it is quantised",
        lambda: model(quantised(dynamic=True)).policy(2): "gradients do not pass",
    }.items():
        with pytest.raises(TypeError, match=reason):
            refused()
