"""What surrounds the algorithm of every engine: random states, time and usage, and Ctrl-C and errors."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from pyro.util import set_rng_seed
from torch import Tensor

from bayeslm.models.lm import count_usage

# -- random states -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RandomStates:
    """A snapshot of the random states of torch, of each CUDA device, of NumPy and of Python."""

    torch: Tensor
    cuda: dict[int, Tensor]
    numpy: Any
    python: Any

    @staticmethod
    def now() -> RandomStates:
        """Return a snapshot of the states now."""
        cuda = dict(enumerate(torch.cuda.get_rng_state_all())) if torch.cuda.is_available() else {}
        return RandomStates(torch.get_rng_state(), cuda, np.random.get_state(), random.getstate())  # noqa: NPY002

    def restore(self) -> None:
        """Restore the snapshot; states of devices that this machine lacks are ignored."""
        torch.set_rng_state(self.torch)
        for i, state in self.cuda.items():
            if i < torch.cuda.device_count():
                torch.cuda.set_rng_state(state, i)
        np.random.set_state(self.numpy)  # noqa: NPY002
        random.setstate(self.python)

    def saved(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the snapshot as tensors and as values that JSON can hold."""
        kind, keys, *rest = self.numpy
        version, inside, gauss = self.python
        tensors = {"rng.torch": self.torch} | {f"rng.cuda.{i}": state for i, state in self.cuda.items()}
        return tensors, {"numpy": [kind, keys.tolist(), *rest], "random": [version, list(inside), gauss]}

    @staticmethod
    def of(tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> RandomStates:
        """Return the snapshot from what `saved` returned."""
        cuda = {int(key.rpartition(".")[2]): x for key, x in tensors.items() if key.startswith("rng.cuda.")}
        kind, keys, *rest = values["numpy"]
        version, inside, gauss = values["random"]
        numpy = (kind, np.array(keys, dtype=np.uint32), *rest)
        return RandomStates(tensors["rng.torch"], cuda, numpy, (version, tuple(inside), gauss))


@contextlib.contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Seed torch, NumPy and Python's random for the block and restore their states after it; None changes nothing."""
    if seed is None:
        yield
        return
    before = RandomStates.now()
    set_rng_seed(seed)
    try:
        yield
    finally:
        before.restore()


# -- time and usage -----------------------------------------------------------------------------------------------


class Stopwatch:
    """Measure the seconds of its block and count the networks' work in it: the start of every engine's ``stats``."""

    def __enter__(self) -> Stopwatch:
        self._counting = count_usage()
        self.usage = self._counting.__enter__()
        self._start = time.perf_counter()
        return self

    def __exit__(self, *error: Any) -> None:
        self._counting.__exit__(None, None, None)

    def seconds(self) -> float:
        return time.perf_counter() - self._start

    def snapshot(self) -> dict[str, Any]:
        """The counts so far, as numbers, for `resume`."""
        return {"seconds": self.seconds()} | self.usage.state_dict()

    def resume(self, seconds: float, **numbers: Any) -> None:
        """Count on from a `snapshot`: the work of a run that is resumed."""
        self._start = time.perf_counter() - seconds
        self.usage.load_state_dict(numbers)

    def stats(self) -> dict[str, Any]:
        """Return ``seconds``, ``tokens``, ``model_calls``, and ``mismatch`` (the largest, the mean a token) if any."""
        stats = {"seconds": self.seconds(), "tokens": self.usage.tokens, "model_calls": self.usage.model_calls}
        return stats if self.usage.mismatch is None else stats | {"mismatch": list(self.usage.mismatch)}


# -- Ctrl-C and errors --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SoFar:
    """The results of a run that did not end.

    :param particles: the `Particles` drawn or moved until then, or None.
    :param policies: of `SVI`, the trained language models, one a chain (None of a chain whose guide has none).
    :param step: of `SVI`, the number of finished steps of the last chain.
    :param checkpoint: of `SVI`, the folder of the last checkpoint.
    """

    particles: Any = None
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
