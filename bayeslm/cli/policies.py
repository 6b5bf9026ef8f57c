"""The policies that the commands `sample` and `export` are given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .console import UsageError
from .inputs import DTYPES, language_model

WHERE = ("", "policy", "svi/policy", "adaptive/policy", "auto/policy")  # a policy's place in what a user points at


def load_policy(name: str, prior: str | None, device: str | None, dtype: str | None, **settings: Any) -> Any:
    """Load a policy: a folder of a model or an adapter, one of results that holds a policy, or a name on the hub.

    :param prior: the model under an adapter, if not the one that the adapter names.
    :param settings: of `LanguageModel.from_pretrained`.
    :raises FileNotFoundError: for a folder that holds no model.
    :raises UsageError: if there is no such dtype.
    """
    torch_dtype(dtype)
    folder = find_policy(Path(name)) if Path(name).is_dir() else None
    base = None if prior is None else language_model(prior, device, dtype, **settings)
    if base is not None:
        settings |= {"base": base}
    return language_model(name if folder is None else str(folder), device, dtype, **settings)


def find_policy(folder: Path) -> Path:
    """Return the folder of a policy, which is this one, or in it where `infer --out` and `Posterior.save` put it.

    :raises FileNotFoundError: if there is none.
    """
    for place in WHERE:
        if any((folder / place / name).is_file() for name in ("config.json", "adapter_config.json")):
            return folder / place
    raise FileNotFoundError(
        f"{folder} holds no policy: neither config.json nor adapter_config.json is there, or in its folder policy or "
        "svi/policy, where infer --engine svi --out puts it"
    )


def torch_dtype(name: str | None) -> Any:
    """Return the dtype of a name, None for None.

    :raises UsageError: if there is no such dtype.
    """
    if name is not None and name not in DTYPES:
        raise UsageError(f"--dtype {name} is unknown: choose one of {', '.join(DTYPES)}")
    import torch

    return None if name is None else getattr(torch, name)
