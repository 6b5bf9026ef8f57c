"""The command line: the commands `bayeslm demo`, `infer`, `show`, `sample`, `export` and `label`."""

import typer

from . import demo, export, infer, label, sample, show

app = typer.Typer(
    name="bayeslm",
    help="Reinforcement learning of language models as Bayesian inference: a prior, a reward, a posterior.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.command()(demo.demo)
app.command()(infer.infer)
app.command()(show.show)
app.command()(sample.sample)
app.command()(export.export)
app.command()(label.label)

__all__ = ["app"]
