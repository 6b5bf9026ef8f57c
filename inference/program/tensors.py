"""Tensors of values and terms: picked by prompt, brought to NumPy."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def along(x: Tensor, axis: int, index: Tensor) -> Tensor:
    """x (particle, ...) gathered by ``index`` (draw, prompt), prompts being ``axis`` of x."""
    shape = [1] * x.dim()
    shape[0], shape[axis] = index.shape
    return x.gather(0, index.to(x.device).reshape(shape).expand(len(index), *x.shape[1:]))


def to_numpy(x: Tensor) -> np.ndarray:
    """A tensor as an array; half precisions, which NumPy lacks or computes badly in, as float32."""
    return (x.float() if x.dtype in (torch.bfloat16, torch.float16) else x).detach().cpu().numpy()
