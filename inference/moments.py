r"""Moments: "half of the texts are about ...", several expectations at once, as a target for every engine.

    \pi(x | c) \propto b(x | c) exp(\lambda . \phi(c, x)),     mean_c E_\pi[\phi] = \mu

is the distribution nearest to b in KL with these moments (`bayeslm.moments`). In each round an engine draws from the
target of the \lambda so far, and \lambda moves as far towards \mu as these draws support; the last round's draws, which
\lambda does not depend on, say which moments it has reached. Source: Khalifa, Elsahar and Dymetman 2021, A
distributional approach to controlled text generation, arXiv 2012.11635.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from bayeslm.models import Moment, TiltedLM, moment_target
from bayeslm.moments import MomentError, Tilt, check_kind, fit_tilt, moments
from bayeslm.posterior import Posterior
from bayeslm.validation import Count, Positive, validated
from bayeslm.weights import Array, ess

from .importance import ImportanceSampling
from .program import Engine

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False)
class MomentFit:
    """A target that has moments, and how well it has them."""

    target: TiltedLM
    """The program, for every engine."""
    wanted: tuple[Moment, ...]
    coefficients: Array
    """(moment,): lambda, the weights of the features in the target's reward."""
    coefficients_stderr: Array
    """(moment,): standard errors."""
    base_moments: Array
    """(moment,): of the base, by the first round's draws."""
    moments: Array
    """(moment,): of the target, by draws on which the coefficients do not depend."""
    moments_stderr: Array
    """(moment,): standard errors, of these draws alone."""
    posterior: Posterior
    """These draws."""
    rounds: int
    """The number of runs of the engine."""

    def summary(self) -> pd.DataFrame:
        """Return a table with a row for each moment."""
        import pandas as pd

        columns = {
            "target": [moment.target for moment in self.wanted],
            "base": self.base_moments,
            "reached": self.moments,
            "reached_se": self.moments_stderr,
            "coefficient": self.coefficients,
            "coefficient_se": self.coefficients_stderr,
        }
        return pd.DataFrame(columns, index=pd.Index([moment.name for moment in self.wanted], name="moment"))


@validated
def match_moments(
    base: TiltedLM,
    prompts: Any,
    wanted: Sequence[Moment],
    *,
    engine: Engine | None = None,
    num_rounds: Count = 10,
    min_ess: Positive = 50.0,
    **columns: Any,
) -> MomentFit:
    """Find the target nearest to a base that has the moments, on average over the prompts.

    :param base: the prior, ``TiltedLM(lm, None)``, or a target with a reward.
    :param prompts: and ``columns``, as for `TiltedLM`.
    :param wanted: the moments.
    :param engine: draws in each round, and must give weighted draws, an enumeration or independent ones. None:
        ``ImportanceSampling(num_particles=1024)``, whose draws are of the prior in every round; where few of these have
        what is wanted, take `AdaptiveImportance` or `SMC` with a twist. With a seed, each round has another one.
    :param num_rounds: the most runs of the engine.
    :param min_ess: the least effective sample size, for each prompt, of draws that are weighted for new coefficients.
    :raises MomentError: if the draws do not have the moments: outside their range, in contradiction, or too rare.
    :raises ValueError: if the engine's draws cannot be weighted anew, or a feature is not finite.
    """
    if not wanted:
        raise ValueError("there are no moments: give at least one")
    engine = ImportanceSampling(num_particles=1024, progress=False) if engine is None else engine
    names, goals = [moment.name for moment in wanted], np.array([moment.target for moment in wanted])
    coefficients, fit = np.zeros(len(wanted)), Tilt(np.zeros(0), np.zeros(0), 0.0, 0.0)
    before: Array | None = None
    for done in range(num_rounds):
        target = moment_target(base, wanted, coefficients.tolist())
        posterior = _with_seed(engine, done).run(target, prompts, **columns)
        check_kind(posterior)
        features = _features(posterior, target, wanted, prompts, columns)
        now, stderr = moments(posterior, features)
        before = now if before is None else before
        size = math.inf if posterior.kind == "enumerated" else float(ess(posterior.log_weights).min())
        if fit.step == 1.0 and (done == num_rounds - 1 or not size > 2.0 * fit.ess):
            return MomentFit(
                target, tuple(wanted), coefficients, fit.stderr, before, now, stderr, posterior, rounds=done + 1
            )
        fit = fit_tilt(posterior, features, goals, names, min_ess=min_ess)
        coefficients = coefficients + fit.coefficients
    each = zip(names, now, goals, strict=True)
    reached = ", ".join(f"{name!r} {value:.4g} of {goal:.4g}" for name, value, goal in each)
    raise MomentError(f"{num_rounds} rounds have reached {reached}: raise num_rounds, or draw more in each")


def _with_seed(engine: Engine, done: int) -> Engine:
    """Return the engine with another seed for each round, if it has one: the check needs draws of its own."""
    seed: int | None = getattr(engine, "seed", None)
    return engine if seed is None else replace(engine, seed=(seed + done) % 2**32)  # type: ignore[type-var]


def _features(
    posterior: Posterior, target: TiltedLM, wanted: Sequence[Moment], prompts: Any, columns: dict[str, Any]
) -> Array:
    """Return the features of the draws, (chain, draw, prompt, moment).

    :raises ValueError: if one is not finite.
    """
    (rows,), columns = target.program_arguments(prompts, **columns)
    distribution = target.prior(rows, max_new_tokens=target.max_new_tokens, temperature=target.temperature)
    x = torch.as_tensor(posterior.samples["completion"], device=target.prior.device)
    each = [target.scores(moment.reward, distribution, rows, x, columns) for moment in wanted]
    values = torch.stack(each, -1).double().cpu().numpy()
    if (bad := np.argwhere(~np.isfinite(values))).size:
        chain, draw, prompt, j = bad[0]
        what = f"{wanted[j].name!r} is {values[tuple(bad[0])]}"
        raise ValueError(
            f"a feature must be finite, and {what} for {posterior.texts['completion'][chain, draw, prompt]!r:.80}"
        )
    return values
