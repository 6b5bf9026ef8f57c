"""The command line: `bayeslm demo`, `infer`, `show`, `report`, `sample`, `export`, `label`, `engines`, `rewards`."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from bayeslm.version import __version__

from . import catalogue, demo, export, infer, label, sample, show
from .console import UNBROKEN


def _is_terminal() -> bool:
    return all(stream is not None and stream.isatty() for stream in (sys.stdout, sys.stderr))


app = typer.Typer(
    name="bayeslm",
    help="Reinforcement learning of language models as Bayesian inference: a prior, a reward, a posterior.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich" if _is_terminal() else None,  # in a pipe, plain lines that are not wrapped
    context_settings={} if _is_terminal() else {"terminal_width": UNBROKEN, "max_content_width": UNBROKEN},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"bayeslm {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_version, help="Print the version, and exit.")
    ] = False,
) -> None:
    if "OMP_NUM_THREADS" not in os.environ:  # read when PyTorch is imported, which is later
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")


app.command()(demo.demo)
app.command()(infer.infer)
app.command()(show.show)
app.command()(show.report)
app.command()(sample.sample)
app.command()(export.export)
app.command()(label.label)
app.command()(catalogue.engines)
app.command()(catalogue.rewards)

__all__ = ["app"]
