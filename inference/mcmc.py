r"""Markov chain Monte Carlo over completions and the other latents of a program: many chains as one batch.

    a sweep: for each latent in turn, a Metropolis-Hastings step (`Move`) that leaves \pi(z) \propto p(z) L(z) invariant

Chains start from importance sampling: their first states are draws of its particles with probabilities proportional to
the weights (sampling-importance resampling, Rubin 1988). A warm-up follows, which adapts step sizes and is discarded.

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

import torch

from bayeslm import diagnostics
from bayeslm.inference.markov import RandomWalk, Replicas, Tally, as_draws, chain_by_chain, latent_moves, sweep
from bayeslm.inference.program import (
    Particles,
    PolicyGuide,
    SoFar,
    check_evidence,
    draw,
    inspect,
    keeping,
    posterior,
    prompt_labels,
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
    num_temperatures: Count = 1
    step_size: Positive = 1.0
    seed: Seed | None = None
    progress: bool = True

    def run(self, model: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Posterior:
        """Sample the posterior of ``model(*args, **kwargs)``. Draws are equally weighted; log Z is not estimated (NaN).

        ``stats``, for each site: ``acceptance_<site>`` (prompt,); of completions ``acceptance_by_cut_<site>`` and
        ``cuts_<site>`` (max_new_tokens,), see `Tally`; of continuous latents ``step_size_<site>`` (prompt,). Of the
        initial particles: ``initial_ess`` and ``initial_log_evidence`` (prompt,), the estimates of importance sampling.
        With parallel tempering: ``swap_acceptance`` (pair, prompt) and ``inverse_temperatures`` (temperature, prompt).
        And ``warmup``, ``thin``, ``interrupted``, ``seconds``, ``tokens`` and ``model_calls``. After Ctrl-C the
        posterior has the draws until then, equally many of each chain.

        :raises EvidenceError: if no initial particle of a prompt has positive probability.
        :raises ProgramError: if a latent is masked, or a term of the log-joint is NaN or +inf.
        :raises RunError: if an error stops the run after the first draws; it carries them.
        """
        with running(self.seed) as watch, torch.no_grad():
            program = inspect(model, *args, **kwargs)
            guide = None if self.proposal is None else PolicyGuide(program, self.proposal)
            initial, interrupted = draw(
                program, guide, self.initial_particles, progress=self.progress, label="warm start"
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
            states: list[Particles] = []
            steps = self.warmup + self.num_samples * self.thin

            def so_far() -> SoFar | None:
                return SoFar(particles=chain_by_chain(states)) if states else None

            with track("MCMC", steps, self.progress) as report, keeping(so_far) as run:
                for step in range(steps):
                    warm = step < self.warmup
                    state = sweep(
                        moves, state, replicas.gamma, tally=None if warm else tally, rows=replicas.cold, adapt=warm
                    )
                    state = replicas.swap(state)
                    if warm:
                        replicas.adapt(step + 1)
                    elif (step - self.warmup + 1) % self.thin == 0:
                        states.append(as_draws(state[replicas.cold]))
                    report()
            step_sizes = {move.site.name: move.step_size[-1] for move in moves if isinstance(move, RandomWalk)}
            return posterior(
                program,
                chain_by_chain(states),
                engine="MCMC",
                kind="markov",
                num_chains=self.num_chains,
                stats=watch.stats()
                | tally.stats()
                | {f"step_size_{name}": to_numpy(size) for name, size in step_sizes.items()}
                | {
                    "initial_ess": diagnostics.ess(weights),
                    "initial_log_evidence": diagnostics.log_evidence(weights)[0],
                }
                | replicas.stats()
                | {"warmup": self.warmup, "thin": self.thin, "interrupted": run.interrupted},
                prior=initial if guide is None else None,
            )
