r"""So many effective draws, in at most so many seconds.

    1. importance sampling from the prior
    2. more draws, where the effective share of those is large enough: as many as the target seems to need
    3. else adaptive importance sampling, which trains a policy and keeps all draws (`adaptive_importance`)

After each round the effective sample size, Pareto's k-hat and the values of the likelihood are looked at: a target that
is reached on paper does not end the run while k-hat is above 0.7, or while fewer than ten draws of one likelihood have
a tenth of the weight.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bayeslm.inference.program import inspect, running
from bayeslm.inference.training import Plan, run_adaptively
from bayeslm.posterior import Posterior
from bayeslm.validation import Count, Positive, Seed, validated


@validated
@dataclass(frozen=True)
class Auto:
    """Importance sampling that goes on to what its diagnostics ask for.

    :param target_ess: effective draws of each prompt, of all chains together.
    :param max_seconds: after which no round begins. A run that it bounds is not reproduced by its seed.
    :param num_particles: the most draws of each prompt in each chain.
    :param num_chains: independent replicates.
    :param seed: of all random numbers of the run; None draws from the global random state.
    :param progress: whether to show a progress bar.
    :raises ValueError: if a setting is out of range.
    """

    target_ess: Positive = 256.0
    max_seconds: Positive = 300.0
    num_particles: Count = 2**15
    num_chains: Count = 1
    seed: Seed | None = None
    progress: bool = True

    def run(self, model: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Posterior:
        """Sample the posterior of ``model(*args, **kwargs)``.

        ``stats["notes"]`` say what was done and why, a line each; the others and ``policy`` are
        `AdaptiveImportance`'s. After Ctrl-C the posterior has the rounds that are complete.

        :raises EvidenceError: if no draw of a prompt has positive probability.
        :raises RunError: if an error stops the run after the first round; it carries the draws.
        """
        plan = Plan(num_particles=self.num_particles, target_ess=self.target_ess, max_seconds=self.max_seconds)
        with running(self.seed) as watch:
            return run_adaptively(
                inspect(model, *args, **kwargs),
                plan,
                engine="Auto",
                num_chains=self.num_chains,
                stopwatch=watch,
                progress=self.progress,
            )
