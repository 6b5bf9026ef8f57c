"""Texts of models, files and errors for a terminal, on which some characters are commands."""

from __future__ import annotations

import re
import unicodedata

UNSAFE = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}  # controls, bidi and zero-width marks, lone surrogates, ...
BLANK = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u3164\ufe00-\ufe0d\uffa0\U000e0100-\U000e01ef]")
_SHAPES = re.compile(r"\n *Trace Shapes:.*", re.DOTALL)


def visible(text: str) -> str:
    r"""Return a text with an escape such as ``\x1b`` in the place of each character that would not be shown.

    Those are characters that a terminal obeys, that change the order of others, or that have no width. Line feeds and
    tabs are kept.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if _is_shown(c) else c.encode("unicode_escape").decode() for c in text)


def _is_shown(character: str) -> bool:
    if character in "\n\t":
        return True
    return unicodedata.category(character) not in UNSAFE and not BLANK.match(character)


def message_of(error: BaseException) -> str:
    """Return an error's message without the table of shapes, aligned on the right, that Pyro appends to it."""
    return _SHAPES.sub("", str(error)).strip()
