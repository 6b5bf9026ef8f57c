"""The figures of all steps of a run's chains, as arrays."""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np

from bayeslm.validation import NonEmpty, validated


@validated
def stack_chains(histories: Annotated[list[dict[str, list[Any]]], NonEmpty]) -> dict[str, Any]:
    """Return lists of chains as arrays (chain, step, ...), NaN after the end of a chain that ended before others.

    Entries that name steps, ``..._steps``, are one list, the longest chain's.
    """
    stacked: dict[str, Any] = {}
    for key in [key for key in histories[0] if all(key in history for history in histories)]:
        rows = [np.array(history[key]) for history in histories]
        longest = max(rows, key=len)
        if key.endswith("_steps"):
            stacked[key] = longest.tolist()
            continue
        padding = [np.full((len(longest) - len(x), *x.shape[1:]), np.nan) for x in rows]
        stacked[key] = np.array(
            [np.concatenate([x, nan]) if len(nan) else x for x, nan in zip(rows, padding, strict=True)]
        )
    return stacked
