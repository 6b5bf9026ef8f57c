"""Texts of a language model, drawn at once or shown as they grow."""

import numpy as np
import pytest
import torch
from support.models import llama_network, table_lm, tiny_llama
from support.tokenizers import TOKENIZERS

from bayeslm.models import LanguageModel
from bayeslm.models.lm import generation, sample_texts


def words(text):
    return text.split()


@pytest.mark.parametrize("settings", [{"temperature": 0.7}, {"top_k": 3, "stop": "b"}, {"top_p": 0.7}], ids=str)
def test_texts_have_the_frequencies_of_the_distribution(settings):
    lm = table_lm(order=2, vocab=4)
    (drawn,) = lm.generate_texts(["a"], 4000, max_new_tokens=2, seed=0, **settings)
    dist = lm(["a"], max_new_tokens=2, **settings)
    every = dist.enumerate_support()
    for text, p in zip(dist.decode(every)[:, 0], dist.log_prob(every)[:, 0].exp().tolist(), strict=True):
        found = drawn.count(text) / len(drawn)
        assert abs(found - p) < 5 * (p * (1 - p) / len(drawn)) ** 0.5 + 1e-9


PROMPTS = {
    "strings": ["a b", "c"],
    "token ids": [[1, 2], [3]],
    "array": np.array([["a b", "c"]], dtype=object),
    "chats": [[{"role": "user", "content": "a"}], [{"role": "user", "content": "b c"}]],
}


@pytest.mark.parametrize("kind", PROMPTS)
def test_a_seed_gives_the_same_texts_and_leaves_the_random_state(kind):
    lm = tiny_llama()
    lm.tokenizer.chat_template = "{% for message in messages %}{{ message.content }} {% endfor %}"
    before = torch.get_rng_state()
    one, other = (lm.generate_texts(PROMPTS[kind], 3, max_new_tokens=5, seed=s) for s in (1, 2))
    assert [len(texts) for texts in one] == [3, 3]
    assert one != other
    assert lm.generate_texts(PROMPTS[kind], 3, max_new_tokens=5, seed=1) == one
    assert torch.equal(torch.get_rng_state(), before)
    lm.generate_texts(PROMPTS[kind], 3, max_new_tokens=5)
    assert not torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("stop", [None, "b"])
def test_what_is_said_of_a_text_is_its_own(stop):
    lm, settings = tiny_llama(scale=1.0), {"max_new_tokens": 4, "temperature": 4.0, "stop": stop}
    drawn = sample_texts(lm, ["a b", "c"], 8 if stop is None else 40, seed=0, **settings)
    for prompt, texts in zip(["a b", "c"], drawn, strict=True):
        for text in texts:
            ids = [lm.tokenizer.convert_tokens_to_ids(word) for word in words(text.text)]
            stopped = stop in words(text.text)
            assert text.ended == (stopped or len(ids) < 4)
            assert text.num_tokens == len(ids) + (text.ended and not stopped)
            x = torch.tensor([(ids + [0] * 4)[:4]])
            expected = lm([prompt], **settings).log_prob(x).item()
            assert text.log_prob == pytest.approx(expected, abs=1e-4)
    assert {text.ended for texts in drawn for text in texts} == {True, False}
    if stop is not None:  # also as the last token that the limit allows
        assert max(len(words(text.text)) for texts in drawn for text in texts if stop in words(text.text)) == 4


@pytest.mark.parametrize(("kind", "num_texts"), [*((kind, 1) for kind in TOKENIZERS), ("byte_level", 3)])
def test_pieces_of_a_growing_text_make_the_text(kind, num_texts):
    """Of random tokens: bytes of characters, spaces that decoders drop, words that others begin."""
    tokenizer = TOKENIZERS[kind]()
    lm = LanguageModel(llama_network(vocab_size=len(tokenizer)), tokenizer, eos_token_ids=(1,), batch_size=2)
    with torch.no_grad():
        lm.network.lm_head.weight[[t for t in range(len(tokenizer)) if tokenizer.decode([5, t]).count("\ufffd")]] *= 0.1
    compared = 0
    for seed in range(2):
        pieces = []
        settings = {"max_new_tokens": 8, "temperature": 0.5, "seed": seed}
        drawn = sample_texts(lm, ["My food", "good"], num_texts, **settings, on_text=pieces.append)
        assert drawn == sample_texts(lm, ["My food", "good"], num_texts, **settings)
        text = drawn[0][0].text
        if kind in ("word_piece", "word_ends"):  # later tokens change spaces before them
            assert "".join("".join(pieces).split()) == "".join(text.split())
        elif "\ufffd" not in text:  # for which decoders give up bytes before it
            assert "".join(pieces) == text
            compared += len(pieces) > 1
    assert compared or kind in ("word_piece", "word_ends")


def test_a_character_of_several_tokens_is_given_whole():
    data, pieces = "aé🙂".encode(), []
    growing = generation._Growing(lambda ids: bytes(ids[0].tolist()).decode(errors="replace"), pieces.append)
    for length in range(1, len(data) + 1):
        growing(torch.tensor(list(data[:length])))
    growing.finish(data.decode())
    assert pieces == ["a", "é", "🙂"]


def test_a_model_of_token_ids_has_no_texts():
    with pytest.raises(TypeError, match=r"no tokenizer to decode with: sample token ids, lm\(prompts\)\.sample"):
        LanguageModel(llama_network()).generate_texts([[1, 2]], max_new_tokens=3)
