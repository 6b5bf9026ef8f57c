"""The commands `bayeslm show` and `bayeslm report`: saved posteriors as tables, or as one HTML file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bayeslm.files import require_writable

from .console import err_console, one_line_errors, out_console

if TYPE_CHECKING:
    from bayeslm.posterior import Posterior


def show(
    directory: Annotated[Path, typer.Argument(help="An output folder of infer or demo, or one posterior in it.")],
    texts: Annotated[int, typer.Option(help="How many of the best completions to print for each prompt.")] = 3,
    max_prompts: Annotated[
        int | None, typer.Option(min=1, help="How many prompts to print, and warnings. Default: 20.")
    ] = None,
) -> None:
    """Print the comparison of saved posteriors, their best completions, and warnings."""
    with one_line_errors():
        from . import tables
        from .comparison import TABLES

        posteriors = load_posteriors(directory)
        has_file = (directory / TABLES).is_file()
        whole = f"all are in {directory / TABLES}" if has_file else "raise --max-prompts to print them"
        tables.show(posteriors, out_console, texts, most=max_prompts or tables.MOST, whole=whole)


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
        from bayeslm.report import write_report

        from .resume import run_settings, unfinished

        target = output or directory / "report.html"
        require_writable(target.parent)
        posteriors = load_posteriors(directory)
        settings = run_settings(directory)
        if missing := unfinished(directory, posteriors):
            settings["unfinished"] = ", ".join(missing)
        path = write_report(posteriors, target, title=title, settings=settings)
        out_console.print(f"written to {target}, {path.stat().st_size / 1e6:.1f} MB")


def load_posteriors(directory: Path) -> dict[str, Posterior]:
    """Return the posteriors in an output folder by name, those with a policy last; results of other calls are left out.

    :param directory: an output folder, or one posterior.
    :raises FileNotFoundError: if there are none.
    """
    from bayeslm.posterior import Posterior
    from bayeslm.storage import ARRAYS, TEXTS

    from .resume import others, unfinished

    # a folder that has lost one of its files is damaged, and said to be
    files = [path for name in ("posterior.json", ARRAYS, TEXTS) for path in directory.glob(f"*/{name}")]
    found = {path.parent.name: path.parent for path in sorted(files)}
    if not found and (waiting := unfinished(directory, {})):
        raise FileNotFoundError(f"{directory} holds no result yet of {', '.join(waiting)}")
    if (directory / "posterior.json").is_file() or not found:
        found = {directory.name: directory}
    posteriors = {name: Posterior.load(path) for name, path in found.items()}
    for name in others(directory, posteriors):
        text = f"{directory / name}: left out, a copy or a result of another call"
        err_console.print(text, style="yellow")
        del posteriors[name]
    for name in unfinished(directory, posteriors):
        text = f"{name}: no result yet. It is running, or was stopped: then repeat the command that began it"
        err_console.print(text, style="yellow")
    if not posteriors:
        raise FileNotFoundError(f"{directory} holds no result of its call")
    return dict(sorted(posteriors.items(), key=lambda item: item[1].policy_path is not None))
