"""Engines and strategies for control."""

from .state_values import StateValues

__all__ = ["StateValues"]
