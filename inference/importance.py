r"""Importance sampling: weigh draws of a proposal q by what they miss of the posterior.

    x_i ~ q,    w_i = p(x_i) exp(r(x_i)/beta) / q(x_i),    \hat Z = (1/n) \sum_i w_i,    E[\hat Z] = Z

With the prior as the proposal the weight is the likelihood alone. The k-hat of Pareto-smoothed importance sampling
(Vehtari, Simpson, Gelman, Yao and Gabry, arXiv 1507.02646) says whether the weights can be trusted: below 0.7.

Conditional importance sampling has a draw of the posterior itself as the first of each chain: log \hat Z is then an
upper bound of log Z in expectation, as it is a lower bound without (`retained`, `bayeslm.diagnostics.certify`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bayeslm.inference.program import (
    PolicyGuide,
    Stopwatch,
    as_law,
    check_counts,
    draw,
    inspect,
    inspect_or_reuse,
    posterior,
    seeded,
)
from bayeslm.inference.sequential import check_retained, in_front, retained_particles
from bayeslm.models.lm import LanguageModel
from bayeslm.posterior import Posterior


@dataclass(frozen=True)
class ImportanceSampling:
    """Weighted draws of a proposal.

    :param num_particles: draws in each chain.
    :param num_chains: independent replicates.
    :param guide: the proposal: a Pyro guide of the program, or a `LanguageModel` that takes the place of the
        program's own (a policy trained by `SVI`). None proposes from the prior.
    :param retained: exact draws of the posterior, from `RejectionSampling` or `Exact` on the same program: chain c
        has the c-th of them as its first particle, and log Z is bounded from above. At least one a chain.
    :param batch_size: particles run at once; by default what bounded memory takes.
    :param vectorize: run all particles of a batch as one program run; False for programs whose Python code
        depends on single latent values.
    :param seed: reproduces the run; None leaves the global random state in charge.
    """

    num_particles: int = 256
    num_chains: int = 1
    guide: Callable[..., Any] | LanguageModel | None = None
    retained: Posterior | None = None
    batch_size: int | None = None
    vectorize: bool = True
    seed: int | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        check_counts(self, "num_particles", "num_chains", "batch_size")
        check_retained(self)
        if isinstance(self.guide, type):
            raise ValueError(
                f"ImportanceSampling: guide is the class {self.guide.__name__}: make one and train it, by SVI"
            )

    def run(self, model: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Posterior:
        """Sample the posterior of ``model(*args, **kwargs)``. ``stats``: ``ess`` and ``khat`` a prompt.

        :raises EvidenceError: if no draw has positive probability.
        :raises ProgramError: if the retained draws are not of this program, or the guide cannot have proposed them.
        """
        with seeded(self.seed), Stopwatch() as watch:
            program = (
                inspect_or_reuse(None, model, args, kwargs)
                if self.retained is None
                else inspect(model, *args, **kwargs)
            )
            guide = PolicyGuide(program, self.guide) if isinstance(self.guide, LanguageModel) else self.guide
            guide = None if guide is None else as_law(guide, program)
            kept = None
            if self.retained is not None:
                kept = retained_particles(
                    program,
                    self.retained,
                    self.num_chains,
                    guide,
                    batch_size=self.batch_size,
                    vectorize=self.vectorize,
                )
            particles, interrupted = draw(
                program,
                guide,
                self.num_particles * self.num_chains,
                batch_size=self.batch_size,
                vectorize=self.vectorize,
                progress=self.progress,
                label="importance sampling",
            )
            return posterior(
                program,
                particles if kept is None else in_front(kept, particles),
                engine="ImportanceSampling",
                kind="weighted",
                num_chains=self.num_chains,
                conditional=kept is not None,
                stats=watch.stats() | {"interrupted": interrupted},
                prior=particles if guide is None else None,
            )
