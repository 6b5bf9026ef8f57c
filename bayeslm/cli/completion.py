"""Names that a shell completes, in a module that imports nothing: a shell waits for it after each tab."""

from __future__ import annotations

ENGINES = ("exact", "importance", "adaptive", "auto", "rejection", "bestofn", "smc", "annealed", "mcmc", "svi", "nuts")
REWARDS: tuple[str, ...] = ("classifier", "constraint", "contains", "exactmatch", "grammar", "judge", "length")
REWARDS += ("matches", "sentiment", "similarity", "tokenf1", "toxicity")


def complete_engine(incomplete: str) -> list[str]:
    """Return the engines that continue a list such as ``importance,s``."""
    return _continued(incomplete, ENGINES, ",")


def complete_reward(incomplete: str) -> list[str]:
    """Return the rewards that continue a sum such as ``sentiment + l``."""
    return _continued(incomplete, REWARDS, "+")


def _continued(incomplete: str, names: tuple[str, ...], separator: str) -> list[str]:
    before, found, last = incomplete.rpartition(separator)
    start = before + found + last[: len(last) - len(last.lstrip())]
    return [start + name for name in names if name.startswith(last.strip())]
