"""Chats as texts, by the template of a tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def chat_text(name: str, chat: Sequence[Mapping[str, Any]], tokenizer: Any) -> str:
    """Return the text that a language model continues: up to where the assistant's answer begins.

    A chat whose last turn is the assistant's ends inside that turn, which the model continues.

    :param name: of the prompt, for errors.
    :param chat: messages with a role and a content, which is a string or a list of parts ``{"type": "text", "text":
        ...}``; what else they hold is the template's business.
    :param tokenizer: with a chat template.
    :raises TypeError: if there is no template, or a message is of another form.
    :raises ValueError: if a message has a part other than text, or the template refuses the chat.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        raise TypeError(f"{name} is a chat, and this LanguageModel's tokenizer has no chat template")
    strings = [plain_message(f"{name}, message {j}", message) for j, message in enumerate(chat)]
    try:
        text = _render(tokenizer, strings)
        if _holds_any(text, strings):
            return text
        cause = None
    except Exception as error:  # of whatever type: a template is a program
        text, cause = "", error
    try:  # templates of models for texts and images read contents as parts only
        other = _render(tokenizer, [_in_parts(message) for message in strings])
        if _holds_any(other, strings) and "'type': 'text'" not in other:  # which is a list that was written as it is
            return other
    except Exception as error:
        cause = cause or (None if text else error)
    if cause is not None:
        reason = " ".join(str(cause).split())[:300] or type(cause).__name__
        raise ValueError(f"{name}: the tokenizer's chat template refuses this chat: {reason}") from cause
    return text


def _holds_any(text: str, chat: list[dict[str, Any]]) -> bool:
    """Return whether a text holds the content of a message, or no message has any."""
    contents = [message["content"].strip() for message in chat if message.get("content")]
    return not contents or any(content in text for content in contents)


def _render(tokenizer: Any, chat: list[dict[str, Any]]) -> str:
    continues = chat[-1].get("role") == "assistant" and "content" in chat[-1]
    how = {"continue_final_message": True} if continues else {"add_generation_prompt": True}
    return str(tokenizer.apply_chat_template(chat, tokenize=False, **how))


def plain_message(name: str, message: Any) -> dict[str, Any]:
    """Return a message whose content is a string, if it has any."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise TypeError(f'{name} is {message!r:.60}: a message is {{"role": ..., "content": ...}}')
    content = message.get("content")
    if isinstance(content, list | tuple):
        content = "".join(_text_of(name, part) for part in content)
    if not isinstance(content, str | None):
        raise TypeError(f"{name} has content {content!r:.60}: it must be a string, or a list of parts of text")
    return {key: value for key, value in (*message.items(), ("content", content)) if value is not None}


def _text_of(name: str, part: Any) -> str:
    """Return the text of a part of a content."""
    if isinstance(part, str):
        return part
    kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
    if kind != "text" or not isinstance(part.get("text"), str):
        raise ValueError(f"{name} has a part of type {kind!r} without text: only parts of text are read")
    return str(part["text"])


def _in_parts(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message whose content is a list of one part."""
    content = message.get("content")
    return message if content is None else message | {"content": [{"type": "text", "text": content}]}
