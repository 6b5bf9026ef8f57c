"""Models on disk, in the format of transformers or PEFT: a folder that is complete or absent."""

from __future__ import annotations

import contextlib
import fnmatch
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn
from transformers import GenerationConfig

from bayeslm.files import replacing_folder

from .adapters import has_adapters
from .settings import NAME, Settings

# Files of a model; those of one that is saved over another do not outlive it.
OWN = (
    *(NAME, "config.json", "generation_config.json", "adapter_*", "model*.safetensors*", "pytorch_model*.bin*"),
    *("tokenizer*", "special_tokens_map.json", "chat_template.*", "added_tokens.json", "vocab.*", "merges.txt"),
)


def save(network: nn.Module, tokenizer: Any, settings: Settings, path: str | os.PathLike[str]) -> None:
    """Write a network (only its adapters, if it has any), its tokenizer and settings into a folder.

    A model that the folder holds is replaced as a whole, once the new one is complete; other files in it stay.

    :param tokenizer: None if there is none.
    :raises FileExistsError: if ``path`` is a file.
    :raises OSError: if the disk refuses; the folder is then as it was.
    :raises ValueError: if several adapters are active, which PEFT saves one by one.
    """
    try:
        with replacing_folder(Path(path).resolve(), _is_own) as folder:
            _write_network(network, folder)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
            settings.write(folder)
    except FileExistsError:
        raise
    except (OSError, SafetensorError) as error:
        raise OSError(getattr(error, "errno", None), f"the model could not be saved: {error}", str(path)) from error


def _write_network(network: Any, folder: Path) -> None:
    if not has_adapters(network):
        with _valid_generation_config(network):
            network.save_pretrained(folder)
        return
    active = list(network.active_adapters)
    if len(active) != 1:
        raise ValueError(f"{len(active)} adapters are active, {active}: save_pretrained writes one")
    # Embeddings are not adapted; PEFT would ask the hub whether the base's vocabulary was changed.
    network.save_pretrained(folder, selected_adapters=active, save_embedding_layers=False)
    if active != ["default"]:  # PEFT puts adapters of other names into a folder of that name
        shutil.copytree(folder / active[0], folder, dirs_exist_ok=True)
        shutil.rmtree(folder / active[0])


@contextlib.contextmanager
def _valid_generation_config(network: Any) -> Iterator[None]:
    """Reduce a generation config that transformers loads but refuses to save to its special tokens, for the block."""
    kept = getattr(network, "generation_config", None)
    try:
        if kept is not None:
            kept.validate(strict=True)
    except ValueError:
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        network.generation_config = GenerationConfig(**{name: getattr(kept, name) for name in names})
    try:
        yield
    finally:
        if kept is not None:
            network.generation_config = kept


def _is_own(name: str) -> bool:
    """Return whether a file is a model's, by its name."""
    return any(fnmatch.fnmatch(name, pattern) for pattern in OWN)
