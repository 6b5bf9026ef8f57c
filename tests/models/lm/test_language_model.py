"""Prompts of every kind, special tokens, and texts."""

import copy
import warnings

import numpy as np
import pyro
import pytest
import torch
from support.models import llama_network, tiny_llama
from support.oracles import assert_same_distribution
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from bayeslm.models import LanguageModel

PROMPTS = [[1, 2, 3], [4]]
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}{% if add_generation_prompt %}a{% endif %}"
)


def chat_model():
    lm = tiny_llama()
    lm.tokenizer.chat_template = TEMPLATE
    return lm


# -- prompts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompts", "shape"),
    [
        (["a b c", "d"], (2,)),
        (("a b c", "d"), (2,)),
        ([[1, 2, 3], (4,)], (2,)),
        ([torch.tensor([1, 2, 3]), np.array([4])], (2,)),
        ([[{"role": "b", "content": "c"}], "d"], (2,)),
        (np.array(["a b c", "d"]), (2,)),
        (np.array([["a b c", "d"], ["d", "a b c"]], dtype=object), (2, 2)),
        (torch.tensor([[1, 2, 3], [4, 5, 6]]), (2,)),
        (np.array([[1, 2, 3], [4, 5, 6]]), (2,)),
    ],
)
def test_prompts_of_every_kind(prompts, shape):
    lm = chat_model()
    lm.tokenizer.chat_template = "a b c"
    dist = lm(prompts, max_new_tokens=2)
    assert dist.batch_shape == shape
    first = dist.prompt_ids.reshape(-1, dist.prompt_ids.shape[-1])[0]
    assert first.tolist() == [1, 2, 3]
    value = dist.sample()
    assert value.shape == (*shape, 2)
    torch.testing.assert_close(
        dist.log_prob(value).reshape(-1)[:1], lm([[1, 2, 3]], 2).log_prob(value.reshape(-1, 2)[:1]), atol=1e-5, rtol=0
    )


def test_prompts_are_padded_on_the_left():
    dist = tiny_llama()(["a b c", "d"], 2)
    assert dist.prompt_mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert dist.prompt_ids[1, 2] == 4
    assert dist.prompt_texts() == ["a b c", "d"]
    assert tiny_llama()(["a b", "d c"], 2).prompt_mask is None


def test_a_chat_goes_through_the_template():
    dist = chat_model()([[{"role": "b", "content": "c d"}, {"role": "e", "content": "f"}]], 2)
    assert dist.prompt_texts() == ["b c d e f a"]


def test_an_empty_prompt_is_the_beginning_of_a_text():
    lm = tiny_llama()
    assert lm(["", []], 2).prompt_ids.tolist() == [[0], [0]]
    network = llama_network(bos_token_id=None)
    with pytest.raises(ValueError, match=r"prompts\[1\] is empty, and the model has no BOS"):
        LanguageModel(network)([[1], []], 2)


@pytest.mark.parametrize(
    ("prompts", "error", "match"),
    [
        ([], ValueError, "prompts is empty"),
        (np.array([], dtype=object), ValueError, "prompts is empty"),
        ("a b", TypeError, r"got one string: write \['a b'\]"),
        ([1, 2, 3], TypeError, r"prompts\[0\] is 1: .*goes into a list"),
        (torch.tensor([1, 2]), TypeError, r"prompts\[0\] is tensor\(1\): .*goes into a list"),
        ([{"role": "user", "content": "a"}], TypeError, r"prompts\[0\] is \{'role'.*goes into a list"),
        ([[1], [1.5]], TypeError, r"prompts\[1\] is \[1\.5\]"),
        (3, TypeError, "prompts must be a list of prompts, got 3"),
        ({"prompt": ["a"]}, TypeError, "prompts must be a list of prompts, got a table"),
        ([[1], None], TypeError, r"prompts\[1\] is None"),
        ([[1], [8]], ValueError, r"prompts\[1\] holds token ids outside 0\.\.7"),
        ([[-1]], ValueError, r"prompts\[0\] holds token ids outside"),
        ([[1], [1] * 60], ValueError, r"prompts\[1\] has 60 tokens, and the model's context has room for 54 "),
        ([[{"role": "b", "content": "c"}]], TypeError, r"prompts\[0\] is a chat, .*no chat template"),
    ],
)
def test_prompts_that_are_refused(prompts, error, match):
    with pytest.raises(error, match=match):
        tiny_llama()(prompts, max_new_tokens=10)


def test_prompt_and_completion_may_fill_the_context():
    dist = tiny_llama()([[1] * 54], max_new_tokens=10)
    assert torch.isfinite(dist.log_prob(dist.sample()))


def test_without_a_tokenizer_prompts_are_ids():
    lm = LanguageModel(llama_network())
    dist = lm([[1, 2], [3]], 2)
    assert dist.prompt_texts() == ["1 2", "3"]
    with pytest.raises(TypeError, match=r"prompts\[1\] is a string, and this LanguageModel has no tokenizer"):
        lm([[1], "a"], 2)
    with pytest.raises(TypeError, match="no tokenizer to decode with"):
        lm.decode(dist.sample())


# -- special tokens ------------------------------------------------------------------------------------------


def test_special_tokens_are_found():
    lm = tiny_llama()
    assert (lm.eos_token_ids, lm.bos_token_id, lm.pad_token_id) == ((0,), 0, 0)
    bare = llama_network(eos_token_id=[5, 3], bos_token_id=2)
    lm = LanguageModel(bare)
    assert (lm.eos_token_ids, lm.bos_token_id, lm.pad_token_id) == ((3, 5), 2, 3)
    bare.generation_config.eos_token_id = 6  # goes before the config
    assert LanguageModel(bare).eos_token_ids == (6,)
    assert LanguageModel(bare, eos_token_ids=4, pad_token_id=7).eos_token_ids == (4,)
    assert LanguageModel(bare, eos_token_ids=[]).eos_token_ids == ()


def test_an_end_outside_the_vocabulary_ends_nothing():
    """GPT2Config has 50256 for any vocabulary; one that a user gives is refused."""
    network = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2))
    assert LanguageModel(network).eos_token_ids == ()
    with pytest.raises(ValueError, match=r"eos_token_ids \[20\] are not all in 0\.\.19"):
        LanguageModel(network, eos_token_ids=20)


def test_batch_size_is_positive():
    for name in ("batch_size", "micro_batch_size"):
        with pytest.raises(ValueError, match=f": {name} must be a positive whole number"):
            tiny_llama(**{name: 0})


def test_a_prior_is_frozen_and_in_evaluation_mode():
    network = llama_network(attention_dropout=0.5).train()
    lm = LanguageModel(network)
    assert not any(module.training for module in lm.network.modules())
    assert not any(p.requires_grad for p in lm.parameters())
    dist = lm([[1, 2]], 3)
    x = dist.sample()
    assert torch.equal(dist.log_prob(x.clone()), dist.log_prob(x.clone()))


# -- texts ---------------------------------------------------------------------------------------------------


def test_decode():
    lm = tiny_llama(eos_token_ids=(0, 3))
    values = torch.tensor([[[1, 2, 4], [1, 0, 0]], [[3, 0, 0], [0, 0, 0]], [[5, 6, 3], [7, 7, 7]]])
    texts = lm.decode(values)
    assert texts.dtype == object
    assert texts.tolist() == [["a b d", "a"], ["", ""], ["e f", "g g g"]]
    assert lm.decode(values[0, 0]).shape == ()
    assert lm.decode(values[0, 0]).item() == "a b d"
    assert lm(["a"], 3).decode(values[0]).tolist() == ["a b d", "a"]


def test_decode_drops_special_tokens_and_malformed_ids():
    lm = tiny_llama(eos_token_ids=(3,))
    assert lm.decode(torch.tensor([[1, 0, 2, 3], [1, -5, 99, 2]])).tolist() == ["a b", "a b"]


# -- a torch module ------------------------------------------------------------------------------------------


def test_copies_are_independent():
    lm = tiny_llama()
    dist = lm(PROMPTS, 3)
    twin = copy.deepcopy(lm)
    assert_same_distribution(lm, twin)
    assert twin.tokenizer is lm.tokenizer
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    x = torch.tensor([[1, 2, 3], [4, 5, 6]])
    torch.testing.assert_close(twin(PROMPTS, 3).log_prob(x), torch.full((2,), 3 * np.log(1 / 8), dtype=torch.float32))
    assert not torch.allclose(dist.log_prob(x), twin(PROMPTS, 3).log_prob(x))


def test_parameters_are_counted_once_and_known_to_pyro():
    policy = tiny_llama().policy(lora_rank=2)
    assert policy.device == torch.device("cpu")  # finds body and head, which are no submodules of their own
    assert set(policy.state_dict()) == {f"network.{name}" for name in policy.network.state_dict()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a frozen weight is no mistake
        pyro.module("policy", policy)
    assert len(pyro.get_param_store()) == sum(p.requires_grad for p in policy.parameters())


def test_any_module_with_the_call_convention():
    """A network that is no `PreTrainedModel` and has no head to take apart."""

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = llama_network()
            self.config = self.inner.config

        def forward(self, input_ids, attention_mask=None, position_ids=None, past_key_values=None, use_cache=True):
            return self.inner(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
            )

    assert_same_distribution(LanguageModel(Wrapped()), tiny_llama())


@pytest.mark.parametrize("prompt", ["a \udc80", "\ud83d", [{"role": "user", "content": "b \ud800"}]])
def test_half_a_character_in_a_prompt_is_named(prompt):
    lm = tiny_llama()
    lm.tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(ValueError, match=r"prompts\[1\] holds the lone surrogate '.ud"):
        lm(["a", prompt])
