"""Checks of engines' settings, made when the engine is constructed."""

from __future__ import annotations

import math
import numbers
from typing import Any


def check_counts(engine: Any, *names: str) -> None:
    """Check that settings are positive whole numbers, or None where that is the default.

    :raises ValueError: with the setting's name and value.
    """
    for name in names:
        value = getattr(engine, name)
        if value is None and getattr(type(engine), name, 0) is None:
            continue
        if not isinstance(value, numbers.Integral) or isinstance(value, bool) or int(value) < 1:
            raise ValueError(f"{type(engine).__name__}: {name} must be a positive whole number, got {value!r}")


def check_positive(engine: Any, *names: str) -> None:
    """Check that settings are positive and finite, or None.

    :raises ValueError: with the setting's name and value.
    """
    for name in names:
        value = getattr(engine, name)
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{type(engine).__name__}: {name} must be positive and finite, got {value!r}")
