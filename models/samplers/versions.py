"""What vLLM must be, in process or as a server, in words."""

from __future__ import annotations

import re

OLDEST = (0, 10)  # the first version that returns log-probabilities after the temperature
NEEDS_PROCESSED = "returns log-probabilities before the temperature, and {:g} is asked for"
DEPARTED = (
    "has the weights of the model that it was given to, and all weights of this one were trained or merged: it can "
    "take adapters alone, as SVI(guide=partial(AutoPolicy, lora_rank=16)) trains them"
)


def check_version(version: str) -> str:
    """Return what is wrong with a version, or nothing."""
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is not None and (int(found[1]), int(found[2])) >= OLDEST:
        return ""
    what = "does not say its version, as vLLM does" if found is None else f"is version {found[0]}"
    return f"{what}: needed is vLLM {OLDEST[0]}.{OLDEST[1]} or newer"
