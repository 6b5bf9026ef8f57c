r"""Docstrings as Sphinx reads them: plain text with code in back-ticks, lists and fields, and formulas as typed.

So outside of code the characters that reStructuredText takes for markup (the star of π* or *batch, bars, backslashes)
are themselves, names of TeX are the symbols they stand for, and an indented paragraph is shown as it is typed.
"""

from __future__ import annotations

import re
from typing import Any

from sphinx.application import Sphinx

SYMBOLS = {
    "pm": "±",
    "in": "∈",
    "geq": "≥",
    "sum": "∑",
    "prod": "∏",
    "sqrt": "√",
    "nabla": "∇",
    "propto": "∝",
    "succ": "≻",
}
SYMBOLS |= {name: name for name in ("log", "exp", "argmax", "argmin")}
SYMBOLS |= dict(zip(("alpha", "beta", "gamma", "delta", "epsilon", "theta", "lambda", "mu"), "αβγδεθλμ", strict=True))
SYMBOLS |= dict(zip(("pi", "sigma", "tau", "phi", "psi", "Delta", "Lambda"), "πστφψΔΛ", strict=True))
ACCENTS = {"hat": "\N{COMBINING CIRCUMFLEX ACCENT}", "bar": "\N{COMBINING MACRON}", "tilde": "\N{COMBINING TILDE}"}
CODE = re.compile(r"(``.+?``|`[^`]+`|:\w+(?: [^:]*)?:(?=\s|$))")
EMPHASIS = re.compile(r"(?<![\w*])\*[A-Za-z][A-Za-z ]*\*(?![\w*])")


def symbols(text: str) -> str:
    r"""Replace ``\psi`` by ψ, and ``\hat Z`` by Z with a hat."""
    text = re.sub(r"\\(hat|bar|tilde)\s*\{?\\?(\w+)\}?", _accented, text)
    return re.sub(r"\\([A-Za-z]+)", lambda m: SYMBOLS.get(m[1], m[0]), text)


def _accented(match: re.Match[str]) -> str:
    letter = SYMBOLS.get(match[2], match[2])
    return letter[0] + ACCENTS[match[1]] + letter[1:]


def escaped(text: str) -> str:
    """Escape what is no markup in a line, outside of code."""
    parts = CODE.split(text)
    for i in range(0, len(parts), 2):
        kept = EMPHASIS.findall(parts[i])
        pieces = EMPHASIS.split(parts[i])
        pieces = [re.sub(r"([\\*|])", r"\\\1", symbols(piece)) for piece in pieces]
        pieces = [re.sub(r"(\w)_(?!\w)", r"\1\\_", piece) for piece in pieces]
        parts[i] = "".join(a + b for a, b in zip(pieces, [*kept, ""], strict=True))
    return "".join(parts)


def as_restructured_text(lines: list[str]) -> list[str]:
    """Return a docstring's lines with its plain text escaped and its indented paragraphs as literal blocks."""
    result: list[str] = []
    typed = False
    for line in lines:
        indented = line.startswith("  ")
        if typed and line.strip() and not indented:
            typed = False
            if result[-1]:
                result.append("")
        if not typed and indented and (not result or not result[-1]):
            typed = True
            result += ["::", ""]
        result.append(symbols(line) if typed else escaped(line))
    return result


def process(app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Rewrite the docstring of something; a plain value has none of its own."""
    if what in ("data", "attribute") and lines and not callable(thing) and thing is not None:
        of_type = type(thing).__doc__
        if isinstance(of_type, str) and "\n".join(lines).strip().split("\n")[0] == of_type.strip().split("\n")[0]:
            lines.clear()
    lines[:] = as_restructured_text(lines)


def plain_signature(
    app: Sphinx, what: str, name: str, thing: Any, options: Any, signature: str | None, returned: str | None
) -> tuple[str | None, str | None]:
    """Leave out of a signature what `validated` reads, and defaults that have no literal: the docstring says both."""

    def plain(text: str | None) -> str | None:
        if text is None:
            return None
        text = re.sub(r"~?typing\.Annotated\[(.*?), <bayeslm\.validation\.[\w.]+ object at \w+>\]", r"\1", text)
        text = re.sub(r"~?typing\.Annotated\[(.*?), <class 'bayeslm\.validation\.\w+'>\]", r"\1", text)
        return re.sub(r"<[^<>]*>", "...", text)

    return plain(signature), plain(returned)


def setup(app: Sphinx) -> dict[str, bool]:
    """Register `process` and `plain_signature`."""
    app.connect("autodoc-process-docstring", process)
    app.connect("autodoc-process-signature", plain_signature)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
