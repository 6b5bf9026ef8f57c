"""A real model: SmolLM2-135M-Instruct against transformers' own forward pass, generation and chat template."""

import pytest
import torch
from support.oracles import all_by_hand

from bayeslm.models import LanguageModel
from bayeslm.models.lm.network import CausalNetwork
from bayeslm.models.lm.usage import count_usage

PROMPTS = ["My dinner at the restaurant was", "Yes", "The capital of France is"]
TOKENS = 5


@pytest.fixture(scope="module")
def ids(smollm2):
    return [smollm2.tokenizer(prompt)["input_ids"] for prompt in PROMPTS]


def test_agrees_with_transformers(smollm2, ids):
    """Sampled and scored, padded and not, to 1e-4 a token; drawn with one prefill of the three prompts."""
    dist = smollm2(PROMPTS, max_new_tokens=TOKENS)
    assert dist.prompt_mask is not None
    with count_usage() as usage:
        x = dist.sample((2,))
    assert usage.model_calls == TOKENS
    assert usage.tokens == 3 * max(map(len, ids)) + 6 * (TOKENS - 1)
    with torch.no_grad():
        expected = all_by_hand(smollm2, ids, x)
    torch.testing.assert_close(dist.token_log_prob(x), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(smollm2(PROMPTS, TOKENS).token_log_prob(x), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(smollm2.packed()(PROMPTS, TOKENS).token_log_prob(x), expected, atol=1e-4, rtol=0)
    alone = smollm2(PROMPTS[:1], TOKENS)
    assert alone.prompt_mask is None
    torch.testing.assert_close(alone.token_log_prob(x[:, 0]), expected[:, 0], atol=1e-4, rtol=0)


def test_at_temperature_zero_it_is_greedy_search(smollm2):
    texts = smollm2.decode(smollm2(PROMPTS, TOKENS, temperature=1e-4).sample())
    for prompt, text in zip(PROMPTS, texts, strict=True):
        inputs = smollm2.tokenizer(prompt, return_tensors="pt")
        whole = smollm2.network.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
        assert text == smollm2.tokenizer.decode(whole[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert "Paris" in texts[2]


def test_chats_are_those_of_the_template(smollm2):
    chat = [{"role": "user", "content": "Say hello."}]
    dist = smollm2([chat], max_new_tokens=TOKENS)
    expected = smollm2.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert dist.prompt_ids[0].tolist() == list(expected)
    assert "Say hello." in dist.prompt_texts()[0]


def test_special_tokens_and_texts(smollm2):
    assert smollm2.eos_token_ids == (smollm2.tokenizer.convert_tokens_to_ids("<|im_end|>"),)
    assert smollm2([""], 2).prompt_ids.tolist() == [[smollm2.bos_token_id]]
    text = "Hello , world!  Naïve “quotes”, 漢字 🙂\n\ttabs"
    value = smollm2.tokenizer(text, return_tensors="pt")["input_ids"]
    assert smollm2.decode(value).tolist() == [text]
    with pytest.raises(ValueError, match=r"prompts\[1\] has 9000 tokens, .* room for 8187"):
        smollm2([[1], [1] * 9000], max_new_tokens=TOKENS)


def test_the_head_is_apart_and_batches_are_bounded(smollm2):
    causal = smollm2.causal
    assert causal.head is smollm2.network.lm_head
    assert causal.cached_numbers == 2 * 30 * 3 * 64
    assert 50 < causal.batches(60, 40).decoding < causal.batches(6, 4).decoding


@pytest.mark.long
def test_lora(smollm2, tmp_path):
    """Begins as the prior, costs the adapters alone in memory and on disk, and finds its base by name."""
    policy = smollm2.policy(lora_rank=4)
    frozen = {p.data_ptr() for p in policy.parameters() if not p.requires_grad}
    assert frozen == {p.data_ptr() for p in smollm2.parameters()}
    x = smollm2(PROMPTS[:1], 4).sample((2,))
    expected = smollm2(PROMPTS[:1], 4).log_prob(x)
    before = policy(PROMPTS[:1], 4).log_prob(x)
    torch.testing.assert_close(before, expected, atol=1e-4, rtol=0)
    before.sum().backward()
    with torch.no_grad():
        for p in policy.parameters():
            if p.requires_grad:
                p.add_(p.grad, alpha=1e-3)
    after = policy(PROMPTS[:1], 4).log_prob(x).detach()
    assert (after > before).all()
    torch.testing.assert_close(smollm2(PROMPTS[:1], 4).log_prob(x), expected)
    policy.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 10e6
    loaded = LanguageModel.from_pretrained(tmp_path)
    assert loaded.name == "smollm2"
    assert CausalNetwork(loaded.network).head is not None
    torch.testing.assert_close(loaded(PROMPTS[:1], 4).log_prob(x), after, atol=1e-4, rtol=0)
