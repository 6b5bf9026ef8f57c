"""Which tokens end, begin and pad texts: a table of what configs, tokenizers and users say."""

import importlib

import numpy as np
import pytest
import torch
from support.models import llama_network
from support.tokenizers import byte_level
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from bayeslm.models import LanguageModel
from bayeslm.models.lm import ModuleWithProperties, word_tokenizer


def tokenizer(eos="c"):
    return word_tokenizer(["a", "b", "c", "d", "e", "f", "g", "h"], eos)


@pytest.mark.parametrize(
    ("generation", "config", "eos", "expected"),
    [
        (5, 4, "c", (5,)),
        ([5, 3], 4, "c", (3, 5)),  # as Llama 3 has: all of them end a text
        ([5, 99], 4, "c", (5,)),
        (99, 4, "c", (4,)),
        ([99, 50256], 4, "c", (4,)),
        (None, 4, "c", (4,)),
        (None, [4, 6], "c", (4, 6)),
        (None, 50256, "c", (2,)),
        (None, -1, "c", (2,)),
        ([], None, "c", (2,)),
        (None, None, "c", (2,)),
        (None, None, None, ()),
        (99, 8, None, ()),
    ],
)
def test_ends_are_those_of_the_first_that_names_a_token(generation, config, eos, expected):
    network = llama_network(vocab_size=8)
    network.generation_config.eos_token_id = generation
    network.config.eos_token_id = config
    assert LanguageModel(network, eos and tokenizer(eos)).eos_token_ids == expected
    assert LanguageModel(network, tokenizer(), eos_token_ids=7).eos_token_ids == (7,)  # a user's goes before all
    assert LanguageModel(network, tokenizer(), eos_token_ids=()).eos_token_ids == ()


def test_a_default_of_the_config_does_not_hide_the_tokenizer():
    """GPT2Config has 50256 for any vocabulary, as end and as beginning."""
    lm = LanguageModel(GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=8, n_layer=1, n_head=2)), tokenizer())
    assert (lm.eos_token_ids, lm.bos_token_id, lm.pad_token_id) == ((2,), 2, 2)
    assert LanguageModel(lm.network).bos_token_id is None
    ended = lm([""], 2).log_prob(torch.tensor([[2, 2]]))
    torch.testing.assert_close(ended, lm.network(torch.tensor([[2]])).logits.log_softmax(-1)[0, -1, 2:3])


def test_a_beginning_outside_the_vocabulary_is_none():
    words = tokenizer()
    words.add_special_tokens({"bos_token": "<s>"})
    assert words.bos_token_id == 8
    assert LanguageModel(llama_network(vocab_size=8, bos_token_id=3), words).bos_token_id == 3
    with pytest.raises(ValueError, match="empty, and the model has no BOS token"):
        LanguageModel(llama_network(vocab_size=8, bos_token_id=None), words)([""], 2)


@pytest.mark.parametrize("ends", [3, np.int64(3), [3], (3,), {3}, np.array([3]), torch.tensor(3)])
def test_ends_by_hand(ends):
    assert LanguageModel(llama_network(), eos_token_ids=ends).eos_token_ids == (3,)


@pytest.mark.parametrize(
    ("ends", "error", "match"),
    [
        (8, ValueError, r"eos_token_ids \[8\] are not all in 0\.\.7"),
        ([1, -1], ValueError, r"eos_token_ids \[-1, 1\] are not all"),
        ("c", TypeError, "eos_token_ids must be a token id or several, got 'c'"),
        (1.5, TypeError, r"eos_token_ids must be a token id or several, got 1\.5"),
        ([None], TypeError, "eos_token_ids must be a token id or several"),
        (True, TypeError, "eos_token_ids must be a token id or several, got True"),
        ([2, False], TypeError, "eos_token_ids must be a token id or several"),
        (np.array([True]), TypeError, "eos_token_ids must be a token id or several"),
        (torch.tensor([1, 0]) > 0, TypeError, "eos_token_ids must be a token id or several"),
    ],
)
def test_ends_by_hand_that_are_refused(ends, error, match):
    with pytest.raises(error, match=match):
        LanguageModel(llama_network(), eos_token_ids=ends)


def test_a_pad_that_is_no_token_only_fills():
    lm = LanguageModel(llama_network(), byte_level(), pad_token_id=99)
    value = lm([[1]], 12).sample((50,))
    live = lm.vocabulary.is_live(value)
    assert (value[~live] == 99).all()
    assert (~live).any()


# -- errors of properties --------------------------------------------------------------------------------------


class Headless(nn.Module):
    """A network that lacks what it needs inside a method."""

    def __init__(self):
        super().__init__()
        self.inner = llama_network()
        self.config = self.inner.config

    def get_output_embeddings(self):
        return self.no_such_layer

    @property
    def base_model(self):
        return nn.Identity()

    def forward(self, input_ids, **settings):
        return self.inner(input_ids, **settings)


@pytest.mark.parametrize("name", ["causal", "device", "vocab_size", "vocabulary"])
def test_a_property_raises_the_error_inside_it(name):
    lm = LanguageModel(Headless())
    with pytest.raises(AttributeError, match="no attribute 'no_such_layer'"):
        getattr(lm, name)
    with pytest.raises(AttributeError, match=f"'LanguageModel' object has no attribute '{name}s'"):
        getattr(lm, f"{name}s")


def test_every_module_with_properties_shows_their_errors():
    for room in ("bayeslm.inference", "bayeslm.models.control"):
        importlib.import_module(room)

    def all_subclasses(kind):
        return {kind, *(found for child in kind.__subclasses__() for found in all_subclasses(child))}

    own = {kind for kind in all_subclasses(nn.Module) if kind.__module__.startswith("bayeslm.")}
    with_properties = {kind for kind in own if any(isinstance(x, property) for x in vars(kind).values())}
    assert len(with_properties) >= 4
    hidden = {kind for kind in with_properties if not issubclass(kind, ModuleWithProperties)}
    assert {kind.__name__ for kind in hidden} <= {"AutoPolicy"}  # whose property looks up what it was made with


def test_a_network_without_a_config_is_refused():
    with pytest.raises(TypeError, match="the network, a Linear, has no config with a vocab_size"):
        LanguageModel(nn.Linear(2, 2))
