"""Inputs of the commands: the language model, a trained policy, and prompts."""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path
from typing import Any, Literal

from bayeslm.prompt_files import prompt_table, read_prompt_file

from .console import UsageError, err_console
from .expressions import evaluate

Dtype = Literal["float32", "bfloat16", "float16"]
ADDRESS = re.compile(r"""("(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*')|([A-Za-z_][\w.]*:[A-Za-z_]\w*)""")
"""A string, or the address of a function that is not in a string."""


def language_model(name: str, device: str | None, dtype: Dtype | None = None, **settings: Any) -> Any:
    """Load a `LanguageModel`.

    :param device: None is a GPU if there is one, else the CPU.
    :param dtype: of the weights; None is that of the stored weights.
    :param settings: of `LanguageModel.from_pretrained`.
    :raises UsageError: if there is no such device.
    """
    import torch
    from transformers.utils import logging

    from bayeslm.models import LanguageModel

    logging.disable_progress_bar()
    logging.set_verbosity_error()  # its report of missing weights has lines; the error that follows has one
    chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=chosen).item()  # the device "meta" has shapes and no numbers
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(f"--device {chosen}: {str(error).splitlines()[0]}") from None
    with err_console.status(f"loading {name} (the first time, its weights are converted)"):
        return LanguageModel.from_pretrained(name, device=chosen, dtype=torch_dtype(dtype), **settings)


def torch_dtype(name: Dtype | None) -> Any:
    """Return PyTorch's dtype of a name, None for None."""
    import torch

    return None if name is None else getattr(torch, name)


def load_reward(text: str, where: str = "--reward") -> Any:
    """Return the reward that an expression says, such as ``sentiment - 2 * toxicity + 0.1 * my_rewards:brief``.

    Built-in rewards are called by their names, ``length(target=20)``; a function of the user's own is
    ``package.module:function``, and `Reward` gives it bounds. It may be in the working folder, which is looked at last,
    so that nothing else is imported from there.

    :param where: the option or the key of a file that has it, for errors.
    :raises UsageError: if the expression is malformed, or there is no such reward.
    """
    from bayeslm.models import rewards

    def maker(name: str) -> Any:
        names = list(inspect.signature(rewards.BUILT_IN[name]).parameters)

        def make(*arguments: Any, **settings: Any) -> Any:
            if len(arguments) > len(names) or settings.keys() & set(names[: len(arguments)]):
                raise ValueError(f"{name} takes each of its settings once: {', '.join(names) or 'it has none'}")
            return rewards.get(name, **dict(zip(names, arguments, strict=False)), **settings)

        return make

    def load(address: str) -> Any:
        if str(Path.cwd()) not in sys.path:
            sys.path.append(str(Path.cwd()))
        return rewards.load(address)

    makers = {name: maker(name) for name in rewards.BUILT_IN}
    makers |= {rewards.BUILT_IN[name].__qualname__: make for name, make in makers.items()}
    makers |= {"Reward": rewards.Reward, "_load": load}
    addressed = ADDRESS.sub(lambda found: found[1] or f"_load({found[2]!r})", text)
    try:
        found = evaluate(addressed, makers, operand=rewards.Reward)
        if not isinstance(found, rewards.Reward):
            raise ValueError("it is no reward: name one, as in 2 * sentiment")
        return found
    except (TypeError, ValueError) as error:
        raise UsageError(f"{where} {text}: {error}") from error


def trained_policy(folder: Path, prior: Any) -> Any:
    """Load a trained `LanguageModel`; adapters are put on the weights of the prior.

    :raises OSError: if the folder holds none.
    """
    from bayeslm.models import LanguageModel

    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder} is not a folder with a policy: after --engine svi --out runs/NAME it is runs/NAME/svi/policy"
        )
    base = prior if (folder / "adapter_config.json").is_file() else None
    settings = {name: getattr(prior, name) for name in ("batch_size", "gradient_checkpointing")}
    return LanguageModel.from_pretrained(folder, base=base, compile=prior.compiles, **settings).to(prior.device)


def read_prompts(prompts: Any, where: str = "prompts") -> tuple[list[Any], dict[str, list[Any]]]:
    """Return prompts and the columns of them.

    :param prompts: a file, or a list of prompts or of mappings with "prompt".
    :param where: where the list is from, for errors.
    :raises UsageError: if there are none.
    :raises ValueError: if one, or the file, is malformed; see `read_prompt_file`.
    """
    from bayeslm.models.rewards import check_columns

    if not prompts:
        raise UsageError('no prompts: give at least one, as in "The weather is", or --prompts FILE')
    if isinstance(prompts, str):
        rows, columns = read_prompt_file(prompts)
    else:
        rows, columns = prompt_table(where, [(f"row {i}", row) for i, row in enumerate(prompts, start=1)])
    try:
        check_columns(columns)
    except ValueError as error:
        raise ValueError(f"{prompts if isinstance(prompts, str) else where}: {error}") from None
    return rows, columns


def read_texts(prompts: Any) -> list[str]:
    """Return prompts that are texts.

    :raises ValueError: if one is a chat or token ids, or as in `read_prompts`.
    """
    found, _ = read_prompts(prompts)
    if other := next((prompt for prompt in found if not isinstance(prompt, str)), None):
        raise ValueError(f"{prompts}: this command needs prompts that are texts, got {other!r:.60}")
    return found


def one_source(arguments: list[str] | None, path: Path | None) -> Any:
    """Return the prompts of the command line: those written there, the file of ``--prompts``, or None.

    :raises UsageError: if there are both.
    """
    if arguments and path is not None:
        raise UsageError("give prompts either on the command line or by --prompts, not both")
    return arguments or (None if path is None else str(path))
