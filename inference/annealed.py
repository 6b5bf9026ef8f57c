r"""Annealed sequential Monte Carlo: from the prior to the posterior by a ladder of inverse temperatures.

With g_0 = 0 < g_1 < ... < g_K = 1 and \pi_g(z) \propto p(z) L(z)^g, N particles z ~ p, and for k = 1, ..., K

    w <- w L(z)^{g_k - g_{k-1}}
    where ESS(w) < threshold:  Z <- Z mean(w),  ancestors ~ resampling(w),  w = 1
    z ~ a sweep of Metropolis-Hastings moves that leaves \pi_{g_k} as it is (`moves`)

Del Moral, Doucet and Jasra 2006, doi 10.1111/j.1467-9868.2006.00553.x; Neal 2001, arXiv physics/9803008, without
resampling. E[\hat Z] = Z where the ladder is given. By default it is found on the way: each step goes as far as lets
the conditional ESS

    CESS(g) = N (\sum_i W_i v_i)^2 / \sum_i W_i v_i^2,     v_i = L(z_i)^{g - g_{k-1}},  W normalised

fall to a share of N, by bisection (Zhou, Johansen and Aston 2016, arXiv 1303.3123; Jasra, Stephens, Doucet and
Tsagaris 2011, doi 10.1111/j.1467-9469.2010.00723.x), and random walks adapt to their islands. \hat Z is then
consistent, with a bias that is small beside its spread (Beskos, Jasra, Kantas and Thiery 2016, arXiv 1306.6462).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bayeslm.inference.markov import Tally, latent_moves, sweep, tempered
from bayeslm.inference.program import (
    Particles,
    SoFar,
    Stopwatch,
    check_counts,
    check_positive,
    draw,
    inspect,
    keeping,
    posterior,
    seeded,
    to_numpy,
)
from bayeslm.inference.sequential import Islands, Step, check_resampling
from bayeslm.models.lm import LanguageModel
from bayeslm.posterior import Posterior
from bayeslm.progress import track


@dataclass(frozen=True)
class AnnealedSMC:
    """Particles that are cooled from the prior to the posterior. Each prompt of each chain has a ladder of its own.

    :param num_particles: in each chain, which is an island of its own: resampled within itself.
    :param num_chains: independent islands.
    :param ladder: inverse temperatures, ascending to 1; None finds them.
    :param cess: share of the particles to which the conditional ESS falls at each step of a ladder that is found.
    :param num_sweeps: sweeps of moves at each temperature.
    :param ess_threshold: resample where the ESS falls below this share of the particles; 0 never, 1 at each step.
    :param resampling: "systematic", "stratified", "residual" or "multinomial".
    :param proposal: a policy (trained by `SVI`) that proposes suffixes in the prior's place.
    :param step_size: of random walks on continuous latents, see `RandomWalk`; adapted if the ladder is found.
    :param seed, progress: as in `ImportanceSampling`.
    """

    num_particles: int = 64
    num_chains: int = 1
    ladder: Sequence[float] | None = None
    cess: float = 0.9
    num_sweeps: int = 1
    ess_threshold: float = 0.5
    resampling: str = "systematic"
    proposal: LanguageModel | None = None
    step_size: float = 1.0
    seed: int | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        check_counts(self, "num_particles", "num_chains", "num_sweeps")
        check_positive(self, "step_size")
        check_resampling(self)
        if not 0.0 < self.cess < 1.0:
            raise ValueError(f"AnnealedSMC: cess must be between 0 and 1, got {self.cess}")
        if self.ladder is not None:
            steps = [b - a for a, b in zip([0.0, *self.ladder], [*self.ladder, 1.0], strict=True)]
            if not self.ladder or not all(step > 0 for step in steps[:-1]) or steps[-1] != 0.0:
                raise ValueError(f"AnnealedSMC: ladder must ascend from above 0 to 1, got {self.ladder!r}")

    def run(self, model: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Posterior:
        """Sample the posterior of ``model(*args, **kwargs)``.

        ``stats``, a step being a temperature: ``inverse_temperatures``, ``ess_by_step`` before resampling and
        ``resampled`` (chain, step, prompt), ``ancestors`` (chain, step, draw, prompt), the genealogy; acceptance as
        `MCMC`'s.

        Ctrl-C cools what there is at once; an error on the way carries the particles as its ``particles``.

        :raises EvidenceError: if no particle of a prompt has positive probability.
        :raises ProgramError: if a latent is masked, or a term of the log-joint is NaN.
        """
        with seeded(self.seed), Stopwatch() as watch, torch.no_grad():
            program = inspect(model, *args, **kwargs)
            size = self.num_particles * self.num_chains
            initial, interrupted = draw(program, None, size, progress=self.progress, label="particles of the prior")
            if interrupted:
                raise KeyboardInterrupt
            groups = torch.arange(self.num_chains, device=program.device).repeat_interleave(self.num_particles)
            moves = latent_moves(program, policy=self.proposal, step_size=self.step_size, groups=groups)
            islands = Islands(
                program,
                self.num_chains,
                self.num_particles,
                scheme=self.resampling,
                threshold=self.ess_threshold,
                alone=True,
            )
            state, tally = initial, Tally()
            gamma = torch.zeros((self.num_chains, program.weight_prompts), device=program.device)
            one = torch.ones_like(gamma)
            ladder: list[Tensor] = []
            with track("annealing", None if self.ladder is None else len(self.ladder), self.progress) as report:
                while (gamma < 1.0).any():
                    last, gamma = gamma, one if interrupted else self._next(islands, state, gamma, len(ladder))
                    ladder.append(gamma)
                    name = f"inverse temperature {gamma.max().item():.3g}"
                    change = (gamma - last).repeat_interleave(self.num_particles, 0)
                    increment = tempered(state.total_log_likelihood, change)
                    islands.weigh(increment, Step(name, {}, state.log_likelihood, None))
                    if (index := islands.resample()) is not None:
                        state = state.gather(program, index)
                    with keeping(lambda state=state: SoFar(particles=state)) as run:  # type: ignore[misc]
                        for _ in range(0 if interrupted else self.num_sweeps):
                            each = gamma.repeat_interleave(self.num_particles, 0)
                            state = sweep(moves, state, each, tally=tally, adapt=self.ladder is None)
                    interrupted |= run.interrupted
                    report(values={"inverse temperature": gamma.min().item()})
            return posterior(
                program,
                state,
                engine="AnnealedSMC",
                kind="particles",
                num_chains=self.num_chains,
                log_weights=islands.total,
                roots=islands.roots,
                stats=watch.stats()
                | Islands.record([islands])
                | {"inverse_temperatures": to_numpy(torch.stack(ladder, 1))}
                | tally.stats()
                | {"interrupted": interrupted},
                prior=initial,
            )

    def _next(self, islands: Islands, state: Particles, gamma: Tensor, step: int) -> Tensor:
        """The next inverse temperatures (chain, column)."""
        if self.ladder is not None:
            return torch.full_like(gamma, self.ladder[step])
        shape = (self.num_chains, self.num_particles, -1)
        return next_temperature(
            islands.log_weights.reshape(shape), state.total_log_likelihood.reshape(shape), gamma, self.cess
        )


def next_temperature(log_weights: Tensor, log_likelihood: Tensor, gamma: Tensor, share: float) -> Tensor:
    """How far each posterior may cool until its conditional ESS is ``share`` of its particles, at most to 1.

    :param log_weights, log_likelihood: (chain, particle, column). Particles that are dead, or that any cooling kills,
        do not count: no step is small enough to keep them.
    :param gamma: the inverse temperatures (chain, column) now.
    """
    wide = torch.float32 if gamma.device.type == "mps" else torch.float64
    alive = log_likelihood > -torch.inf
    weights = torch.where(alive, log_weights, -torch.inf).to(wide)
    likelihood = torch.where(alive, log_likelihood, 0.0).to(wide)

    def enough(step: Tensor) -> Tensor:
        rise = step[:, None] * likelihood
        log_cess = 2 * (weights + rise).logsumexp(1) - weights.logsumexp(1) - (weights + 2 * rise).logsumexp(1)
        return ~(log_cess < math.log(share))  # not a number where all are dead: no step is too long

    high = 1.0 - gamma.to(wide)
    low, whole = torch.zeros_like(high), enough(high)
    for _ in range(50):
        middle = (low + high) / 2
        fits = enough(middle)
        low, high = torch.where(fits, middle, low), torch.where(fits, high, middle)
    one = torch.ones_like(gamma)
    further = torch.maximum((gamma + low).to(gamma), torch.nextafter(gamma, one))
    return torch.where(whole, one, further)
