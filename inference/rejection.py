r"""Rejection sampling, exact draws of the posterior where the likelihood is bounded; and best-of-n, a baseline.

    x ~ p,    accept with probability exp(l(x) - M),    l = \sum_f log-likelihood terms <= M

Accepted draws are independent draws of the posterior, and the acceptance rate is Z exp(-M) (von Neumann 1951). With a
constraint, x ~ p without the texts that it has refused before. Where a sampler draws x ~ s, accepted draws are of
s exp(l) / E_s[exp(l)], and p / s remains as their weight: they are weighted draws, nearly equal ones where s is near p.

Best-of-n keeps the best of n draws instead: it has no beta and no Z. Its KL divergence from the prior is at most
log n - (n - 1)/n (Beirami et al. 2024, arXiv 2401.01879).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from bayeslm import diagnostics
from bayeslm.inference.program import (
    EvidenceError,
    Particles,
    Program,
    ProgramError,
    SoFar,
    Stopwatch,
    check_evidence,
    draw,
    gathered,
    inspect,
    keeping,
    of_prompts,
    posterior,
    ranks,
    run_particles,
    running,
)
from bayeslm.inference.sequential import LearnedRejection, TokenConstraint, learned_evidence, with_factor
from bayeslm.posterior import Posterior
from bayeslm.progress import track
from bayeslm.validation import Count, Seed, validated

TOLERANCE = 1e-4  # nats by which a draw may exceed the bound


@validated
@dataclass(frozen=True)
class RejectionSampling:
    """Exact draws of the posterior.

    :param num_samples: the number of draws in each chain.
    :param num_chains: the number of independent chains.
    :param log_bound: M, an upper bound of the sum of all log-likelihood terms (r_max / beta). None takes the program's
        attribute ``log_bound``, which a `TiltedLM` has if its reward has an upper bound.
    :param max_proposals: the largest number of proposals for each prompt. If it does not suffice, the posterior has
        fewer draws, and a `DiagnosticsWarning` says so.
    :param constraint: a `Grammar` or `Constraint` that the program has as a factor, or one for each of some sites: what
        it has refused is not proposed again (`refusals`).
    :param batch_size: the number of particles in one run of the program; None for as many as bounded memory allows.
    :param vectorize: whether one run of the program holds all particles of a batch. False runs them one by one, for
        programs whose Python code depends on the value of a latent.
    :param seed: seed of all random numbers; None draws from the global random state.
    :param progress: whether to show a progress bar.
    :raises ValueError: if a setting is out of range.
    """

    num_samples: Count = 100
    num_chains: Count = 1
    log_bound: float | None = None
    max_proposals: Count = 100_000
    constraint: TokenConstraint | Mapping[str, TokenConstraint] | None = None
    batch_size: Count | None = None
    vectorize: bool = True
    seed: Seed | None = None
    progress: bool = True

    def run(self, model: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Posterior:
        """Sample the posterior of ``model(*args, **kwargs)``; log Z is estimated from all proposals.

        The draws of a program whose language model has a sampler are weighted ones.

        ``stats``: ``acceptance`` (prompt,), the share of accepted proposals; ``proposals``, their number for each
        prompt; ``wanted``, the number of draws that the settings ask for; ``constrained``, whether a constraint is set;
        ``interrupted``, ``seconds``, ``tokens`` and ``model_calls``. After Ctrl-C the posterior has the draws
        until then, equally many of each prompt and chain.

        :raises ProgramError: if no finite bound is known, or a proposal exceeds it by more than rounding, or the
            constraint is a `Grammar` that is no factor of the program. As all accepted draws are wrong then, there are
            no results.
        :raises EvidenceError: if ``max_proposals``, or Ctrl-C, leave a prompt with fewer draws than chains.
        :raises RunError: if another error stops the run after the first batch; it carries all proposals, weighted as by
            `ImportanceSampling`.
        """
        bound = self.log_bound if self.log_bound is not None else getattr(model, "log_bound", math.inf)
        if not math.isfinite(bound):
            raise ProgramError(
                f"rejection sampling needs a finite upper bound of the log-likelihood, got {bound}: set log_bound to "
                "r_max / beta, or give the reward of a TiltedLM its upper_bound, as in Reward(f, upper_bound=1.0)"
            )
        with running(self.seed, divided=True, sampled=True) as watch:
            program = inspect(model, *args, **kwargs)
            watch.check_together(program, self, num_samples=self.num_samples * self.num_chains)
            proposals, accepted, interrupted = self._propose(program, bound, watch)
            counts = accepted.sum(0)
            wanted = self.num_samples * self.num_chains
            draws = min(wanted, int(counts.min()))
            stats = watch.stats() | {
                "acceptance": (counts / len(accepted)).cpu().numpy(),
                "proposals": len(accepted),
                "wanted": wanted,
                "interrupted": interrupted,
                "constrained": self.constraint is not None,
            }
            log_weights = proposals.log_weights.cpu().numpy()[None]
            if draws < wanted:
                check_evidence(log_weights, program)
                rates = ", ".join(f"{rate:.2g}" for rate in stats["acceptance"])
                if draws < self.num_chains:
                    raise EvidenceError(
                        f"rejection sampling has {draws} of {wanted} draws a prompt after {len(accepted)} proposals "
                        f"(acceptance {rates}): raise max_proposals or beta, or use importance sampling"
                    )
            evidence = diagnostics.log_evidence(log_weights)
            if self.constraint is not None:
                log_share = proposals.log_prior - proposals.log_proposal
                evidence = learned_evidence(proposals.total_log_likelihood, log_share)
            first = accepted.long().argsort(dim=0, descending=True, stable=True)[:draws]
            kept = proposals.gather(program, first)
            sampled = "sampler_draws" in stats
            if sampled:
                likelihood = proposals.total_log_likelihood
                log_share = kept.total_log_likelihood - (likelihood.logsumexp(0) - math.log(len(likelihood)))
                kept = replace(kept, log_proposal=kept.log_proposal + log_share)
            found = posterior(
                program,
                kept,
                engine="RejectionSampling",
                kind="weighted" if sampled else "exact",
                num_chains=self.num_chains,
                evidence=evidence,
                stats=stats,
                prior=proposals if self.constraint is None else None,
                from_prior=len(proposals) if self.constraint is None else None,
                log_bound=bound,
            )
            return found if self.constraint is None else with_factor(found, self.constraint)

    def _propose(self, program: Program, bound: float, watch: Stopwatch) -> tuple[Particles, torch.Tensor, bool]:
        """Propose until every prompt has its draws or ``max_proposals`` is reached, each process its share of both.

        :returns: the proposals; whether each is accepted, bool (proposal, prompt); whether Ctrl-C interrupted.
        :raises ProgramError: if a proposal exceeds the bound.
        """
        wanted, most = (ranks().share(n) for n in (self.num_samples * self.num_chains, self.max_proposals))
        guide = None if self.constraint is None else LearnedRejection(program, self.constraint)
        size = self.batch_size or program.particles_a_run
        parts: list[tuple[Particles, torch.Tensor]] = []
        least = done = 0
        highest = -math.inf
        tolerance = max(TOLERANCE, torch.finfo(torch.float32).eps * abs(bound))  # no more than rounding
        counts = torch.zeros((), dtype=torch.long, device=program.device)

        def so_far() -> SoFar | None:
            return SoFar(particles=Particles.concatenate([part for part, _ in parts])) if parts else None

        plan = f"{wanted} exact draws {of_prompts(program)}, by at most {most} proposals"
        with track("rejection sampling", wanted, self.progress, plan=plan) as report, keeping(so_far) as run:
            while least < wanted and done < most and highest - bound <= tolerance:
                # no larger a batch than the acceptance so far requires
                expected = math.ceil(1.2 * (wanted - least) * done / least) + 1 if least else wanted
                n = min(size, most - done, max(expected, 16))
                part = run_particles(program, guide, n, vectorize=self.vectorize)
                log_likelihood = part.log_weights
                if guide is not None:
                    guide.learn()
                if guide is not None or watch.usage.drawn.draws:
                    log_likelihood = part.total_log_likelihood
                highest = max(highest, log_likelihood.max().item())
                log_ratio = log_likelihood - bound
                accepted = torch.rand_like(log_ratio).log() < log_ratio
                parts.append((part, accepted))
                done += n
                counts = counts + accepted.sum(0)
                now = int(counts.min())
                report(min(now, wanted) - min(least, wanted), values={"proposals": done})
                least = now
        if highest - bound > tolerance:  # raised here, as inside the block it would become a RunError with results
            raise ProgramError(
                f"a draw has log-likelihood {highest:.6g}, above the bound {bound:.6g}: the accepted draws would be "
                "wrong. Raise log_bound"
            )
        proposals = gathered([part for part, _ in parts], program.device)
        accepted = ranks().joined(torch.cat([accepted for _, accepted in parts]))
        return proposals, accepted, ranks().any(run.interrupted)


@validated
@dataclass(frozen=True)
class BestOfN:
    """The best of n draws of the prior: a baseline, not a posterior.

    :param n: the number of candidates for each draw.
    :param num_samples: the number of draws in each chain.
    :param num_chains: the number of independent chains.
    :param batch_size: the number of particles in one run of the program; None for as many as bounded memory allows.
    :param vectorize: whether one run of the program holds all particles of a batch. False runs them one by one, for
        programs whose Python code depends on the value of a latent.
    :param seed: seed of all random numbers; None draws from the global random state.
    :param progress: whether to show a progress bar.
    :raises ValueError: if a setting is out of range.
    """

    n: Count = 16
    num_samples: Count = 16
    num_chains: Count = 1
    batch_size: Count | None = None
    vectorize: bool = True
    seed: Seed | None = None
    progress: bool = True

    def run(self, model: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Posterior:
        """Draw from the best-of-n distribution of ``model(*args, **kwargs)``, best by the sum of log-likelihood terms.

        Where a sampler draws, it is the best of the sampler's draws.

        All weights are equal, though the draws are not the posterior's; log Z is that of the posterior, estimated from
        all candidates. ``stats``: ``n``; ``kl_bound``, an upper bound of KL(best-of-n || prior); ``interrupted``,
        ``seconds``, ``tokens`` and ``model_calls``. After Ctrl-C the posterior has the draws whose candidates were
        complete.

        :raises EvidenceError: if no candidate of a prompt has positive probability, or Ctrl-C came before each chain
            had a draw.
        :raises RunError: if an error stops the run after the first batch; it carries the candidates.
        """
        with running(self.seed, divided=True, sampled=True) as watch:
            program = inspect(model, *args, **kwargs)
            watch.check_together(program, self, num_samples=self.num_samples * self.num_chains)
            candidates, interrupted = draw(
                program,
                None,
                self.n * self.num_samples * self.num_chains,
                batch_size=self.batch_size,
                vectorize=self.vectorize,
                progress=self.progress,
                label=f"best of {self.n}",
            )
            weights = candidates.log_weights  # log-likelihoods, as the prior is the proposal, or a sampler near it
            scores = candidates.total_log_likelihood if watch.usage.drawn.draws else weights
            groups = len(scores) // self.n
            best = scores[: groups * self.n].reshape(groups, self.n, scores.shape[1]).argmax(1)
            index = best + self.n * torch.arange(groups, device=best.device)[:, None]
            return posterior(
                program,
                candidates.gather(program, index),
                engine="BestOfN",
                kind="uncorrected",
                num_chains=self.num_chains,
                evidence=diagnostics.log_evidence(weights.cpu().numpy()[None]),
                stats=watch.stats()
                | {
                    "n": self.n,
                    "kl_bound": diagnostics.best_of_n_kl_bound(self.n),
                    "interrupted": interrupted,
                },
                prior=candidates,
                from_prior=len(candidates),
            )
