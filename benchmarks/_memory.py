"""Resident memory of the process that asks, as Linux counts it."""

from __future__ import annotations

from pathlib import Path

import torch


def resident(network: torch.nn.Module) -> float:
    """MB now, with all of a network's weights: until they are used they may be in their file alone."""
    for p in network.parameters():
        p.sum()
    return _field("VmRSS")


def peak() -> float:
    """MB at the most since the process began, or the last `reset_peak` (`ru_maxrss` may be the parent's)."""
    return _field("VmHWM")


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _field(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{name}:")).split()[1]) / 1024
