"""The command `bayeslm infer`: the posterior over completions of prompts, by one engine or several."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .completion import complete_engine, complete_reward
from .console import one_line_errors
from .inputs import Dtype


def infer(
    ctx: typer.Context,
    prompt: Annotated[list[str] | None, typer.Argument(help="Prompts, each completed on its own.")] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            help="A settings file, such as the run.yaml that every --out holds: YAML whose keys are the options below, "
            "with engines: a mapping from each engine to its settings. Options take the place of its settings."
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help='A file of prompts: lines of text, or JSON(L), CSV, TSV or Parquet with "prompt" and columns for '
            "the reward."
        ),
    ] = None,
    prior: Annotated[
        str | None,
        typer.Option(
            help="The language model: smollm2, a folder, or a name on the Hugging Face hub. Default: smollm2."
        ),
    ] = None,
    reward: Annotated[
        str | None,
        typer.Option(
            help="Built-in rewards with their settings (see bayeslm rewards) and functions of your own, as in: "
            "sentiment - 2 * toxicity + length(target=20) + package.module:function. Default: sentiment.",
            autocompletion=complete_reward,
        ),
    ] = None,
    timeout: Annotated[
        float | None, typer.Option(help="Time limit of the reward for a batch of texts, in seconds. Default: none.")
    ] = None,
    beta: Annotated[
        float | None,
        typer.Option(
            help="The KL coefficient: a small one gives high rewards, a large one stays near the prior. Default: 0.1."
        ),
    ] = None,
    engine: Annotated[
        list[str] | None,
        typer.Option(
            help="One or several engines with their settings (see bayeslm engines), as in: "
            "importance, svi(num_steps=200, optimizer=Adam(1e-3)). Default: importance.",
            autocompletion=complete_engine,
        ),
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Length limit of a completion, in tokens. Default: 24.")
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="Divides the prior's logits. Default: 1.")] = None,
    top_k: Annotated[
        int | None, typer.Option(help="Of each token of the prior the k likeliest remain, renormalised. Default: all.")
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(help="Of each token the fewest likeliest with this probability remain. Default: all."),
    ] = None,
    stop: Annotated[
        list[str] | None,
        typer.Option(help="A string that ends a completion as an end token does; it may be repeated. Default: none."),
    ] = None,
    subsample_size: Annotated[
        int | None,
        typer.Option(help="svi, importance: number of prompts at a time, for more prompts than fit one step."),
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ... Default: cuda if there is a GPU.")] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Type of the weights. Default: the stored one.")] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Most texts in one pass of the network. Default: by the free memory.")
    ] = None,
    gradient_checkpointing: Annotated[
        bool | None, typer.Option(help="svi: use less memory for long texts, and a third more time. Default: no.")
    ] = None,
    compile: Annotated[
        bool | None,
        typer.Option(help="Write tokens by a compiled graph: many tokens are faster, the first takes a minute."),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Makes the run reproducible; of all engines that set no other. Default: 0.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="A new folder for posteriors, policy, plots and run.yaml, the settings. Repeat the command to resume "
            "a stopped run or to add an engine."
        ),
    ] = None,
) -> None:
    """Infer the posterior over completions of prompts under a reward.

    For example:

      bayeslm infer "My dinner at the restaurant was" --beta 0.1

      bayeslm infer "The weather will be" --engine "importance, svi(num_steps=40)" --out runs/weather

      bayeslm infer --config runs/weather/run.yaml --engine "svi(num_steps=80)" --out runs/longer

      bayeslm infer --prompts prompts.jsonl --reward "my_rewards:politeness - toxicity" --engine rejection
    """
    with one_line_errors():
        from .execution import execute
        from .inputs import one_source
        from .settings import NAMES, read_settings

        options = {name: ctx.params[name] for name in NAMES if ctx.params.get(name) not in (None, [], ())}
        options |= {name: str(value) for name, value in options.items() if isinstance(value, Path)}
        options |= {} if (source := one_source(prompt, prompts)) is None else {"prompts": source}
        settings = read_settings(config, options, engine or [])

        def place(name: str, option: str) -> str:
            """Return where a setting is from, for errors."""
            of_file = config is not None and not (name in options or (name == "engines" and engine))
            return f"{config}: {name}" if of_file else option

        execute(settings, place)
