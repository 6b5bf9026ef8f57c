"""Texts that are observed: they read as they were written; a beginning has the probability of all that it begins."""

import numpy as np
import pytest
import torch
from support.models import llama_network, table_lm, tiny_llama
from support.tokenizers import TOKENIZERS, byte_level, metaspace

from bayeslm.models import LanguageModel
from bayeslm.models.lm.encoding import UNOBSERVED

SPACED = {"words": "good food", "word_piece": " good food", "word_ends": " good food"}


def model(tokenizer, **settings):
    return LanguageModel(llama_network(vocab_size=len(tokenizer)), tokenizer, **settings)


@pytest.mark.parametrize("around", [{}, {"before": True, "after": True}])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_text_reads_as_it_was_written(name, around):
    """Of every kind of tokenizer, whatever it puts around texts of their own; and it ends there, or need not."""
    lm = model(TOKENIZERS[name](**around), eos_token_ids=(0,), pad_token_id=0)
    text = SPACED.get(name, " good food")
    ended, begun = (lm.encode([text, ""], 6, eos=eos) for eos in (True, False))
    for value in (ended, begun):
        assert lm.decode(value, ["My food", "My food"]).tolist() == [text, ""]
    lengths = [lm(["My food"] * 2, 6).lengths(value) for value in (ended, begun)]
    assert torch.equal(lengths[0], lengths[1] + 1)
    assert ended[1].tolist() == [0] * 6
    assert begun[1].tolist() == [UNOBSERVED] * 6


@pytest.mark.parametrize(("tokenizer", "text"), [(metaspace(), "food"), (metaspace(), " food."), (byte_level(), "é🙂")])
def test_a_text_without_a_space_or_of_bytes(tokenizer, text):
    lm = model(tokenizer, eos_token_ids=(2,), pad_token_id=2)
    assert lm.decode(lm.encode([text], 12), ["My"]).tolist() == [text]


def test_the_shape_is_the_arrays():
    texts = np.array([["a", "b c", ""], ["c", "a a", "b"]], dtype=object)
    value = table_lm().encode(texts, 4)
    assert value.shape == (2, 3, 4)
    assert value.dtype == torch.int64
    assert table_lm().decode(value).tolist() == texts.tolist()


@pytest.mark.parametrize("make", [lambda: table_lm(order=3, seed=1, vocab=4), lambda: tiny_llama(seed=1)])
def test_a_beginning_has_the_probability_of_all_that_it_begins(make):
    """By enumeration, batches of beginnings of unequal lengths among them, up to the longest, which is a completion."""
    lm = make()
    dist = lm([[1, 2], [3], [2]], max_new_tokens=3)
    support = dist.enumerate_support()[:, 0]
    total = dist.log_prob(dist.enumerate_support()).exp()
    begins = lm.encode(["a b", "c", "b b a"], 3, eos=False)
    for i, length in enumerate((2, 1, 3)):
        among = (support[:, :length] == begins[i, :length]).all(-1)
        torch.testing.assert_close(dist.log_prob(begins)[i].exp(), total[among, i].sum())
    torch.testing.assert_close(dist.log_prob(lm.encode([""] * 3, 3, eos=False)), torch.zeros(3))
    whole = lm.encode(["a b", "c", "b b"], 3)
    found = dist.log_prob(dist.enumerate_support())[(dist.enumerate_support() == whole).all(-1)]
    torch.testing.assert_close(dist.log_prob(whole).sum(), found.sum())


U = UNOBSERVED


@pytest.mark.parametrize("value", [[U, 1, U], [1, U, 0], [U, 0, 0]])
def test_what_goes_on_after_a_beginning_is_malformed(value):
    """Whether or not another row of the batch has tokens."""
    for others in ([], [[1, 2, 3]]):
        rows = torch.tensor([value, *others])
        assert table_lm()([[1]] * len(rows), 3).log_prob(rows)[0] == -torch.inf


@pytest.mark.parametrize(
    ("texts", "settings", "error", "message"),
    [
        ("a b", {}, TypeError, r"write \['a b'\]"),
        (["a", 3], {}, TypeError, r"texts\[1\] is 3, and no string"),
        (["a", "a b c d"], {}, ValueError, r"texts\[1\] \('a b c d'\) has 5 tokens, of which one is its end"),
        (["a b c d e"], {"eos": False}, ValueError, "has 5 tokens, and max_new_tokens is 4: raise that"),
        (["a <eos> b"], {}, ValueError, "holds the end token 0"),
        (["a zebra"], {}, ValueError, "cannot be written in the tokenizer's tokens"),
        (["a\ud800"], {}, ValueError, "surrogate"),
    ],
)
def test_what_does_not_fit_is_refused(texts, settings, error, message):
    with pytest.raises(error, match=message):
        table_lm().encode(texts, 4, **settings)


def test_a_text_that_has_no_tokens_is_refused():
    with pytest.raises(ValueError, match=r"texts\[0\] \('My z'\) cannot be written .*they read"):
        model(TOKENIZERS["word_ends"](), eos_token_ids=(1,)).encode(["My z"], 4)


def test_without_tokenizer_or_end_it_says_so():
    with pytest.raises(TypeError, match="no tokenizer to encode with"):
        LanguageModel(llama_network()).encode(["a"], 4)
    with pytest.raises(ValueError, match=r"no end token.*eos=False"):
        tiny_llama(eos_token_ids=()).encode(["a"], 4)
