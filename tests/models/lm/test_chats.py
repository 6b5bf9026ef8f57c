"""Chats: answered or continued, in every form of content; a template's own error is one line."""

from collections import UserList
from types import MappingProxyType

import pytest
from support.models import tiny_llama

from bayeslm.chats import has_speakers, is_chat
from bayeslm.models.rewards import Reward

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' and false %}{% endif %}"
    "{{ {'user': 'a', 'system': 'b', 'assistant': 'c', 'tool': 'd'}[m.role] }} {{ m.content }} f {% endfor %}"
    "{% if add_generation_prompt %}c{% endif %}"
)
IN_PARTS = TEMPLATE.replace("{{ m.content }}", "{% for p in m.content %}{{ p.text }} {% endfor %}")


def turn(role, content):
    return {"role": role, "content": content}


def texts(template, *chats):
    lm = tiny_llama()
    lm.tokenizer.chat_template = template
    return lm(list(chats), 2).prompt_texts()


@pytest.mark.parametrize("template", [TEMPLATE, IN_PARTS])
@pytest.mark.parametrize(
    ("chat", "text"),
    [
        ([turn("user", "e")], "a e f c"),
        ([turn("system", "g"), turn("user", "e")], "b g f a e f c"),
        ([turn("user", "e"), turn("assistant", "g")], "a e f c g"),  # continued
        ([turn("user", "e"), turn("assistant", "g"), turn("user", "e")], "a e f c g f a e f c"),
        ([turn("user", "e"), turn("assistant", "g"), turn("tool", "e")], "a e f c g f d e f c"),
        ([turn("user", "e"), turn("assistant", "")], "a e f c"),
        ([turn("user", [{"type": "text", "text": "e"}])], "a e f c"),
        ([turn("user", [{"type": "text", "text": "e "}, {"type": "text", "text": "g"}])], "a e g f c"),
        ([turn("user", ["e"]), turn("assistant", [{"type": "text", "text": "g"}])], "a e f c g"),
        (({"role": "user", "content": "e", "name": None},), "a e f c"),
    ],
)
def test_a_chat_is_answered_or_continued(template, chat, text):
    assert texts(template, chat, "e") == [text, "e"]


@pytest.mark.parametrize(
    ("prompt", "chat", "speakers"),
    [
        ([turn("user", "e")], True, True),
        ((turn("user", "e"), turn("assistant", "g")), True, True),
        (UserList([turn("user", "e")]), True, True),
        ([MappingProxyType(turn("user", "e"))], True, True),
        ([{"text": "e"}], True, False),  # a row of a column, which no language model reads
        ([{"role": 1, "content": "e"}], True, False),
        ([turn("user", "e"), "g"], True, False),
        (["g", turn("user", "e")], False, False),
        ([], False, False),
        ((), False, False),
        ("e", False, False),
        ("", False, False),
        ([2, 3], False, False),
        ([[turn("user", "e")]], False, False),  # a list of chats
    ],
)
def test_a_chat_is_told_by_one_rule(prompt, chat, speakers):
    """The prompt that a language model reads as a chat is one to which rewards see an answer as a message."""
    assert (is_chat(prompt), has_speakers(prompt)) == (chat, speakers)
    if speakers:
        assert texts(TEMPLATE, prompt) == texts(TEMPLATE, [dict(message) for message in prompt])
    if chat:
        with pytest.raises(TypeError, match="chat template" if speakers else "chat template|a message is"):
            tiny_llama()([prompt], 2)
    seen = []
    Reward(lambda completions, **_: seen.extend(completions) or [0.0] * len(completions))([prompt], ["text"])
    assert seen == [[turn("assistant", "text")] if chat else "text"]


def test_a_template_that_drops_a_message_is_used_as_it_is():
    template = "{% for m in messages if m.role != 'system' %}{{ m.content }} {% endfor %}"
    assert texts(template, [turn("system", "g"), turn("user", "e")]) == ["e"]


def test_messages_are_not_changed():
    chat = [turn("user", [{"type": "text", "text": "e"}]), turn("assistant", "g")]
    texts(TEMPLATE, chat)
    assert chat == [turn("user", [{"type": "text", "text": "e"}]), turn("assistant", "g")]


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('System role not\\nsupported') }}", "System role not supported"),
        ("{{ messages[0].x.y }}", "has no attribute 'x'"),
        ("{% for %}", "Expected an expression"),
        ("{{ messages[0].content + 1 }}", "concatenate"),
        ("{{ 1 // 0 }}", "zero"),
    ],
)
def test_an_error_of_the_template_is_one_line(template, reason):
    refused(template, [turn("user", "e")], reason)


def test_a_template_that_drops_the_turn_to_continue_is_refused():
    chat = [turn("user", "e"), turn("assistant", "g")]
    refused("{% for m in messages %}{{ m.content if m.role == 'user' }}{% endfor %}", chat, "final message")


def refused(template, chat, reason):
    lm = tiny_llama()
    lm.tokenizer.chat_template = template
    with pytest.raises(ValueError, match=reason) as caught:
        lm([[1], chat], 2)
    assert str(caught.value).startswith("prompts[1]: the tokenizer's chat template refuses this chat: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("message", "error", "match"),
    [
        (turn("user", [{"type": "image", "url": "x"}]), ValueError, "has a part of type 'image' without text"),
        (turn("user", [{"type": "image_url", "text": "e"}]), ValueError, "type 'image_url'"),
        (turn("user", [{"type": "text"}]), ValueError, "type 'text' without text"),
        (turn("user", [3]), ValueError, "type 'int'"),
        (turn("user", 3), TypeError, "has content 3: it must be a string, or a list of parts"),
        ({"content": "e"}, TypeError, "a message is"),
        ("e", TypeError, "'e': a message is"),
    ],
)
def test_messages_that_are_refused(message, error, match):
    lm = tiny_llama()
    lm.tokenizer.chat_template = TEMPLATE
    with pytest.raises(error, match=r"prompts\[0\], message 1") as caught:
        lm([[turn("user", "e"), message]], 2)
    assert match in str(caught.value)
