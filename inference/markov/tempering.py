r"""Parallel tempering: replicas of chains at inverse temperatures of the likelihood, and exchanges between neighbours.

    0 = g_1 < ... < g_K = 1,    exchange with probability min(1, (L(z_k) / L(z_{k+1}))^{g_{k+1} - g_k})

Even and odd pairs alternate. The inverse temperatures adapt until all pairs reject equally often (Syed, Bouchard-Côté,
Deligiannidis and Doucet 2021, arXiv 1905.02939).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from bayeslm.inference.program import Particles, Program, to_numpy
from bayeslm.validation import validated


def log_target(state: Particles, gamma: Tensor | float) -> Tensor:
    """Return log p(z) + gamma log L(z), (particle, prompt); at gamma = 0 it is log p(z), even where L = 0."""
    return state.log_prior + tempered(state.total_log_likelihood, gamma)


def tempered(log_likelihood: Tensor, gamma: Tensor | float) -> Tensor:
    """Return gamma log L, with 0 log 0 = 0."""
    gamma = torch.as_tensor(gamma, dtype=log_likelihood.dtype, device=log_likelihood.device)
    return torch.where(gamma == 0, 0.0, gamma * log_likelihood)


@validated
class Replicas:
    """Replicas of the chains at K inverse temperatures, in one axis of particles, temperature by temperature.

    ``cold`` is the slice of the particles at inverse temperature 1, the last ones. K = 1 is no tempering. The prompt
    axis has length 1 where prompts share a latent.

    :param program: the inspected program.
    :param temperatures: the number K.
    :param chains: the number of chains.
    """

    def __init__(self, program: Program, temperatures: int, chains: int) -> None:
        self._program = program
        self._shape = (temperatures, chains, program.weight_prompts)
        ladder = torch.linspace(0.0 if temperatures > 1 else 1.0, 1.0, temperatures, device=program.device)
        self._ladder = ladder[:, None].repeat(1, program.weight_prompts)
        self.cold = slice((temperatures - 1) * chains, None)
        self._swaps = 0
        self._reset_counts()

    def _reset_counts(self) -> None:
        self._tried, self._accepted = torch.zeros((2, self._shape[0] - 1, self._shape[2]), device=self._ladder.device)

    @property
    def gamma(self) -> Tensor:
        """Inverse temperatures, (particle, prompt)."""
        return self._ladder.repeat_interleave(self._shape[1], 0)

    def start(self, particles: Particles) -> Particles:
        """Draw the chains' first states from weighted particles, by the weights for each inverse temperature."""
        weights = tempered(particles.total_log_likelihood, self._ladder[:, None])  # (temperature, particle, prompt)
        weights = weights + particles.log_prior - particles.log_proposal
        shares = weights.movedim(1, -1).softmax(-1)
        index = shares.flatten(0, 1).multinomial(self._shape[1], replacement=True)
        index = index.reshape(self._shape[0], self._shape[2], self._shape[1]).movedim(-1, 1)
        return particles.gather(self._program, index.flatten(0, 1))

    def swap(self, state: Particles) -> Particles:
        """Exchange the states of neighbours: of even pairs at one call, of odd pairs at the next."""
        temperatures, chains, _ = self._shape
        if temperatures == 1:
            return state
        likelihood = state.total_log_likelihood.reshape(self._shape)
        log_ratio = self._ladder.diff(dim=0)[:, None] * (likelihood[:-1] - likelihood[1:])  # (pair, chain, prompt)
        probability = log_ratio.nan_to_num(nan=-torch.inf, neginf=-torch.inf).clamp_max(0.0).exp()
        turn = torch.arange(temperatures - 1, device=state.log_prior.device) % 2 == self._swaps % 2
        accepted = (torch.rand_like(probability) < probability) & turn[:, None, None]
        self._swaps += 1
        self._tried += turn[:, None] * chains
        self._accepted += (probability * turn[:, None, None]).sum(1)
        index = torch.arange(temperatures * chains, device=accepted.device).reshape(temperatures, chains, 1)
        index = index.repeat(1, 1, self._shape[2])
        index[:-1] += chains * accepted
        index[1:] -= chains * accepted
        return state.gather(self._program, index.flatten(0, 1))

    def adapt(self, step: int) -> None:
        """At steps 16, 32, 64, ..., move the inverse temperatures to where all pairs would reject equally often.

        :param step: the number of sweeps so far.
        """
        if self._shape[0] < 3 or step < 16 or step & (step - 1):
            return
        rejected = to_numpy(1.0 - self._accepted / self._tried) + 1e-3
        barrier = np.concatenate([np.zeros_like(rejected[:1]), rejected.cumsum(0)])
        old = to_numpy(self._ladder)
        for prompt in range(old.shape[1]):
            even = np.linspace(0.0, barrier[-1, prompt], len(old))
            self._ladder[:, prompt] = torch.as_tensor(np.interp(even, barrier[:, prompt], old[:, prompt]))
        self._reset_counts()

    def stats(self) -> dict[str, Any]:
        """Return ``inverse_temperatures`` (temperature, prompt) and ``swap_acceptance`` (pair, prompt); {} if K = 1."""
        if self._shape[0] == 1:
            return {}
        return {
            "inverse_temperatures": to_numpy(self._ladder),
            "swap_acceptance": to_numpy(self._accepted / self._tried),
        }
