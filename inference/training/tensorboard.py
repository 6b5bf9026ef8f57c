"""A training's numbers for TensorBoard; needs the extra "tensorboard"."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from bayeslm.inference.program import check_counts


class TensorBoard:
    """Writes what `SVI` tells its ``log`` into a folder that ``tensorboard --logdir`` shows: numbers of every step, and
    a completion of each prompt every so many steps.

    A run that goes on from a checkpoint continues its curves: what was written of later steps is dropped.

    :param texts_every: steps from one look at completions to the next.
    :raises ImportError: if the package tensorboard is missing.
    """

    def __init__(self, folder: str | os.PathLike[str], texts_every: int = 25) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError('TensorBoard needs its package: pip install "bayeslm[tensorboard]"') from error
        self._make = SummaryWriter
        self.folder = os.fspath(folder)
        self.texts_every = texts_every
        check_counts(self, "texts_every")
        self._writer: Any = None

    def __call__(self, step: int, values: Mapping[str, float]) -> None:
        if self._writer is None:
            self._writer = self._make(self.folder, purge_step=step)
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def texts(self, step: int, rows: Sequence[tuple[str, str, float]]) -> None:
        """A table of prompts, completions and log-likelihoods r / beta."""
        lines = [f"| {_cell(prompt)} | {_cell(text)} | {told:.3g} |" for prompt, text, told in rows]
        self._writer.add_text(
            "completions", "\n".join(["| prompt | completion | r / β |", "|---|---|---|", *lines]), step
        )
        self._writer.flush()


def _cell(text: str) -> str:
    """Text in a table of Markdown."""
    return text.replace("|", "\\|").replace("\n", " ↵ ")
