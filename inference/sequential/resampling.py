r"""Resampling: weighted particles are replaced by copies of them, their offspring, that have equal weights.

A scheme is unbiased if, with N particles of normalised weights W_i, particle i has N W_i offspring on average. All of
these are, exactly. They place N points on the weights' distribution function F(i) = N (W_1 + ... + W_i); a point
belongs to the first i with F(i) above it:

    multinomial    N u_k, all independent            Gordon, Salmond and Smith 1993
    stratified     k + u_k, one in each stratum      Kitagawa 1996
    systematic     k + u, one u for all              Carpenter, Clifford and Fearnhead 1999
    residual       floor(N W_i) copies of each i, the rest multinomial by the remainders   Liu and Chen 1998

Stratified and residual resampling never add more variance than multinomial; systematic gives every particle
floor(N W_i) or ceil(N W_i) offspring, and usually adds least, though there are counterexamples (Douc and Cappé 2005,
arXiv cs/0507025, who compare the schemes).

Log-weights are (chain, particle, prompt), unnormalised, finite or -inf, and a scheme returns the ancestors in the same
shape: the index of the particle of which each new one is a copy. Each chain and each prompt is resampled on its own. A
particle of weight 0 has no offspring; where all weights are 0 they count as equal, so callers must check for that case.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor


def multinomial(log_weights: Tensor) -> Tensor:
    """Draw ancestors independently."""
    shares = _shares(log_weights)
    return at_points(shares, shares.shape[-1] * torch.rand_like(shares))


def stratified(log_weights: Tensor) -> Tensor:
    """Draw ancestors by one uniform point in each stratum [k, k + 1)."""
    shares = _shares(log_weights)
    return at_points(shares, _strata(shares) + torch.rand_like(shares))


def systematic(log_weights: Tensor) -> Tensor:
    """Draw ancestors by equidistant points with one random offset."""
    shares = _shares(log_weights)
    return at_points(shares, _strata(shares) + torch.rand_like(shares[..., :1]))


def residual(log_weights: Tensor) -> Tensor:
    """Copy particle i floor(N W_i) times, and draw the ancestors still missing independently from the remainders."""
    shares = _shares(log_weights)
    certain, slots, size = shares.floor(), _strata(shares), shares.shape[-1]
    copies = certain.sum(-1, keepdim=True)
    points = torch.where(slots < copies, slots, copies + (size - copies) * torch.rand_like(shares))
    return at_points(torch.cat([certain, shares - certain], -1), points) % size


def conditional_multinomial(log_weights: Tensor) -> Tensor:
    """Draw ancestors independently, except that of particle 0, which is retained: its ancestor is itself.

    This is the resampling step of conditional SMC (Andrieu, Doucet and Holenstein 2010, Particle Markov chain Monte
    Carlo). Other particles may be copies of particle 0.
    """
    ancestors = multinomial(log_weights)
    ancestors[:, 0] = 0
    return ancestors


Resampling = Literal["multinomial", "stratified", "systematic", "residual"]
RESAMPLING: dict[Resampling, Callable[[Tensor], Tensor]] = {
    "systematic": systematic,
    "stratified": stratified,
    "residual": residual,
    "multinomial": multinomial,
}


def keep_in_place(ancestors: Tensor) -> Tensor:
    """Reorder ancestors so that a particle with offspring is its own ancestor.

    Then only particles without offspring are replaced, in ascending order, and no other memory has to be copied.
    """
    ascending = ancestors.sort(1).values
    again = torch.zeros_like(ascending, dtype=torch.uint8)
    again[:, 1:] = ascending[:, 1:] == ascending[:, :-1]
    lost = torch.ones_like(again).scatter(1, ancestors, 0)
    # one copy of each survivor, ascending, then the further copies; into survivors' places, ascending, then the others'
    values = ascending.gather(1, again.argsort(dim=1, stable=True))
    return torch.empty_like(ancestors).scatter(1, lost.argsort(dim=1, stable=True), values)


def ess(log_weights: Tensor) -> Tensor:
    """Return Kish's effective sample size (sum w)^2 / sum w^2, (chain, prompt); 0 where every weight is 0."""
    weights = relative_weights(log_weights)
    square = weights.square().sum(-1)
    return weights.sum(-1).square() / square.clamp_min(torch.finfo(square.dtype).tiny)


def relative_weights(log_weights: Tensor) -> Tensor:
    """Return weights divided by the largest, (chain, prompt, particle), in float64 except on MPS, which has none."""
    wide = torch.float32 if log_weights.device.type == "mps" else torch.float64
    lw = log_weights.movedim(1, -1).to(wide)
    peak = lw.amax(-1, keepdim=True)
    return (lw - torch.where(peak == -torch.inf, 0.0, peak)).exp()


def _shares(log_weights: Tensor) -> Tensor:
    """Return the expected numbers of offspring N W, (chain, prompt, particle)."""
    weights = relative_weights(log_weights)
    total = weights.sum(-1, keepdim=True)
    weights = torch.where(total > 0, weights, 1.0)
    return weights.shape[-1] * weights / weights.sum(-1, keepdim=True)


def _strata(shares: Tensor) -> Tensor:
    """Return the lower ends of the strata, which are also the particles' indices."""
    return torch.arange(shares.shape[-1], dtype=shares.dtype, device=shares.device).expand_as(shares)


def at_points(mass: Tensor, points: Tensor) -> Tensor:
    """Return the particles (chain, particle, prompt) on whose mass (chain, prompt, particle) the points fall."""
    cumulative = mass.cumsum(-1)
    index = torch.searchsorted(cumulative, points.contiguous(), right=True).clamp_max(mass.shape[-1] - 1)
    # rounding may place a point outside all mass: past the end, or between two sums that should be equal
    outside = mass.gather(-1, index) == 0
    return torch.where(outside, mass.argmax(-1, keepdim=True), index).movedim(-1, 1).contiguous()
