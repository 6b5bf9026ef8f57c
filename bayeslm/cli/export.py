"""The command `bayeslm export`: a policy as a folder for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bayeslm.files import require_empty, require_writable

from .console import UsageError, one_line_errors, out_console
from .inputs import Dtype, torch_dtype
from .policies import load_policy


def export(
    policy: Annotated[
        str,
        typer.Argument(
            help="A trained policy: its folder, or an output folder of infer; or any model: smollm2, a folder, or a "
            "name on the Hugging Face hub."
        ),
    ],
    directory: Annotated[Path, typer.Argument(help="A new or empty folder.")],
    merge: Annotated[
        bool, typer.Option("--merge", help="Merge adapters into the weights: a whole model, without PEFT.")
    ] = False,
    dtype: Annotated[
        Dtype | None,
        typer.Option(help="Type of a whole model's weights. Default: the stored one. An adapter needs --merge for it."),
    ] = None,
    prior: Annotated[
        str | None,
        typer.Option(
            help="The model under an adapter, if not the one that the adapter names; the exported one names this."
        ),
    ] = None,
) -> None:
    """Write a policy as a folder that PEFT, transformers and vLLM load, with a model card.

    An adapter stays an adapter, on the base model that it names; with --merge it becomes a whole model. Its card says
    how it was trained, and how to load it.

    For example:

      bayeslm export runs/weather weather-adapter

      bayeslm export runs/weather weather-model --merge --dtype bfloat16

      bayeslm export smollm2 smollm2-base
    """
    with one_line_errors():
        require_empty(directory, "another folder")
        require_writable(directory)
        wanted = torch_dtype(dtype)
        lm = load_policy(policy, prior, "cpu", None)
        if lm.has_adapters and not merge and wanted is not None:
            raise UsageError("--dtype is of a whole model's weights: add --merge, or leave it out")
        if merge or wanted is not None:
            lm = lm.merged(wanted)
        lm.save_pretrained(directory)
        what = "an adapter" if lm.has_adapters else "a model"
        out_console.print(f"{directory} holds {what}: its README.md says how to load it")
