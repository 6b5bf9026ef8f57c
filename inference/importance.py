r"""Importance sampling: draws of a proposal q, weighted by the ratio of the posterior to q.

    x_i ~ q,    w_i = p(x_i) exp(r(x_i)/beta) / q(x_i),    \hat Z = (1/n) \sum_i w_i,    E[\hat Z] = Z

With the prior as the proposal the weight is the likelihood. The k-hat of Pareto-smoothed importance sampling
(Vehtari, Simpson, Gelman, Yao and Gabry, arXiv 1507.02646) says whether the weights can be trusted: below 0.7.

Conditional importance sampling replaces the first draw of each chain by an exact draw of the posterior: log \hat Z is
then an upper bound of log Z in expectation, while it is a lower bound without it (`bayeslm.diagnostics.certify`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from bayeslm.inference.program import (
    PolicyGuide,
    Program,
    as_proposal,
    check_draws_texts,
    draw,
    inspect,
    inspect_or_reuse,
    posterior,
    running,
)
from bayeslm.inference.sequential import (
    ConstraintGuide,
    TokenConstraint,
    check_retained,
    put_first,
    retained_particles,
    with_factor,
)
from bayeslm.models.lm import LanguageModel
from bayeslm.posterior import Posterior
from bayeslm.validation import Count, Seed, validated


@validated
@dataclass(frozen=True)
class ImportanceSampling:
    """Weighted draws of a proposal.

    :param num_particles: the number of draws in each chain.
    :param num_chains: the number of independent chains.
    :param guide: the proposal, a Pyro guide of the program or a `LanguageModel` (a policy trained by `SVI`) in the
        place of the program's own; or a `Grammar` or `Constraint` that the program has as a factor, or one for each of
        some sites: the prior without the tokens that it refuses. None proposes from the prior.
    :param retained: exact draws of the posterior, by `RejectionSampling` or `Exact` on the same program, at least one
        for each chain. Then the first particle of chain c is the c-th of them, and the chain's log Z is an upper bound
        in expectation. A language model's sampler does not draw then: its density of these draws is not known.
    :param batch_size: the number of particles in one run of the program; None for as many as bounded memory allows.
    :param vectorize: whether one run of the program holds all particles of a batch. False runs them one by one, for
        programs whose Python code depends on the value of a latent.
    :param seed: seed of all random numbers; None draws from the global random state.
    :param progress: whether to show a progress bar.
    :raises ValueError: if a setting is out of range.
    """

    num_particles: Count = 256
    num_chains: Count = 1
    guide: Callable[..., Any] | LanguageModel | Mapping[str, TokenConstraint] | None = None
    retained: Posterior | None = None
    batch_size: Count | None = None
    vectorize: bool = True
    seed: Seed | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        check_retained(self)
        check_draws_texts("ImportanceSampling", self.guide)
        if isinstance(self.guide, type):
            raise ValueError(
                f"ImportanceSampling: guide is the class {self.guide.__name__}, not an instance: make one, and train "
                "it by SVI"
            )

    def run(self, model: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Posterior:
        """Sample the posterior of ``model(*args, **kwargs)``.

        ``stats``: ``ess`` (prompt,), the effective sample size; ``khat`` (prompt,), the shape of the weights' tail;
        ``constrained``, whether a constraint is the proposal; ``interrupted``, ``seconds``, ``tokens`` and
        ``model_calls``. After Ctrl-C the posterior has the draws until then.

        :raises EvidenceError: if no draw of a prompt has positive probability.
        :raises ProgramError: if the retained draws are not of this program, or the guide cannot have proposed them; or
            if the guide is a `Grammar` that is no factor of the program.
        :raises RunError: if an error stops the run after the first batch; it carries the draws.
        """
        with running(self.seed, divided=True, sampled=self.retained is None) as watch:
            program = (
                inspect_or_reuse(None, model, args, kwargs)
                if self.retained is None
                else inspect(model, *args, **kwargs)
            )
            total = self.num_particles * self.num_chains
            watch.check_together(program, self, num_particles=total)
            guide = None if self.guide is None else as_proposal(self._guide(program, self.guide), program)
            retained = None
            if self.retained is not None:
                retained = retained_particles(
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
                total,
                batch_size=self.batch_size,
                vectorize=self.vectorize,
                progress=self.progress,
                label="importance sampling",
            )
            is_constrained = isinstance(self.guide, TokenConstraint | Mapping)
            found = posterior(
                program,
                particles if retained is None else put_first(retained, particles),
                engine="ImportanceSampling",
                kind="weighted",
                num_chains=self.num_chains,
                conditional=retained is not None,
                stats=watch.stats() | {"interrupted": interrupted, "constrained": is_constrained},
                prior=particles if guide is None else None,
                from_prior=len(particles) if guide is None else None,
            )
            return with_factor(found, self.guide) if is_constrained else found

    def _guide(self, program: Program, setting: Any) -> Callable[..., Any]:
        """Return the guide: that of a policy or a constraint, or the setting itself."""
        if isinstance(setting, LanguageModel):
            return PolicyGuide(program, setting)
        if isinstance(setting, TokenConstraint | Mapping):
            return ConstraintGuide(program, setting)
        return setting
