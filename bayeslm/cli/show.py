"""The command `bayeslm show`: the tables of saved posteriors."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bayeslm.posterior import Posterior

from . import tables
from .comparison import TABLES
from .console import err_console, one_line_errors, out_console
from .resume import others


def show(
    directory: Annotated[Path, typer.Argument(help="An output folder of infer or demo, or one posterior in it.")],
    texts: Annotated[int, typer.Option(help="How many of the best completions to print for each prompt.")] = 3,
    max_prompts: Annotated[int, typer.Option(min=1, help="How many prompts to print, and warnings.")] = tables.MOST,
) -> None:
    """Print the comparison of saved posteriors, their best completions, and warnings."""
    with one_line_errors():
        found = {path.parent.name: path.parent for path in sorted(directory.glob("*/posterior.json"))}
        if (directory / "posterior.json").is_file() or not found:
            found = {directory.name: directory}
        posteriors = {name: Posterior.load(path) for name, path in found.items()}
        for name in others(directory, posteriors):
            text = f"{directory / name}: left out, a copy or a result of another call"
            err_console.print(text, style="yellow")
            del posteriors[name]
        if not posteriors:
            raise FileNotFoundError(f"{directory} holds no result of its call")
        order = sorted(posteriors, key=lambda name: posteriors[name].policy_path is not None)  # policies last
        has_file = (directory / TABLES).is_file()
        whole = f"all are in {directory / TABLES}" if has_file else "raise --max-prompts to print them"
        tables.show({name: posteriors[name] for name in order}, out_console, texts, most=max_prompts, whole=whole)
