"""What a model was given by hand survives saving; folders are whole, and have tokenizers of their own."""

import itertools
import json
import os
import random
import resource
import signal
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.chaos import forked
from support.models import llama_network, random_network, tiny_llama
from support.oracles import assert_same_distribution
from support.tokenizers import metaspace
from transformers import GenerationConfig, LlamaConfig, LlamaForSequenceClassification

from bayeslm.files import atomic_folder
from bayeslm.inference import SVI
from bayeslm.models import LanguageModel, TiltedLM, rewards
from bayeslm.models.control import TabularPolicy
from bayeslm.models.lm import word_tokenizer
from bayeslm.posterior import Posterior

BY_HAND = [
    {},
    {"eos_token_ids": (3, 5), "pad_token_id": 6},
    {"eos_token_ids": ()},
    {"pad_token_id": 99},
    {"eos_token_ids": 0, "compute_dtype": torch.bfloat16},
]


def tokens(lm):
    return (lm.eos_token_ids, lm.bos_token_id, lm.pad_token_id, lm.compute_dtype)


def letters(eos="<eos>"):
    return word_tokenizer(["<eos>", *"abcdefg"], eos)


# -- settings ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by_hand", BY_HAND)
@pytest.mark.parametrize("kind", ["network", "policy", pytest.param("adapters", marks=pytest.mark.long)])
def test_what_was_given_by_hand_survives(tmp_path, kind, by_hand):
    lm = tiny_llama(**by_hand)
    lm.save_pretrained(tmp_path / "base")
    if kind != "network":
        lm = LanguageModel.from_pretrained(tmp_path / "base").policy(2 if kind == "adapters" else None)
        lm.save_pretrained(tmp_path / "policy")
    loaded = LanguageModel.from_pretrained(tmp_path / ("base" if kind == "network" else "policy"))
    assert tokens(loaded) == tokens(lm)
    assert_same_distribution(lm, loaded)


def test_an_adapter_keeps_what_its_base_on_disk_does_not_say(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    base = LanguageModel.from_pretrained(tmp_path / "base", eos_token_ids=7, pad_token_id=9, dtype=torch.bfloat16)
    assert tokens(base)[:3] == ((7,), 0, 9)
    base.policy(2).save_pretrained(tmp_path / "adapter")
    loaded = LanguageModel.from_pretrained(tmp_path / "adapter")
    assert (loaded.vocabulary, next(loaded.parameters()).dtype) == (base.vocabulary, torch.bfloat16)
    (tmp_path / "adapter" / "bayeslm.json").unlink()  # then the generation config says the ends
    assert LanguageModel.from_pretrained(tmp_path / "adapter", base=base).vocabulary == base.vocabulary
    assert tokens(LanguageModel.from_pretrained(tmp_path / "adapter"))[:3] == ((7,), 0, 0)
    (tmp_path / "adapter" / "generation_config.json").unlink()  # as in folders of PEFT: the base
    assert LanguageModel.from_pretrained(tmp_path / "adapter", base=base).vocabulary == base.vocabulary
    assert LanguageModel.from_pretrained(tmp_path / "adapter").vocabulary == tiny_llama().vocabulary


def test_a_saved_posterior_keeps_the_ends_of_its_policy(tmp_path):
    lm = tiny_llama(eos_token_ids=7, pad_token_id=5)
    program = TiltedLM(lm, lambda completions: [float(len(text)) for text in completions], max_new_tokens=2)
    posterior = SVI(num_steps=1, num_samples=8, seed=0, progress=False).run(program, ["a"])
    posterior.save(tmp_path / "posterior")
    path = Posterior.load(tmp_path / "posterior").policy_path
    loaded = LanguageModel.from_pretrained(path, base=lm if (path / "adapter_config.json").exists() else None)
    assert tokens(loaded) == tokens(posterior.policy)
    assert_same_distribution(posterior.policy, loaded)


def test_a_later_edit_of_the_config_counts_unless_a_hand_was_there(tmp_path):
    for by_hand, expected in (({}, (4,)), ({"eos_token_ids": 7}, (7,))):
        path = tmp_path / str(expected[0])
        tiny_llama(**by_hand).save_pretrained(path)
        GenerationConfig(eos_token_id=4).save_pretrained(path)
        assert LanguageModel.from_pretrained(path).eos_token_ids == expected
        assert LanguageModel.from_pretrained(path, eos_token_ids=6).eos_token_ids == (6,)


@pytest.mark.parametrize(
    "content", ["[", "[]", '{"eos_token_ids": [1.5]}', '{"pad_token_id": "x"}', '{"compute_dtype": 3}']
)
def test_damaged_settings_are_named(tmp_path, content):
    tiny_llama().save_pretrained(tmp_path)
    (tmp_path / "bayeslm.json").write_text(content)
    with pytest.raises(OSError, match=r"bayeslm\.json (cannot be read|is damaged)"):
        LanguageModel.from_pretrained(tmp_path)


def test_tokenizer_settings_survive(tmp_path):
    lm = LanguageModel(llama_network(vocab_size=len(metaspace())), metaspace(after=True))
    lm.tokenizer.chat_template = "{{ messages[0].content }}"
    lm.tokenizer.model_max_length = 77
    lm.save_pretrained(tmp_path)
    loaded = LanguageModel.from_pretrained(tmp_path)
    for text in ("My food", "My é", ""):
        assert loaded.encode_prompts([text]).ids.tolist() == lm.encode_prompts([text]).ids.tolist()
    assert loaded.decode(torch.tensor([300])).item() == lm.decode(torch.tensor([300])).item()
    assert (loaded.tokenizer.chat_template, loaded.tokenizer.model_max_length) == ("{{ messages[0].content }}", 77)


def test_a_generation_config_that_transformers_does_not_save(tmp_path):
    """Some on the hub have a temperature for sampling that they do not ask for."""
    lm = tiny_llama()
    config = lm.network.generation_config
    config.temperature, config.do_sample, config.eos_token_id = 0.5, False, [3, 4]
    lm = LanguageModel(lm.network, lm.tokenizer)
    lm.save_pretrained(tmp_path)
    assert lm.network.generation_config is config
    assert LanguageModel.from_pretrained(tmp_path).eos_token_ids == (3, 4)


def test_adapters_of_another_name(tmp_path):
    network = get_peft_model(llama_network(), LoraConfig(init_lora_weights=False), adapter_name="mine")
    lm = LanguageModel(network, letters())
    lm.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "mine").exists()
    assert_same_distribution(LanguageModel.from_pretrained(tmp_path / "adapter", base=tiny_llama()), lm)
    network.add_adapter("other", LoraConfig(init_lora_weights=False))
    network.base_model.set_adapter(["mine", "other"])
    with pytest.raises(ValueError, match="2 adapters are active"):
        LanguageModel(network, letters()).save_pretrained(tmp_path / "both")
    assert not (tmp_path / "both").exists()


# -- checksums -------------------------------------------------------------------------------------------------


def fitted(order=2):
    lm = LanguageModel.tabular(["<eos>", "a", "b"], order=order)
    lm.fit(["a b"], num_steps=1, seed=0, progress=False)
    return lm


def classifier(path):
    settings = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    network = LlamaForSequenceClassification(LlamaConfig(**settings, num_attention_heads=2, num_labels=1))
    with atomic_folder(path) as folder:
        network.save_pretrained(folder)
        letters().save_pretrained(folder)


def saver(make):
    return lambda path: make().save_pretrained(path)


SAVED = {  # how one is saved, and loaded
    "network": (saver(tiny_llama), LanguageModel.from_pretrained),
    "policy": (saver(lambda: tiny_llama().policy()), LanguageModel.from_pretrained),
    "adapters": (
        saver(lambda: tiny_llama().policy(2)),
        lambda path: LanguageModel.from_pretrained(path, base=tiny_llama()),
    ),
    "merged": (saver(lambda: tiny_llama().policy(2).merged()), LanguageModel.from_pretrained),
    "fitted": (saver(fitted), LanguageModel.from_pretrained),
    "of an environment": (
        saver(lambda: TabularPolicy.uniform(5, 3)),
        lambda path: TabularPolicy.uniform(5, 3).load_pretrained(path),
    ),
    "classifier": (classifier, rewards.Classifier),
}


@pytest.mark.parametrize("kind", SAVED)
def test_a_flipped_bit_in_tensors_is_refused_by_name(tmp_path, kind):
    """Anywhere in them: the lowest bit of a weight changes scores by less than anybody would see."""
    save, load = SAVED[kind]
    save(tmp_path / "saved")
    (file,) = (tmp_path / "saved").glob("*.safetensors")
    content = file.read_bytes()
    data = len(content) - 8 - int.from_bytes(content[:8], "little")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        load(tmp_path / "saved")
    for place in (1, 2, data // 2, data - 3):
        damaged = bytearray(content)
        damaged[-place] ^= 1 << place % 8
        file.write_bytes(damaged)
        with pytest.raises((ValueError, OSError), match=f"{file.name} is damaged: .* not what was written"):
            load(tmp_path / "saved")
    file.write_bytes(content)
    load(tmp_path / "saved")


def test_weights_of_another_save_are_refused_until_the_checksums_are_removed(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "saved")
    llama_network(seed=1).save_pretrained(tmp_path / "saved")
    with pytest.raises(OSError, match=r"model\.safetensors is damaged.* remove .*SHA256SUMS"):
        LanguageModel.from_pretrained(tmp_path / "saved")
    (tmp_path / "saved" / "SHA256SUMS").unlink()  # as in folders of others
    assert_same_distribution(LanguageModel.from_pretrained(tmp_path / "saved"), tiny_llama(seed=1))


@pytest.mark.parametrize("file", ["config.json", "generation_config.json", "tokenizer_config.json"])
def test_changed_settings_are_used_with_a_warning(tmp_path, file):
    tiny_llama().save_pretrained(tmp_path / "saved")
    path = tmp_path / "saved" / file
    path.write_text(path.read_text() + " ")
    with pytest.warns(UserWarning, match=rf"{path} is damaged.*used all the same\. If you have changed it yourself"):
        LanguageModel.from_pretrained(tmp_path / "saved")


def test_checksums_of_others_near_a_model_are_none_of_it(tmp_path, monkeypatch):
    """In the folder around a model, or in the working folder when a name is loaded."""
    tiny_llama().save_pretrained(tmp_path / "saved")
    sums = (tmp_path / "saved" / "SHA256SUMS").read_text()
    (tmp_path / "SHA256SUMS").write_text(sums.replace("  ", "  others/"))
    LanguageModel.from_pretrained(tmp_path / "saved")
    (tmp_path / "SHA256SUMS").write_text("not ours")
    LanguageModel.from_pretrained(tmp_path / "saved")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError, match="no model 'someone/none'"):
        LanguageModel.from_pretrained("someone/none", local_files_only=True)


# -- tokenizers ----------------------------------------------------------------------------------------------


def test_a_subfolder_has_its_own_tokenizer_and_ends(tmp_path):
    LanguageModel(llama_network(), letters(), eos_token_ids=6).save_pretrained(tmp_path / "inner")
    lm = LanguageModel.from_pretrained(tmp_path, subfolder="inner")
    assert lm.name == str(tmp_path / "inner")
    assert lm.eos_token_ids == (6,)
    assert lm(["a b"], 2).prompt_texts() == ["a b"]
    letters("g").save_pretrained(tmp_path)
    assert LanguageModel.from_pretrained(tmp_path, subfolder="inner").tokenizer.eos_token == "<eos>"
    for path in (tmp_path / "inner").glob("*token*"):
        path.unlink()
    assert LanguageModel.from_pretrained(tmp_path, subfolder="inner").tokenizer.eos_token == "g"  # the root's
    lm.policy(2).save_pretrained(tmp_path / "adapters" / "first")
    assert LanguageModel.from_pretrained(tmp_path / "adapters", subfolder="first").has_adapters


def test_a_revision_has_its_own_tokenizer_and_ends(tmp_path):
    """In the folder in which the Hugging Face hub's files are kept."""
    cache = tmp_path / "models--someone--tiny"
    for revision, ends in (("a" * 40, 6), ("b" * 40, 5)):
        tokenizer = letters("f" if revision[0] == "a" else "e")
        LanguageModel(llama_network(), tokenizer, eos_token_ids=ends).save_pretrained(cache / "snapshots" / revision)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("a" * 40)
    (cache / "refs" / "old").write_text("b" * 40)
    where = {"cache_dir": str(tmp_path), "local_files_only": True}
    main = LanguageModel.from_pretrained("someone/tiny", **where)
    old = LanguageModel.from_pretrained("someone/tiny", revision="old", **where)
    assert [lm.tokenizer.eos_token for lm in (main, old)] == ["f", "e"]
    assert [lm.eos_token_ids for lm in (main, old)] == [(6,), (5,)]
    assert [lm.name for lm in (main, old)] == ["someone/tiny", None]  # which adapters would name as their base
    main.policy(2).network.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"revision": "old"}))
    assert LanguageModel.from_pretrained(tmp_path / "adapter", **where).eos_token_ids == (5,)


@pytest.fixture
def adapter(tmp_path):
    """A base model, and the folder of an adapter as PEFT writes it."""
    base = tiny_llama()
    base.policy(2).network.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    return base, tmp_path / "adapter"


def test_an_adapter_has_its_own_tokenizer_template_and_ends(adapter):
    base, path = adapter
    plain = LanguageModel.from_pretrained(path, base=base)
    assert plain.tokenizer is base.tokenizer
    assert plain.vocabulary == base.vocabulary
    (path / "chat_template.jinja").write_text("{{ messages[0].content }} g")
    with_template = LanguageModel.from_pretrained(path, base=base)
    assert with_template([[{"role": "user", "content": "a"}]], 2).prompt_texts() == ["a g"]
    assert base.tokenizer.chat_template is None
    letters("g").save_pretrained(path)
    own = LanguageModel.from_pretrained(path, base=base)
    assert (own.tokenizer.eos_token, own.eos_token_ids) == ("g", (7,))
    assert own([[{"role": "user", "content": "a"}]], 2).prompt_texts() == ["a"]  # its end, g, is no text
    GenerationConfig(eos_token_id=[4, 5]).save_pretrained(path)
    assert LanguageModel.from_pretrained(path, base=base).eos_token_ids == (4, 5)


def test_an_adapter_whose_end_is_one_of_the_bases_has_all_of_them(adapter):
    _, path = adapter
    letters().save_pretrained(path)
    base = tiny_llama(eos_token_ids=(0, 5), pad_token_id=3)
    loaded = LanguageModel.from_pretrained(path, base=base)
    assert loaded.tokenizer is not base.tokenizer
    assert loaded.vocabulary == base.vocabulary


def cut(path):
    path.write_text(path.read_text()[:100])


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda path: (path / "tokenizer.json").unlink(), "holds a part of a tokenizer, tokenizer_config.json, which"),
        (lambda path: cut(path / "tokenizer.json"), "cannot be loaded|is damaged"),
        (lambda path: (path / "tokenizer_config.json").write_text("{"), "cannot be loaded|is damaged"),
        (lambda path: (path / "tokenizer.json").write_text("{}"), "cannot be loaded|is damaged"),
    ],
)
def test_a_tokenizer_that_cannot_be_loaded_is_an_error(tmp_path, adapter, damage, match):
    base, path = adapter
    base.save_pretrained(tmp_path / "base")
    base.tokenizer.save_pretrained(path)
    for folder, settings in ((tmp_path / "base", {}), (path, {"base": base})):
        damage(folder)
        with pytest.raises(OSError, match=match) as caught:
            LanguageModel.from_pretrained(folder, **settings)
        assert "\n" not in str(caught.value)


def test_weights_alone_are_a_model_of_token_ids(tmp_path):
    """Of GPT-2 transformers makes a tokenizer without words; and settings without words are an error."""
    random_network("gpt2", n_positions=64).save_pretrained(tmp_path)
    assert LanguageModel.from_pretrained(tmp_path).tokenizer is None
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    with pytest.raises(OSError, match=r"tokenizer_config\.json, which cannot be loaded: none of .*vocab\.json"):
        LanguageModel.from_pretrained(tmp_path)


# -- whole or not at all -------------------------------------------------------------------------------------


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else None


@pytest.mark.parametrize("over_another", [False, True])
@pytest.mark.parametrize("room", [0, 1000, 20_000])
def test_a_full_disk_leaves_the_folder_as_it_was(tmp_path, over_another, room):
    target = tmp_path / "model"
    if over_another:
        tiny_llama(seed=1).save_pretrained(target)
    before = contents(target)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then a write beyond the limit fails
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        with pytest.raises(OSError, match="could not be saved") as caught:
            tiny_llama().save_pretrained(target)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert str(target) in str(caught.value)
    assert contents(target) == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"] * over_another


def test_a_model_is_replaced_by_another_of_any_kind(tmp_path):
    """Of the first no file stays that would change the second; a user's own files do."""
    target = tmp_path / "model"
    lms = [tiny_llama(), tiny_llama().policy(2), tiny_llama(eos_token_ids=7), LanguageModel(llama_network(seed=3))]
    for lm in [*lms, lms[1], lms[0]]:
        lm.save_pretrained(target)
        (target / "notes.txt").write_text("mine")
        loaded = LanguageModel.from_pretrained(target, base=tiny_llama() if lm.has_adapters else None)
        assert loaded.has_adapters == lm.has_adapters
        assert (loaded.tokenizer is None) == (lm.tokenizer is None)
        assert_same_distribution(loaded, lm)
    lms[0].save_pretrained(target)
    assert (target / "notes.txt").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_reader_finds_a_model_whose_replacement_was_killed(tmp_path, monkeypatch):
    """By its name, through a link, in a subfolder; between the two renamings, which is the one moment without it."""
    old, new = tiny_llama(), tiny_llama(seed=1)
    rename = os.rename
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for place in ("model", "root/inner", "link"):
        old.save_pretrained(tmp_path / place)
        process = os.fork()
        if process == 0:
            monkeypatch.setattr(os, "rename", lambda *args: os._exit(9) if "/new/" in str(args[0]) else rename(*args))
            new.save_pretrained(tmp_path / place)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 9
        assert not (tmp_path / place).exists()
        where = {"subfolder": "inner"} if place == "root/inner" else {}
        root = tmp_path / ("root" if where else place)
        assert_same_distribution(LanguageModel.from_pretrained(root, **where), new)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "model", "real", "root"]


@pytest.mark.long
def test_models_are_whole_after_kills_at_any_moment(tmp_path):
    """30 SIGKILLs of a process that saves one of two models over the other, again and again."""
    models = [tiny_llama(), tiny_llama().policy(2)]
    rng, target = random.Random(0), tmp_path / "model"
    models[0].save_pretrained(target)
    (target / "notes.txt").write_text("mine")

    def save_for_ever():
        for lm in itertools.cycle(models[::-1]):
            lm.save_pretrained(target)

    found = set()
    for _ in range(30):
        assert not forked(save_for_ever, 0.05 + rng.random())
        base = models[0] if (target / "adapter_config.json").exists() else None
        loaded = LanguageModel.from_pretrained(target, base=base)
        found.add(loaded.has_adapters)
        assert_same_distribution(loaded, models[loaded.has_adapters])
        assert (target / "notes.txt").read_text() == "mine"
    models[0].save_pretrained(target)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert found == {False, True}


def test_a_link_to_a_folder_stays_a_link(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "real")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    tiny_llama(seed=1).save_pretrained(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert_same_distribution(LanguageModel.from_pretrained(tmp_path / "real"), tiny_llama(seed=1))


def test_a_file_is_not_overwritten(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError):
        tiny_llama().save_pretrained(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"
