"""Modules whose properties raise their own errors."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from torch import nn


class ModuleWithProperties(nn.Module):
    """A torch module with properties.

    Python asks ``__getattr__`` where a property raises `AttributeError`, and torch's answer is that there is no such
    attribute, whatever was missing inside the property. Here the property raises its error again.
    """

    def __getattr__(self, name: str) -> Any:
        found = getattr(type(self), name, None)
        return (
            found.__get__(self, type(self))
            if isinstance(found, property | cached_property)
            else super().__getattr__(name)
        )
