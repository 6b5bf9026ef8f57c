"""The states of the generators that are drawn from: torch's and its accelerators', NumPy's and Python's."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class RandomStates:
    """As they were; of each accelerator one."""

    torch: Tensor
    cuda: dict[int, Tensor]
    numpy: Any
    python: Any

    @staticmethod
    def now() -> RandomStates:
        cuda = dict(enumerate(torch.cuda.get_rng_state_all())) if torch.cuda.is_available() else {}
        return RandomStates(torch.get_rng_state(), cuda, np.random.get_state(), random.getstate())  # noqa: NPY002

    def restore(self) -> None:
        """Put them back; those of accelerators that are not here are left out."""
        torch.set_rng_state(self.torch)
        for i, state in self.cuda.items():
            if i < torch.cuda.device_count():
                torch.cuda.set_rng_state(state, i)
        np.random.set_state(self.numpy)  # noqa: NPY002
        random.setstate(self.python)

    def saved(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """As tensors and as JSON."""
        kind, keys, *rest = self.numpy
        version, inside, gauss = self.python
        tensors = {"rng.torch": self.torch} | {f"rng.cuda.{i}": state for i, state in self.cuda.items()}
        return tensors, {"numpy": [kind, keys.tolist(), *rest], "random": [version, list(inside), gauss]}

    @staticmethod
    def of(tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> RandomStates:
        """What `saved` gave."""
        cuda = {int(key.rpartition(".")[2]): x for key, x in tensors.items() if key.startswith("rng.cuda.")}
        kind, keys, *rest = values["numpy"]
        version, inside, gauss = values["random"]
        numpy = (kind, np.array(keys, dtype=np.uint32), *rest)
        return RandomStates(tensors["rng.torch"], cuda, numpy, (version, tuple(inside), gauss))
