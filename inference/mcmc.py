r"""Markov chain Monte Carlo over texts, and whatever other latents a program has: many chains as one batch.

    a sweep: for each latent in turn, a Metropolis-Hastings step (`moves`) that leaves \pi(z) \propto p(z) L(z) as it is

Chains start from importance sampling: they are draws of its particles with probabilities proportional to the weights
(sampling-importance resampling, Rubin 1988), and a warm-up follows, which adapts step sizes and is thrown away.

Parallel tempering runs K replicas of each chain, at inverse temperatures 0 = g_1 < ... < g_K = 1 of the likelihood,
and exchanges neighbours with probability min(1, (L(z_k) / L(z_{k+1}))^{g_{k+1} - g_k}), even and odd pairs in turn.
The first replica draws from the prior and forgets; only the last one is kept. In the warm-up the temperatures move to
where all neighbours refuse equally often (Syed, Bouchard-Côté, Deligiannidis and Doucet 2021, arXiv 1905.02939).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bayeslm import diagnostics
from bayeslm.inference.markov.moves import RandomWalk, Tally, latent_moves, sweep, tempered
from bayeslm.inference.program.checks import check_counts, check_positive
from bayeslm.inference.program.guides import PolicyGuide
from bayeslm.inference.program.particles import Particles
from bayeslm.inference.program.program import Program, inspect, seeded
from bayeslm.inference.program.results import Stopwatch, carry, check_evidence, draw, posterior, prompt_labels, to_numpy
from bayeslm.posterior import Posterior
from bayeslm.progress import track

from ..models import LanguageModel


@dataclass(frozen=True)
class MCMC:
    """Chains of completions whose suffixes are redrawn, with steps for the other latents of the program.

    :param num_samples: draws kept of each chain.
    :param num_chains: chains, all run as one batch.
    :param warmup: sweeps before the first draw.
    :param thin: sweeps for each draw.
    :param initial_particles: draws of the prior, or of the proposal, that chains start from.
    :param proposal: a policy (trained by `SVI`) that proposes suffixes in the prior's place.
    :param num_temperatures: replicas of each chain in parallel tempering, for posteriors with modes far apart. 1 is
        none; each costs as much as a chain.
    :param step_size: of random walks on continuous latents, at the start; see `RandomWalk`.
    :param seed, progress: as in `ImportanceSampling`.
    """

    num_samples: int = 200
    num_chains: int = 16
    warmup: int = 100
    thin: int = 1
    initial_particles: int = 256
    proposal: LanguageModel | None = None
    num_temperatures: int = 1
    step_size: float = 1.0
    seed: int | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        check_counts(self, "num_samples", "num_chains", "warmup", "thin", "initial_particles", "num_temperatures")
        check_positive(self, "step_size")

    def run(self, model: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Posterior:
        """Sample the posterior of ``model(*args, **kwargs)``. Draws come equally weighted; log Z is not estimated.

        ``stats``, for each site: ``acceptance_<site>`` (prompt,), ``acceptance_by_cut_<site>`` and ``cuts_<site>``
        (max_new_tokens,) of completions, ``step_size_<site>`` (prompt,) of continuous latents; of the warm start
        ``initial_ess`` and ``initial_log_evidence`` (prompt,), importance sampling's own; with parallel tempering
        ``swap_acceptance`` (pair, prompt) and ``inverse_temperatures`` (temperature, prompt).

        Ctrl-C keeps the draws so far; an error on the way carries them as its ``particles``.

        :raises EvidenceError: if no initial particle has positive probability.
        :raises ProgramError: if a latent is masked, or a term of the log-joint is NaN.
        """
        with seeded(self.seed), Stopwatch() as watch, torch.no_grad():
            program = inspect(model, *args, **kwargs)
            guide = None if self.proposal is None else PolicyGuide(program, self.proposal)
            initial, interrupted = draw(
                program, guide, self.initial_particles, progress=self.progress, what="warm start"
            )
            if interrupted:
                raise KeyboardInterrupt
            weights = to_numpy(initial.log_weights)[None]
            check_evidence(weights, prompt_labels(program))
            replicas = Replicas(program, self.num_temperatures, self.num_chains)
            groups = torch.arange(self.num_temperatures, device=program.device).repeat_interleave(self.num_chains)
            moves = latent_moves(program, policy=self.proposal, step_size=self.step_size, groups=groups)
            state = replicas.start(initial)
            tally = Tally()
            parts: list[Particles] = []
            steps = self.warmup + self.num_samples * self.thin
            with track("MCMC", steps, self.progress) as report:
                for step in range(steps):
                    warm = step < self.warmup
                    try:
                        state = sweep(
                            moves, state, replicas.gamma, tally=None if warm else tally, rows=replicas.cold, adapt=warm
                        )
                        state = replicas.swap(state)
                    except KeyboardInterrupt:
                        if not parts:
                            raise
                        interrupted = True
                        break
                    except Exception as error:
                        if parts:
                            carry(error, chain_major(parts), f"the {len(parts)} draws of each chain before")
                        raise
                    if warm:
                        replicas.adapt(step + 1)
                    elif (step - self.warmup + 1) % self.thin == 0:
                        parts.append(recorded(state[replicas.cold]))
                    report()
            steps_of = {m.site.name: m.step_size[-1] for m in moves if isinstance(m, RandomWalk)}
            kept = chain_major(parts)
            return posterior(
                program,
                kept,
                engine="MCMC",
                kind="markov",
                num_chains=self.num_chains,
                stats=watch.read()
                | tally.stats()
                | {f"step_size_{name}": to_numpy(size) for name, size in steps_of.items()}
                | {
                    "initial_ess": diagnostics.ess(weights),
                    "initial_log_evidence": diagnostics.log_evidence(weights)[0],
                }
                | replicas.stats()
                | {"warmup": self.warmup, "thin": self.thin, "interrupted": interrupted},
                prior=initial if guide is None else None,
            )


class Replicas:
    """K tempered replicas of C chains, in one axis of particles, the K-th chain's last; K = 1 is no tempering.

    ``gamma`` (particle, column): inverse temperatures; ``cold``: the particles at 1.
    """

    def __init__(self, program: Program, temperatures: int, chains: int) -> None:
        self._program = program
        self._shape = (temperatures, chains, program.weight_prompts)
        ladder = torch.linspace(0.0 if temperatures > 1 else 1.0, 1.0, temperatures, device=program.device)
        self._ladder = ladder[:, None].repeat(1, program.weight_prompts)
        self.cold = slice((temperatures - 1) * chains, None)
        self._swaps = 0
        self._forget()

    def _forget(self) -> None:
        self._tried, self._accepted = torch.zeros((2, self._shape[0] - 1, self._shape[2]), device=self._ladder.device)

    @property
    def gamma(self) -> Tensor:
        return self._ladder.repeat_interleave(self._shape[1], 0)

    def start(self, particles: Particles) -> Particles:
        """Chains drawn from weighted particles, at each temperature by its own weights."""
        weights = tempered(particles.total_log_likelihood, self._ladder[:, None])  # (temperature, particle, column)
        weights = weights + particles.log_prior - particles.log_proposal
        shares = weights.movedim(1, -1).softmax(-1)
        index = shares.flatten(0, 1).multinomial(self._shape[1], replacement=True)
        index = index.reshape(self._shape[0], self._shape[2], self._shape[1]).movedim(-1, 1)
        return particles.gather(self._program, index.flatten(0, 1))

    def swap(self, state: Particles) -> Particles:
        """Exchange neighbours: even pairs and odd ones in turn."""
        temperatures, chains, _ = self._shape
        if temperatures == 1:
            return state
        likelihood = state.total_log_likelihood.reshape(self._shape)
        log_ratio = self._ladder.diff(dim=0)[:, None] * (likelihood[:-1] - likelihood[1:])  # (pair, chain, column)
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
        """At steps 16, 32, 64, ...: temperatures between which the chains have refused equally often so far."""
        if self._shape[0] < 3 or step < 16 or step & (step - 1):
            return
        refused = to_numpy(1.0 - self._accepted / self._tried) + 1e-3
        barrier = np.concatenate([np.zeros_like(refused[:1]), refused.cumsum(0)])
        old = to_numpy(self._ladder)
        for column in range(old.shape[1]):
            even = np.linspace(0.0, barrier[-1, column], len(old))
            self._ladder[:, column] = torch.as_tensor(np.interp(even, barrier[:, column], old[:, column]))
        self._forget()

    def stats(self) -> dict[str, Any]:
        if self._shape[0] == 1:
            return {}
        return {
            "inverse_temperatures": to_numpy(self._ladder),
            "swap_acceptance": to_numpy(self._accepted / self._tried),
        }


def recorded(state: Particles) -> Particles:
    """What of chains is kept as a draw: off the accelerator, without what only moves need."""
    return Particles(
        {name: value.cpu() for name, value in state.values.items()},
        state.log_prior.cpu(),
        state.log_proposal.cpu(),
        {name: term.cpu() for name, term in state.log_likelihood.items()},
        {},
        {name: term.cpu() for name, term in state.pointwise.items()},
    )


def chain_major(parts: list[Particles]) -> Particles:
    """Draws of all chains, one part a draw, in the order of chains."""
    draws, chains = len(parts), len(parts[0].log_prior)
    return Particles.concatenate(parts)[torch.arange(draws * chains).reshape(draws, chains).T.reshape(-1)]
