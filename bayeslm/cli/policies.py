"""The policies that the commands `sample` and `export` are given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .console import UsageError, err_console
from .inputs import Dtype, language_model

WHERE = ("policy", "svi/policy", "adaptive/policy", "auto/policy")  # where results hold a policy


def load_policy(name: str, prior: str | None, device: str | None, dtype: Dtype | None, **settings: Any) -> Any:
    """Load a policy: a folder of a model or an adapter, one of results that holds a policy, or a name on the hub.

    :param prior: the model under an adapter, if not the one that the adapter names.
    :param settings: of `LanguageModel.from_pretrained`.
    :returns: a `LanguageModel`.
    :raises FileNotFoundError: for a folder that holds no model.
    :raises UsageError: if a folder holds several policies, or there is no such device.
    """
    folder = find_policy(Path(name)) if Path(name).is_dir() else None
    if folder is not None and folder != Path(name):
        err_console.print(f"policy: {folder}")
    base = None if prior is None else language_model(prior, device, dtype, **settings)
    if base is not None:
        settings |= {"base": base}
    return language_model(name if folder is None else str(folder), device, dtype, **settings)


def find_policy(folder: Path) -> Path:
    """Return the folder of a policy: the given one, or the one in it that `infer --out` or `Posterior.save` wrote.

    :param folder: of a model or an adapter, or of results.
    :returns: the folder that holds the configuration.
    :raises FileNotFoundError: if there is none.
    :raises UsageError: if results hold several, with all of them.
    """

    def is_model(place: Path) -> bool:
        return any((place / name).is_file() for name in ("config.json", "adapter_config.json"))

    if is_model(folder):
        return folder
    found = [folder / place for place in WHERE if is_model(folder / place)]
    if len(found) > 1:
        raise UsageError(f"{folder} holds {len(found)} policies: choose one of {', '.join(map(str, found))}")
    if found:
        return found[0]
    raise FileNotFoundError(
        f"{folder} holds no policy: neither config.json nor adapter_config.json is there, or in its folder policy or "
        "svi/policy, where infer --engine svi --out puts it"
    )
