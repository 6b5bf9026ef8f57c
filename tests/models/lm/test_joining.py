"""Prompts that are made of what was drawn: token for token, in every batch, chats by their template."""

import numpy as np
import pytest
import torch
from support.models import llama_network, random_network, table_lm, tiny_llama
from support.tokenizers import TOKENIZERS, byte_level

from bayeslm.models import LanguageModel
from bayeslm.models.lm import count_usage, redraw
from bayeslm.models.lm.encoding import Encoded

TEMPLATE = (
    "{% for m in messages %}{{ {'user': 'a', 'system': 'b', 'assistant': 'c', 'tool': 'd'}[m.role] }} "
    "{{ m.content }} f {% endfor %}{% if add_generation_prompt %}c{% endif %}"
)


def turn(role, content):
    return {"role": role, "content": content}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_what_was_drawn_is_conditioned_on_id_for_id(name):
    """Particles x prompts of unequal lengths, whose texts, encoded anew, have other ids."""
    lm = LanguageModel(llama_network(vocab_size=len(TOKENIZERS[name]())), TOKENIZERS[name](), eos_token_ids=(1, 2))
    prompts = ["My food", "I do not"]
    x = lm(prompts, max_new_tokens=5).arbitrary(1).expand(2, 5)
    x = torch.stack([x, lm(prompts, max_new_tokens=5).arbitrary(2)])  # (particle, prompt, token)
    text = "good" if name == "words" else " good"
    joined, before = lm.join(prompts, x, text), lm.encode_prompts(prompts).rows()
    between = [t for t in lm.encode([text], 8, eos=False)[0].tolist() if t >= 0]
    drawn = lm.vocabulary.before_end(x)
    expected = [[*before[i % 2], *row, *between] for i, row in enumerate(drawn)]
    assert joined.rows() == expected
    assert joined.ids.shape[:-1] == (2, 2)
    y = lm(joined, max_new_tokens=3).arbitrary(3)
    one_by_one = torch.stack([lm([row], 3).log_prob(y.reshape(4, 3)[i : i + 1])[0] for i, row in enumerate(expected)])
    torch.testing.assert_close(lm(joined, 3).log_prob(y).reshape(-1), one_by_one, atol=1e-4, rtol=1e-4)


def test_encoded_anew_it_would_be_another_text():
    """What the test before would not see, if decoding and encoding were the identity."""
    lm = LanguageModel(llama_network(vocab_size=len(byte_level())), byte_level(), eos_token_ids=(1,))
    x = torch.tensor([lm.tokenizer.convert_tokens_to_ids(["Ġ", "f", "o", "o", "d"])])
    again = lm.encode_prompts(["My" + lm.decode(x, ["My"])[0]]).rows()
    assert len(again[0]) < len(lm.join(["My"], x).rows()[0])


def test_parts_broadcast_and_nothing_is_added_for_none():
    lm = table_lm()
    x = lm.encode(np.array([["a"], ["b c"]], dtype=object), 3)  # (particle, 1, token)
    found = np.array([["d", None], ["", "d e"]], dtype=object)
    joined = lm.join(["f", "g g"], x, found, " a")
    texts = [" ".join(lm.detokenize([row])[0].split()) for row in joined.rows()]
    assert texts == ["f a d a", "g g a a", "f b c a", "g g b c d e a"]
    again = lm.join(lm.join(["f", "g g"], x), found, ["a", "a"])
    assert again.rows() == joined.rows()


def test_a_beginning_and_padding_add_nothing():
    lm = tiny_llama(pad_token_id=5, eos_token_ids=(0, 3))
    x = torch.tensor([[1, 3, 5, 5], [1, -100, -100, -100], [0, 5, 5, 5], [5, 5, 5, 5]])
    assert lm.join([[2]] * 4, x).rows() == [[2, 1], [2, 1], [2], [2, 5, 5, 5, 5]]


@pytest.mark.parametrize("ended", [True, False])
def test_a_chat_goes_on_by_its_template(ended):
    """As the template writes the whole chat, whether the turn has ended or was cut; some chats, not all."""
    lm = tiny_llama()
    lm.tokenizer.chat_template = TEMPLATE
    first = [[turn("user", "e")], [turn("system", "g"), turn("user", "b")]]
    x = lm.encode(["g b", "d d"], 3 if ended else 2, eos=ended)
    joined = lm.join(first, x, {"role": "tool", "content": np.array(["a", None], dtype=object)})
    assert joined.rows()[0] == lm.encode_prompts([[*first[0], turn("assistant", "g b"), turn("tool", "a")]]).rows()[0]
    assert joined.rows()[1] == lm.encode_prompts([[*first[1], turn("assistant", "d d")]]).rows()[0]  # which is open
    y = lm.encode(["c", "f"], 3)
    again = lm.join(joined, y, turn("user", "f")).rows()
    turns = [turn("assistant", "g b"), turn("tool", "a"), turn("assistant", "c"), turn("user", "f")]
    assert again[0] == lm.encode_prompts([[*first[0], *turns]]).rows()[0]
    turns = [turn("assistant", "d d f"), turn("user", "f")]
    assert again[1] == lm.encode_prompts([[*first[1], *turns]]).rows()[0]


def test_a_continued_answer_goes_on_by_its_template():
    lm = tiny_llama()
    lm.tokenizer.chat_template = TEMPLATE
    begun = [turn("user", "e"), turn("assistant", "g")]
    joined = lm.join([begun], lm.encode(["b"], 3), turn("user", "f"))
    whole = [begun[0], turn("assistant", "g b"), turn("user", "f")]
    assert joined.rows() == lm.encode_prompts([whole]).rows()


def test_a_template_that_rewrites_earlier_turns_is_refused():
    lm = tiny_llama()
    lm.tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' and not loop.last %}g {% else %}a {% endif %}"
        "{{ m.content }} {% endfor %}{% if add_generation_prompt %}c{% endif %}"
    )
    with pytest.raises(ValueError, match="part 2: the tokenizer's chat template writes earlier turns in another way"):
        lm.join([[turn("user", "e")]], lm.encode(["b"], 2), turn("user", "f"))


@pytest.mark.parametrize(
    ("prompts", "parts", "error", "message"),
    [
        (["a"], (3,), TypeError, "part 1 is 3: it must be completions, a text, an array of texts"),
        (["a"], ([1, 2],), TypeError, "part 1 holds 1, and no text"),
        (["a"], (torch.tensor([[0.5]]),), TypeError, r"part 1 is a tensor of torch.float32 and shape \(1, 1\)"),
        (["a"], ("b", ["a", "b", "c"], ["a", "b"]), ValueError, r"different shapes: \(1,\), \(1,\), \(3,\), \(2,\)"),
        (["a"], (turn("user", "e"),), TypeError, "part 1 is a chat's message, and the prompts are no chats"),
        ("a", (), TypeError, "write"),
    ],
)
def test_what_cannot_be_joined_is_refused(prompts, parts, error, message):
    with pytest.raises(error, match=message):
        table_lm().join(prompts, *parts)


def test_a_text_without_a_tokenizer_or_room_is_refused():
    lm = LanguageModel(llama_network())
    assert lm.join([[1]], torch.tensor([[2, 3]])).rows() == [[1, 2, 3]]
    with pytest.raises(TypeError, match="part 1 is a text, and this LanguageModel has no tokenizer"):
        lm.join([[1]], "a")
    joined = lm.join([[1] * 60, [1]], torch.tensor([[2, 3]] * 2))
    with pytest.raises(ValueError, match=r"prompts\[0\] has 62 tokens, and the model's context has room for 61"):
        lm(joined, max_new_tokens=3)
    assert isinstance(joined, Encoded)


def _joined(lm, wide=True):
    """Joined prompts (particle, prompt) of long beginnings, and the same as plain ids."""
    prompts = [[1, 2, 3] * 6, [4, 5] * 5] if wide else [[1, 2, 3] * 6]
    x = lm(prompts, max_new_tokens=4).expand((40, len(prompts))).arbitrary(1)
    joined = lm.join(prompts, x, "a")
    again = np.empty(tuple(joined.ids.shape[:-1]), dtype=object)
    for index, row in zip(np.ndindex(*again.shape), joined.rows(), strict=True):
        again[index] = row
    return joined, again


@pytest.mark.parametrize("settings", [{}, {"batch_size": 7}])
@pytest.mark.parametrize("wide", [True, False])
def test_what_prompts_begin_with_is_read_once(settings, wide):
    """Draws, scores, redrawn suffixes and gradients are those of whole prompts, for a part of the tokens."""
    lm = tiny_llama(seed=2, **settings)
    joined, again = _joined(lm, wide)
    used, drawn = [], []
    for prompts in (joined, again):
        dist = lm(prompts, max_new_tokens=3)
        with count_usage() as usage, torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            drawn.append(dist.sample())
            scores = dist.token_log_prob(drawn[0].clone())
            redrawn, _ = redraw(dist, drawn[0], torch.full(drawn[0].shape[:-1], 1))
        used.append((usage.tokens, scores, redrawn))
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(used[0][2], used[1][2])
    torch.testing.assert_close(used[0][1], used[1][1], atol=1e-4, rtol=1e-4)
    assert used[0][0] < 0.7 * used[1][0]
    policy, gradients = lm.policy(), []
    for prompts in (joined, again):
        total = policy(prompts, max_new_tokens=3).log_prob(drawn[0].clone()).sum()
        found = torch.autograd.grad(total, [p for p in policy.parameters() if p.requires_grad])
        gradients.append(torch.cat([g.reshape(-1) for g in found]))
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("model_type", ["gpt2", "mamba", "gemma3_text"])
def test_networks_that_share_nothing_read_whole_prompts(model_type):
    lm = LanguageModel(random_network(model_type), eos_token_ids=(2, 7))
    joined = lm.join([[5, 6, 7, 8], [9]], torch.tensor([[[3, 4, 2], [5, 5, 5]]] * 3))
    y = lm(joined, max_new_tokens=3).arbitrary(1)
    each = [lm([row], 3).log_prob(v[None])[0] for row, v in zip(joined.rows(), y.reshape(-1, 3), strict=True)]
    torch.testing.assert_close(lm(joined, 3).log_prob(y).reshape(-1), torch.stack(each), atol=1e-4, rtol=1e-4)
