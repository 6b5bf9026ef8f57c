"""The GPU of each of several processes on one machine."""

from __future__ import annotations

import os

import torch


def own_device(device: str | torch.device) -> torch.device:
    """Return a device; "cuda" is this process's own GPU, which becomes its current one.

    Launchers number the processes of a machine by LOCAL_RANK.

    :raises ValueError: if there are more processes than GPUs.
    """
    asked, local = torch.device(device), os.environ.get("LOCAL_RANK", "")
    if asked != torch.device("cuda") or not local.isdecimal() or not (gpus := torch.cuda.device_count()):
        return asked
    if int(local) >= gpus:
        raise ValueError(
            f"process {local} of this machine has no GPU of its own: there are {gpus}. Launch at most as many processes"
        )
    torch.cuda.set_device(int(local))
    return torch.device("cuda", int(local))
