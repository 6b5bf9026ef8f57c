r"""The contexts in which a program runs: minibatches of prompts, assigned values, random states, explained errors.

Minibatches are of a program whose plate ``prompts`` is subsampled:

    with pyro.plate("prompts", N, subsample_size=b) as batch: ...

Every prompt has a posterior of its own, and one policy serves them all (amortised inference). A loss over them is a
sum, which a minibatch B of b prompts estimates without bias (stochastic variational inference, Hoffman, Blei, Wang and
Paisley 2013, arXiv 1206.7051):

    \sum_{c=1}^N L(c)  =  E_B[ (N / b) \sum_{c \in B} L(c) ]

Pyro scales log p inside the plate by N / b instead; a score-function gradient, a product of two such terms, would be
scaled by its square. So here a minibatch is an ordinary program of b prompts, without a scale, and its loss is scaled.
"""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pyro.distributions import Unit
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from pyro.util import set_rng_seed
from torch import Tensor

from bayeslm.models.lm import Autoregressive, exclusive, subsamples_of
from bayeslm.validation import Seed, validated

from .errors import ProgramError

PROMPTS = "prompts"  # the plate whose elements are posteriors of their own
PARTICLES = "_particles"  # the outermost plate, which engines add
Assignment = tuple[Tensor, Tensor | None]
"""A value, and the log-probabilities of a completion's tokens where they are known."""


class Minibatch(Messenger):
    """Choose the prompts of a subsampled plate, and remove the plate's scale from the terms inside.

    After a run with a subsampled plate, ``prompts`` (b,) are its indices, ``full_size`` is N, and ``fixed`` says
    whether the indices were chosen here or by the program.

    :param prompts: indices (b,); None takes those of the program, or the first b where it chooses none. A program that
        asks `subsample_of` may have any number of them.
    :raises ProgramError: if the plate's subsample does not have the size, or the indices, of ``prompts``.
    """

    def __init__(self, prompts: Tensor | None = None) -> None:
        super().__init__()
        self.prompts = prompts
        self.fixed = prompts is not None
        self.full_size: int | None = None
        self._sizes = contextlib.ExitStack()

    def __enter__(self) -> Any:
        self._sizes.enter_context(subsamples_of(None if self.prompts is None else len(self.prompts)))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self._sizes.close()
        super().__exit__(*error)

    def _pyro_sample(self, msg: Any) -> None:
        if site_is_subsample(msg):
            if msg["name"] == PROMPTS:
                self._choose(msg)
            return
        frames = msg["cond_indep_stack"]
        for i, frame in enumerate(frames):
            if frame.name == PROMPTS and frame.vectorized and frame.full_size == self.full_size:
                msg["scale"] = msg["scale"] / (frame.full_size / frame.size)
                msg["cond_indep_stack"] = (*frames[:i], frame._replace(full_size=frame.size), *frames[i + 1 :])

    def _choose(self, msg: Any) -> None:
        plate, own = msg["fn"], msg["value"]  # own: the indices of pyro.plate(..., subsample=indices)
        size = plate.subsample_size if own is None else len(own)
        if size is None or size >= plate.size:
            size = None  # all of them
        if self.prompts is None and size is not None:
            self.prompts = torch.arange(size) if own is None else torch.as_tensor(own)
            self.fixed = own is not None
        if self.prompts is None:
            return
        if size != len(self.prompts) or (own is not None and not torch.equal(torch.as_tensor(own), self.prompts)):
            raise ProgramError(
                f"the plate {PROMPTS!r} of a program and its guide must be subsampled alike, here with "
                f"subsample_size={len(self.prompts)}, and in the same way each time"
            )
        self.full_size = plate.size
        if own is None:
            msg["value"] = self.prompts.to(plate.device)


class Arbitrary(Messenger):
    """Replace the sampling of completions by arbitrary tokens, so that no network runs.

    :param seed: of the tokens.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self._seed = seed

    def _pyro_sample(self, msg: Any) -> None:
        if isinstance(msg["fn"], Autoregressive) and msg["value"] is None:
            msg["value"] = msg["fn"].arbitrary(self._seed)


class Assign(Messenger):
    """Put values in the place of latent sites, which are then not sampled.

    :param assignments: by site, a function from the site's distribution, whose outermost plate is that of the
        particles, to the value (particle, *plates, *event) and, of a completion whose log-probabilities are known,
        those of its tokens (particle, *plates, token), else None. They travel on the trace's node, as
        ``token_log_prob``, to `particles.score_sites`.
    """

    def __init__(self, assignments: Mapping[str, Callable[[Any], Assignment]]) -> None:
        super().__init__()
        self._assignments = assignments

    def _pyro_sample(self, msg: Any) -> None:
        if msg["value"] is not None or msg["name"] not in self._assignments:
            return
        msg["value"], known = self._assignments[msg["name"]](msg["fn"])
        if known is not None:
            msg["token_log_prob"] = known


_BRANCHES = ("is ambiguous", "only one element tensors", "a Tensor with", "only integer tensors of a single element")


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Explain errors of a program whose Python code needs a single value, where engines run many particles at once.

    A factor that is NaN passes, to `particles.score_sites`, whose error shows its text; Pyro's own check, when the
    factor is made, shows all factors and no text. Pyro makes the factor's `Unit` distribution inside `pyro.factor`, and
    offers no argument or handler that turns off this one check: the class attribute that it reads is replaced while
    any such block is at work, in whatever order they end (a thread that is abandoned may end after its run).
    """
    _put_off_checks(1)
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
        _put_off_checks(-1)


_lock = threading.Lock()
_blocks = 0


def _put_off_checks(change: int) -> None:
    """Count the blocks at work."""
    global _blocks
    with _lock:
        _blocks += change
        if _blocks:
            Unit._validate_args = False
        elif "_validate_args" in vars(Unit):
            del Unit._validate_args


MT19937 = 624  # words of the state of NumPy's generator


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
        """Return the snapshot from what `saved` returned.

        :raises Exception: of several types, if it is none; restoring such a state would crash the process, or later.
        """
        cuda = {int(key.rpartition(".")[2]): x for key, x in tensors.items() if key.startswith("rng.cuda.")}
        kind, keys, *rest = values["numpy"]
        version, inside, gauss = values["random"]
        position, has_gauss, numpy_gauss = rest
        python = (version, tuple(inside), gauss)
        if kind != "MT19937" or len(keys) != MT19937 or not 0 <= int(position) <= MT19937 or has_gauss not in (0, 1):
            raise ValueError("its entry 'numpy' is no state of NumPy's generator")  # which itself does not look
        if not isinstance(numpy_gauss, float) or not isinstance(gauss, float | None):
            raise TypeError("the kept normal number of a random state must be a number")
        numpy = (kind, np.array(keys, dtype=np.uint32), int(position), has_gauss, numpy_gauss)
        torch.Generator().set_state(tensors["rng.torch"])
        random.Random().setstate(python)
        return RandomStates(tensors["rng.torch"], cuda, numpy, python)


@validated
def set_seed(seed: Seed) -> None:
    """Seed torch, NumPy and Python's random, as `pyro.util.set_rng_seed` does.

    Where there is no accelerator, `torch.manual_seed` keeps each call, with its stack, for devices that never come,
    in memory that grows with every run. There only the CPU's generator is seeded.
    """
    if torch.accelerator.is_available():
        set_rng_seed(seed)
        return
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  what rewards and Gymnasium's users draw from


@contextlib.contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Seed torch, NumPy and Python's random for the block and restore their states after it; None changes nothing.

    Other threads wait for their turn, as these states are one for the process.
    """
    with exclusive():
        if seed is None:
            yield
            return
        before = RandomStates.now()
        set_seed(seed)
        try:
            yield
        finally:
            before.restore()
