"""Completions that an engine is asked for before they are needed, and draws while the run goes on.

A request is made in the run's own thread, where the engine takes over what it needs of the weights (`prepare`); another
thread then waits for the engine, lots one after another. What comes back when it is needed depends on no clock.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol

from .remembered import remembered
from .scopes import having


class PreparedSampler(Protocol):
    """A sampler that draws elsewhere: what it needs of the weights it takes over at once."""

    def prepare(self, request: Any, /) -> Callable[[], Any]:
        """Hand over the request's weights, and return what draws by them, while they change here."""


class Asked(BaseException):  # which a program's own `except Exception` lets through
    """A lot has its request: the block that makes it ends."""


@dataclass(eq=False)
class Lot:
    """One request and, later, its draws.

    :param before: the lot that is drawn before it, if one is.
    """

    before: Lot | None
    request: Any = None
    taken: bool = False
    draws: Any = None
    error: BaseException | None = None
    done: threading.Event = field(default_factory=threading.Event)

    def answer(self, sampler: Any, request: Any) -> Any:
        """Return the draws of a request: the lot's own if it is its first; before it has one it is made the lot's.

        :raises Asked: when the lot has got its request.
        """
        if self.taken:  # a later completion of the same program, whose prompts were not known
            return sampler.draw(request)
        if self.request is None:
            if not hasattr(sampler, "prepare"):
                raise TypeError(
                    "it draws with the network that is trained, while it is trained: Ahead needs an engine of its own, "
                    "such as VLLMServer, whose method `prepare` takes over the weights"
                )
            draw, self.request = sampler.prepare(request), request
            threading.Thread(target=self._draw, args=(draw,), daemon=True).start()
            raise Asked
        if request._replace(weights=None) != self.request._replace(weights=None):
            raise ValueError(
                "its prompts are others now than when it was asked for them: they depend on a latent that the policy "
                "draws. Leave out Ahead"
            )
        self.taken = True
        self.done.wait()
        if self.error is not None:
            raise self.error
        return self.draws

    def _draw(self, draw: Callable[[], Any]) -> None:
        try:
            if self.before is not None:
                self.before.done.wait()
            self.draws = draw()
        except BaseException as error:  # which the run's own thread raises
            self.error = error
        finally:
            self.before = None
            self.done.set()


_lot: ContextVar[Lot | None] = ContextVar("bayeslm_lot", default=None)


def asked_ahead() -> Lot | None:
    """Return the lot that the next request of a sampler is of, if it is of one."""
    return _lot.get()


@contextlib.contextmanager
def asking_ahead(key: int) -> Iterator[Lot]:
    """Make the first request of a sampler in the block, which ends there, that of the run's lot ``key``."""
    lots = remembered().lots
    lots[key] = lot = Lot(next(reversed(lots.values()), None))
    with having(_lot, lot), contextlib.suppress(Asked):
        yield lot


@contextlib.contextmanager
def answering(key: int) -> Iterator[None]:
    """Answer the first request of a sampler in the block by the run's lot ``key``; if the run has none, as always."""
    with having(_lot, remembered().lots.pop(key, None)):
        yield
