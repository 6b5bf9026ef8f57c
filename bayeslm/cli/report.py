"""The command `bayeslm report`: saved posteriors as one HTML file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bayeslm.report import write_report

from .console import one_line_errors, out_console
from .show import load_posteriors


def report(
    directory: Annotated[Path, typer.Argument(help="An output folder of infer or demo, or one posterior in it.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The HTML file. Default: report.html in the folder.")
    ] = None,
    title: Annotated[str | None, typer.Option(help="The title. Default: what was inferred.")] = None,
) -> None:
    """Write a report of saved posteriors: one HTML file, which opens without a network.

    It has the engines side by side, rewards before and after, curves of the training, effective sample sizes, and a
    table of all texts that sorts and filters, with the tokens that the policy moved.
    """
    with one_line_errors():
        posteriors = load_posteriors(directory)
        path = write_report(posteriors, output or directory / "report.html", title=title)
        size = path.stat().st_size / 1e6
        out_console.print(f"written to {output or directory / 'report.html'}: {size:.1f} MB, open it in a browser")
