"""Maximum likelihood on texts against closed forms; weights are frozen afterwards, also after errors."""

from collections import Counter
from itertools import pairwise

import pytest
import torch
from support.models import llama_network, table_lm, tiny_llama
from support.statistics import assert_random_state_kept
from support.tokenizers import metaspace
from support.zoo import zoo_network

from bayeslm.models import LanguageModel
from bayeslm.models.lm import word_tokenizer
from bayeslm.models.lm.encoding import Vocabulary
from bayeslm.models.lm.fit_texts import to_sequences

TEXTS = ["a b a", "a c", "b b b a", "a b a"]


def sequences(texts):
    """Token ids with the eos before and after."""
    return [[0, *(" abcdefg".index(word) for word in text.split()), 0] for text in texts]


def frozen(lm):
    return not any(p.requires_grad or p.grad is not None for p in lm.parameters())


def test_a_table_reaches_the_empirical_frequencies():
    """The likeliest bigram table has p(y | x) = n(x, y) / n(x); its loss is the entropy of that."""
    pairs = Counter(pair for ids in sequences(TEXTS) for pair in pairwise(ids))
    contexts = Counter(x for x, _ in pairs.elements())
    lm = table_lm(order=2, vocab=4)
    losses = lm.fit(TEXTS, num_steps=400, learning_rate=0.1, progress=False)
    likeliest = -sum(n * torch.tensor(n / contexts[x]).log() for (x, _), n in pairs.items()) / len(
        list(pairs.elements())
    )
    assert losses[-1] == pytest.approx(float(likeliest), abs=5e-3)
    for (x, y), n in pairs.items():
        score = lm([[x]], max_new_tokens=1).log_prob(torch.tensor([[y]])).exp()
        assert score.item() == pytest.approx(n / contexts[x], abs=0.02)
    assert frozen(lm)


def test_a_network_memorises_texts():
    texts = ["a b c d", "e f g"]
    lm = tiny_llama(seed=1)
    lm.fit(texts, num_steps=80, learning_rate=1e-2, progress=False, seed=0)
    value = torch.tensor([[1, 2, 3, 4, 0], [5, 6, 7, 0, 0]])
    torch.testing.assert_close(
        lm([""], max_new_tokens=5).log_prob(value).exp(), torch.tensor([0.5, 0.5]), atol=0.1, rtol=0
    )
    assert set(lm.decode(lm([[0, 1], [0, 5]], max_new_tokens=4, temperature=0.1).sample())) == {"b c d", "f g"}


def test_long_texts_are_cut_and_not_taught_to_end():
    lm = table_lm(order=2, vocab=4)
    lm.fit(["a b c"] * 2, num_steps=300, learning_rate=0.1, max_tokens=3, progress=False)
    learnt = lm.network.table.softmax(-1)
    untouched = table_lm(order=2, vocab=4).network.table.softmax(-1)
    assert learnt[0, 1] > 0.98  # <eos> a
    assert learnt[1, 2] > 0.98  # a b
    torch.testing.assert_close(learnt[2:], untouched[2:])  # no text has a token after b


def test_without_bos_the_first_token_is_given():
    network = llama_network(bos_token_id=None)
    tokenizer = word_tokenizer(["<eos>", *"abcdefg"], "<eos>")
    tokenizer.bos_token = None
    lm = LanguageModel(network, tokenizer)
    assert lm.bos_token_id is None
    lm.fit(["a b", "c d"], num_steps=60, learning_rate=1e-2, progress=False)
    assert lm.decode(lm(["a", "c"], max_new_tokens=3, temperature=0.1).sample()).tolist() == ["b", "d"]


def test_batches_are_seeded():
    def fitted(seed):
        lm = table_lm(order=2, vocab=4)
        lm.fit(TEXTS, num_steps=5, batch_size=2, seed=seed, progress=False)
        return lm.network.table

    with assert_random_state_kept():
        first = fitted(1)
    assert torch.equal(first, fitted(1))
    assert any(not torch.equal(first, fitted(seed)) for seed in range(2, 6))


def test_only_adapters_are_trained_where_there_are_some():
    """The weights under an adapter are the prior's own."""
    prior = tiny_llama()
    before = [p.clone() for p in prior.parameters()]
    policy = prior.policy(lora_rank=2)
    losses = policy.fit(["a b c d"], num_steps=30, learning_rate=2e-2, progress=False)
    assert losses[-1] < losses[0] / 2
    assert all(torch.equal(p, b) for p, b in zip(prior.parameters(), before, strict=True))
    assert frozen(policy)


@pytest.mark.parametrize(
    ("texts", "settings", "error", "match"),
    [
        ([], {}, ValueError, "texts is empty"),
        (["a", ""], {}, ValueError, r"texts\[1\] is empty"),
        (["a"], {"max_tokens": 1}, ValueError, r"texts\[0\] has one token"),
        (["a"], {"learning_rate": -1.0}, ValueError, "learning_rate must be positive"),
    ],
)
def test_errors_leave_the_network_frozen(texts, settings, error, match):
    lm = table_lm()
    with pytest.raises(error, match=match):
        lm.fit(texts, **settings, progress=False)
    assert frozen(lm)


def test_an_interrupt_leaves_the_network_frozen(monkeypatch):
    lm = table_lm()

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.optim.AdamW, "step", interrupt)
    with pytest.raises(KeyboardInterrupt):
        lm.fit(["a b"], progress=False)
    assert frozen(lm)


def test_fitting_needs_a_tokenizer():
    with pytest.raises(TypeError, match="needs a tokenizer"):
        LanguageModel(llama_network()).fit(["a"])


@pytest.mark.parametrize("pad", [-100, -1, 5, 8, 50256])
def test_the_pad_is_no_part_of_the_texts(pad):
    """Whatever its id, in the vocabulary or not: the loss is that of each text alone."""
    texts = ["a b c d", "e"]
    lm = tiny_llama(pad_token_id=pad)
    lm.tokenizer.add_special_tokens({"pad_token": "<pad>"})  # outside the network's vocabulary
    ids = [torch.tensor([row]) for row in sequences(texts)]
    with torch.no_grad():
        scores = [lm.network(x).logits.log_softmax(-1)[0, :-1].gather(-1, x[0, 1:, None]) for x in ids]
    (loss,) = lm.fit(texts, num_steps=1, progress=False)
    assert loss == pytest.approx(-torch.cat(scores).mean().item(), abs=1e-5)


@pytest.mark.parametrize(
    ("model_type", "rank"),
    [
        ("llama", 2),
        ("roberta", None),
        *(
            pytest.param(model_type, rank, marks=pytest.mark.long)
            for model_type, rank in [("llama", None), ("roberta", 2), ("bloom", None), ("bloom", 2), ("mamba", None)]
        ),
    ],
)
def test_pads_that_a_config_or_a_tokenizer_names_outside_the_vocabulary(model_type, rank):
    """The loss is that of each text alone, of whole batches and of minibatches, and texts are drawn and decoded after.

    Networks of absolute positions, of biases from the mask, of positions that skip padding, and recurrent ones.
    """
    texts = ["a b c d", "e"]
    for named in (-1, 50256, None):
        network = zoo_network(model_type, vocab_size=8, eos_token_id=0, bos_token_id=0)
        for config in (network.config, network.generation_config):
            config.pad_token_id = named
        tokenizer = word_tokenizer(["<eos>", *"abcdefg"], "<eos>")
        tokenizer.add_special_tokens({"pad_token": "<pad>"}) if named is None else setattr(tokenizer, "pad_token", None)
        lm = LanguageModel(network, tokenizer)
        assert lm.pad_token_id == (8 if named is None else named)
        lm = lm if rank is None else lm.policy(rank)
        ids = [torch.tensor([row]) for row in sequences(texts)]
        with torch.no_grad():
            scores = [lm.network(x).logits.log_softmax(-1)[0, :-1].gather(-1, x[0, 1:, None]) for x in ids]
        (loss,) = lm.fit(texts, num_steps=1, learning_rate=1e-9, progress=False)
        assert loss == pytest.approx(-torch.cat(scores).mean().item(), abs=1e-4)
        losses = lm.fit(texts, num_steps=8, batch_size=1, learning_rate=1e-9, seed=0, progress=False)
        alone = sorted(-score.mean().item() for score in scores)
        assert sorted({round(x, 3) for x in losses}) == pytest.approx(alone, abs=2e-3)
        with torch.no_grad():
            x = lm(["a b", "c"], 3).sample((2,))
            assert lm.decode(x).shape == (2, 2)
            both, one = lm(["a b", "c"], 3).log_prob(x), lm(["a b"], 3).log_prob(x[:, :1])
            torch.testing.assert_close(both[:, :1], one, atol=1e-4, rtol=0)


def test_ends_and_beginnings_are_not_written_twice():
    """Whether the tokenizer appends its end to what it encodes, or the text holds it."""
    tokenizer = metaspace(before=True, after=True)
    bos, eos, inner = 1, 2, tokenizer("My food", add_special_tokens=False)["input_ids"]
    for text in ("My food", "My food</s>", "<s>My food</s>"):
        assert to_sequences([text], tokenizer, bos, Vocabulary(300, (eos,), 0), 99) == [([bos], [*inner, eos])]
    assert to_sequences(["My food"], tokenizer, None, Vocabulary(300, (), 0), 99) == [(inner[:1], inner[1:])]


def test_a_special_token_outside_the_vocabulary_begins_no_text():
    lm = LanguageModel(llama_network(bos_token_id=None), word_tokenizer(["<eos>", *"abcdefg", "<s>"], "<eos>"))
    lm.tokenizer.bos_token = "<s>"
    assert LanguageModel(lm.network, lm.tokenizer).fit(["a b"], num_steps=1, progress=False)[0] > 0
    with pytest.raises(ValueError, match=r"texts\[1\] has the token id 8, and the network's are 0\.\.7"):
        lm.fit(["a b", "a <s>"], progress=False)
