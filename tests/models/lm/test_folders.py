"""Folders of weights that other people wrote: what can be honoured is, and nothing else is imported or allocated."""

from __future__ import annotations

import json
import os
import resource
import sys
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.models import llama_network, table_lm
from transformers import GPT2Config, GPT2LMHeadModel

from bayeslm.models import LanguageModel, rewards
from bayeslm.models.lm.adapter_folders import ADAPTERS
from bayeslm.models.lm.adapter_folders import REFUSED as REFUSED_KINDS

PROMPT, COMPLETION = [5, 6], [3, 4, 1, 0]
KINDS: dict[str, Any] = {
    "LORA": peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"]),
    "LORA, weight-decomposed": peft.LoraConfig(r=4, target_modules=["q_proj"], use_dora=True, use_rslora=True),
    "LOHA": peft.LoHaConfig(r=4, target_modules=["q_proj"]),
    "LOKR": peft.LoKrConfig(r=4, target_modules=["q_proj"]),
    "IA3": peft.IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "OFT": peft.OFTConfig(r=0, oft_block_size=4, target_modules=["q_proj"]),
    "HRA": peft.HRAConfig(r=4, target_modules=["q_proj"]),
    "MISS": peft.MissConfig(r=4, target_modules=["q_proj"]),
    "C3A": peft.C3AConfig(block_size=4, target_modules=["q_proj"]),
    "LN_TUNING": peft.LNTuningConfig(target_modules=["input_layernorm"]),
    "LORA, all biases": peft.LoraConfig(r=4, target_modules=["q_proj"], bias="all"),
    "LORA, biases of its layers": peft.LoraConfig(r=4, target_modules=["q_proj"], bias="lora_only"),
    "ADALORA": peft.AdaLoraConfig(target_modules=["q_proj"], init_r=4, target_r=2, total_step=10, bias="all"),
    "VERA": peft.VeraConfig(r=4, target_modules=["q_proj"], projection_prng_key=3, d_initial=0.2, bias="vera_only"),
}
MORE: dict[str, Any] = {  # tested once in a while
    "ADAMSS": peft.AdamssConfig(target_modules=["q_proj"], num_subspaces=4, subspace_rank=2, random_seed=3),
    "PVERA": peft.PveraConfig(r=4, target_modules=["q_proj"], projection_prng_key=3),
    "FROD": peft.FrodConfig(target_modules=["q_proj"], projection_prng_key=3, sparse_rate=0.02),
    "FOURIERFT": peft.FourierFTConfig(n_frequency=20, target_modules=["q_proj"], random_loc_seed=3, scaling=90.0),
    "WAVEFT": peft.WaveFTConfig(n_frequency=20, target_modules=["q_proj"], random_loc_seed=3, use_idwt=False),
    "GLORA": peft.GloraConfig(r=4, target_modules=["down_proj"]),
    "GRALORA": peft.GraloraConfig(r=4, target_modules=["q_proj"], gralora_k=4, hybrid_r=2),
    "VBLORA": peft.VBLoRAConfig(r=2, target_modules=["q_proj"], num_vectors=16, vector_length=4, topk=3),
    "UNILORA": peft.UniLoraConfig(r=4, target_modules=["q_proj"], proj_seed=3, theta_d_length=64),
    "RANDLORA": peft.RandLoraConfig(r=4, target_modules=["q_proj"], projection_prng_key=3, randlora_alpha=300),
    "TINYLORA": peft.TinyLoraConfig(r=2, target_modules=["q_proj"], u=16, projection_seed=3),
    "DELORA": peft.DeloraConfig(r=4, target_modules=["q_proj"], delora_lambda=5),
    "HIRA": peft.HiraConfig(r=4, target_modules=["q_proj"]),
    "ROAD": peft.RoadConfig(target_modules=["q_proj"], group_size=8, variant="road_2"),
    "SHIRA": peft.ShiraConfig(r=4, target_modules=["q_proj"], random_seed=3),
    "TRAINABLE_TOKENS": peft.TrainableTokensConfig(token_indices=[3, 4], target_modules=["embed_tokens"]),
    "OSF": peft.OSFConfig(target_modules=["q_proj"]),
    "PSOFT": peft.PsoftConfig(r=4, target_modules=["q_proj"], psoft_alpha=8),
    "PEANUT": peft.PeanutConfig(r=4, target_modules=["q_proj"], act_fn="tanh", scaling=0.5, depth=2),
    "SUPERTUNING": peft.SupertuningConfig(target_modules=["q_proj"], sparsity=0.9, select_top=False),
    "DEFT": peft.DeftConfig(r=4, target_modules=["q_proj"]),
}


def network() -> Any:
    return llama_network(attention_bias=True)


def score(network: Any) -> float:
    """The log-probability of `COMPLETION` by the network's own forward pass."""
    with torch.no_grad():
        logits = network(input_ids=torch.tensor([PROMPT + COMPLETION])).logits.log_softmax(-1)
    own = logits[0, len(PROMPT) - 1 : -1].gather(-1, torch.tensor(COMPLETION)[:, None])
    return float(own.sum())


def log_prob(lm: LanguageModel) -> float:
    return float(lm([PROMPT], max_new_tokens=len(COMPLETION)).log_prob(torch.tensor([COMPLETION])))


def adapter(folder: Path, config: Any) -> float:
    """Write an adapter with random weights, and return the score of its own forward pass."""
    config.task_type = "CAUSAL_LM"
    adapted: Any = peft.get_peft_model(network(), config).eval()
    torch.manual_seed(1)
    for name, p in adapted.named_parameters():
        if adapted.base_model.prefix in name or p.requires_grad:
            p.data += 0.3 * torch.randn_like(p)
    adapted.save_pretrained(folder)
    return score(adapted)


def change(path: Path, **settings: Any) -> None:
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | settings))


@pytest.fixture
def small() -> Iterator[None]:
    """Fail a test that takes over 300 MB."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000


# -- adapters ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*KINDS, *(pytest.param(kind, marks=pytest.mark.long) for kind in MORE)])
def test_adapters_score_as_they_themselves_do(tmp_path: Path, kind: str) -> None:
    """Loaded, merged, copied, trained and saved again; around a prior, which stays what it was."""
    own = adapter(tmp_path / "first", (KINDS | MORE)[kind])
    prior = LanguageModel(network())
    before = log_prob(prior)
    policy = LanguageModel.from_pretrained(tmp_path / "first", base=prior)
    copy = policy.continued()
    copy.save_pretrained(tmp_path / "second")
    again = LanguageModel.from_pretrained(tmp_path / "second", base=prior)
    assert abs(own - before) > 1e-3 or kind == "LN_TUNING"
    assert [log_prob(lm) for lm in (policy, policy.packed(), again)] == pytest.approx([own] * 3, abs=1e-5)
    copy([PROMPT], max_new_tokens=4).log_prob(torch.tensor([COMPLETION])).sum().backward()
    trained = [p for p in copy.parameters() if p.requires_grad]
    assert trained
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained)
    with torch.no_grad():
        for p in trained:
            p += 0.05 * p.grad.sign()
    after = score(copy.network)
    assert abs(after - own) > 1e-3
    assert [log_prob(lm) for lm in (copy, copy.merged())] == pytest.approx([after] * 2, abs=1e-4)
    assert [log_prob(lm) for lm in (prior, policy)] == pytest.approx([before, own], abs=1e-5)


def test_every_supported_kind_is_tested() -> None:
    assert {kind.partition(",")[0] for kind in KINDS | MORE} == set(ADAPTERS)
    assert {kind.value for kind in peft.PeftType} == {*ADAPTERS, *REFUSED_KINDS}


@pytest.mark.parametrize("kind", [*REFUSED_KINDS, "lora", "EVIL", None, ["LORA"], {"a": 1}])
def test_other_kinds_are_refused_by_name(tmp_path: Path, kind: Any) -> None:
    change(tmp_path / "adapter_config.json", peft_type=kind)
    with pytest.raises(ValueError, match=r"adapters of type .* are not supported.*, but LORA") as caught:
        LanguageModel.from_pretrained(tmp_path, base=LanguageModel(network()))
    reason = f" ({REFUSED_KINDS[kind]})" if isinstance(kind, str) and kind in REFUSED_KINDS else ""
    assert f"{kind!r} are not supported{reason}, but" in str(caught.value)


REFUSED = {
    "megatron_core": "megatron.evil",
    "megatron_config": {"tensor_model_parallel_size": 1},
    "layer_replication": [[0, 1000000]],
    "alora_invocation_tokens": [1],
    "arrow_config": {"top_k": 1},
    "from_a_later_version": "evil",
    "init_lora_weights": "pissa_niter_4",
    "task_type": "SEQ_CLS",
}


@pytest.mark.parametrize("name", REFUSED)
def test_settings_that_change_the_base_or_run_code_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / "megatron").mkdir()
    adapter(tmp_path / "megatron", KINDS["LORA"])
    (tmp_path / "megatron" / "evil.py").write_text("raise SystemExit('run')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    config = tmp_path / "megatron" / "adapter_config.json"
    change(config, **{name: REFUSED[name]}, **({"megatron_config": {"a": 1}} if name == "megatron_core" else {}))
    with pytest.raises(ValueError, match=f"adapter_config.json: {name}" if "megatron" not in name else "megatron_co"):
        LanguageModel.from_pretrained("megatron", base=LanguageModel(network()))
    assert not [module for module in sys.modules if module.startswith("megatron")]


@pytest.mark.parametrize(
    ("kind", "setting"), [("VERA", "save_projection"), ("PSOFT", "psoft_orth"), ("SHIRA", "mask_type")]
)
def test_settings_without_a_value_are_refused_where_the_default_has_one(
    tmp_path: Path, kind: str, setting: str
) -> None:
    """They would be dropped, and the adapter scored by the default."""
    change(tmp_path / "adapter_config.json", peft_type=kind, **{setting: False})
    with pytest.raises(ValueError, match=f"adapter_config.json: {setting} False is not supported"):
        LanguageModel.from_pretrained(tmp_path, base=LanguageModel(network()))


def test_code_that_would_make_the_base_is_ignored(tmp_path: Path) -> None:
    own = adapter(tmp_path, KINDS["LORA"])
    change(
        tmp_path / "adapter_config.json", auto_mapping={"base_model_class": "A", "parent_library": "evil"}, later=None
    )
    policy = LanguageModel.from_pretrained(tmp_path, base=LanguageModel(network()))
    assert log_prob(policy) == pytest.approx(own, abs=1e-5)


def test_an_adapter_is_no_classifier(tmp_path: Path) -> None:
    adapter(tmp_path, KINDS["LORA"])
    with pytest.raises(OSError, match="holds an adapter"):
        rewards.Classifier(tmp_path)


def test_an_adapter_whose_base_is_an_adapter_is_refused(tmp_path: Path) -> None:
    adapter(tmp_path, KINDS["LORA"])
    change(tmp_path / "adapter_config.json", base_model_name_or_path=str(tmp_path))
    with pytest.raises(ValueError, match="is an adapter around the adapter"):
        LanguageModel.from_pretrained(tmp_path)


SIZES = [
    ("LORA", {"r": 10**7}),
    ("LORA", {"r": 10**30}),
    ("LORA", {"r": 1e7}),
    ("LORA", {"r": -5}),
    ("LORA", {"r": "4"}),
    ("LORA", {"rank_pattern": {"q_proj": 10**7}}),
    ("LORA", {"r": 5}),
    ("LOHA", {"r": 10**7}),
    ("HRA", {"r": 10**7}),
    ("MISS", {"r": 10**7}),
    ("C3A", {"block_size": 10**7}),
]


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(("kind", "settings"), SIZES)
def test_an_adapter_of_another_size_than_its_weights(tmp_path: Path, kind: str, settings: dict[str, Any]) -> None:
    adapter(tmp_path, KINDS[kind])
    change(tmp_path / "adapter_config.json", **settings)
    with pytest.raises(ValueError, match=str(tmp_path)):
        LanguageModel.from_pretrained(tmp_path, base=LanguageModel(network()))


def _without_weights(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()


def _lacks_one(folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors.pop(next(iter(tensors)))
    save_file(tensors, folder / "adapter_model.safetensors")


def _cut(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _pickled(folder: Path) -> None:
    _without_weights(folder)
    torch.save({"x": Path("code")}, folder / "adapter_model.bin")


@pytest.mark.parametrize("damage", [_without_weights, _lacks_one, _cut, _pickled])
def test_damaged_adapters_are_named(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    adapter(tmp_path, KINDS["LORA"])
    damage(tmp_path)
    with pytest.raises((ValueError, OSError), match=str(tmp_path)):
        LanguageModel.from_pretrained(tmp_path, base=LanguageModel(network()))


def test_weights_of_the_base_in_an_adapter_leave_the_prior_alone(tmp_path: Path) -> None:
    adapter(tmp_path, KINDS["LORA"])
    path = tmp_path / "adapter_model.safetensors"
    extra = {"base_model.model.model.norm.weight": torch.zeros(32)}
    save_file(load_file(path) | extra, path)
    prior = LanguageModel(network())
    before = log_prob(prior)
    LanguageModel.from_pretrained(tmp_path, base=prior)
    assert log_prob(prior) == before


# -- models --------------------------------------------------------------------------------------------------


def llama(folder: Path) -> None:
    LanguageModel(llama_network()).save_pretrained(folder)


def gpt2(folder: Path) -> None:
    config = GPT2Config(vocab_size=8, n_embd=16, n_layer=1, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(folder)


def table(folder: Path) -> None:
    table_lm().save_pretrained(folder)


CONFIGS: list[tuple[Callable[[Path], None], dict[str, Any]]] = [
    (llama, {"hidden_size": 10**9}),
    (llama, {"hidden_size": 20000}),
    (llama, {"vocab_size": 10**8}),
    (llama, {"vocab_size": 10**20}),
    (llama, {"num_hidden_layers": 10**9}),
    (llama, {"num_attention_heads": 10**9}),
    (llama, {"intermediate_size": 10**8}),
    (llama, {"head_dim": 10**7}),
    (gpt2, {"n_positions": 10**6}),
    (gpt2, {"n_embd": 20000}),
    (table, {"order": 10**9}),
    (llama, {"max_position_embeddings": 10**30}),
    (llama, {"attn_implementation": "someone/kernels@main"}),
]


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(("save", "settings"), CONFIGS)
def test_a_config_that_asks_for_more_than_the_weights(
    tmp_path: Path, save: Callable[[Path], None], settings: dict[str, Any]
) -> None:
    save(tmp_path / "model")
    LanguageModel.from_pretrained(tmp_path / "model")
    change(tmp_path / "model" / "config.json", **settings)
    with pytest.raises(OSError, match=r"model' holds no model .*(config\.json|over 2\^40 numbers)"):
        LanguageModel.from_pretrained(tmp_path / "model")


def _header(folder: Path, header: bytes, length: int | None = None) -> None:
    (folder / "model.safetensors").write_bytes(
        (len(header) if length is None else length).to_bytes(8, "little") + header
    )


def _bomb(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with zipfile.ZipFile(folder / "pytorch_model.bin", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("data/0", bytes(10**7))


def _sparse(folder: Path, name: str) -> None:
    with (folder / name).open("ab") as file:
        file.truncate(2**43)


def _pipe(folder: Path, name: str) -> None:
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)


def _endless(folder: Path, name: str) -> None:
    """Of no size by the system, and without an end when it is read."""
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to("/dev/zero")


DAMAGE: dict[str, Callable[[Path], None]] = {
    "header beyond the file": lambda folder: _header(folder, b"{}", 2**60),
    "tensor beyond the file": lambda folder: _header(
        folder, b'{"x": {"dtype": "F32", "shape": [1000000, 1000000], "data_offsets": [0, 4]}}'
    ),
    "header of another kind": lambda folder: _header(folder, b'{"x": [1, 2]}'),
    "deep header": lambda folder: _header(folder, b"[" * 100_000),
    "packed pickle": _bomb,
    "huge weights": lambda folder: _sparse(folder, "model.safetensors"),
    "huge tokenizer": lambda folder: _sparse(folder, "tokenizer.json"),
    "huge config": lambda folder: _sparse(folder, "config.json"),
    "deep config": lambda folder: (folder / "config.json").write_text('{"a": ' * 50_000),
    "list": lambda folder: (folder / "config.json").write_text("[]"),
    **{f"{name}, a pipe": partial(_pipe, name=name) for name in ("config.json", "tokenizer.json", "model.safetensors")},
    **{f"{name}, endless": partial(_endless, name=name) for name in ("config.json", "tokenizer.json")},
}


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_folder_is_one_line(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    table(tmp_path / "model")
    damage(tmp_path / "model")
    with pytest.raises(OSError, match=r"^the folder .*model' holds no model that transformers can load: .*/model/"):
        LanguageModel.from_pretrained(tmp_path / "model")


@pytest.mark.parametrize("layers", [0, 1, -1])
def test_weights_that_have_no_place_are_said(tmp_path: Path, layers: int) -> None:
    """A config of fewer layers describes another network, which would be used without a word."""
    LanguageModel(llama_network(num_hidden_layers=2)).save_pretrained(tmp_path / "model")
    (tmp_path / "model/SHA256SUMS").unlink()
    change(tmp_path / "model" / "config.json", num_hidden_layers=layers)
    with pytest.warns(UserWarning, match=r"has no place, and which are not used: model\.layers\..* and \d+ more"):
        LanguageModel.from_pretrained(tmp_path / "model")


@pytest.mark.parametrize("value", ["x", [], {}, {"__type": "AddedToken", "content": "evil"}])
def test_a_limit_of_a_tokenizer_that_is_no_number(tmp_path: Path, value: Any) -> None:
    table(tmp_path / "model")
    (tmp_path / "model/SHA256SUMS").unlink()
    change(tmp_path / "model" / "tokenizer_config.json", model_max_length=value)
    with pytest.raises(OSError, match=r"model' holds a part of a tokenizer, .*model_max_length is"):
        LanguageModel.from_pretrained(tmp_path / "model")
