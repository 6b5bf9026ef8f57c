r"""Markov chain Monte Carlo over completions and the other latents of a program: many chains as one batch.

    a sweep: for each latent in turn, a Metropolis-Hastings step (`Move`) that leaves \pi(z) \propto p(z) L(z) invariant

A step of a completion draws N new suffixes of all chains in one batch, and chooses among these and the current one
(`markov/ensemble.py`, `markov/suffix_move.py`).

Chains start from importance sampling: their first states are draws of its particles with probabilities proportional to
the weights (sampling-importance resampling, Rubin 1988). A warm-up follows, which adapts step sizes and where texts are
cut, and is discarded.

Parallel tempering runs K replicas of each chain, at inverse temperatures 0 = g_1 < ... < g_K = 1 of the likelihood,
and exchanges neighbours with probability min(1, (L(z_k) / L(z_{k+1}))^{g_{k+1} - g_k}), even and odd pairs alternating.
The first replica samples the prior, where chains mix fast; only the last one is kept. In the warm-up the inverse
temperatures move to where all pairs reject equally often (Syed, Bouchard-Côté, Deligiannidis and Doucet 2021, arXiv
1905.02939).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from bayeslm import diagnostics
from bayeslm.inference.markov import (
    RandomWalk,
    Recycling,
    Replicas,
    SuffixMove,
    Tally,
    as_draws,
    chain_by_chain,
    latent_moves,
    num_candidates,
    sweep,
)
from bayeslm.inference.program import (
    Particles,
    PolicyGuide,
    SoFar,
    check_evidence,
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
from bayeslm.models.lm import LanguageModel
from bayeslm.posterior import Posterior
from bayeslm.progress import track
from bayeslm.validation import Count, Positive, Seed, validated


@validated
@dataclass(frozen=True)
class MCMC:
    """Markov chains whose steps redraw suffixes of completions, and move the other latents of the program.

    :param num_samples: the number of draws of each chain.
    :param num_chains: the number of chains, which run as one batch.
    :param warmup: the number of sweeps before the first draw.
    :param thin: the number of sweeps for each draw.
    :param initial_particles: the number of draws of the prior, or of the proposal, from which the chains start.
    :param proposal: a policy (trained by `SVI`) that proposes suffixes of completions; None for the prior.
    :param num_candidates: the number of suffixes that a step proposes at once, for each chain; None chooses it by the
        device and the number of chains (`markov.num_candidates`), between 1 and 16. 1 is the step of Metropolis and
        Hastings.
    :param num_temperatures: the number of replicas of each chain in parallel tempering, for posteriors with modes that
        are far apart. 1 is none; each costs as much as a chain.
    :param step_size: the initial step size of random walks on continuous latents, see `RandomWalk`.
    :param seed: seed of all random numbers; None draws from the global random state.
    :param progress: whether to show progress bars.
    :raises ValueError: if a setting is out of range.
    """

    num_samples: Count = 200
    num_chains: Count = 16
    warmup: Count = 100
    thin: Count = 1
    initial_particles: Count = 256
    proposal: LanguageModel | None = None
    num_candidates: Count | None = None
    num_temperatures: Count = 1
    step_size: Positive = 1.0
    seed: Seed | None = None
    progress: bool = True

    def run(self, model: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Posterior:
        """Sample the posterior of ``model(*args, **kwargs)``. Draws are equally weighted; log Z is not estimated (NaN).

        ``stats``, for each site: ``acceptance_<site>`` (prompt,); of completions ``acceptance_by_cut_<site>`` and
        ``cuts_<site>`` (max_new_tokens,), see `Tally`, and ``cut_probabilities_<site>`` (max_new_tokens,), which the
        warm-up has learned; of continuous latents ``step_size_<site>`` (prompt,). ``num_candidates``; and for each
        reward and each deterministic site with one number a prompt ``recycled_<name>``, for each factor
        ``recycled_log_likelihood_<name>`` (chain, draw, prompt): its mean over all candidates since the last draw.
        Means of these estimate the posterior's, as those of the draws do, with a smaller error.
        ``autocorrelation_time`` (prompt,): the number of draws that are worth one independent draw for the mean of the
        log-likelihood (NaN where it is constant or a chain has fewer than four draws). Of the initial particles:
        ``initial_ess`` and ``initial_log_evidence`` (prompt,), the estimates of importance sampling. With parallel
        tempering: ``swap_acceptance`` (pair, prompt) and ``inverse_temperatures`` (temperature, prompt). Where several
        processes have the chains, each adapts its own, and what it has adapted to is the first one's here.
        And ``warmup``, ``thin``, ``interrupted``, ``seconds``, ``tokens`` and ``model_calls``. After Ctrl-C the
        posterior has the draws until then, equally many of each chain.

        :raises EvidenceError: if no initial particle of a prompt has positive probability.
        :raises ProgramError: if a latent is masked, or a term of the log-joint is NaN or +inf.
        :raises RunError: if an error stops the run after the first draws; it carries them.
        """
        with running(self.seed, divided=True) as watch, torch.no_grad():
            program = inspect(model, *args, **kwargs)
            watch.check_together(program, self, num_chains=self.num_chains)
            chains = ranks().share(self.num_chains)
            guide = None if self.proposal is None else PolicyGuide(program, self.proposal)
            initial, interrupted = draw(
                program, guide, self.initial_particles, progress=self.progress, label="warm start"
            )
            if interrupted:
                raise KeyboardInterrupt
            weights = to_numpy(initial.log_weights)[None]
            check_evidence(weights, program)
            replicas = Replicas(program, self.num_temperatures, chains)
            groups = torch.arange(self.num_temperatures, device=program.device).repeat_interleave(chains)
            suffixes = self.num_candidates or num_candidates(program, chains * self.num_temperatures)
            moves = latent_moves(
                program,
                policy=self.proposal,
                num_candidates=suffixes,
                step_size=self.step_size,
                groups=groups,
                same_cut=True,
            )
            state = replicas.start(initial)
            tally, recycling = Tally(), Recycling()
            states: list[Particles] = []
            steps = self.warmup + self.num_samples * self.thin

            def so_far() -> SoFar | None:
                return SoFar(particles=chain_by_chain(states)) if states else None

            sweeps = f"{self.warmup} sweeps of warm-up and {steps - self.warmup} more"
            plan = f"{chains} chains {of_prompts(program)}, {sweeps}"
            with track("MCMC", steps, self.progress, plan=plan) as report, keeping(so_far) as run:
                for step in range(steps):
                    warm = step < self.warmup
                    counts: dict[str, Any] = {} if warm else {"tally": tally, "recycling": recycling}
                    state = sweep(moves, state, replicas.gamma, **counts, rows=replicas.cold, adapt=warm)
                    state = replicas.swap(state)
                    if warm:
                        replicas.adapt(step + 1)
                    elif (step - self.warmup + 1) % self.thin == 0:
                        states.append(as_draws(state[replicas.cold]))
                        recycling.draw()
                    report()
            least = min(message.value for message in ranks().exchange(len(states)))
            draws = gathered([chain_by_chain(states[:least])], states[0].log_prior.device)
            recycled = {name: ranks().joined_array(x) for name, x in recycling.stats(least).items()}
            adapted: dict[str, np.ndarray] = {
                f"step_size_{move.site.name}": to_numpy(move.step_size[-1])
                for move in moves
                if isinstance(move, RandomWalk)
            }
            adapted |= {
                f"cut_probabilities_{move.site.name}": to_numpy(move.cut_probabilities[-1])
                for move in moves
                if isinstance(move, SuffixMove)
            }
            return posterior(
                program,
                draws,
                engine="MCMC",
                kind="markov",
                num_chains=self.num_chains,
                stats=watch.stats()
                | tally.stats()
                | recycled
                | {name: ranks().first_array(x) for name, x in (adapted | replicas.stats()).items()}
                | {"autocorrelation_time": self._autocorrelation_time(draws)}
                | {"num_candidates": ranks().first(suffixes).value}
                | {
                    "initial_ess": diagnostics.ess(weights),
                    "initial_log_evidence": diagnostics.log_evidence(weights)[0],
                }
                | {"warmup": self.warmup, "thin": self.thin, "interrupted": ranks().any(run.interrupted)},
                prior=initial if guide is None else None,
            )

    def _autocorrelation_time(self, draws: Particles) -> np.ndarray:
        """Return the number of draws that are worth one for the mean of the log-likelihood, (prompt,)."""
        values = to_numpy(draws.total_log_likelihood).reshape(self.num_chains, -1, draws.log_prior.shape[1])
        with np.errstate(invalid="ignore", divide="ignore"):
            times = values[..., 0].size / np.atleast_1d(diagnostics.ess_bulk(values))
        return np.where(np.ptp(values, axis=(0, 1)) > 0, times, np.nan)
