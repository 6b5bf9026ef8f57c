"""Settings of a language model that its folder, in the format of transformers or PEFT, has no place for."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

NAME = "bayeslm.json"


@dataclass(frozen=True)
class Settings:
    """What the folder of a saved model says in addition; None: what the model itself says.

    :param eos_token_ids: the tokens that end a completion.
    :param pad_token_id: fills completions after their end.
    :param compute_dtype: the dtype in which products of float32 weights are computed.
    :param base_dtype: of the weights under adapters.
    :param decoder_start_ids: the tokens before a completion of an encoder-decoder network.
    """

    eos_token_ids: tuple[int, ...] | None = None
    pad_token_id: int | None = None
    compute_dtype: torch.dtype | None = None
    base_dtype: torch.dtype | None = None
    decoder_start_ids: tuple[int, ...] | None = None

    def over(self, other: Settings) -> Settings:
        """Return these settings, and another's where these say nothing."""
        return Settings(**{k: vars(other)[k] if v is None else v for k, v in vars(self).items()})

    def write(self, folder: Path) -> None:
        """Write the settings into a folder, if there are any."""
        said: dict[str, Any] = {name: value for name, value in asdict(self).items() if value is not None}
        if said:
            content = json.dumps(said, default=lambda dtype: str(dtype).removeprefix("torch."))
            (folder / NAME).write_text(content, encoding="utf-8")

    @classmethod
    def read(cls, path: Path | None) -> Settings:
        """Read the settings in a file.

        :param path: None is a file that does not exist.
        :raises OSError: if it cannot be read.
        """
        if path is None or not path.is_file():
            return cls()
        try:
            said = json.loads(path.read_text(encoding="utf-8"))
            ends, pad, start = (said.get(name) for name in ("eos_token_ids", "pad_token_id", "decoder_start_ids"))
            if any(type(i) is not int for i in (*(ends or ()), *(start or ()), *(() if pad is None else (pad,)))):
                raise TypeError(f"token ids {ends!r}, {pad!r} and {start!r} are no integers")
            return cls(
                None if ends is None else tuple(ends),
                pad,
                _dtype(said.get("compute_dtype")),
                _dtype(said.get("base_dtype")),
                None if start is None else tuple(start),
            )
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise OSError(f"{path} cannot be read ({error}): save the model again, or remove that file") from error


def _dtype(name: str | None) -> torch.dtype | None:
    dtype = None if name is None else getattr(torch, name)
    if not isinstance(dtype, torch.dtype | None):
        raise TypeError(f"{name!r} is no dtype")
    return dtype
