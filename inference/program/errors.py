"""Errors of programs, whose messages say what to do, and the context that explains Python's own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from pyro.distributions import Unit


class ProgramError(ValueError):
    """Inference cannot run the program, or a term of its log-joint is NaN or +inf."""


class EvidenceError(ProgramError):
    """No particle has positive posterior probability, so there are no draws to return.

    ``survivors``: by `SMC`, the texts that were alive until the step at which all particles died.
    """

    survivors: tuple[str, ...] = ()


_BRANCHES = ("is ambiguous", "only one element tensors", "a Tensor with", "only integer tensors of a single element")


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Explain errors of a program whose Python code needs a single value, where engines run many particles at once.

    A factor that is NaN passes, to `run.score_sites`, whose error shows its text; Pyro's own check, when the factor is
    made, shows all factors and no text. Pyro makes the factor's `Unit` distribution inside `pyro.factor`, and offers no
    argument or handler that turns off this one check: the class attribute that it reads is replaced for the block.
    """
    own = vars(Unit).get("_validate_args")
    Unit._validate_args = False
    try:
        yield
    except (RuntimeError, ValueError, TypeError) as error:
        if not any(sign in str(error) for sign in _BRANCHES):
            raise
        raise ProgramError(
            "the program's Python code needs a single value where each prompt and particle has its own "
            f"({str(error).splitlines()[0]}): engines run all of them at once and cannot follow each one's branch. Use "
            "torch.where, or ImportanceSampling(vectorize=False) with one prompt"
        ) from error
    finally:
        if own is None:
            del Unit._validate_args
        else:
            Unit._validate_args = own
