"""Networks of which each process has a part alone: they are refused, as nothing here computes with parts."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

DISTRIBUTED = {"DTensor", "FlatParameter"}  # by their names: PyTorch imports neither before it is used


def refuse_sharded(named: Iterable[tuple[str, Tensor]]) -> None:
    """Refuse parameters that are distributed over processes.

    :param named: the parameters with their names.
    :raises TypeError: if one is, as by ``fully_shard`` (FSDP2), FSDP or tensor parallelism.
    """
    for name, x in named:
        if not DISTRIBUTED.isdisjoint(each.__name__ for each in type(x).__mro__):
            placed = f" as {list(x.placements)}" if hasattr(x, "placements") else ""
            raise TypeError(
                f"the parameter {name!r} is a {type(x).__name__}, distributed over processes{placed}, each of which "
                "has a part alone: it would be scored or trained wrongly. Hand in the network whole, without "
                "fully_shard, FSDP or tensor parallelism: engines divide draws and particles among the processes. "
                "policy(lora_rank) trains few weights where memory is short"
            )
