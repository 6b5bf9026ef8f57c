"""Saved models in plain PEFT and transformers: they load by the folder alone, and score as ours do."""

import json
import os

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from support.models import llama_network, tiny_llama
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from bayeslm.models import LanguageModel
from bayeslm.models.lm import loading
from bayeslm.models.lm.adapters import own_parameters

PROMPT, COMPLETIONS = [1, 2, 3], [[1, 4, 3], [5, 6, 2], [7, 7, 7]]


def disturbed(policy, scale=0.2):
    with torch.no_grad():
        for p in own_parameters(policy.network):
            p.add_(scale * torch.randn_like(p))
    return policy


def ours(lm, prompt=PROMPT, completions=COMPLETIONS):
    with torch.no_grad():
        return lm([prompt] * len(completions), len(completions[0])).log_prob(torch.tensor(completions))


def theirs(network, prompt=PROMPT, completions=COMPLETIONS):
    """Log-probabilities by nothing but the network's own forward pass."""
    ids = torch.tensor([prompt + completion for completion in completions])
    with torch.no_grad():
        scores = network(input_ids=ids).logits.float().log_softmax(-1)[:, len(prompt) - 1 : -1]
    return scores.gather(-1, ids[:, len(prompt) :, None]).sum((1, 2))


def assert_equal_elsewhere(lm, network, atol=1e-5, **where):
    torch.testing.assert_close(theirs(network.eval(), **where), ours(lm, **where), atol=atol, rtol=0)


@pytest.fixture
def base(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def on_the_hub(base):
    """As in the cache of the hub's files."""
    snapshot = base.parent / "models--someone--tiny" / "snapshots" / ("a" * 40)
    snapshot.parent.mkdir(parents=True)
    base.rename(snapshot)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("a" * 40)
    return {"cache_dir": str(base.parent), "local_files_only": True}


def test_an_adapter_on_a_hub_model_names_it(base, tmp_path):
    where = on_the_hub(base)
    policy = disturbed(LanguageModel.from_pretrained("someone/tiny", **where).policy(2))
    policy.save_pretrained(tmp_path / "policy")
    assert_equal_elsewhere(policy, AutoPeftModelForCausalLM.from_pretrained(tmp_path / "policy", **where))


def loaded(base):
    return LanguageModel.from_pretrained(base).policy(2)


def loaded_again(base):
    """Loaded, saved, and loaded on another copy of the base, which it then names."""
    loaded(base).save_pretrained(base.parent / "first")
    copy = LanguageModel.from_pretrained(base)
    copy.save_pretrained(base.parent / "copy")
    again = LanguageModel.from_pretrained(
        base.parent / "first", base=LanguageModel.from_pretrained(base.parent / "copy")
    ).continued()
    for file in base.glob("model*"):
        file.unlink()
    return again


def of_another_name(base):
    network = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=2), adapter_name="mine")
    return LanguageModel(network)


MADE = {
    "loaded": loaded,
    "continued": lambda base: loaded(base).continued(),
    "a relative folder": lambda base: LanguageModel.from_pretrained(os.path.relpath(base)).policy(2),
    "a subfolder": lambda base: LanguageModel.from_pretrained(base.parent, subfolder=base.name).policy(2),
    "loaded again": loaded_again,
    "another name": of_another_name,
}


@pytest.mark.parametrize("made", MADE)
def test_an_adapter_loads_in_plain_peft_by_its_folder_alone(base, tmp_path, monkeypatch, made):
    policy = disturbed(MADE[made](base))
    policy.save_pretrained(tmp_path / "policy")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    network = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "policy")
    assert (ours(policy) - ours(tiny_llama())).abs().max() > 0.01
    assert_equal_elsewhere(policy, network)
    assert_equal_elsewhere(policy, network.merge_and_unload())


def test_what_a_policy_is_used_with_stands_beside_it(base, tmp_path):
    lm = LanguageModel.from_pretrained(base, eos_token_ids=(3, 5), pad_token_id=6)
    lm.tokenizer.chat_template = "{{ messages[0].content }}"
    network = lm.network
    for policy in (lm.policy(2), lm.policy(), lm.policy(2).merged()):
        path = tmp_path / str(policy.has_adapters) / str(policy.name)
        policy.save_pretrained(path)
        config = GenerationConfig.from_pretrained(path)
        assert (config.eos_token_id, config.pad_token_id) == ([3, 5], 6)
        tokenizer = AutoTokenizer.from_pretrained(path)
        assert tokenizer("a b")["input_ids"] == lm.encode_prompts(["a b"]).ids[0].tolist()
        assert tokenizer.apply_chat_template([{"role": "user", "content": "c"}], tokenize=False) == "c"
    assert network.generation_config.eos_token_id == 0  # the model's own config is as it was


@pytest.mark.parametrize("change", ["fitted", "merged", "an object"])
def test_a_base_that_is_stored_nowhere_is_not_named(base, tmp_path, change):
    """Plain PEFT refuses to guess; the network in memory, or a merged export, is what there is."""
    lm = LanguageModel.from_pretrained(base)
    if change == "fitted":
        lm.fit(["a b c"], num_steps=2, progress=False)
    elif change == "merged":
        lm = disturbed(lm.policy(2))
    else:
        lm = LanguageModel(llama_network(), lm.tokenizer)
    policy = disturbed(lm.policy(2))
    policy.save_pretrained(tmp_path / "policy")
    assert not json.loads((tmp_path / "policy" / "adapter_config.json").read_text())["base_model_name_or_path"]
    under = lm.merged().network if change == "merged" else lm.network
    assert_equal_elsewhere(policy, PeftModel.from_pretrained(under, tmp_path / "policy"))
    policy.merged().save_pretrained(tmp_path / "merged")
    assert_equal_elsewhere(policy, AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))


# -- merged exports --------------------------------------------------------------------------------------------


def test_a_merged_export_loads_in_plain_transformers(base, tmp_path):
    policy = disturbed(loaded(base))
    policy.merged().save_pretrained(tmp_path / "merged")
    network = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert_equal_elsewhere(policy, network)
    assert not hasattr(network, "peft_config")


@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16, torch.float16])
def test_merged_weights_are_rounded_once(base, tmp_path, base_dtype, dtype):
    """Right is the float32 sum, rounded; a small adapter is lost where it is added to bfloat16 weights."""
    prior = LanguageModel.from_pretrained(base, dtype=base_dtype)
    policy = disturbed(prior.policy(2), 0.02)
    merged = policy.merged(dtype)
    assert {p.dtype for p in merged.parameters()} == {dtype or base_dtype}
    name = "model.layers.0.self_attn.q_proj"
    layer = policy.network.get_submodule(f"base_model.model.{name}")
    exact = layer.base_layer.weight.float() + layer.get_delta_weight("default").float()
    if dtype is not None or base_dtype == torch.float32:
        torch.testing.assert_close(merged.network.get_submodule(name).weight, exact.to(dtype or base_dtype))
    merged.save_pretrained(tmp_path / "merged")
    network = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert network.dtype == (dtype or base_dtype)
    assert torch.equal(network.state_dict()[f"{name}.weight"], merged.network.state_dict()[f"{name}.weight"])
    if (base_dtype, dtype) == (torch.bfloat16, torch.float32):
        assert_equal_elsewhere(LanguageModel.from_pretrained(tmp_path / "merged"), network)


def test_a_bfloat16_policy_of_all_weights_is_exported_as_it_is_scored(base, tmp_path):
    policy = disturbed(LanguageModel.from_pretrained(base, dtype=torch.bfloat16).policy(), 0.05)
    assert policy.compute_dtype == torch.bfloat16
    merged = policy.merged(torch.bfloat16)
    assert merged.compute_dtype is None
    torch.testing.assert_close(ours(merged), ours(policy), atol=1e-5, rtol=0)


def test_a_merged_dtype_is_a_floating_point_type(base):
    with pytest.raises(ValueError, match=r"must be a floating-point type .* got torch\.int8"):
        loaded(base).merged(torch.int8)


# -- weights that a package carries ----------------------------------------------------------------------------


def test_an_adapter_on_packaged_weights_names_their_conversion(tmp_path, monkeypatch):
    """Not a short name, which we alone know, nor the hub's, whose weights are others. Any machine of ours finds it."""
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "tiny.Q4_1.gguf").write_bytes(b"1234")
    tiny_llama().save_pretrained(tmp_path / "cache" / "tiny.Q4_1-4")  # as if converted
    monkeypatch.setenv("BAYESLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(loading, "PACKAGED", {"tiny": ("tiny_package", "tiny-package", "someone/tiny")})
    monkeypatch.setattr(loading, "_package", lambda name: tmp_path / "package")
    policy = disturbed(LanguageModel.from_pretrained("tiny").policy(2))
    policy.save_pretrained(tmp_path / "policy")
    assert_equal_elsewhere(policy, AutoPeftModelForCausalLM.from_pretrained(tmp_path / "policy"))
    (tmp_path / "cache").rename(tmp_path / "other")  # as on a machine with another cache
    monkeypatch.setenv("BAYESLM_CACHE", str(tmp_path / "other"))
    for _ in range(2):
        again = LanguageModel.from_pretrained(tmp_path / "policy")
        assert again.name == "tiny"
        torch.testing.assert_close(ours(again), ours(policy))
        again.save_pretrained(tmp_path / "policy")
        assert_equal_elsewhere(policy, AutoPeftModelForCausalLM.from_pretrained(tmp_path / "policy"))


@pytest.mark.long
def test_smollm2_in_plain_peft_and_transformers(smollm2, tmp_path):
    policy = disturbed(smollm2.policy(4), 0.02)
    policy.save_pretrained(tmp_path / "policy")
    policy.merged().save_pretrained(tmp_path / "merged")
    prompt = smollm2.encode_prompts(["My dinner at the restaurant was"]).ids[0].tolist()
    where = {"prompt": prompt, "completions": policy([prompt] * 8, 5).sample().tolist()}
    assert (ours(policy, **where) - ours(smollm2, **where)).abs().max() > 0.1
    for network in (
        AutoPeftModelForCausalLM.from_pretrained(tmp_path / "policy"),
        AutoModelForCausalLM.from_pretrained(tmp_path / "merged"),
    ):
        same_pass = (theirs(network, **where) - theirs(policy.network, **where)).abs().max() / 5
        difference = (theirs(network, **where) - ours(policy, **where)).abs().max() / 5
        print(f"{type(network).__name__}: {difference:.1e} nats a token, {same_pass:.1e} by the same pass")
        assert same_pass < 1e-5
        assert difference < 5e-5  # rounding of a pass that reads the prompt once: as of SmolLM2 itself
