"""Models on disk, in the format of transformers or PEFT: a folder that is complete or absent."""

from __future__ import annotations

import contextlib
import copy
import fnmatch
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from safetensors import SafetensorError
from torch import nn
from transformers import GenerationConfig

from bayeslm.files import replacing_folder
from bayeslm.model_card import CARD, FIGURE, Loading, is_own_card, training_notes, write_card
from bayeslm.posterior import Posterior

from .adapters import has_adapters
from .bars import late_bars
from .configs import is_encoder_decoder
from .loading import location, short_name
from .quantised import refuse_quantised
from .settings import NAME, Settings
from .special_tokens import SpecialTokens, find_special_tokens

# Files of a model; those of one that is saved over another do not outlive it.
OWN = (
    *(NAME, FIGURE, "config.json", "generation_config.json", "adapter_*", "model*.safetensors*", "pytorch_model*.bin*"),
    *("tokenizer*", "special_tokens_map.json", "chat_template.*", "added_tokens.json", "vocab.*", "merges.txt"),
)


def save(lm: Any, network: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a language model (only its adapters, if it has any), its tokenizer and settings into a folder.

    A model that the folder holds is replaced as a whole, once the new one is complete; other files in it stay.

    :param lm: a `TokenModel`.
    :param network: its network, whole.
    :raises FileExistsError: if ``path`` is a file.
    :raises OSError: if the disk refuses; the folder is then as it was.
    :raises ValueError: if several adapters are active, which PEFT saves one by one.
    """
    if getattr(network, "hf_quantizer", None) is None and not lm.has_adapters:
        how = "from_pretrained(name, quantization_config=transformers.TorchAoConfig(...)), which notes it"
        refuse_quantised(network, "save_pretrained of a network whose config does not say how it is quantised", how)
    tokenizer, settings = lm.tokenizer, _settings(lm)
    special = SpecialTokens(lm.eos_token_ids, lm.bos_token_id, lm.pad_token_id, lm.decoder_start_ids)
    notes = training_notes(lm.provenance) if isinstance(lm.provenance, Posterior) else lm.provenance
    try:
        with late_bars(), replacing_folder(Path(path).resolve(), _is_own) as folder:
            with _generating(network, special) as generation:
                if has_adapters(network):
                    write_adapters(network, folder)
                    generation.save_pretrained(folder)
                else:
                    whole: Any = network
                    whole.save_pretrained(folder)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
            settings.write(folder)
            (folder / CARD).unlink(missing_ok=True)  # PEFT's, a form that nobody has filled in
            old = Path(path) / CARD
            if not old.exists() or is_own_card(old):
                write_card(folder, _loading(network, settings, tokenizer is not None), notes)
    except FileExistsError:
        raise
    except (OSError, SafetensorError) as error:
        raise OSError(getattr(error, "errno", None), f"the model could not be saved: {error}", str(path)) from error


def _settings(lm: Any) -> Settings:
    """Return what the folder does not say itself; one of adapters does not say what its base names."""
    named, adapted = find_special_tokens(lm.network, lm.tokenizer), lm.has_adapters
    return Settings(
        lm.eos_token_ids if adapted or lm.eos_token_ids != named.eos else None,
        lm.pad_token_id if adapted or lm.pad_token_id != named.pad else None,
        lm.compute_dtype,
        next((p.dtype for p in lm.parameters() if p.is_floating_point()), None) if adapted else None,
        (lm.decoder_start_ids or None) if adapted or lm.decoder_start_ids != named.start else None,
    )


def push(
    write: Callable[[Path], None],
    network: Any,
    repo_id: str,
    private: bool | None,
    token: str | bool | None,
    **kwargs: Any,
) -> str:
    """Upload what ``write`` writes into a folder to a repository of the Hugging Face hub, which is made if need be.

    :param network: whose base model, if it is an adapter, must have a name on the hub.
    :param private: of a repository that is made; None: as the account has it.
    :param token: of the account; None: the one that ``hf auth login`` has stored.
    :param kwargs: for ``HfApi.upload_folder``.
    :returns: the address of the commit.
    :raises ValueError: if the adapter's base model is a folder here.
    """
    if has_adapters(network):
        base = network.peft_config[network.active_adapters[0]].base_model_name_or_path or ""
        if (place := base and location(base)) == "" or Path(place).is_dir():
            where = f"in {place}" if place else "stored nowhere"
            raise ValueError(
                f"the adapter's base model is {where}, where nobody else finds it: push the whole model, "
                "policy.merged().push_to_hub(...)"
            )
    api = HfApi(token=token)
    api.create_repo(repo_id, private=private, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / "model")
        return str(api.upload_folder(repo_id=repo_id, folder_path=Path(folder) / "model", **kwargs).commit_url)


def _loading(network: Any, settings: Settings, has_tokenizer: bool) -> Loading:
    """Return what the card says of loading a network."""
    first = next((p.dtype for p in network.parameters() if p.is_floating_point()), torch.float32)
    dtype, compute = (None if x is None else str(x).removeprefix("torch.") for x in (first, settings.compute_dtype))
    if not has_adapters(network):
        return Loading(None, None, str(dtype), compute, None, has_tokenizer, is_encoder_decoder(network))
    config = network.peft_config[network.active_adapters[0]]
    base = config.base_model_name_or_path or ""
    rank = getattr(config, "r", None)
    where = (base and location(base), short_name(base))
    return Loading(*where, str(dtype), compute, rank, has_tokenizer, is_encoder_decoder(network))


def write_adapters(network: Any, folder: Path) -> None:
    """Write the active adapter, with the place of its base model."""
    active = list(network.active_adapters)
    if len(active) != 1:
        raise ValueError(f"{len(active)} adapters are active, {active}: save_pretrained writes one")
    config = network.peft_config[active[0]]
    base = config.base_model_name_or_path
    try:
        config.base_model_name_or_path = base and location(base)
        # Embeddings are not adapted; PEFT would ask the hub whether the base's vocabulary was changed.
        network.save_pretrained(folder, selected_adapters=active, save_embedding_layers=False)
    finally:
        config.base_model_name_or_path = base
    if active != ["default"]:  # PEFT puts adapters of other names into a folder of that name
        shutil.copytree(folder / active[0], folder, dirs_exist_ok=True)
        shutil.rmtree(folder / active[0])


@contextlib.contextmanager
def _generating(network: Any, special: SpecialTokens) -> Iterator[GenerationConfig]:
    """Give a network, for the block, a generation config that ends and pads texts as ours are, and yield it.

    One that transformers loads but refuses to save is reduced to its special tokens.
    """
    kept = getattr(network, "generation_config", None)
    config = GenerationConfig() if kept is None else copy.deepcopy(kept)
    try:
        config.validate(strict=True)
    except ValueError:
        named = ("bos_token_id", "decoder_start_token_id", "forced_bos_token_id")
        config = GenerationConfig(**{name: getattr(config, name) for name in named})
    ends = list(special.eos)
    config.eos_token_id, config.pad_token_id = (ends[0] if len(ends) == 1 else ends or None), special.pad
    if kept is None or has_adapters(network):
        yield config
        return
    network.generation_config = config
    try:
        yield config
    finally:
        network.generation_config = kept


def _is_own(name: str) -> bool:
    """Return whether a file is a model's, by its name."""
    return any(fnmatch.fnmatch(name, pattern) for pattern in OWN)
