r"""Rejection sampling: exact draws of the posterior, where the likelihood is bounded; and best-of-n, its imitation.

    x ~ p,    accept with probability exp(l(x) - M),    l = \sum_f log-likelihood terms <= M

Accepted draws are independent draws of the posterior, and the acceptance rate is Z exp(-M) (von Neumann 1951).

Best-of-n keeps the best of n draws instead. It is the practitioners' baseline: no temperature, no Z. Its divergence
from the prior is at most log n - (n - 1)/n (Beirami et al. 2024, arXiv 2401.01879).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
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
    check_counts,
    check_evidence,
    draw,
    inspect,
    keeping,
    posterior,
    prompt_labels,
    run_particles,
    seeded,
)
from bayeslm.posterior import Posterior
from bayeslm.progress import track


@dataclass(frozen=True)
class RejectionSampling:
    """Exact draws of the posterior.

    :param num_samples: draws in each chain.
    :param num_chains: independent replicates.
    :param log_bound: M, an upper bound of the summed log-likelihood terms (r_max / beta). None reads it from the
        program's ``log_bound``, which `TiltedLM` has where its reward has an upper bound.
    :param max_proposals: the budget, proposals a prompt. When it is spent the draws so far are given with a warning.
    :param batch_size, vectorize, seed, progress: as in `ImportanceSampling`.
    """

    num_samples: int = 100
    num_chains: int = 1
    log_bound: float | None = None
    max_proposals: int = 100_000
    batch_size: int | None = None
    vectorize: bool = True
    seed: int | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        check_counts(self, "num_samples", "num_chains", "max_proposals", "batch_size")

    def run(self, model: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Posterior:
        """Sample the posterior of ``model(*args, **kwargs)``. ``stats``: ``acceptance`` a prompt, ``proposals``.

        log Z comes from all proposals, accepted or not.

        :raises ProgramError: if no finite bound is known, or a draw exceeds it.
        :raises EvidenceError: if the budget is spent before each prompt has a draw a chain.
        """
        bound = self.log_bound if self.log_bound is not None else getattr(model, "log_bound", math.inf)
        if not bound < math.inf:
            raise ProgramError(
                "rejection sampling needs an upper bound of the log-likelihood: give log_bound = r_max / beta, "
                "or a reward with an upper_bound to TiltedLM"
            )
        with seeded(self.seed), Stopwatch() as watch:
            program = inspect(model, *args, **kwargs)
            proposals, accepted, interrupted = self._propose(program, bound)
            counts = accepted.sum(0)
            wanted = self.num_samples * self.num_chains
            draws = min(wanted, int(counts.min()))
            stats = watch.stats() | {
                "acceptance": (counts / len(accepted)).cpu().numpy(),
                "proposals": len(accepted),
                "interrupted": interrupted,
            }
            log_weights = proposals.log_weights.cpu().numpy()[None]
            if draws < wanted:
                check_evidence(log_weights, prompt_labels(program))
                rates = ", ".join(f"{rate:.2g}" for rate in stats["acceptance"])
                report = (
                    f"rejection sampling has {draws} of {wanted} draws a prompt after {len(accepted)} proposals "
                    f"(acceptance {rates}): raise max_proposals or beta, or use ImportanceSampling"
                )
                if draws < self.num_chains:
                    raise EvidenceError(report)
                warnings.warn(report, stacklevel=2)
            first = accepted.long().argsort(dim=0, descending=True, stable=True)[:draws]
            kept = proposals.gather(program, first)
            return posterior(
                program,
                kept,
                engine="RejectionSampling",
                kind="exact",
                num_chains=self.num_chains,
                evidence=diagnostics.log_evidence(log_weights),
                stats=stats,
                prior=proposals,
            )

    def _propose(self, program: Program, bound: float) -> tuple[Particles, torch.Tensor, bool]:
        """Proposals until every prompt has its draws or the budget is spent: them, and which are accepted."""
        wanted = self.num_samples * self.num_chains
        size = self.batch_size or program.max_particles
        parts: list[tuple[Particles, torch.Tensor]] = []
        least = done = 0
        counts = torch.zeros((), dtype=torch.long, device=program.device)

        def so_far() -> SoFar | None:
            return SoFar(particles=Particles.concatenate([part for part, _ in parts])) if parts else None

        with track("rejection sampling", wanted, self.progress) as report, keeping(so_far) as run:
            while least < wanted and done < self.max_proposals:
                # no larger a batch than the acceptance so far asks for
                expected = math.ceil(1.2 * (wanted - least) * done / least) + 1 if least else wanted
                n = min(size, self.max_proposals - done, max(expected, 16))
                part = run_particles(program, None, n, vectorize=self.vectorize)
                log_ratio = part.log_weights - bound
                if (log_ratio > 1e-4 * max(1.0, abs(bound))).any():
                    raise ProgramError(
                        f"a draw has log-likelihood {part.log_weights.max().item():.6g}, above the bound "
                        f"{bound:.6g}: the accepted draws would be wrong. Raise log_bound"
                    )
                accepted = torch.rand_like(log_ratio).log() < log_ratio
                parts.append((part, accepted))
                done += n
                counts = counts + accepted.sum(0)
                now = int(counts.min())
                report(min(now, wanted) - min(least, wanted), values={"proposals": done})
                least = now
        proposals = Particles.concatenate([part for part, _ in parts])
        return proposals, torch.cat([accepted for _, accepted in parts]), run.interrupted


@dataclass(frozen=True)
class BestOfN:
    """The best of n draws of the prior: a baseline, not a posterior.

    :param n: candidates of each draw.
    :param num_samples: draws in each chain.
    :param num_chains, batch_size, vectorize, seed, progress: as in `ImportanceSampling`.
    """

    n: int = 16
    num_samples: int = 16
    num_chains: int = 1
    batch_size: int | None = None
    vectorize: bool = True
    seed: int | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        check_counts(self, "n", "num_samples", "num_chains", "batch_size")

    def run(self, model: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Posterior:
        """Best-of-n draws of ``model(*args, **kwargs)`` by summed log-likelihood.

        ``stats``: ``kl_bound`` of KL(best-of-n || prior). Weights are 0 and mean nothing; log Z is the true
        posterior's, from all candidates.
        """
        with seeded(self.seed), Stopwatch() as watch:
            program = inspect(model, *args, **kwargs)
            candidates, interrupted = draw(
                program,
                None,
                self.n * self.num_samples * self.num_chains,
                batch_size=self.batch_size,
                vectorize=self.vectorize,
                progress=self.progress,
                label=f"best of {self.n}",
            )
            scores = candidates.log_weights  # the prior proposes: the likelihood alone
            groups = len(scores) // self.n
            best = scores[: groups * self.n].reshape(groups, self.n, -1).argmax(1)
            index = best + self.n * torch.arange(groups, device=best.device)[:, None]
            kept = candidates.gather(program, index)
            return posterior(
                program,
                kept,
                engine="BestOfN",
                kind="uncorrected",
                num_chains=self.num_chains,
                evidence=diagnostics.log_evidence(scores.cpu().numpy()[None]),
                stats=watch.stats()
                | {
                    "n": self.n,
                    "kl_bound": diagnostics.best_of_n_kl_bound(self.n),
                    "interrupted": interrupted,
                },
                prior=candidates,
            )
