"""What all commands share: consoles, exit codes, errors in one line, the language model, and prompts."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

out_console = Console()
err_console = Console(stderr=True)

# Exit codes, beside 0 and typer's own 2 for wrong usage.
FAILED, NO_POSTERIOR, INTERRUPTED = 1, 3, 130


@contextlib.contextmanager
def clear_errors() -> Iterator[None]:
    """One line instead of a traceback for everything that a user can mend."""
    from bayeslm.inference import EvidenceError, RunError

    code = FAILED
    try:
        yield
        return
    except (Exception, KeyboardInterrupt) as error:
        cause = error.__cause__ if isinstance(error, RunError) else error
        notes = getattr(error, "__notes__", [])
        if isinstance(cause, KeyboardInterrupt):
            kept = notes or ([] if cause is error else [str(error)]) or ["before there was anything to keep"]
            message, code = "interrupted: " + "\n".join(kept), INTERRUPTED
        elif isinstance(cause, ValueError | TypeError | OSError | ImportError | FloatingPointError):
            code = NO_POSTERIOR if isinstance(cause, EvidenceError) else FAILED
            message = "\n".join([str(error).partition("\nTrace Shapes:")[0].strip(), *notes])  # Pyro appends a trace
        else:
            raise
    err_console.print(f"bayeslm: {message}", style="red", markup=False, highlight=False)
    raise typer.Exit(code)


DTYPES = ("float32", "bfloat16", "float16")


def language_model(name: str, device: str | None, dtype: str | None = None, **settings: Any) -> Any:
    """A `LanguageModel`, on a GPU where there is one, with weights of a type of `DTYPES`; None: as they are stored.

    :param settings: of `LanguageModel.from_pretrained`.
    :raises ValueError: if there is no such device or type.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"--dtype {dtype} is none of {', '.join(DTYPES)}")
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


def policy_of(folder: Path, prior: Any) -> Any:
    """A trained `LanguageModel`; adapters are put on the prior's own weights.

    :raises OSError: if there is none in the folder.
    """
    from bayeslm.models import LanguageModel

    if not folder.is_dir():
        raise FileNotFoundError(f"--policy {folder} is no folder: runs/NAME/svi/policy is one, after --out runs/NAME")
    base = prior if (folder / "adapter_config.json").is_file() else None
    sizes = {"batch_size": prior.batch_size, "gradient_checkpointing": prior.gradient_checkpointing}
    return LanguageModel.from_pretrained(folder, base=base, **sizes).to(prior.device)


def read_prompts(given: list[str], path: Path | None) -> tuple[list[str], dict[str, list[Any]]]:
    """Prompts of the command line and of a file, and the file's other columns."""
    if path is None:
        if not given:
            raise ValueError('no prompts: give one, as in "The weather is", or --prompts FILE')
        return given, {}
    if given:
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
            raise ValueError(f"{path}, line {number}: not JSON ({error})") from None
        if not isinstance(row, dict) or "prompt" not in row:
            raise ValueError(f'{path}, line {number}: needs an object with a "prompt"')
        if rows and row.keys() != rows[0].keys():
            raise ValueError(f"{path}, line {number}: has columns {sorted(row)}, the first line {sorted(rows[0])}")
        rows.append(row)
    columns = {key: [row[key] for row in rows] for key in rows[0]}
    return columns.pop("prompt"), columns
