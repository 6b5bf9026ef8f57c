"""Gradients for code that needs them, whatever its caller has turned off."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def differentiating() -> Iterator[None]:
    """Record gradients in the block, also where its caller is in ``torch.no_grad`` or ``torch.inference_mode``.

    :raises ValueError: if the block differentiates through a tensor that was made in inference mode, which PyTorch
        refuses.
    """
    with torch.inference_mode(False), torch.enable_grad():
        try:
            yield
        except RuntimeError as error:
            if "nference tensor" not in str(error) or type(error) is not RuntimeError:
                raise
            raise ValueError(
                f"a network or a tensor was made inside torch.inference_mode ({str(error).partition('.')[0]}): make or "
                "load it outside, or give a copy, x.clone(), that was made outside"
            ) from error
