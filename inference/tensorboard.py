"""A training's numbers for TensorBoard; needs the extra "tensorboard"."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any


class TensorBoard:
    """Writes what `SVI` tells its ``log`` into a folder that ``tensorboard --logdir`` shows.

    A run that goes on from a checkpoint continues its curves: what was written of later steps is dropped.

    :raises ImportError: if the package tensorboard is missing.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError('TensorBoard needs its package: pip install "bayeslm[tensorboard]"') from error
        self._make = SummaryWriter
        self.folder = os.fspath(folder)
        self._writer: Any = None

    def __call__(self, step: int, values: Mapping[str, float]) -> None:
        if self._writer is None:
            self._writer = self._make(self.folder, purge_step=step)
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()
