"""Inputs of the commands: the language model, a trained policy, and prompts."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bayeslm.prompt_files import check_prompt, read_prompt_file

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
    logging.set_verbosity_error()  # its report of missing weights has lines; the error that follows has one
    chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=chosen).item()  # the device "meta" has shapes and no numbers
    except (RuntimeError, AssertionError, NotImplementedError) as error:
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
        try:
            return rewards.get(name, **settings)
        except (TypeError, ValueError) as error:
            if not settings:
                raise
            raise ValueError(f"--reward {name} with --reward-settings: {error}") from error
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


def read_prompts(arguments: list[str], path: Path | None) -> tuple[list[Any], dict[str, list[Any]]]:
    """Return the prompts of the command line or of a file, and the file's other columns.

    :raises ValueError: if there are none or both, or the file is malformed; see `read_prompt_file`.
    """
    from bayeslm.models.rewards import check_columns

    if path is None:
        if not arguments:
            raise ValueError('no prompts: give at least one, as in "The weather is", or --prompts FILE')
        for number, prompt in enumerate(arguments, start=1):
            check_prompt(f"prompt {number}", prompt)
        return arguments, {}
    if arguments:
        raise ValueError("give prompts either on the command line or by --prompts, not both")
    prompts, columns = read_prompt_file(path)
    try:
        check_columns(columns)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return prompts, columns


def read_texts(arguments: list[str], path: Path | None) -> list[str]:
    """Return prompts that are texts.

    :raises ValueError: if one is a chat or token ids, or as in `read_prompts`.
    """
    prompts, _ = read_prompts(arguments, path)
    if other := next((prompt for prompt in prompts if not isinstance(prompt, str)), None):
        raise ValueError(f"{path}: this command needs prompts that are texts, got {other!r:.60}")
    return prompts
