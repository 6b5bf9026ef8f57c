"""Errors of programs; their messages say what to do."""

from __future__ import annotations


class ProgramError(ValueError):
    """Inference cannot run the program, or a term of its log-joint is NaN or +inf."""


class EvidenceError(ProgramError):
    """No particle has positive posterior probability, so there are no draws to return.

    ``survivors``: by `SMC`, the texts that were alive until the step at which all particles died.
    """

    survivors: tuple[str, ...] = ()
