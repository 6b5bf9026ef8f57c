"""Networks are scored as their own forward pass scores, or refused. (Architectures: test_zoo.py.)"""

import copy

import pytest
import torch
from peft import CPTConfig, LoraConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from support.models import PADDED_PROMPTS, llama_network, random_network
from support.oracles import all_by_hand, by_hand
from torch import nn
from transformers import (
    DogeConfig,
    DogeForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)
from transformers.models.llama.modeling_llama import LlamaMLP

from bayeslm.models import LanguageModel
from bayeslm.models.lm import own_forward, redraw
from bayeslm.models.lm.network import CausalNetwork
from bayeslm.models.lm.usage import count_usage

PROMPTS = [[1, 2, 3, 4], [5], [6, 7]]


def assert_scored_as_its_forward(lm, prompts=PROMPTS, tokens=5):
    """Own draws, given ones, and those of a redraw from ragged cuts, against unpadded whole texts."""
    dist = lm(prompts, tokens)
    with torch.no_grad():
        x = dist.sample((3,))
        cut = torch.arange(3 * len(prompts)).reshape(3, -1) % tokens
        new, scores = redraw(dist, x, cut)
        of_draws, of_new = (all_by_hand(lm, prompts, value) for value in (x, new))
        for value, expected in ((x, of_draws), (x.clone(), of_draws), (new, of_new)):
            torch.testing.assert_close(dist.token_log_prob(value), expected, atol=1e-4, rtol=0)
    after = torch.arange(tokens) >= cut[..., None]
    torch.testing.assert_close(scores, of_new * after, atol=1e-4, rtol=0)
    return x


# -- refused ---------------------------------------------------------------------------------------------------


PROMPT_LEARNING = {
    "PROMPT_TUNING": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "PREFIX_TUNING": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "P_TUNING": PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "CPT": CPTConfig(task_type="CAUSAL_LM", cpt_token_ids=[1, 2], cpt_mask=[1, 1], cpt_tokens_type_mask=[1, 1]),
    "activated LoRA": LoraConfig(task_type="CAUSAL_LM", alora_invocation_tokens=[1, 2], target_modules="all-linear"),
}


@pytest.mark.parametrize("kind", PROMPT_LEARNING)
def test_adapters_that_change_the_text_are_refused_by_name(kind):
    with pytest.raises(TypeError, match=f"adapter 'default' is of the kind {kind}"):
        LanguageModel(get_peft_model(llama_network(), PROMPT_LEARNING[kind]))


def test_a_network_that_looks_ahead_is_refused():
    with pytest.raises(TypeError, match=r"BertLMHeadModel is not causal: .* before \[3, 4, 5\]; an encoder"):
        _ = LanguageModel(random_network("bert")).vocab_size


def test_a_wrapper_that_computes_something_else_is_refused_with_the_numbers():
    network = get_peft_model(llama_network(), LoraConfig(target_modules="all-linear"))
    forward = network.forward

    def hotter(*args, **kwargs):
        out = forward(*args, **kwargs)
        out.logits = out.logits / 2
        return out

    network.forward = hotter
    with pytest.raises(TypeError, match=r"cannot be scored as its own forward pass scores: .* are \[-.*\] for \[-.*\]"):
        _ = LanguageModel(network).vocab_size


def test_logits_of_another_width_than_the_config_says_are_refused():
    network = llama_network()
    network.lm_head = nn.Linear(32, 12)
    with pytest.raises(TypeError, match=r"must compute logits of shape \(2, 6, 8\).* found shape \(2, 6, 12\)"):
        _ = LanguageModel(network).vocab_size


@pytest.mark.parametrize("error", [ValueError("no padding token\nsecond line"), KeyError("x"), RuntimeError()])
def test_a_network_that_fails_on_plain_token_ids_is_refused_with_its_reason(error):
    network = llama_network()
    network.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(error))
    with pytest.raises(
        TypeError, match=rf"LlamaForCausalLM fails on the token ids .* \({type(error).__name__}: .*causal"
    ):
        _ = LanguageModel(network).vocab_size


# -- scored as it scores ---------------------------------------------------------------------------------------


def with_bias(network):
    network.lm_head.bias = nn.Parameter(torch.linspace(-2, 2, 8))


def with_hook_on_the_body(network):
    network.model.register_forward_hook(lambda m, a, out: setattr(out, "last_hidden_state", 2 * out.last_hidden_state))


def with_hook_on_a_layer(network):
    network.model.layers[0].register_forward_hook(lambda m, a, out: out * 1.5)


def with_hook_on_the_network(network):
    network.register_forward_hook(lambda m, a, out: setattr(out, "logits", out.logits.clamp(-1, 1)))


def with_hook_before_the_head(network):
    network.lm_head.register_forward_pre_hook(lambda m, args: (args[0].tanh(),))


def with_own_forward(network):
    forward = network.forward

    def biased(*args, **kwargs):
        out = forward(*args, **kwargs)
        out.logits = out.logits + torch.linspace(-2, 2, 8)
        return out

    network.forward = biased


def with_another_head(network):
    network.lm_head = nn.Sequential(nn.Linear(32, 8), nn.Tanh())


def tied(network):
    network.lm_head.weight = network.model.embed_tokens.weight


def in_training(network):
    network.config.attention_dropout = 0.5
    network.train()


CHANGES = [
    with_bias,
    with_hook_on_the_body,
    with_hook_on_a_layer,
    with_hook_on_the_network,
    with_hook_before_the_head,
    with_own_forward,
    with_another_head,
    tied,
    in_training,
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_network_is_scored_as_it_scores(change):
    network = llama_network()
    change(network)
    assert_scored_as_its_forward(LanguageModel(network))


@pytest.mark.parametrize("change", CHANGES)
def test_one_that_is_changed_before_its_first_use_is_too(change):
    lm = LanguageModel(llama_network())
    change(lm.network)
    assert_scored_as_its_forward(lm)


def test_a_limit_of_minus_one_is_none():
    """As in XLNet's config."""
    network = llama_network()
    network.config.max_position_embeddings = -1
    lm = LanguageModel(network)
    assert lm.causal.context_length is None
    assert_scored_as_its_forward(lm)


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_replaced_after_its_first_use_is_noticed(change):
    """A layer, a ``forward`` or a hook; scores that a distribution has kept go with it."""
    lm = LanguageModel(llama_network())
    dist = lm(PROMPTS, 2)
    x = dist.sample()
    change(lm.network)
    assert_scored_as_its_forward(lm)
    torch.testing.assert_close(dist.log_prob(x), dist.log_prob(x.clone()))


def test_a_forward_of_the_class_that_is_replaced_is_noticed(monkeypatch):
    lm = LanguageModel(llama_network())
    lm(PROMPTS, 2).sample()
    forward = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: 3 * forward(self, x))
    assert_scored_as_its_forward(lm)


@pytest.mark.parametrize("place", ["weights", "config"])
def test_a_network_that_computes_nan_is_refused(place):
    network = llama_network()
    if place == "weights":
        network.model.norm.weight.data[0] = torch.nan
    else:
        network.model.norm.variance_epsilon = float("nan")
    with pytest.raises(TypeError, match="computes NaN of the token ids"):
        LanguageModel(network)(PROMPTS, 2)


@pytest.mark.parametrize("active", [["one"], ["other"], ["one", "other"], []])
def test_the_active_adapters_are_scored(active):
    network = get_peft_model(llama_network(), LoraConfig(target_modules="all-linear", init_lora_weights=False), "one")
    network.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    lm = LanguageModel(network)
    x = lm(PROMPTS, 5).sample()
    if active:
        network.base_model.set_adapter(active)
    else:
        network.base_model.disable_adapter_layers()
    assert_scored_as_its_forward(lm)
    rows = torch.stack([by_hand(lm, p, c).detach() for p, c in zip(PROMPTS, x, strict=True)])
    torch.testing.assert_close(lm(PROMPTS, 5).token_log_prob(x), rows, atol=1e-4, rtol=0)


def test_a_kept_score_goes_when_another_adapter_becomes_active():
    network = get_peft_model(llama_network(), LoraConfig(target_modules="all-linear", init_lora_weights=False))
    lm = LanguageModel(network)
    dist = lm(PROMPTS, 5)
    x = dist.sample()
    with network.disable_adapter():
        torch.testing.assert_close(dist.log_prob(x), lm(PROMPTS, 5).log_prob(x.clone()))
    torch.testing.assert_close(dist.log_prob(x), lm(PROMPTS, 5).log_prob(x.clone()))


def test_wrappers_are_taken_off():
    network = llama_network()
    for wrapped in (nn.DataParallel(network), torch.compile(network, backend="eager")):
        assert LanguageModel(wrapped).network is network


# -- whole texts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model_type", "extra", "shares", "pads"),
    [
        ("lfm2", {"layer_types": ["conv", "full_attention"]}, False, None),
        ("openai-gpt", {}, False, None),  # no cache
        ("trocr", {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4}, True, False),
    ],
)
def test_networks_whose_caches_cannot_be_shared_read_whole_texts(model_type, extra, shares, pads):
    """Padded and not, sampled, scored, redrawn and, of a policy, with a gradient."""
    lm = LanguageModel(random_network(model_type, **extra), eos_token_ids=(2, 7))
    x = assert_scored_as_its_forward(lm, PADDED_PROMPTS, 4)
    assert (lm.causal.findings.caches, lm.causal.findings.pads) == (shares, pads)
    policy = lm.policy()
    scores = policy(PADDED_PROMPTS, 4).token_log_prob(x[0])
    expected = torch.stack([by_hand(policy, p, c) for p, c in zip(PADDED_PROMPTS, x[0], strict=True)])
    trained = [p for p in policy.parameters() if p.requires_grad]
    found, wanted = (torch.autograd.grad(s.sum(), trained, allow_unused=True) for s in (scores, expected))
    for a, b in zip(found, wanted, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


# -- the cost of trying ----------------------------------------------------------------------------------------


def test_a_network_is_tried_once_and_its_copies_are_not(monkeypatch):
    tried = []
    find, holds = own_forward.find, own_forward.holds_padded
    monkeypatch.setattr(own_forward, "find", lambda *args: tried.append("find") or find(*args))
    monkeypatch.setattr(own_forward, "holds_padded", lambda *args: tried.append("padding") or holds(*args))
    lm = LanguageModel(llama_network())
    lm([[1, 2]], 3).sample()
    assert tried == ["find"]
    for model in (lm, lm.policy(), lm.policy(2), lm.policy(2).continued(), lm.packed(), lm):
        model(PROMPTS, 3).sample()
    assert tried == ["find", "padding"]


def test_trying_changes_nothing():
    """Neither the random state, nor the counts of passes, nor the network."""
    lm = LanguageModel(llama_network())
    before = copy.deepcopy(lm.network.state_dict())
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    with count_usage() as usage:
        assert lm.causal.shares_prefill(torch.tensor([[0, 1]]))
    assert torch.equal(torch.rand(1), expected)
    assert usage.model_calls == 0
    assert all(torch.equal(before[k], v) for k, v in lm.network.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_no_reason_to_read_whole_texts(dtype):
    for network in (llama_network(), random_network("gemma2", query_pre_attn_scalar=8), random_network("gpt2")):
        causal = CausalNetwork(network.to(dtype).eval())
        assert causal.findings.caches
        assert causal.shares_prefill(torch.tensor([[0, 1]]))


def test_a_network_of_nothing_but_its_context(tmp_path):
    """A context of two tokens, and one of one, leave little to try."""
    for length in (1, 2, 3):
        lm = LanguageModel(llama_network(max_position_embeddings=length))
        assert lm.causal.context_length == length
        if length > 1:
            assert_scored_as_its_forward(lm, [[1]], 1)


# -- where longer texts change the scores of their beginning ---------------------------------------------------


TINY = {
    "vocab_size": 20,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "max_position_embeddings": 64,
}
ROPE = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [9.0] * 4, "rope_theta": 1e4}
LONGER = {
    "longrope": lambda: Phi3ForCausalLM(
        Phi3Config(
            **TINY,
            rope_parameters=ROPE | {"original_max_position_embeddings": 12},
            original_max_position_embeddings=12,
        )
    ),
    "few kept": lambda: DogeForCausalLM(DogeConfig(**TINY, keep_window_size=12)),
}


@pytest.mark.parametrize("kind", LONGER)
def test_texts_end_where_longer_ones_have_no_one_distribution(kind):
    """The network's own scores of some tokens of 16 are others than of fewer; texts of 12 are right."""
    torch.manual_seed(0)
    network = LONGER[kind]().eval()
    with torch.no_grad():
        for p in network.parameters():
            p.mul_(3.0)
            if p.ndim == 1 and not p.any():
                p.normal_()  # what Doge's masks are chosen by
        ids = torch.randint(3, 20, (1, 16))
        whole = network(input_ids=ids).logits
        changes = [(whole[:, :n] - network(input_ids=ids[:, :n]).logits).abs().max() for n in (8, 13, 14, 15)]
    assert max(changes) > 1e-2
    lm = LanguageModel(network)
    assert_scored_as_its_forward(lm, [[1, 3, 4, 5], [6], [7, 8]], 8)
    with pytest.raises(ValueError, match=r"prompts\[0\] has 4 tokens, and the model's context has room for 3 "):
        lm([[1, 3, 4, 5]], 9)
