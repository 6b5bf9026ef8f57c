"""What a run has when Ctrl-C or an error stops it: kept by one context manager, carried by one exception."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from .particles import Particles


@dataclass(frozen=True)
class SoFar:
    """The results of a run that did not end.

    :param particles: the particles drawn or moved until then.
    :param policies: of `SVI`, the trained language models, one a chain (None of a chain whose guide has none).
    :param step: of `SVI`, the number of finished steps of the last chain.
    :param checkpoint: of `SVI`, the folder of the last checkpoint.
    """

    particles: Particles | None = None
    policies: tuple[Any, ...] = ()
    step: int | None = None
    checkpoint: str | None = None

    @property
    def policy(self) -> Any:
        """The last chain's policy, or None."""
        return self.policies[-1] if self.policies else None

    def __str__(self) -> str:
        parts = []
        if self.particles is not None:
            parts.append(f"{len(self.particles)} particles")
        if any(policy is not None for policy in self.policies):
            parts.append("the trained policy" if len(self.policies) == 1 else f"{len(self.policies)} trained policies")
        if self.step is not None:
            parts.append(f"{self.step} steps")
        return ", ".join(parts) or "nothing"


class RunError(RuntimeError):
    """An error stopped a run that had results already: they are ``so_far``, and the error is the ``__cause__``."""

    def __init__(self, message: str, so_far: SoFar) -> None:
        super().__init__(message)
        self.so_far = so_far


@dataclass
class Interruption:
    """Whether Ctrl-C ended the block of `keeping`."""

    interrupted: bool = False


@contextlib.contextmanager
def keeping(so_far: Callable[[], SoFar | None], *, can_return: bool = True) -> Iterator[Interruption]:
    """Keep the results of a run that Ctrl-C or an error stops inside the block.

    Ctrl-C ends the block: the code after it returns the results, and the yielded object says ``interrupted``. An error
    is raised again as a `RunError` that carries the results. Where there are none yet, both pass unchanged.

    :param so_far: called when the block is stopped; returns the results, or None if there are none.
    :param can_return: False where the code after the block needs all of it: Ctrl-C is a `RunError` too.
    :raises RunError: on an error after the first results.
    """
    run = Interruption()
    try:
        yield run
    except (Exception, KeyboardInterrupt) as error:
        kept = so_far()
        if kept is not None and can_return and isinstance(error, KeyboardInterrupt):
            run.interrupted = True
            return
        inner = error.so_far if isinstance(error, RunError) else None
        if kept is None or kept == inner:
            raise
        if inner is not None and kept.particles is None:
            kept = replace(kept, particles=inner.particles)
        cause = error.__cause__ if isinstance(error, RunError) and error.__cause__ is not None else error
        text = str(cause).partition("\nTrace Shapes:")[0].rstrip()  # which Pyro appends to errors of a program
        what = "interrupted" if isinstance(cause, KeyboardInterrupt) else f"{type(cause).__name__}: {text}"
        message = f"{what}\nThe run has {kept} so far: this error carries them as .so_far"
        raise RunError(message, kept) from cause
