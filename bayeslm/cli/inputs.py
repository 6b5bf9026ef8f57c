"""Inputs of the commands: the language model, a trained policy, and prompts."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .console import err_console

DTYPES = ("float32", "bfloat16", "float16")


def language_model(name: str, device: str | None, dtype: str | None = None, **settings: Any) -> Any:
    """Load a `LanguageModel`.

    :param device: None is a GPU if there is one, else the CPU.
    :param dtype: of the weights, one of `DTYPES`; None is that of the stored weights.
    :param settings: of `LanguageModel.from_pretrained`.
    :raises ValueError: if there is no such device or dtype.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"--dtype {dtype} is unknown: choose one of {', '.join(DTYPES)}")
    import torch
    from transformers.utils import logging

    from bayeslm.models import LanguageModel

    logging.disable_progress_bar()
    chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {chosen}: {str(error).splitlines()[0]}") from None
    with err_console.status(f"loading {name} (the first time, its weights are converted)"):
        return LanguageModel.from_pretrained(
            name, device=chosen, dtype=None if dtype is None else getattr(torch, dtype), **settings
        )


def load_reward(name: str, settings: Mapping[str, Any]) -> Any:
    """Return a built-in reward, or a function of the user's own as ``package.module:function``.

    That may be in the working folder, which is looked at last, so that nothing else is imported from there.

    :raises ValueError: if there is none, or ``settings`` are given for a function.
    """
    from bayeslm.models import rewards

    if ":" not in name:
        return rewards.get(name, **settings)
    if settings:
        raise ValueError(
            "--reward-settings are for built-in rewards only: give a function of your own its settings in Python"
        )
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    return rewards.load(name)


def trained_policy(folder: Path, prior: Any) -> Any:
    """Load a trained `LanguageModel`; adapters are put on the weights of the prior.

    :raises OSError: if the folder holds none.
    """
    from bayeslm.models import LanguageModel

    if not folder.is_dir():
        raise FileNotFoundError(
            f"--policy {folder} is not a folder: after --engine svi --out runs/NAME give runs/NAME/svi/policy"
        )
    base = prior if (folder / "adapter_config.json").is_file() else None
    sizes = {"batch_size": prior.batch_size, "gradient_checkpointing": prior.gradient_checkpointing}
    return LanguageModel.from_pretrained(folder, base=base, **sizes).to(prior.device)


def read_prompts(arguments: list[str], path: Path | None) -> tuple[list[str], dict[str, list[Any]]]:
    """Return the prompts of the command line or of a file, and the file's other columns.

    :raises ValueError: if there are none or both, or a line of a JSONL file is malformed.
    """
    if path is None:
        if not arguments:
            raise ValueError('no prompts: give at least one, as in "The weather is", or --prompts FILE')
        return arguments, {}
    if arguments:
        raise ValueError("give prompts either on the command line or by --prompts, not both")
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"{path} holds no prompts")
    if path.suffix != ".jsonl":
        return lines, {}
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number} is not JSON: {error}") from None
        if not isinstance(row, dict) or "prompt" not in row:
            raise ValueError(f'{path}, line {number} must be an object with a "prompt"')
        if rows and row.keys() != rows[0].keys():
            raise ValueError(
                f"{path}, line {number} has columns {sorted(row)}, but the first line has {sorted(rows[0])}"
            )
        rows.append(row)
    columns = {key: [row[key] for row in rows] for key in rows[0]}
    return columns.pop("prompt"), columns
