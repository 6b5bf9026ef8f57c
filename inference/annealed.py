r"""Annealed sequential Monte Carlo: from the prior to the posterior by a ladder of inverse temperatures.

With g_0 = 0 < g_1 < ... < g_K = 1 and \pi_g(z) \propto p(z) L(z)^g, N particles z ~ p, and for k = 1, ..., K

    w <- w L(z)^{g_k - g_{k-1}}
    where ESS(w) < threshold:  Z <- Z mean(w),  ancestors ~ resampling(w),  w = 1
    z ~ a sweep of Metropolis-Hastings moves that leaves \pi_{g_k} invariant (`Move`)

Del Moral, Doucet and Jasra 2006, doi 10.1111/j.1467-9868.2006.00553.x; Neal 2001, arXiv physics/9803008, without
resampling. With a fixed ladder E[\hat Z] = Z. By default the ladder is adaptive: each step is as long as lets the
conditional ESS

    CESS(g) = N (\sum_i W_i v_i)^2 / \sum_i W_i v_i^2,     v_i = L(z_i)^{g - g_{k-1}},  W normalised

fall to a share of N, by bisection (Zhou, Johansen and Aston 2016, arXiv 1303.3123; Jasra, Stephens, Doucet and
Tsagaris 2011, doi 10.1111/j.1467-9469.2010.00723.x), and random walks adapt their steps to the particles of each chain.
\hat Z is then consistent, with a bias that is small compared with its standard error (Beskos, Jasra, Kantas and Thiery
2016, arXiv 1306.6462).

What it is for: programs with continuous or several latents, whose posterior no prior draw comes near to. On texts alone
its moves cost more tokens than they are worth: at equal tokens log \hat Z had the larger mean squared error on each of
eight enumerable problems, mostly several times that of importance sampling (benchmarks/RESULTS.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor

from bayeslm.inference.markov import Tally, latent_moves, sweep, tempered
from bayeslm.inference.program import (
    Particles,
    SoFar,
    draw,
    gathered,
    inspect,
    keeping,
    of_prompts,
    posterior,
    ranks,
    running,
    to_numpy,
)
from bayeslm.inference.sequential import Population, Resampling, WeightUpdate
from bayeslm.models.lm import LanguageModel
from bayeslm.posterior import Posterior
from bayeslm.progress import track
from bayeslm.validation import Count, Finite, Positive, Seed, Share, Within, validated


@validated
@dataclass(frozen=True)
class AnnealedSMC:
    """Weighted particles that move from the prior to the posterior, with a ladder for each prompt of each chain.

    :param num_particles: the number of particles in each chain.
    :param num_chains: the number of independent chains (islands), each resampled within itself; whether they agree is
        a check that one chain cannot give.
    :param ladder: inverse temperatures, ascending from above 0 to 1; None for an adaptive ladder.
    :param cess: the share of the particles to which the conditional ESS falls at each step of an adaptive ladder.
    :param num_sweeps: the number of sweeps of moves at each inverse temperature.
    :param ess_threshold: resample where the effective sample size is below this share of the particles; 0 never
        resamples, 1 resamples at every step.
    :param resampling: "systematic", "stratified", "residual" or "multinomial".
    :param proposal: a policy (trained by `SVI`) that proposes suffixes of completions; None for the prior.
    :param num_candidates: the number of suffixes that a move proposes at once for each particle (`MCMC`).
    :param step_size: the initial step size of random walks on continuous latents, see `RandomWalk`; it is adapted if
        the ladder is adaptive.
    :param seed: seed of all random numbers; None draws from the global random state.
    :param progress: whether to show progress bars.
    :raises ValueError: if a setting is out of range.
    """

    num_particles: Count = 64
    num_chains: Count = 4
    ladder: Sequence[Finite] | None = None
    cess: Annotated[float, Within("(0, 1)")] = 0.9
    num_sweeps: Count = 1
    ess_threshold: Share = 0.5
    resampling: Resampling = "systematic"
    proposal: LanguageModel | None = None
    num_candidates: Count = 1
    step_size: Positive = 1.0
    seed: Seed | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        if self.ladder is not None:
            steps = [b - a for a, b in zip([0.0, *self.ladder], [*self.ladder, 1.0], strict=True)]
            if not self.ladder or not all(step > 0 for step in steps[:-1]) or steps[-1] != 0.0:
                raise ValueError(f"AnnealedSMC: ladder must ascend from above 0 to 1, got {self.ladder!r}")

    def run(self, model: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Posterior:
        """Sample the posterior of ``model(*args, **kwargs)``.

        ``stats``, where a step is an inverse temperature: ``inverse_temperatures`` (chain, step, prompt);
        ``ess_by_step`` (chain, step, prompt), the effective sample size before resampling; ``resampled`` (chain, step,
        prompt); ``ancestors`` (chain, step, draw, prompt), the genealogy; for each site ``acceptance_<site>``
        (prompt,), and of completions ``acceptance_by_cut_<site>`` and ``cuts_<site>`` (max_new_tokens,), see `Tally`;
        ``interrupted``, ``seconds``, ``tokens`` and ``model_calls``.

        After Ctrl-C the particles go to inverse temperature 1 in one step, without further moves.

        :raises EvidenceError: if no particle of a prompt has positive probability.
        :raises ProgramError: if a latent is masked, or a term of the log-joint is NaN or +inf.
        :raises RunError: if an error stops the run after particles were drawn; it carries those of the last sweep.
        """
        with running(self.seed, divided=True) as watch, torch.no_grad():
            program = inspect(model, *args, **kwargs)
            watch.check_together(program, self, num_chains=self.num_chains)
            rows = ranks().rows(self.num_chains)
            chains = rows.stop - rows.start
            size = self.num_particles * self.num_chains
            initial, interrupted = draw(program, None, size, progress=self.progress, label="particles of the prior")
            if interrupted:
                raise KeyboardInterrupt
            groups = torch.arange(chains, device=program.device).repeat_interleave(self.num_particles)
            moves = latent_moves(
                program,
                policy=self.proposal,
                num_candidates=self.num_candidates,
                step_size=self.step_size,
                groups=groups,
            )
            population = Population(program, self, chains=chains)
            state, tally = initial[rows.start * self.num_particles : rows.stop * self.num_particles], Tally()
            gamma = torch.zeros((chains, program.weight_prompts), device=program.device)
            one = torch.ones_like(gamma)
            ladder: list[Tensor] = []

            def so_far() -> SoFar:
                return SoFar(particles=state)

            plan = f"{chains} chains of {self.num_particles} particles {of_prompts(program)}, annealed"
            total = None if self.ladder is None else len(self.ladder)
            with track("annealing", total, self.progress, plan=plan) as report:
                while ranks().any(bool((gamma < 1.0).any())):
                    last, gamma = gamma, one if interrupted else self._next(population, state, gamma, len(ladder))
                    ladder.append(gamma)
                    step = f"inverse temperature {gamma.max().item():.3g}"
                    change = (gamma - last).repeat_interleave(self.num_particles, 0)
                    increment = tempered(state.total_log_likelihood, change)
                    population.weigh(increment, WeightUpdate(step, {}, state.log_likelihood))
                    if (index := population.resample()) is not None:
                        state = state.gather(program, index)
                    with keeping(so_far) as run:
                        for _ in range(0 if interrupted else self.num_sweeps):
                            each = gamma.repeat_interleave(self.num_particles, 0)
                            state = sweep(moves, state, each, tally=tally, adapt=self.ladder is None)
                    interrupted |= run.interrupted
                    report(values={"inverse temperature": gamma.min().item()})
            records = Population.stats([population]) | {"inverse_temperatures": to_numpy(torch.stack(ladder, 1))}
            return posterior(
                program,
                gathered([state], state.log_prior.device),
                engine="AnnealedSMC",
                kind="particles",
                num_chains=self.num_chains,
                log_weights=ranks().joined(population.total_log_weights),
                roots=ranks().joined(population.roots),
                stats=watch.stats()
                | {name: ranks().joined_array(x) for name, x in records.items()}
                | tally.stats()
                | {"interrupted": ranks().any(interrupted)},
                prior=initial,
                from_prior=len(initial),
            )

    def _next(self, population: Population, state: Particles, gamma: Tensor, step: int) -> Tensor:
        """Return the next inverse temperatures, (chain, prompt)."""
        if self.ladder is not None:
            return torch.full_like(gamma, self.ladder[step])
        shape = (len(gamma), self.num_particles, -1)
        return next_inverse_temperature(
            population.log_weights.reshape(shape), state.total_log_likelihood.reshape(shape), gamma, self.cess
        )


def next_inverse_temperature(log_weights: Tensor, log_likelihood: Tensor, gamma: Tensor, share: float) -> Tensor:
    """Return the inverse temperatures (chain, prompt) at which the conditional ESS is a share of the particles.

    :param log_weights: (chain, particle, prompt).
    :param log_likelihood: log L of the particles, (chain, particle, prompt). Particles of weight or likelihood 0 do not
        count, because every step, however short, leaves them without weight.
    :param gamma: the present inverse temperatures, (chain, prompt). The new ones are larger, and at most 1.
    :param share: the conditional ESS divided by the number of particles.
    """
    dtype = torch.float32 if gamma.device.type == "mps" else torch.float64  # MPS has no float64
    alive = log_likelihood > -torch.inf
    weights = torch.where(alive, log_weights, -torch.inf).to(dtype)
    likelihood = torch.where(alive, log_likelihood, 0.0).to(dtype)

    def is_short(step: Tensor) -> Tensor:
        """Return whether the conditional ESS after a step is at least the share, (chain, prompt)."""
        change = step[:, None] * likelihood
        log_cess = 2 * (weights + change).logsumexp(1) - weights.logsumexp(1) - (weights + 2 * change).logsumexp(1)
        return ~(log_cess < math.log(share))  # NaN, where all particles have weight 0: no step is too long

    high = 1.0 - gamma.to(dtype)
    low, reaches_one = torch.zeros_like(high), is_short(high)
    for _ in range(50):
        middle = (low + high) / 2
        short = is_short(middle)
        low, high = torch.where(short, middle, low), torch.where(short, high, middle)
    one = torch.ones_like(gamma)
    further = torch.maximum((gamma + low).to(gamma), torch.nextafter(gamma, one))
    return torch.where(reaches_one, one, further)
