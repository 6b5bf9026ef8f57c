"""Resident memory of the process that asks, as Linux counts it."""

from __future__ import annotations

from pathlib import Path


def resident() -> float:
    """MB now."""
    return _field("VmRSS")


def peak() -> float:
    """MB at the most since the process began (`ru_maxrss` may be the parent's)."""
    return _field("VmHWM")


def _field(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{name}:")).split()[1]) / 1024
