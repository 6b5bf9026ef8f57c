"""A judge at the terminal: shows a prompt with two completions and reads a key."""

from __future__ import annotations

from .console import out_console


class Undo(Exception):
    """The judge takes the last answer back."""


class Quit(Exception):
    """The judge ends the session."""


class TerminalJudge:
    """Asks the person at the terminal which of two completions is better."""

    def __call__(self, prompt: str, first: str, second: str) -> bool | None:
        """Return whether the first is better, or None to skip the pair.

        :raises Undo: to take the last answer back.
        :raises Quit: to end the session, also at the end of the input.
        """
        out_console.print()
        out_console.print(prompt, style="bold")
        for key, text in zip("12", one_line(first, second), strict=True):
            out_console.print(f"  {key}  {text}")
        while True:
            try:
                key = out_console.input("better: 1 or 2 (s skip, u undo, q quit) ").strip().lower()
            except EOFError:
                raise Quit from None
            if key in ("1", "2"):
                return key == "1"
            if key == "s":
                return None
            if key == "u":
                raise Undo
            if key == "q":
                raise Quit
            out_console.print(f"{key!r} is none of 1, 2, s, u, q")


def one_line(first: str, second: str) -> tuple[str, str]:
    """Return two texts on a line each; in quotes, with all whitespace, if they differ in whitespace only."""
    one, two = (" ".join(text.split()) for text in (first, second))
    return (one, two) if one != two else (repr(first), repr(second))
