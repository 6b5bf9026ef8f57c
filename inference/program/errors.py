"""What is wrong with a program, said so that its author knows what to do."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from pyro.distributions import Unit


class ProgramError(ValueError):
    """The program is not one that inference can run, or a term of its log-joint is not a number."""


_BRANCHES = ("is ambiguous", "only one element tensors", "a Tensor with", "only integer tensors of a single element")


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Around a run of a program: says why one whose Python code asks for one value cannot be run for all prompts and
    particles at once.

    A factor that is not a number passes, to where its text is told (`runs.site_terms`): Pyro's own check of it shows
    all factors and no text.
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
