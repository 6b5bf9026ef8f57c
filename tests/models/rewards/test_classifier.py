"""Sequence classifiers as rewards, against direct forward passes of tiny random ones."""

import math

import pytest
import torch

from bayeslm.models.rewards import Classifier, RewardError

NEG_INF = -math.inf
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "<s>", "|", "user", "assistant", "hello"]
WORDS += ["the", "dinner", "was", "good", "bad", "not", "very"]
PROMPTS = ["the dinner was", "hello", "the dinner"]
REPLIES = [" good", " not very bad not very bad", ""]
CHAT = "{% for m in messages %}<s> {{ m['role'] }} | {{ m['content'] }} {% endfor %}"


def tokenizer(kind):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    fast = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ends = {"bert": "[CLS] $A [SEP]", "llama": "<s> $A"}[kind]
    special = [(word, WORDS.index(word)) for word in ("[CLS]", "[SEP]", "<s>")]
    fast.post_processor = processors.TemplateProcessing(single=ends, special_tokens=special)
    return PreTrainedTokenizerFast(
        tokenizer_object=fast, unk_token="[UNK]", pad_token="[PAD]", chat_template=CHAT, model_max_length=32
    )


def network(kind, labels, **settings):
    from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    settings = {"vocab_size": len(WORDS), "pad_token_id": 0, "initializer_range": 0.5, **size, **settings}
    names = dict(enumerate(labels))
    settings |= {"id2label": names, "label2id": {name: i for i, name in names.items()}}
    if kind == "bert":
        return BertForSequenceClassification(BertConfig(**settings, max_position_embeddings=64))
    return LlamaForSequenceClassification(LlamaConfig(**settings, num_key_value_heads=2))


def direct(model, words, texts, **settings):
    """Logits of one text at a time, so of no padding: shape (texts, labels)."""
    model.eval()
    with torch.no_grad():
        return torch.cat([model(**words(text, return_tensors="pt", **settings)).logits for text in texts])


@pytest.mark.parametrize("batch_size", [2, 32])
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_reward_model_gives_its_logit_in_any_batch(kind, batch_size, tmp_path):
    network(kind, ["LABEL_0"]).save_pretrained(tmp_path)
    tokenizer(kind).save_pretrained(tmp_path)
    reward = Classifier(str(tmp_path), batch_size=batch_size)
    scores = reward(PROMPTS, [REPLIES, REPLIES[::-1]])
    texts = [p + c for row in (REPLIES, REPLIES[::-1]) for p, c in zip(PROMPTS, row, strict=True)]
    expected = direct(network(kind, ["LABEL_0"]), tokenizer(kind), texts)[:, 0].reshape(2, 3)
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=0)
    assert expected.std() > 0.01
    assert (reward.lower_bound, reward.upper_bound) == (NEG_INF, math.inf)
    alone = Classifier(tmp_path, on="completion", batch_size=batch_size)(PROMPTS[:2], REPLIES[:2])
    torch.testing.assert_close(alone, direct(reward.model, tokenizer(kind), REPLIES[:2])[:, 0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_network_that_is_handed_in_with_and_without_padding_token(kind):
    model, words = network(kind, ["LABEL_0"], pad_token_id=None).train(), tokenizer(kind)
    scores = Classifier(model, words)(PROMPTS, REPLIES)  # evaluation mode: no dropout
    texts = [p + c for p, c in zip(PROMPTS, REPLIES, strict=True)]
    torch.testing.assert_close(scores, direct(model, words, texts)[:, 0], atol=1e-5, rtol=0)


def test_scores_are_float32_in_a_half_precision_network():
    model, words = network("bert", ["A", "B"], pad_token_id=None).bfloat16(), tokenizer("bert")
    logits = direct(model, words, [p + c for p, c in zip(PROMPTS, REPLIES, strict=True)])
    scores = Classifier(model, words, label="B")(PROMPTS, REPLIES)
    assert torch.equal(scores, logits.float().log_softmax(-1)[:, 1])
    assert not torch.equal(scores, logits.log_softmax(-1)[:, 1].float())


def test_one_label_of_several():
    model, words = network("bert", ["NEGATIVE", "NEUTRAL", "POSITIVE"]), tokenizer("bert")
    logits = direct(model, words, [p + c for p, c in zip(PROMPTS, REPLIES, strict=True)])
    for label, output, expected, bounds in [
        ("POSITIVE", None, logits.log_softmax(-1)[:, 2], (NEG_INF, 0.0)),
        (1, "log_prob", logits.log_softmax(-1)[:, 1], (NEG_INF, 0.0)),
        ("NEGATIVE", "prob", logits.softmax(-1)[:, 0], (0.0, 1.0)),
        ("POSITIVE", "logit", logits[:, 2], (NEG_INF, math.inf)),
    ]:
        reward = Classifier(model, words, label=label, output=output)
        torch.testing.assert_close(reward(PROMPTS, REPLIES), expected, atol=1e-5, rtol=0)
        assert (reward.lower_bound, reward.upper_bound) == bounds
    model.config.problem_type = "multi_label_classification"
    scores = Classifier(model, words, label="NEUTRAL", output="prob")(PROMPTS, REPLIES)
    torch.testing.assert_close(scores, logits.sigmoid()[:, 1], atol=1e-5, rtol=0)


def test_chats_go_through_the_classifiers_template():
    model, words = network("llama", ["LABEL_0"]), tokenizer("llama")
    chats = [[{"role": "user", "content": "hello"}], [{"role": "user", "content": "the dinner was bad"}]]
    texts = ["<s> user | hello <s> assistant | good ", "<s> user | the dinner was bad <s> assistant | not good "]
    scores = Classifier(model, words)(chats, ["good", "not good"])
    expected = direct(model, words, texts, add_special_tokens=False)[:, 0]
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=0)
    with pytest.raises(RewardError, match="token ids are another tokenizer's"):
        Classifier(model, words)([[5, 6]], ["good"])
    words.chat_template = None
    with pytest.raises(RewardError, match="chat_template"):
        Classifier(model, words)(chats, ["good", "not good"])


def test_texts_are_cut_only_on_request():
    model, words = network("bert", ["LABEL_0"]), tokenizer("bert")
    long = " good" * 40
    with pytest.raises(RewardError, match=r"a text of 43 tokens is longer than the network.s 32: set max_length"):
        Classifier(model, words)(["hello"], ["", long])
    scores = Classifier(model, words, max_length=8)(["hello"], ["", long])
    expected = direct(model, words, ["hello", "hello" + " good" * 5])[:, 0]
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match=r"max_length must be in 1..32, got 64"):
        Classifier(model, words, max_length=64)


@pytest.mark.parametrize(
    ("labels", "settings", "message"),
    [
        (["NEG", "POS"], {}, "label must be one of 'NEG', 'POS', got None"),
        (["NEG", "POS"], {"label": "POSI"}, "got 'POSI'; did you mean 'POS'"),
        (["NEG", "POS"], {"label": 2}, "got 2"),
        (["LABEL_0"], {"label": "POS"}, "label must be one of 'LABEL_0', got 'POS'"),
        (["LABEL_0"], {"output": "prob"}, "a network with one label gives a logit"),
        (["LABEL_0"], {"output": "odds"}, "output must be one of 'logit', 'log_prob', 'prob' or None, got 'odds'"),
        (["LABEL_0"], {"on": "prompt"}, "on must be"),
        (["LABEL_0"], {"batch_size": 0}, "batch_size must be a positive whole number"),
        (["LABEL_0"], {"tokenizer": None}, "needs its tokenizer"),
    ],
)
def test_classifier_settings_that_do_not_fit(labels, settings, message):
    with pytest.raises(ValueError, match=message):
        Classifier(network("bert", labels), **{"tokenizer": tokenizer("bert"), **settings})


def test_a_checkpoint_without_a_head_is_no_classifier(tmp_path):
    network("bert", ["LABEL_0"]).bert.save_pretrained(tmp_path)
    tokenizer("bert").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"is no trained sequence classifier: it lacks classifier\.bias"):
        Classifier(tmp_path)
    with pytest.raises(OSError, match="nowhere"):
        Classifier(tmp_path / "nowhere")


def test_other_types_are_refused_by_name():
    with pytest.raises(TypeError, match=r"model must be a .*ForSequenceClassification network.* a Linear"):
        Classifier(torch.nn.Linear(2, 2), tokenizer("bert"))
    with pytest.raises(TypeError, match="tokenizer must be one of transformers, got True"):
        Classifier(network("bert", ["LABEL_0"]), True)
