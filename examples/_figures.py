"""What the applications share: their options, means with standard errors, tables, and where figures go."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np


def parser(doc: str | None, name: str) -> argparse.ArgumentParser:
    """Return a parser with the options of all applications; figures go to runs/<name> by default."""
    found = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--folder", type=folder, default=Path("runs") / name, help="of tables and pictures")
    found.add_argument("--quick", action="store_true", help="a few draws and steps: does it run?")
    return found


def folder(text: str) -> Path:
    """Read an option that is a folder, which may not exist yet."""
    if (path := Path(text)).exists() and not path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a file: give a folder")
    return path


def count(text: str) -> int:
    """Read an option that is a positive whole number."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive whole number, got {text!r}")
    return int(text)


def positive(text: str) -> float:
    """Read an option that is a positive number."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"must be positive and finite, got {text!r}")
    return number


def share(text: str) -> float:
    """Read an option that is a number between 0 and 1."""
    if (number := positive(text)) >= 1:
        raise argparse.ArgumentTypeError(f"must be between 0 and 1, got {text!r}")
    return number


def stderr(values: np.ndarray) -> float:
    """Return the standard error of a mean of independent values."""
    return float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else float("nan")


def mean(values: Any, digits: int = 2) -> str:
    """Return the mean of independent values ± its standard error."""
    values = np.asarray(values, dtype=float).ravel()
    return with_error(float(values.mean()), stderr(values), digits) if len(values) else "none"


def over_seeds(runs: Sequence[np.ndarray]) -> np.ndarray:
    """Return what a mean has its standard error over: the problems of one run, or the means of several runs."""
    return runs[0] if len(runs) == 1 else np.array([run.mean() for run in runs])


def with_error(value: float, error: float, digits: int = 2) -> str:
    return f"{round(value, digits) + 0.0:.{digits}f} ± {error:.{digits}f}"  # and not -0.00


def table(rows: Mapping[str, Sequence[str]], head: Sequence[str]) -> list[str]:
    """Return the lines of a table in Markdown."""
    lines = [" | ".join(head), "|".join(["---"] * len(head)), *(" | ".join([name, *row]) for name, row in rows.items())]
    return [f"| {line} |" for line in lines]


def write(folder: Path, lines: Sequence[str], started: float) -> None:
    """Print figures, and write them into a folder."""
    lines = [*lines, "", f"{time.perf_counter() - started:.0f} s"]
    print(*lines, sep="\n")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "figures.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
