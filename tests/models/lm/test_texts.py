"""Texts of completions: prompt and completion together are the text of their tokens; what tokenizers add is no text."""

import pytest
import torch
from support.models import llama_network
from support.tokenizers import TOKENIZERS, byte_level, metaspace, word_ends, word_piece
from transformers import ByT5Tokenizer

from bayeslm.inference import SMC, ImportanceSampling
from bayeslm.models import LanguageModel, TiltedLM, rewards
from bayeslm.models.lm.tabular import NGramConfig, NGramForCausalLM

WITH_DECODER = {name: make for name, make in TOKENIZERS.items() if name != "words"}


def model(tokenizer, **settings):
    return LanguageModel(llama_network(vocab_size=len(tokenizer)), tokenizer, **settings)


def whole(tokenizer, prompt, row):
    return tokenizer.decode([*prompt, *row], skip_special_tokens=True)


# -- decoding ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokenizer", "prompt", "tokens", "text"),
    [
        (metaspace(), "My food", ["▁good"], " good"),
        (metaspace(), "My food", ["good", "▁good"], "good good"),
        (metaspace(), "My food", ["."], "."),
        (metaspace(), "My food ", ["good"], "good"),
        (metaspace(), "", ["▁good", "▁food"], "good food"),  # nothing before it: the beginning of a text
        (metaspace(), "My é", ["▁good"], " good"),
        (metaspace(), "中" * 9, ["<0xC3>", "<0xA9>"], "é"),  # whose context begins inside a character
        (metaspace(), "é", ["<0xC3>"], "\ufffd"),  # cut off: the decoder gives up the prompt's bytes as well
        (byte_level(), "My food", ["Ġgood"], " good"),
        (byte_level(), "My food", ["good"], "good"),
        (word_piece(), "My food is not", ["good"], " good"),
        (word_piece(), "I do", ["##ing", "good", "."], "ing good."),
        (word_piece(), "My food is good", [","], ","),
        (word_ends(), "My food", ["good</w>", "is</w>"], " good is"),
    ],
)
def test_the_text_is_what_a_completion_adds_to_its_prompt(tokenizer, prompt, tokens, text):
    lm = model(tokenizer)
    value = torch.tensor([tokenizer.convert_tokens_to_ids(tokens)])
    assert lm([prompt], len(tokens)).decode(value).tolist() == [text]
    assert lm.decode(value, [prompt]).tolist() == [text]


@pytest.mark.parametrize("name", WITH_DECODER)
def test_prompt_and_completion_are_the_text_of_their_tokens(name):
    """Whatever the tokens, special ones among them, and for long prompts, of which the end alone is decoded."""
    tokenizer = WITH_DECODER[name]()
    lm = model(tokenizer, eos_token_ids=())
    generator = torch.Generator().manual_seed(0)
    low = 3 + 256 * (name == "metaspace")  # its bytes are tested by hand
    names = [t for t in tokenizer.get_vocab() if t.strip("Ġ▁#</w>").isascii() and tokenizer.get_vocab()[t] >= low]
    usable = torch.tensor([1, *sorted(tokenizer.get_vocab()[t] for t in names)])
    prompts = [usable[torch.randint(len(usable), (n,), generator=generator)].tolist() for n in (3, 9, 40)]
    values = usable[torch.randint(len(usable), (20, 3, 6), generator=generator)]
    texts = lm(prompts, 6).decode(values)
    for i, prompt in enumerate(prompts):
        before = whole(tokenizer, prompt, [])
        assert [before + text for text in texts[:, i]] == [whole(tokenizer, prompt, x) for x in values[:, i].tolist()]


def test_a_character_may_begin_in_the_prompt():
    """Token ids that end inside a character: the completion's text begins with all of it."""
    for tokenizer, first, last in ((byte_level(), "Ã", "©"), (metaspace(), "<0xC3>", "<0xA9>")):
        before, after = tokenizer.convert_tokens_to_ids([first, last])
        prompt = [*tokenizer("My food")["input_ids"], before]
        value = torch.tensor([[after]])
        assert model(tokenizer)([prompt], 1).decode(value).tolist() == ["é"]


@pytest.mark.parametrize(("name", "text"), [("metaspace", " good"), ("word_piece", " good"), ("words", "good")])
def test_without_prompts_a_completion_continues_a_text(name, text):
    """A tokenizer without a decoder has words, which no space belongs to."""
    tokenizer = TOKENIZERS[name]()
    lm = model(tokenizer)
    token = tokenizer("good", add_special_tokens=False)["input_ids"][-1:]
    assert lm.decode(torch.tensor(token)).item() == text
    assert lm(["My food", "I do"], 1).decode(torch.tensor([token])).tolist() == [text]  # shared by two prompts
    with pytest.raises(ValueError, match=r"prompts of shape \(2,\) do not fit completions of \(3,\)"):
        lm.decode(torch.tensor([token] * 3), ["a", "I"])


def test_a_prompt_is_decoded_once(monkeypatch):
    """However many particles continue it, and each distinct completion once."""
    tokenizer = metaspace()
    lm = model(tokenizer)
    rows = []
    decode = type(tokenizer).batch_decode
    monkeypatch.setattr(
        type(tokenizer), "batch_decode", lambda self, x, **settings: rows.extend(x) or decode(self, x, **settings)
    )
    lm([[260] * 60, [261]], 2).decode(torch.tensor([[[262, 263], [262, 263]]]).repeat(50, 1, 1))
    assert len(rows) == 4
    assert max(map(len, rows)) < 20


def test_every_reward_of_whole_texts_sees_the_space():
    """Engines, twists of unfinished texts and posteriors: all have the text that the model has written."""
    tokenizer = metaspace()
    network = NGramForCausalLM(NGramConfig(vocab_size=len(tokenizer), order=1))
    network.table.data[:, :259] = -20.0  # no bytes, which are tested above
    lm = LanguageModel(network, tokenizer)
    seen = set()

    def judge(prompts, completions):
        texts = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
        seen.update(texts)
        return [float(" good" in text) for text in texts]

    program = TiltedLM(lm, rewards.Reward(judge, prefix=judge), beta=1.0, max_new_tokens=2)
    prompt = tokenizer("My food")["input_ids"]
    for engine in (
        ImportanceSampling(64, 1, seed=0, progress=False),
        SMC(64, 1, twist="prefix", seed=0, progress=False),
    ):
        seen.clear()
        posterior = engine.run(program, ["My food"])
        ids = posterior.samples["completion"].reshape(-1, 2).tolist()
        expected = {whole(tokenizer, prompt, row) for row in ids}
        assert {"My food" + text for text in posterior.texts["completion"].ravel()} == expected
        assert expected <= seen | {"My food"}
        assert any(text.startswith("My food ") for text in expected)
    unfinished = {whole(tokenizer, prompt, [token]) for token in range(259, len(tokenizer))}
    assert len(seen & unfinished) > 3


# -- encoding ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_what_a_tokenizer_appends_to_a_text_does_not_end_the_prompt(name, before, after):
    tokenizer = TOKENIZERS[name](before=before, after=after)
    lm = model(tokenizer, eos_token_ids=())
    inner = tokenizer("My food", add_special_tokens=False)["input_ids"]
    start = tokenizer("My food")["input_ids"][: int(before)]
    assert lm.encode_prompts(["My food"]).ids.tolist() == [[*start, *inner]]
    if before:
        assert lm.encode_prompts([""]).ids.tolist() == [start]
    elif lm.bos_token_id is not None:
        assert lm.encode_prompts([""]).ids.tolist() == [[lm.bos_token_id]]


def test_an_end_that_the_text_holds_stays():
    tokenizer = metaspace(after=True)
    ids = model(tokenizer).encode_prompts(["My food</s>"]).ids.tolist()
    assert ids == [tokenizer("My food</s>")["input_ids"][:-1]]
    assert ids[0][-1] == tokenizer.eos_token_id


def test_a_python_tokenizer_that_appends_an_end():
    tokenizer = ByT5Tokenizer(extra_ids=0)
    assert model(tokenizer).encode_prompts(["ab"]).ids.tolist() == [tokenizer("ab")["input_ids"][:-1]]
