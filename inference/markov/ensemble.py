r"""Ensembles: of the current state and N proposed ones, one becomes the next state, and all count in averages.

z_0 is the current state, z_1, ..., z_N ~ q independently, and w_k = \pi(z_k) / q(z_k). The next state is

    z_k, k >= 1,  drawn with probabilities w_k / W,      W = w_1 + ... + w_N,
    with probability  min(1, W / (W - w_k + w_0)),       and z_0 otherwise.

The flow from z_0 to z_k is proportional to w_0 w_k min(1 / W, 1 / (W - w_k + w_0)), which is symmetric in the two, so
that \pi is invariant (detailed balance). N = 1 is the step of Metropolis and Hastings. For every N it is multiple-try
Metropolis with independent proposals (Liu, Liang and Wong 2000, doi 10.2307/2669532) and a Metropolised choice (Liu
1996, doi 10.1093/biomet/83.3.681): it leaves z_0 more often than a draw of one of the N + 1 by w_k / (w_0 + W), and
mixes better (Peskun 1973). All N proposals are one batch of the network.

Given the set {z_0, ..., z_N}, each of them was the current state with probability s_k = w_k / (w_0 + W), so in the
stationary distribution

    E_\pi[f] = E[ \sum_k s_k f(z_k) ]

and the average of the right side over sweeps counts the proposals that were not taken too (Tjelmeland 2004, "Using all
Metropolis-Hastings proposals to estimate mean values"; Calderhead 2014, doi 10.1073/pnas.1408184111): `Recycling`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bayeslm.inference.program import Particles, Program, to_numpy
from bayeslm.validation import validated


@dataclass
class Choice:
    """The choice of the next state among N + 1.

    :param index: the next state, 0 for the current one, (particle, prompt).
    :param probability: of the step to the proposal that was drawn, (particle, prompt).
    :param shares: s_k of the current state and the N proposed ones, (N + 1, particle, prompt).
    """

    index: Tensor
    probability: Tensor
    shares: Tensor


def choose(log_ratios: Tensor, current: Tensor) -> Choice:
    """Choose the next state of every particle.

    :param log_ratios: log w_k - log w_0 of the N proposals, (N, particle, prompt); +inf where only w_0 is 0, and NaN
        where both are.
    :param current: whether w_0 > 0, (particle, prompt).
    """
    log_ratios = log_ratios.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)  # NaN: 0 to 0 is rejected
    # where w_0 is 0 the proposals of positive weight are taken as equal: the chain has not yet reached its target
    relative = torch.where(current, log_ratios, log_ratios.clamp_max(0.0))
    own = torch.where(current, 0.0, -torch.inf)
    total = relative.logsumexp(0)
    if len(relative) == 1:
        drawn = torch.zeros_like(total, dtype=torch.long)
        others = own
    else:
        shares = (relative - torch.where(total == -torch.inf, 0.0, total)).exp()
        drawn = _draw(shares)
        left_out = relative.scatter(0, drawn[None], -torch.inf)
        others = torch.cat([left_out, own[None]]).logsumexp(0)
    log_ratio = torch.where(total == -torch.inf, -torch.inf, total - others)  # others = -inf: +inf
    accepted = torch.rand_like(log_ratio).log() < log_ratio
    logs = torch.cat([own[None], relative])
    dead = (logs == -torch.inf).all(0)
    logs[0] = torch.where(dead, 0.0, logs[0])
    return Choice((drawn + 1) * accepted, log_ratio.clamp_max(0.0).exp(), logs.softmax(0))


def _draw(shares: Tensor) -> Tensor:
    """Draw an index of the first axis with probabilities ``shares`` (candidate, particle, prompt)."""
    cdf = shares.cumsum(0)
    u = torch.rand_like(cdf[0]) * cdf[-1]
    index = (cdf <= u).sum(0).clamp_max(len(cdf) - 1)
    # rounding may place u past the end: the last of positive probability then, which argmax of the cdf finds
    return torch.where(shares.gather(0, index[None])[0] > 0, index, cdf.argmax(0))


@validated
def num_candidates(program: Program, chains: int) -> int:
    """Return the number N of proposals in one batch: by the device and the number of chains, not by a clock.

    A few rows cost little more than one, because a network's weights are read once for all of them: about 64 rows on a
    CPU and 512 on another device. N is what the chains' completions leave of these, at least 1 (many chains fill the
    batch) and at most 16: the more proposals, the less each of their tokens is worth.

    :param chains: the number of chains.
    """
    rows = chains * max((site.fn.batch_shape.numel() for site in program.completions), default=1)
    free = 64 if program.device.type == "cpu" else 512
    return max(1, min(16, free // rows))


class Recycling:
    """Averages over the candidates of all moves since the last draw, in the place of the draw's own values.

    Of every reward, of every factor's term, and of deterministic sites with one number for each prompt.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._count = 0
        self._draws: list[dict[str, Tensor]] = []

    def add(self, program: Program, candidates: Particles, shares: Tensor, rows: Tensor | slice) -> None:
        """Count the candidates of one move.

        :param candidates: the current states and N proposals of each, (N + 1) * particle.
        :param shares: (N + 1, particle, prompt).
        :param rows: the particles that count.
        """
        values = {f"log_likelihood_{name}": term for name, term in candidates.log_likelihood.items()}
        values |= candidates.rewards
        for name, value in candidates.values.items():
            site = program.sites[name]
            if site.kind == "deterministic" and site.dims == ("prompt",) and value.is_floating_point():
                values[name] = value
        for name, value in values.items():
            each = value.reshape(len(shares), -1, *value.shape[1:])
            mean = torch.where(shares > 0, shares * each, 0.0).sum(0)[rows].cpu()
            self._sums[name] = self._sums.get(name, 0) + mean
        self._count += 1

    def draw(self) -> None:
        """End the moves of one draw."""
        if self._count:
            self._draws.append({name: total / self._count for name, total in self._sums.items()})
        self._sums, self._count = {}, 0

    def stats(self, num_draws: int) -> dict[str, np.ndarray]:
        """Return the averages of the first draws, (chain, draw, prompt).

        Names are ``recycled_<name>`` for rewards and sites, and ``recycled_log_likelihood_<name>`` for factors.
        """
        draws = self._draws[:num_draws]
        names = draws[0] if draws else {}
        return {f"recycled_{name}": to_numpy(torch.stack([draw[name] for draw in draws], 1)) for name in names}
