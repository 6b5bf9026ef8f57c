"""The command `bayeslm show`: the tables of saved posteriors."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .console import err_console, one_line_errors, out_console


def show(
    directory: Annotated[Path, typer.Argument(help="An output folder of infer or demo, or one posterior in it.")],
    texts: Annotated[int, typer.Option(help="How many of the best completions to print for each prompt.")] = 3,
) -> None:
    """Print the comparison of saved posteriors, their best completions, and warnings."""
    with one_line_errors():
        from bayeslm.posterior import Posterior

        from . import report
        from .resume import others

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
        report.show({name: posteriors[name] for name in order}, out_console, texts)
