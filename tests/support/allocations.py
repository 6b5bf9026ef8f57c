"""Peak memory of a block on the CPU, as PyTorch's allocator counts it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def peak_bytes(function: Callable[[], Any]) -> int:
    """Return the most bytes of tensors that a function holds at once, beyond those that exist before it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = function()
    events = [x for x in profile.profiler.kineto_results.events() if x.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda x: x.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    del result
    return peak
