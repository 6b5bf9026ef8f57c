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
from dataclasses import dataclass, replace
from typing import Any

import torch

from bayeslm import diagnostics
from bayeslm.inference.markov import RandomWalk, Replicas, Tally, latent_moves, sweep
from bayeslm.inference.program import (
    Particles,
    PolicyGuide,
    SoFar,
    Stopwatch,
    check_counts,
    check_evidence,
    check_positive,
    draw,
    inspect,
    keeping,
    posterior,
    prompt_labels,
    seeded,
    to_numpy,
)
from bayeslm.models.lm import LanguageModel
from bayeslm.posterior import Posterior
from bayeslm.progress import track


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
            parts: list[Particles] = []
            steps = self.warmup + self.num_samples * self.thin

            def so_far() -> SoFar | None:
                return SoFar(particles=chain_major(parts)) if parts else None

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
                stats=watch.stats()
                | tally.stats()
                | {f"step_size_{name}": to_numpy(size) for name, size in steps_of.items()}
                | {
                    "initial_ess": diagnostics.ess(weights),
                    "initial_log_evidence": diagnostics.log_evidence(weights)[0],
                }
                | replicas.stats()
                | {"warmup": self.warmup, "thin": self.thin, "interrupted": run.interrupted},
                prior=initial if guide is None else None,
            )


def recorded(state: Particles) -> Particles:
    """Return the chains' state as draws: on the CPU, without the tokens' log-probabilities."""
    return replace(
        state,
        values={name: value.cpu() for name, value in state.values.items()},
        log_prior=state.log_prior.cpu(),
        log_proposal=state.log_proposal.cpu(),
        log_likelihood={name: term.cpu() for name, term in state.log_likelihood.items()},
        token_log_prob={},
        pointwise={name: term.cpu() for name, term in state.pointwise.items()},
        auxiliary={},
        proposal_token_log_prob={},
        log_left_out=None,
    )


def chain_major(parts: list[Particles]) -> Particles:
    """Draws of all chains, one part a draw, in the order of chains."""
    draws, chains = len(parts), len(parts[0])
    return Particles.concatenate(parts)[torch.arange(draws * chains).reshape(draws, chains).T.reshape(-1)]
