r"""Optimal resampling: of all texts that are longer by a token, as many are kept as there are particles, each once.

N particles of weights W_i, whose next tokens have the probabilities q_i, have children of masses m_{iv} = W_i q_i(v),
all of which are known before a token is drawn. With the threshold c that solves

    \sum_{iv} min(1, m_{iv} / c) = N

a child of mass c or more is kept and has its mass as weight; of the others N - #{m >= c} are kept by systematic
resampling, with probability m / c, and have the weight c. So a child's weight is its mass in expectation, estimates
stay unbiased, and of all such schemes that keep N children this has the least \sum E (weight - mass)^2 (Fearnhead and
Clifford 2003, doi 10.1111/1467-9868.00421; for texts Lew et al. 2023, "SMC steering", arXiv 2306.03081). Resampling
that is followed by draws of the next token keeps copies of likely texts instead, which say no more than one of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .resampling import at_points, relative_weights


def keep(log_mass: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """Keep so many children of each chain and prompt.

    :param log_mass: (chain, child, prompt), unnormalised; at least ``number`` of them, some of which may be -inf.
    :returns: their indices and their log-weights, both (chain, particle, prompt); -inf where fewer children have mass.
    """
    mass = relative_weights(log_mass)  # (chain, prompt, child)
    top, order = mass.topk(number, -1)
    places = torch.arange(number, device=mass.device)
    left = mass.scatter(-1, order, 0.0).sum(-1, keepdim=True) + top.flip(-1).cumsum(-1).flip(-1)  # of top[k] and less
    thresholds = left / (number - places)  # if the first k are kept for certain
    certain = (top >= thresholds).long().cumprod(-1)
    first = certain.sum(-1, keepdim=True)  # the number of these, and then the first of the others
    threshold = thresholds.gather(-1, first.clamp_max(number - 1))
    others = mass.scatter(-1, order, torch.where(certain > 0, 0.0, top))
    points = (places - first + torch.rand_like(threshold)).clamp_min(0.0) * threshold
    index = torch.where((certain > 0).movedim(-1, 1), order.movedim(-1, 1), at_points(others, points))
    peak = log_mass.amax(1, keepdim=True)
    log_weight = torch.where(certain > 0, top, threshold).log().movedim(-1, 1)
    return index, (log_weight + torch.where(peak == -torch.inf, 0.0, peak)).to(log_mass.dtype)
