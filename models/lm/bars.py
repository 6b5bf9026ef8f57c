"""Bars of transformers, which load and write the weights of a small model too quickly to be read."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from transformers.utils import logging

PATIENCE = 5.0  # seconds of a bar that are not shown


@contextlib.contextmanager
def late_bars() -> Iterator[None]:
    """Let transformers' bars come only after some seconds in the block, where this version of transformers can."""
    set_hook: Any = getattr(logging, "set_tqdm_hook", None)
    if set_hook is None:
        yield
        return

    def make(bar: Callable[..., Any], arguments: tuple[Any, ...], settings: dict[str, Any]) -> Any:
        made = bar if before is None else lambda *args, **kwargs: before(bar, args, kwargs)
        return made(*arguments, **{"delay": PATIENCE} | settings)

    before = set_hook(None)
    set_hook(make)
    try:
        yield
    finally:
        set_hook(before)
