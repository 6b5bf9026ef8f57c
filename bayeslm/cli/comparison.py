"""Several engines on one program: run one after another, saved, and compared."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import typer

from bayeslm import diagnostics
from bayeslm.files import atomic_file, write_file
from bayeslm.posterior import DiagnosticsWarning, Posterior

from . import tables
from .console import INTERRUPTED, PlainConsole, err_console, out_console
from .resume import Results, rescue

TABLES, SUMMARY = "tables.txt", "summary.csv"  # what is printed, of all prompts; a row for each engine and prompt


def compare(
    model: Callable[[str], Any],
    prompts: list[Any],
    columns: dict[str, list[Any]],
    engines: Mapping[str, Any],
    results: Results,
) -> None:
    """Run the engines that have no result in the output folder, save each result at once, and print the comparison.

    :param model: returns the program for an engine, by the engine's name.
    :param columns: of the prompts, for the reward.
    :raises typer.Exit: after Ctrl-C in an engine that returned the draws it had.
    """
    from bayeslm.inference import RunError

    out = results.out
    posteriors: dict[str, Posterior] = {}
    for name, engine in engines.items():
        if (saved := results.load(name)) is not None:
            err_console.print(f"{name}: already in {out}")
            posteriors[name] = saved
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DiagnosticsWarning)  # they stand below the tables
                posteriors[name] = engine.run(model(name), prompts, **columns)
        except BaseException as error:
            policy = error.so_far.policy if isinstance(error, RunError) else None
            checkpoint = getattr(engine, "checkpoint", None)
            if checkpoint is not None and isinstance(error.__cause__ or error, KeyboardInterrupt):
                folder = getattr(checkpoint, "folder", checkpoint)
                error.add_note(f"the training so far is saved in {folder}: repeat the command to resume it")
            if out is not None and policy is not None and checkpoint is None:
                place = out / f"{name}-policy-so-far"
                try:
                    policy.save_pretrained(place)
                    error.add_note(
                        f"the policy trained so far is saved in {place}: bayeslm export {place} FOLDER --merge makes a "
                        "model of it. Repeating the command begins the training anew, which svi(checkpoint='FOLDER') "
                        "would resume"
                    )
                except OSError as refused:
                    error.add_note(f"{refused}; {rescue(out, name, None, policy)}")
            if posteriors:
                tables.show(posteriors, out_console)
            raise
        try:
            results.save(name, posteriors[name])
        except OSError:
            tables.show(posteriors, out_console)  # what the run has cost is not lost with the disk
            raise
        seconds = posteriors[name].stats["seconds"]
        err_console.print(f"{name}: {seconds:.0f} s")
        if posteriors[name].stats.get("interrupted"):
            if rest := list(engines)[list(engines).index(name) + 1 :]:
                err_console.print(f"not run: {', '.join(rest)}", style="yellow")
            break
    if out is None:
        tables.show(posteriors, out_console)
    else:
        files = [*_save_tables(posteriors, out), *_save_plots(posteriors, out)]
        tables.show(posteriors, out_console, whole=f"all are in {out / TABLES}")
        out_console.print(f"written to {out}: posteriors (each with posterior.nc for ArviZ), {', '.join(files)}")
        out_console.print(f"to print this again: bayeslm show {out}")
    if any(posterior.stats.get("interrupted") for posterior in posteriors.values()):
        raise typer.Exit(INTERRUPTED)


def _save_tables(posteriors: Mapping[str, Posterior], out: Path) -> list[str]:
    """Write what is printed, of all prompts, as a text, and the summaries as a table; return the names of the files."""
    text = io.StringIO()
    tables.show(posteriors, PlainConsole(file=text, width=120), most=None)
    try:
        write_file(out / TABLES, text.getvalue())
        write_file(out / SUMMARY, diagnostics.compare(posteriors).to_csv())
    except OSError as error:  # the posteriors are saved, and tables are made of them
        err_console.print(f"no tables: {error}", style="yellow")
        return []
    return [TABLES, SUMMARY]


def _save_plots(posteriors: Mapping[str, Posterior], out: Path) -> list[str]:
    """Plot the rewards, and the training if there was one; return the names of the files."""
    from bayeslm.plots import plot_rewards, plot_training

    try:
        import matplotlib

        matplotlib.use("Agg")  # a matplotlibrc in the working folder may name code as the backend
        from matplotlib.pyplot import close

        figures = {"rewards.png": plot_rewards(posteriors)}
        if "svi" in posteriors and "elbo" in posteriors["svi"].stats:
            figures["training.png"] = plot_training(posteriors["svi"])
    except ImportError as error:
        err_console.print(f"no plots: {error}", style="yellow")
        return ["no plots"]
    try:
        for name, figure in figures.items():
            with atomic_file(out / name) as unfinished:
                figure.savefig(unfinished, dpi=120)
    except OSError as error:  # the posteriors are saved, and plots are made of them
        err_console.print(f"no plots: {error}", style="yellow")
        return ["no plots"]
    finally:
        close("all")
    return list(figures)
