"""What a chat is, wherever a prompt may be a text, a chat or token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def is_chat(value: Any) -> bool:
    """Return whether a prompt or a completion is a chat: a sequence of messages, which are mappings.

    The first entry tells: what begins as a chat is refused as a chat, with the message that is none.
    """
    return isinstance(value, Sequence) and len(value) > 0 and isinstance(value[0], Mapping)


def has_speakers(value: Any) -> bool:
    """Return whether a value is a chat each of whose messages says who speaks.

    It is asked of values that need not be prompts, such as columns of a reward, whose mappings may be anything.
    """
    return is_chat(value) and all(isinstance(turn, Mapping) and isinstance(turn.get("role"), str) for turn in value)
