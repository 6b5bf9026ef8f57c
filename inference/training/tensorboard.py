"""A training's figures for TensorBoard; needs the extra "tensorboard"."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from typing import Any

from bayeslm.validation import Count, validated

from .callbacks import Callback, Memory, Reply, StepRecord


@validated
@dataclass(frozen=True)
class TensorBoard(Callback):
    """Writes a training into a folder that ``tensorboard --logdir`` shows.

    It has the figures of every step, and a completion of each prompt every so many steps. Steps are counted on through
    chains.

    A disk that refuses is a warning, and ends the curves alone.

    A run that is resumed continues its curves: what was written of later steps is dropped.

    :param folder: where to write.
    :param texts_every: steps from one table of completions to the next.
    :raises ImportError: if the package tensorboard is missing.
    :raises ValueError: if ``texts_every`` is below 1.
    """

    folder: str | os.PathLike[str]
    texts_every: Count = 25

    def __post_init__(self) -> None:
        _summary_writer()

    def start(self, record: StepRecord, state: Memory) -> Reply:
        return Reply(state={"writer": _summary_writer()(os.fspath(self.folder), purge_step=_total(record) + 1)})

    def step(self, record: StepRecord, state: Memory) -> Reply | None:
        if "writer" not in state:
            return None
        try:
            self._write(record, state["writer"])
        except OSError as error:
            warnings.warn(f"no more curves in {self.folder}: {error}; the training continues", stacklevel=2)
            return Reply(state={})
        return None

    def _write(self, record: StepRecord, writer: Any) -> None:
        total = _total(record)
        figures = dict(record.figures)
        figures |= {f"held_out/{k}": float(x.mean()) for k, x in record.evaluations.items() if not k.endswith("_steps")}
        for name, value in figures.items():
            writer.add_scalar(name, value, total)
        if record.particles is not None and (record.step % self.texts_every == 0 or record.is_last):
            rows = [f"| {_cell(prompt)} | {_cell(text)} | {value:.3g} |" for prompt, text, value in record.texts()]
            table = ["| prompt | completion | r / β |", "|---|---|---|", *rows]
            writer.add_text("completions", "\n".join(table), total)
        writer.flush()

    def end(self, record: StepRecord, state: Memory) -> None:
        if "writer" in state:
            state["writer"].close()

    def identity(self) -> None:
        return None


def _summary_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError('TensorBoard needs its package: pip install "bayeslm[tensorboard]"') from error
    return SummaryWriter


def _total(record: StepRecord) -> int:
    """Return the steps done, with the most that each chain before can have; of open ends, a million."""
    return record.chain * (record.num_steps or 1_000_000) + record.step


def _cell(text: str) -> str:
    """Return a text for a table of Markdown."""
    return text.replace("|", "\\|").replace("\n", " ↵ ")
