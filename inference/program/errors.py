"""Errors of programs; their messages say what to do."""

from __future__ import annotations

import re

_SHAPES = re.compile(r"\n *Trace Shapes:.*", re.DOTALL)  # a table that Pyro appends, aligned on the right


class ProgramError(ValueError):
    """Inference cannot run the program, or a term of its log-joint is NaN or +inf."""


class EvidenceError(ProgramError):
    """No particle has positive posterior probability, so there are no draws to return.

    ``survivors``: by `SMC`, the texts that were alive until the step at which all particles died.
    """

    survivors: tuple[str, ...] = ()


def message_of(error: BaseException) -> str:
    """Return an error's message without the table of shapes that Pyro appends to errors of a program."""
    return _SHAPES.sub("", str(error)).strip()
