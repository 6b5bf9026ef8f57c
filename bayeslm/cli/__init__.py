"""The command line: `bayeslm demo`, `bayeslm infer`, `bayeslm show`, `bayeslm report` and `bayeslm label`."""

import typer

from . import demo, infer, label, show

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
app.command()(show.report)
app.command()(label.label)

__all__ = ["app"]
