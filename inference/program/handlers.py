r"""Minibatches of prompts: a program whose plate ``prompts`` is subsampled.

    with pyro.plate("prompts", N, subsample_size=b) as batch: ...

Every prompt has a posterior of its own, and one policy serves them all (amortised inference). A loss over them is a
sum, which a minibatch B of b prompts estimates without bias (stochastic variational inference, Hoffman, Blei, Wang and
Paisley 2013, arXiv 1206.7051):

    \sum_{c=1}^N L(c)  =  E_B[ (N / b) \sum_{c \in B} L(c) ]

Pyro scales log p inside the plate by N / b instead, which a score-function gradient, a product of two of them, would
have squared. So here a minibatch is an ordinary program of b prompts, without a scale, and its loss is multiplied.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from bayeslm.models.lm import Autoregressive

from .errors import ProgramError

if TYPE_CHECKING:
    pass

PROMPTS = "prompts"  # the plate whose elements are posteriors of their own


class Minibatch(Messenger):
    """Tells a subsampled plate of prompts which they are, and takes its scale off the terms inside.

    :param prompts: indices (b,); None leaves it to the program, whose first b prompts are taken if it does not care.
    :raises ProgramError: if a plate is not subsampled as the ``prompts`` need.

    ``prompts``, ``full_size``, N, and whether the prompts are ``fixed`` are what was found of a subsampled plate.
    """

    def __init__(self, prompts: Tensor | None = None) -> None:
        super().__init__()
        self.prompts = prompts
        self.fixed = prompts is not None
        self.full_size: int | None = None

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
        plate, own = msg["fn"], msg["value"]  # its own: pyro.plate(..., subsample=indices)
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
    """Gives completions arbitrary tokens instead of running the network."""

    def _pyro_sample(self, msg: Any) -> None:
        if isinstance(msg["fn"], Autoregressive) and msg["value"] is None:
            msg["value"] = msg["fn"].arbitrary()
