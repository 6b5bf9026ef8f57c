"""Networks that read the whole text again for each of its tokens.

The state of recurrent networks has no keys and values to select and to move; others have no cache at all; and some
count positions from the first token of a batch, padding included. Their own forward pass is right: of whole texts,
without padding, those of one length at a time.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad


def one_length_at_a_time(states: Callable[[Tensor], Tensor], ids: Tensor, mask: Tensor | None) -> Tensor:
    """Return hidden states (row, length, width) of left-padded texts (row, length), 0 on padding.

    :param states: computes the hidden states of texts without padding.
    :param mask: 1 at tokens that are not padding, (row, length); None where none is.
    """
    if mask is None:
        return states(ids)
    length = ids.shape[-1]
    lengths = mask.sum(-1)
    rows, parts = [], []
    for real in lengths.unique().tolist():
        rows.append((lengths == real).nonzero().squeeze(-1))
        parts.append(pad(states(ids[rows[-1], length - real :]), (0, 0, length - real, 0)))
    return torch.cat(parts)[torch.cat(rows).argsort()]
