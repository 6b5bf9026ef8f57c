"""Settings of engines, checked where they are made."""

from __future__ import annotations

import math
import numbers
from typing import Any


def check_counts(engine: Any, *names: str) -> None:
    """:raises ValueError: if a named setting is not a positive whole number, nor None where that is the default."""
    for name in names:
        value = getattr(engine, name)
        if value is None and getattr(type(engine), name, 0) is None:
            continue
        if not isinstance(value, numbers.Integral) or isinstance(value, bool) or int(value) < 1:
            raise ValueError(f"{type(engine).__name__}: {name} must be a positive whole number, got {value!r}")


def check_positive(engine: Any, *names: str) -> None:
    """:raises ValueError: if a named setting is neither None nor positive and finite."""
    for name in names:
        value = getattr(engine, name)
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{type(engine).__name__}: {name} must be positive and finite, got {value!r}")
